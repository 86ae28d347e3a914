"""The graph of a training step: its operations, the calls that they belong to, and the bytes of its tensors.

The trace is the graph of a `tf.function`, without what no gradient needs. Nothing is run for it.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.keras_functional import RunGraph, call_node, inputs_of, nodes_of, run_of, set_run
from accumops.adapters.keras_layer import StateRecorder, layers_within
from accumops.memory.segments import Region

CallKey = tuple[int, int]
"""A call: the identity of its graph, and its position there."""

# Operations whose result is in the buffer of their first input.
_ALIASES = ("ExpandDims", "Identity", "PreventGradient", "Reshape", "Snapshot", "Squeeze", "StopGradient")
# Operations that write their result over an input that nothing else needs.
_IN_PLACE = frozenset(
    (
        *("Abs", "Add", "AddN", "AddV2", "BiasAdd", "Erf", "Exp", "Inv", "InvGrad", "Log", "Maximum", "Minimum"),
        *("Mul", "Neg", "RealDiv", "Reciprocal", "Relu", "Relu6", "Relu6Grad", "ReluGrad", "Rsqrt", "RsqrtGrad"),
        *("SelectV2", "Sigmoid", "SigmoidGrad", "Softmax", "Sqrt", "SqrtGrad", "Square", "SquaredDifference", "Sub"),
        *("Tanh", "TanhGrad"),
    )
)
_LOOPS = ("StatelessWhile", "While")
_OF_SHAPES = ("BroadcastGradientArgs", "Rank", "Shape", "ShapeN", "Size")
_NOT_COMPUTED = ("Const", "Placeholder", "ReadVariableOp", "VarHandleOp")


class TracedCall(NamedTuple):
    """A call in the trace."""

    begin: int
    """The position of its first operation."""
    end: int
    """The position behind its last operation."""
    outputs: list[tf.Tensor]


class TrainingTrace:
    """The operations of a training step that the gradients of weights need.

    Args:
        graph: The graph of layers.
        regions: Its regions.
        batch_size: Samples a batch.

    Raises:
        ValueError: If an input has a size that is not known, apart from the number of samples.
    """

    def __init__(self, graph: keras.Function, regions: Sequence[Region], batch_size: int) -> None:
        step = _traced(graph, regions, batch_size)
        self.calls = dict(sorted(step.calls.items(), key=lambda item: item[1].begin))
        """The calls, in the order in which they are made."""
        self.weight_gradients = {root(tensor).name for tensor in step.gradients}
        """The names of the tensors that are gradients of weights."""
        self._all, self._forward = step.operations, step.forward
        self._position = {operation.name: i for i, operation in enumerate(step.operations)}
        outputs = [tensor for call in self.calls.values() for tensor in call.outputs]
        self._needed = _leading_to([*step.gradients, *outputs])
        self._last_use: dict[str, int] = {}
        for i, operation in enumerate(step.operations):
            if operation.name in self._needed:
                self._last_use.update({root(tensor).name: i for tensor in operation.inputs})
        self._begins, self._keys = [call.begin for call in self.calls.values()], list(self.calls)
        self._call_of_scope = self._scopes()
        self._read_gradient(set(step.upstream))

    def _read_gradient(self, gradient: set[str]) -> None:
        """Finds what the operations that depend on the gradients of the outputs, or wait for them, belong to and read.

        Args:
            gradient: The names of the gradients of the outputs.
        """
        kept: dict[str, tf.Tensor] = {}
        self._readers: dict[str, list[CallKey | None]] = {}
        self._gradients: dict[CallKey, list[tf.Operation]] = {}
        latest = next(reversed(self.calls), None)
        for operation in self._all[self._forward :]:
            before = (*(tensor.op for tensor in operation.inputs), *operation.control_inputs)
            if operation.name not in self._needed or not any(each.name in gradient for each in before):
                continue
            gradient.add(operation.name)
            call = self._call_of(operation.name)
            latest = call or latest  # sums of gradients have no layer's name
            if latest is not None:
                self._gradients.setdefault(latest, []).append(operation)
            if operation.type not in _OF_SHAPES:
                for tensor in (root(each) for each in operation.inputs if each.op.name not in gradient):
                    kept[tensor.name] = tensor
                    self._readers.setdefault(tensor.name, []).append(call)
        self._kept: dict[CallKey, list[tf.Tensor]] = {}
        for tensor in kept.values():
            key = self._call_at(self._made_at(tensor))
            if tensor.op.type not in _NOT_COMPUTED and key is not None:
                self._kept.setdefault(key, []).append(tensor)

    def forward_of(self, key: CallKey) -> list[tf.Operation]:
        """The operations of the forward pass of a call, in their order."""
        call = self.calls[key]
        return [operation for operation in self._all[call.begin : call.end] if operation.name in self._needed]

    def gradient_of(self, key: CallKey) -> list[tf.Operation]:
        """The operations of the gradient of a call, in their order."""
        return self._gradients.get(key, [])

    def kept_by(self, key: CallKey) -> list[tf.Tensor]:
        """The tensors of a call that gradients read, the call's own or others'."""
        return self._kept.get(key, [])

    def readers_of(self, kept: tf.Tensor) -> list[CallKey | None]:
        """The calls whose gradients read a tensor; None for an operation that belongs to no call."""
        return self._readers[kept.name]

    def arriving_at(self) -> dict[CallKey, dict[str, int]]:
        """The bytes of gradients that are there before the gradient of each call, by the tensor's name.

        Gradients of weights are not among them.
        """
        order = {key: i for i, key in enumerate(self._keys)}
        made: dict[str, tuple[int, int]] = {}
        used: dict[str, int] = {}
        for key, operations in self._gradients.items():
            for operation in operations:
                for tensor in map(root, operation.inputs):
                    used[tensor.name] = min(order[key], used.get(tensor.name, len(order)))
                for tensor in operation.outputs:
                    if root(tensor) is tensor and tensor.name not in self.weight_gradients:
                        made[tensor.name] = order[key], size(tensor)
        result: dict[CallKey, dict[str, int]] = {key: {} for key in self.calls}
        for name, (begin, bytes_of) in made.items():
            for key in self._keys[used.get(name, begin) : begin]:
                result[key][name] = bytes_of
        return result

    def most_at_a_time(self, operations: Iterable[tf.Operation], present: dict[str, int]) -> int:
        """Returns the most bytes of results that are there while operations run one after another.

        A result is let go after its last use in the whole trace. Gradients of weights do not count.

        Args:
            operations: The operations.
            present: The bytes of tensors that are there before, and count, by their names.
        """
        live = dict(present)
        total = most = sum(live.values())
        for operation in operations:
            position = self._position[operation.name]
            ending = {root(each).name for each in operation.inputs}
            ending = {name for name in ending if name in live and self._last_use[name] <= position}
            for tensor in operation.outputs:
                if root(tensor) is not tensor or tensor.name in self.weight_gradients:
                    continue
                own = size(tensor)
                over = (
                    next((each for each in ending if live[each] == own), None) if operation.type in _IN_PLACE else None
                )
                if over is not None:
                    ending.remove(over)
                    total -= live.pop(over)
                total += own
                live[tensor.name] = own
                if self._last_use.get(tensor.name, -1) <= position:
                    ending.add(tensor.name)
            most = max(most, total)
            for name in ending:
                total -= live.pop(name)
        return most

    def _call_at(self, position: int) -> CallKey | None:
        """The call that an operation of the forward pass belongs to, by its position."""
        i = bisect.bisect(self._begins, position) - 1
        return self._keys[i] if i >= 0 else None

    def _scopes(self) -> dict[str, CallKey | None]:
        """The call of each scope of names in the forward pass; None for a scope of several calls."""
        found: dict[str, CallKey | None] = {}
        for key, call in self.calls.items():
            for operation in self._all[call.begin : call.end]:
                parts = operation.name.split("/")
                for i in range(1, len(parts) + 1):
                    scope = "/".join(parts[:i])
                    found[scope] = key if found.get(scope, key) == key else None
        return found

    def _call_of(self, name: str) -> CallKey | None:
        """The call whose gradient an operation belongs to, by its name. TensorFlow names it after the forward pass."""
        parts = name.removeprefix("gradient_tape/").split("/")
        scopes = ("/".join(parts[:i]) for i in range(len(parts), 0, -1))
        return next((self._call_of_scope[scope] for scope in scopes if scope in self._call_of_scope), None)

    def _made_at(self, tensor: tf.Tensor) -> int:
        """The position of the operation in the forward pass that a tensor comes from."""
        position = self._position[tensor.op.name]
        while position >= self._forward and tensor.op.inputs:
            tensor = tensor.op.inputs[0]
            position = self._position[tensor.op.name]
        return position


def root(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor whose buffer a tensor has."""
    while True:
        operation = tensor.op
        if operation.type == "IdentityN":
            tensor = operation.inputs[tensor.value_index]
        elif operation.type in _ALIASES:
            tensor = operation.inputs[0]
        elif operation.type == "Mul" and _is_one(operation.inputs[0]):
            tensor = operation.inputs[1]
        else:
            return tensor


