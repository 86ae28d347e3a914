"""What accumops uses of Keras's functional graphs beyond their public interface, to wrap a model or make it again.

`keras.models.clone_model` is public and nearly does it. But it makes inputs again without `sparse` and `optional`, does
not take a `keras.Function`, compiles the copy, and passes on no arguments of a model's own class.
"""

from collections.abc import Callable
from typing import Any

import keras

from accumops.adapters.upstream import relies_on, sample

_FEATURE = "replace_batchnorm_layers and restore_batchnorm_layers"
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
