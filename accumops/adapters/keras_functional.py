"""What accumops uses of Keras's functional graphs beyond their public interface, to wrap a model or make it again.

`keras.models.clone_model` is public and nearly does it. But it makes inputs again without `sparse` and `optional`, does
not take a `keras.Function`, compiles the copy, and passes on no arguments of a model's own class.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from accumops.adapters.upstream import relies_on, sample

_FEATURE = "replace_batchnorm_layers and restore_batchnorm_layers"
_RECOMPUTE = "recompute_layers"
_WRAPPING = "functional models that stay functional when they are wrapped"


@sample("<a functional model>")
def _functional_model() -> Any:
    inputs = keras.Input((1,))
    return keras.Model(inputs, keras.layers.Dense(1)(inputs))


@sample("<a Sequential model>")
def _sequential_model() -> Any:
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


@sample("<a layer>")
def _layer() -> Any:
    return _functional_model().layers[-1]


@sample("<a variable>")
def _variable() -> Any:
    return keras.Variable([0.0])


@sample("<a symbolic tensor>")
def _symbolic_tensor() -> Any:
    return keras.Input((1,))


@sample("<a node>")
def _node() -> Any:
    return _functional_model().layers[-1]._inbound_nodes[0]


@sample("<a node's arguments>")
def _arguments_of_a_node() -> Any:
    return _functional_model().layers[-1]._inbound_nodes[0].arguments


@relies_on("keras.src.models.functional.Functional", feature=_WRAPPING)
def functional_class() -> Any:
    """The class of functional models."""
    from keras.src.models.functional import Functional

    return Functional


@relies_on("<a functional model>._run_through_graph(inputs, operation_fn=, call_fn=)", feature=_WRAPPING)
def _declare_hook() -> None:
    """Declares what `ClonedWithItsClass` overrides."""


class ClonedWithItsClass:
    """A base class for functional models whose class has arguments of its own, which `keras.models.clone_model` drops.

    Keras runs the graph of the model, with new layers, and calls the model's class with the inputs and outputs of that.
    The outputs know the model then.
    """

    def _run_through_graph(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._run_through_graph(inputs, *args, **kwargs)  # type: ignore[misc]
        for output in keras.tree.flatten(outputs):
            if isinstance(output, keras.KerasTensor):
                output._accumops_original = self
        return outputs

    @staticmethod
    def original_of(outputs: Any) -> Any:
        """The model that outputs come from, or None."""
        return next((getattr(each, "_accumops_original", None) for each in keras.tree.flatten(outputs)), None)


@relies_on("keras.src.saving.object_registration.GLOBAL_CUSTOM_NAMES", feature=_WRAPPING)
def share_registered_name(kind: type, other: type) -> None:
    """Has Keras save objects of another class as those of a class, if that is registered."""
    from keras.src.saving.object_registration import GLOBAL_CUSTOM_NAMES

    if kind in GLOBAL_CUSTOM_NAMES:
        GLOBAL_CUSTOM_NAMES[other] = GLOBAL_CUSTOM_NAMES[kind]


@relies_on("<a Sequential model>._layers", feature=_FEATURE)
def layers_with_input(model: keras.Sequential) -> list[keras.Layer]:
    """The layers of a Sequential model, its InputLayer included."""
    return list(model._layers)


@relies_on("<a functional model>._inputs_struct", feature=_FEATURE)
def inputs_of(graph: keras.Function) -> Any:
    """The symbolic inputs of a graph, in the structure in which it was given them."""
    return graph._inputs_struct


@relies_on("<a functional model>._run_through_graph(inputs, operation_fn=, call_fn=)", feature=_FEATURE)
def run_through(graph: keras.Function, inputs: Any, operation: Callable[[Any], Any], call: Callable[..., Any]) -> Any:
    """Runs a graph with other operations.

    Args:
        graph: The graph.
        inputs: Its inputs.
        operation: Returns what stands for an operation of the graph.
        call: Calls what `operation` returned with an operation's arguments.
    """
    return graph._run_through_graph(inputs, operation_fn=operation, call_fn=call)


@relies_on("<a symbolic tensor>._keras_history", feature=_FEATURE)
def source_of(tensor: keras.KerasTensor) -> Any:
    """The operation that a symbolic tensor comes from."""
    return tensor._keras_history.operation


@relies_on("<a layer>._inbound_nodes", "<a layer>._outbound_nodes", feature=_FEATURE)
def copy_without_graph(operation: Any) -> Any:
    """Returns a copy of an operation without variables that is in no graph yet."""
    copy = object.__new__(type(operation))
    vars(copy).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return copy


@relies_on("<a layer>._remat_mode", feature=_FEATURE)
def copy_recompute_mode(original: keras.Layer, copy: keras.Layer) -> None:
    """Has a layer recompute what another does within a `keras.RematScope`."""
    copy._remat_mode = original._remat_mode


@relies_on("<a variable>._path", feature=_FEATURE)
def copy_path(original: keras.Variable, copy: keras.Variable) -> None:
    """Gives a variable the path of another."""
    copy._path = original.path


@relies_on("<a layer>._seed_generators", feature=_FEATURE)
def seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators that are attributes of a layer."""
    return list(layer._seed_generators)