def size(tensor: tf.Tensor) -> int:
    """Returns the bytes of a tensor; of a loop's list of tensors, the bytes of all its elements."""
    if tensor.dtype == tf.variant and tensor.op.type in _LOOPS:
        lists = [each.op for each in tensor.op.inputs if each.op.type in ("EmptyTensorList", "TensorListReserve")]
        counts = [tf.get_static_value(each.inputs[1]) for each in lists]
        steps = max([int(count) for count in counts if count is not None and count > 0], default=1)
        made = tensor.op.inputs[tensor.value_index].op
        shape = tf.get_static_value(made.inputs[0]) if made in lists else None
        if shape is None or any(each < 0 for each in shape.reshape(-1)):
            return 0
        return steps * int(tf.TensorShape(shape).num_elements()) * made.get_attr("element_dtype").size
    return (tensor.shape.num_elements() or 0) * (tensor.dtype.size or 0)


def spec_of(tensor: keras.KerasTensor, batch_size: int) -> tf.TensorSpec:
    """Returns the spec of a symbolic tensor for a batch size.

    Raises:
        ValueError: If another of its sizes is not known.
    """
    shape = [batch_size if i == 0 and each is None else each for i, each in enumerate(tensor.shape)]
    if None in shape:
        raise ValueError(
            f"The memory that layers need is counted for tensors of known sizes, and '{tensor.name}' has the shape "
            f"{tuple(tensor.shape)}. Give `keras.Input` the sizes, for this plan at least."
        )
    return tf.TensorSpec(shape, tensor.dtype)


