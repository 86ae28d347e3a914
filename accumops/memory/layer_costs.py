"""What the calls of a graph keep for its gradient, found in a trace of a training step, and how long each takes.

The trace is the graph of a `tf.function`. It shows which tensors the operations of the gradient read, and their sizes.
Nothing is run for it. Times are those of single calls.
"""

import bisect
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import Node, RunGraph, call_node, inputs_of, nodes_of, run_of, set_run
from accumops.adapters.keras_layer import StateRecorder
from accumops.memory.segments import Region

# Operations whose result is in the buffer of their first input.
_ALIASES = ("ExpandDims", "Identity", "PreventGradient", "Reshape", "Snapshot", "Squeeze", "StopGradient")
_LOOPS = ("StatelessWhile", "While")
_OF_SHAPES = ("BroadcastGradientArgs", "Rank", "Shape", "ShapeN", "Size")
_PRODUCTS = ("BatchMatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "DepthwiseConv2dNative", "Einsum", "MatMul")
ELSEWHERE = 1 << 30
_NOT_COMPUTED = ("Const", "Placeholder", "ReadVariableOp", "VarHandleOp")


class Kept(NamedTuple):
    """A tensor that training without recompute keeps for the gradient."""

    size: int
    """Bytes."""
    behind_product: bool
    """Whether it depends on a convolution or matrix product of the call that makes it."""
    wanted_by: int
    """The position in its region of the first call whose gradient reads it; `ELSEWHERE` if none of the region does."""


class CallCosts(NamedTuple):
    """What a call of a graph costs."""

    kept: dict[str, Kept]
    """What it makes that is kept for the gradient, by the name of the tensor."""
    outputs: list[tuple[str, int]]
    """The name and the bytes of each output."""
    products: int
    """How many convolutions and matrix products it computes."""


def costs_of(graph: keras.Function, regions: Sequence[Region], batch_size: int) -> list[list[CallCosts]]:
    """Returns what each call of each region costs in a training step.

    Args:
        graph: The graph.
        regions: Its regions.
        batch_size: Samples a batch.

    Raises:
        ValueError: If an input has a size that is not known, apart from the number of samples.
    """
    calls: dict[tuple[int, int], _Call] = {}
    traced: dict[str, Any] = {}

    trainable = {id(variable) for variable in graph.trainable_variables}

    def step(tensors: list[tf.Tensor], variables: list[tf.Tensor]) -> None:
        weights = [
            tensor for variable, tensor in zip(graph.variables, variables, strict=True) if id(variable) in trainable
        ]
        with tf.GradientTape() as tape:
            tape.watch([tensor for tensor in (*tensors, *weights) if tensor.dtype.is_floating])
            values = list(zip(graph.variables, variables, strict=True))
            graphs = {id(each.graph): each.graph for each in regions}.values()
            with StateRecorder(values), _Recording(graphs, calls):
                results = graph(keras.tree.pack_sequence_as(inputs_of(graph), tensors), training=True)
        results = [each for each in keras.tree.flatten(results) if each.dtype.is_floating]
        upstream = [tf.raw_ops.Placeholder(dtype=each.dtype, shape=each.shape) for each in results]
        traced.update(forward=_count_operations(), upstream=[each.op.name for each in upstream])
        tape.gradient(results, [*tensors, *weights], output_gradients=upstream)

    specs = [_spec(tensor, batch_size) for tensor in graph.inputs]
    of_variables = [tf.TensorSpec(variable.shape, variable.dtype) for variable in graph.variables]
    concrete = tf.function(step, autograph=False).get_concrete_function(specs, of_variables)
    operations = concrete.graph.get_operations()
    return _Trace(operations, calls, **traced).costs(regions)


def seconds_of(regions: Sequence[Region], batch_size: int) -> list[list[float]]:
    """Returns how long the forward pass of each call of each region takes. Calls that are alike are run once.

    Args:
        regions: The regions.
        batch_size: Samples a batch.
    """
    known: dict[str, float] = {}

    def seconds(node: Node) -> float:
        specs = [_spec(tensor, batch_size) for tensor in node.keras_node.input_tensors]
        config = dict(node.operation.get_config()) if isinstance(node.operation, keras.Layer) else {}
        config.pop("name", None)
        key = f"{type(node.operation).__name__} {config} {specs}"
        if key not in known:
            values = {each: tf.zeros(spec.shape, spec.dtype) for each, spec in zip(node.inputs, specs, strict=True)}
            variables = node.operation.variables if isinstance(node.operation, keras.Layer) else []
            state = [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in variables]
            times = []
            for _ in range(2):
                start = time.perf_counter()
                with StateRecorder(state):
                    call_node(node, dict(values), {"training": True})
                times.append(time.perf_counter() - start)
            known[key] = min(times)
        return known[key]

    return [[seconds(node) for node in region.nodes] for region in regions]


class _Call(NamedTuple):
    """Where a call is in a trace."""

    begin: int
    end: int
    outputs: list[tf.Tensor]


class _Recording:
    """Has graphs note which operations belong to each of their calls, while a block traces them.

    Args:
        graphs: The graphs.
        calls: Where to note them, by the identity of the graph and the position of the call.
    """

    def __init__(self, graphs: Iterable[keras.Function], calls: dict[tuple[int, int], _Call]) -> None:
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
                self._calls.setdefault((id(graph), i), _Call(begin, _count_operations(), outputs))
            return [values[id(each)] for each in graph.outputs]

        return run


class _Trace:
    """The operations of a training step.

    Args:
        operations: All of them, in the order in which they were made.
        calls: The operations of each call.
        forward: How many operations the forward pass has.
        upstream: The names of the gradients of the outputs.
    """

    def __init__(
        self, operations: list[tf.Operation], calls: dict[tuple[int, int], _Call], forward: int, upstream: list[str]
    ) -> None:
        self._operations, self._calls = operations, calls
        self._position = {operation.name: i for i, operation in enumerate(operations)}
        self._forward = forward
        self._order = sorted((call.begin, key) for key, call in calls.items())
        self._call_of_scope = self._scopes()
        gradient = set(upstream)  # the operations that depend on the gradients of the outputs
        kept: dict[str, tf.Tensor] = {}
        self._wanted: dict[str, list[tuple[int, int] | None]] = {}
        for operation in operations[forward:]:
            if operation.type == "Placeholder":
                continue
            if any(tensor.op.name in gradient for tensor in operation.inputs):
                gradient.add(operation.name)
                if operation.type not in _OF_SHAPES:
                    given = [tensor for tensor in operation.inputs if tensor.op.name not in gradient]
                    kept.update({_root(tensor).name: _root(tensor) for tensor in given})
                    for tensor in given:
                        self._wanted.setdefault(_root(tensor).name, []).append(self._call_of(operation.name))
        self._kept = {name: tensor for name, tensor in kept.items() if tensor.op.type not in _NOT_COMPUTED}

    def costs(self, regions: Sequence[Region]) -> list[list[CallCosts]]:
        """What each call costs."""
        kept_by: dict[tuple[int, int], list[tf.Tensor]] = {}
        for tensor in self._kept.values():
            key = self._call_at(self._made_at(tensor))
            if key is not None:
                kept_by.setdefault(key, []).append(tensor)
        keys = [
            [(id(region.graph), i) for i in range(region.begin, region.begin + len(region.nodes))] for region in regions
        ]
        return [[self._cost(key, set(of_region), kept_by.get(key, [])) for key in of_region] for of_region in keys]

    def _cost(self, key: tuple[int, int], of_region: set[tuple[int, int]], kept: Sequence[tf.Tensor]) -> CallCosts:
        if key not in self._calls:
            return CallCosts({}, [], 0)
        call, begin = self._calls[key], min(of_region)[1]
        own = self._operations[call.begin : call.end]
        behind: set[str] = set()
        for operation in own:
            if operation.type in _PRODUCTS or any(tensor.op.name in behind for tensor in operation.inputs):
                behind.add(operation.name)

        def wanted_by(tensor: tf.Tensor) -> int:
            calls = [each for each in self._wanted[tensor.name] if each in of_region]
            unknown = None in self._wanted[tensor.name]
            positions = [each[1] - begin for each in calls if each is not None]
            return key[1] - begin if unknown else min(positions, default=ELSEWHERE)

        entries = {tensor.name: Kept(_size(tensor), tensor.op.name in behind, wanted_by(tensor)) for tensor in kept}
        outputs = [(_root(tensor).name, _size(_root(tensor))) for tensor in call.outputs]
        return CallCosts(entries, outputs, sum(operation.type in _PRODUCTS for operation in own))

    def _call_at(self, position: int) -> tuple[int, int] | None:
        """The call that an operation of the forward pass belongs to, by its position."""
        i = bisect.bisect([begin for begin, _ in self._order], position) - 1
        return self._order[i][1] if i >= 0 else None

    def _scopes(self) -> dict[str, tuple[int, int] | None]:
        """The call of each scope of names in the forward pass; None for a scope of several calls."""
        found: dict[str, tuple[int, int] | None] = {}
        for key, call in self._calls.items():
            for operation in self._operations[call.begin : call.end]:
                parts = operation.name.split("/")
                for i in range(1, len(parts) + 1):
                    scope = "/".join(parts[:i])
                    found[scope] = key if found.get(scope, key) == key else None
        return found

    def _call_of(self, name: str) -> tuple[int, int] | None:
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


def _root(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose buffer a tensor has."""
    while tensor.op.type in _ALIASES or tensor.op.type == "IdentityN":
        tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
    return tensor


def _size(tensor: tf.Tensor) -> int:
    """The bytes of a tensor; of a loop's list of tensors, the bytes of all its elements."""
    if tensor.dtype == tf.variant and tensor.op.type in _LOOPS:
        lists = [each.op for each in tensor.op.inputs if each.op.type in ("EmptyTensorList", "TensorListReserve")]
        counts = [tf.get_static_value(each.inputs[1]) for each in lists]
        steps = max([int(count) for count in counts if count is not None and count > 0], default=1)
        made = tensor.op.inputs[tensor.value_index].op
        shape = tf.get_static_value(made.inputs[0]) if made in lists else None
        if shape is None or any(size < 0 for size in shape.reshape(-1)):
            return 0
        return steps * int(tf.TensorShape(shape).num_elements()) * made.get_attr("element_dtype").size
    return (tensor.shape.num_elements() or 0) * (tensor.dtype.size or 0)


def _spec(tensor: keras.KerasTensor, batch_size: int) -> tf.TensorSpec:
    shape = [batch_size if i == 0 and size is None else size for i, size in enumerate(tensor.shape)]
    if None in shape:
        raise ValueError(
            f"The memory that layers need is counted for tensors of known sizes, and '{tensor.name}' has the shape "
            f"{tuple(tensor.shape)}. Give `keras.Input` the sizes, for this plan at least."
        )
    return tf.TensorSpec(shape, tensor.dtype)


def _count_operations() -> int:
    return len(tf.compat.v1.get_default_graph().get_operations())