class Node(NamedTuple):
    """A call of an operation in a graph."""

    operation: Any
    inputs: list[int]
    """The identities of the symbolic tensors that it takes."""
    outputs: list[int]
    """The identities of the symbolic tensors that it makes."""
    keras_node: Any


@relies_on(
    "<a functional model>._nodes_by_depth",
    "<a node>.operation",
    "<a node>.is_input",
    "<a node>.input_tensors",
    "<a node>.outputs",
    feature=_RECOMPUTE,
)
def nodes_of(graph: keras.Function) -> list[Node]:
    """The calls in a graph, in the order in which Keras makes them."""
    depths = sorted(graph._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in graph._nodes_by_depth[depth]]
    return [
        Node(
            node.operation,
            [id(tensor) for tensor in node.input_tensors],
            [id(tensor) for tensor in node.outputs],
            node,
        )
        for node in nodes
        if node.operation and not node.is_input
    ]


@relies_on(
    "<a node>.arguments",
    "<a node's arguments>.fill_in(tensor_dict)",
    "<a layer>._call_context_args",
    feature=_RECOMPUTE,
)
def call_node(node: Node, values: dict[int, Any], settings: dict[str, Any]) -> None:
    """Makes a call of a graph, as Keras does. Without all of its inputs the call is left out.

    Args:
        node: The call.
        values: The values of symbolic tensors, by their identity. Those of the call's outputs are added.
        settings: What the graph was called with besides its inputs, such as `training`.
    """
    if any(each not in values for each in node.inputs):
        return
    args, kwargs = node.keras_node.arguments.fill_in(values)
    known = getattr(node.operation, "_call_context_args", {})
    kwargs |= {name: value for name, value in settings.items() if name in known and value is not None}
    values.update(zip(node.outputs, keras.tree.flatten(node.operation(*args, **kwargs)), strict=False))


class _Probe:
    """Stands for an operation, to find out what a graph's calls are given besides their inputs."""

    class _AnyName:
        def __contains__(self, name: str) -> bool:
            return True

    _call_context_args = _AnyName()

    def __call__(self, **settings: Any) -> dict[str, Any]:
        return settings


RunGraph = Callable[[list[Any], dict[str, Any]], list[Any]]


@relies_on("<a functional model>._run_through_graph(inputs, operation_fn=, call_fn=)", feature=_RECOMPUTE)
def set_run(graph: keras.Function, run: RunGraph | None) -> None:
    """Has a graph run its calls with tensors by a function.

    Args:
        graph: The graph.
        run: Takes the inputs of the graph, and what it was called with besides, and returns its outputs. With None the
            graph runs as Keras does it.
    """
    if run is None:
        vars(graph).pop("_run_through_graph", None)
        return

    def run_through_graph(inputs: Any, operation_fn: Any = lambda op: op, call_fn: Any = None) -> Any:
        flat = keras.tree.flatten(inputs)
        if call_fn is not None or any(isinstance(each, keras.KerasTensor) for each in flat):
            return type(graph)._run_through_graph(graph, inputs, operation_fn=operation_fn, call_fn=call_fn)
        return keras.tree.pack_sequence_as(graph._outputs_struct, run(flat, operation_fn(_Probe())()))

    run_through_graph.run = run  # type: ignore[attr-defined]
    vars(graph)["_run_through_graph"] = run_through_graph


def run_of(graph: keras.Function) -> RunGraph | None:
    """The function that `set_run` gave a graph, or None."""
    return getattr(vars(graph).get("_run_through_graph"), "run", None)


def run_as(graph: keras.Function, otherwise: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs another graph of the same calls as `set_run` has this one run.

    Args:
        graph: The graph with the calls.
        otherwise: Runs the other graph as Keras does.
        inputs: The inputs.
        *args: The other arguments.
        **kwargs: The keyword arguments.
    """
    symbolic = any(isinstance(each, keras.KerasTensor) for each in keras.tree.flatten(inputs))
    run = None if symbolic else vars(graph).get("_run_through_graph")
    return (run or otherwise)(inputs, *args, **kwargs)


@relies_on("<a Sequential model>._functional", feature=_RECOMPUTE)
def graph_of(model: Any) -> Any:
    """The graph of a functional or built Sequential model, or None for any other layer."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if isinstance(model, keras.Function) else None