class _Step(NamedTuple):
    operations: list[tf.Operation]
    forward: int
    """How many operations the forward pass has."""
    upstream: list[str]
    """The names of the gradients of the outputs."""
    gradients: list[tf.Tensor]
    """The gradients of weights."""
    calls: dict[CallKey, TracedCall]


def _traced(graph: keras.Function, regions: Sequence[Region], batch_size: int) -> _Step:
    calls: dict[CallKey, TracedCall] = {}
    specs = [spec_of(tensor, batch_size) for tensor in graph.inputs]
    if not all(layer.built for layer in layers_within(graph)):  # layers within layers may wait for their first call
        call = tf.function(
            lambda tensors: graph(keras.tree.pack_sequence_as(inputs_of(graph), tensors)), autograph=False
        )
        call.get_concrete_function(specs)
    trainable = {id(variable) for variable in graph.trainable_variables}
    traced: dict[str, Any] = {}

    def step(tensors: list[tf.Tensor], variables: list[tf.Tensor]) -> None:
        values = list(zip(graph.variables, variables, strict=True))
        weights = [tensor for variable, tensor in values if id(variable) in trainable]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            graphs = {id(each.graph): each.graph for each in regions}.values()
            with StateRecorder(values), _Recording(graphs, calls):
                results = graph(keras.tree.pack_sequence_as(inputs_of(graph), tensors), training=True)
        results = [each for each in keras.tree.flatten(results) if each.dtype.is_floating]
        upstream = [tf.raw_ops.Placeholder(dtype=each.dtype, shape=each.shape) for each in results]
        traced.update(forward=_count_operations(), upstream=[each.op.name for each in upstream])
        gradients = [each for each in tape.gradient(results, weights, output_gradients=upstream) if each is not None]
        traced.update(gradients=tf.nest.flatten(gradients, expand_composites=True))

    of_variables = [tf.TensorSpec(variable.shape, variable.dtype) for variable in graph.variables]
    concrete = tf.function(step, autograph=False).get_concrete_function(specs, of_variables)
    return _Step(concrete.graph.get_operations(), calls=calls, **traced)


class _Recording:
    """Has graphs note which operations belong to each of their calls, while a block traces them.

    Args:
        graphs: The graphs.
        calls: Where to note them.
    """

    def __init__(self, graphs: Iterable[keras.Function], calls: dict[CallKey, TracedCall]) -> None:
        self._graphs, self._calls = list(graphs), calls
        self._before = [run_of(graph) for graph in self._graphs]

    def __enter__(self) -> None:
        for graph in self._graphs:
            set_run(graph, self._run_of(graph))

    def __exit__(self, *_: Any) -> None:
        for graph, run in zip(self._graphs, self._before, strict=True):
            set_run(graph, run)

    def _run_of(self, graph: keras.Function) -> RunGraph:
        nodes = nodes_of(graph)

        def run(tensors: list[Any], settings: dict[str, Any]) -> list[Any]:
            values = dict(zip(map(id, graph.inputs), tensors, strict=True))
            for i, node in enumerate(nodes):
                begin = _count_operations()
                call_node(node, values, settings)
                outputs = [values[each] for each in node.outputs if isinstance(values.get(each), tf.Tensor)]
                self._calls.setdefault((id(graph), i), TracedCall(begin, _count_operations(), outputs))
            return [values[id(each)] for each in graph.outputs]

        return run


def _leading_to(tensors: Sequence[tf.Tensor]) -> set[str]:
    """The names of the operations that tensors depend on."""
    found: set[str] = set()
    waiting = [tensor.op for tensor in tensors]
    while waiting:
        operation = waiting.pop()
        if operation.name not in found:
            found.add(operation.name)
            waiting += [*(tensor.op for tensor in operation.inputs), *operation.control_inputs]
    return found


def _is_one(tensor: tf.Tensor) -> bool:
    if tensor.op.type != "Const" or tensor.shape.rank != 0:
        return False
    return bool(np.all(tf.get_static_value(tensor) == 1))


def _count_operations() -> int:
    return len(tf.compat.v1.get_default_graph().get_operations())
