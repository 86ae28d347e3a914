"""What accumops uses of Keras's layers beyond their public interface."""

from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.upstream import relies_on


@relies_on(
    "keras.src.backend.common.stateless_scope.in_stateless_scope()",
    feature="AccumBatchNormalization within `stateless_call`",
)
def in_stateless_scope() -> bool:
    """Whether a `keras.StatelessScope` is open. False where this cannot be told."""
    try:
        from keras.src.backend.common import stateless_scope
    except ImportError:
        return False
    return bool(stateless_scope.in_stateless_scope())


@relies_on(
    "keras.Layer._flatten_layers(include_self=, recursive=)",
    feature="finding the layers of a model, and replace_batchnorm_layers",
)
def layers_within(layer: keras.Layer, *, include_self: bool = True, recursive: bool = True) -> list[keras.Layer]:
    """The layers of a layer or model, those nested in them included.

    Args:
        layer: The layer or model.
        include_self: Whether it is the first of them.
        recursive: Whether to look into the layers that are found, too.
    """
    return list(layer._flatten_layers(include_self=include_self, recursive=recursive))


class ExtraCheckpointState(keras.Layer):
    """A base class for layers with state that `tf.train.Checkpoint` saves and a SavedModel does not.

    A subclass sets `checkpoint_state`, a `tf.train.experimental.PythonState`.
    """

    checkpoint_state: tf.train.experimental.PythonState

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        if save_type != "checkpoint":
            children.pop("checkpoint_state", None)
        return children


@relies_on("keras.Layer._get_own_losses()", feature="losses over the window, and recompute")
def layer_losses(layer: keras.Layer) -> list[tf.Tensor]:
    """What a layer and those within it have added as losses, without regularizers of variables."""
    return [loss for each in layers_within(layer) for loss in each._get_own_losses()]


@relies_on("keras.Layer._get_regularization_losses()", feature="losses over the window")
def regularization_losses(layer: keras.Layer) -> list[tf.Tensor]:
    """The losses of the regularizers of a layer's trainable variables."""
    return list(layer._get_regularization_losses())


class StateRecorder(keras.StatelessScope):
    """A `keras.StatelessScope` that collects losses, and records assignments to variables that it has no value for.

    Args:
        values: Pairs of a variable and its value.
    """

    def __init__(self, values: list[tuple[keras.Variable, tf.Tensor]]) -> None:
        super().__init__(values, collect_losses=True)
        self._known = {id(variable) for variable, _ in values}
        self.unknown: list[tuple[keras.Variable, str]] = []
        """Other variables that were assigned, and the scope of names where."""

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Is called for each assignment, with the variable and its new value."""
        variable, _ = update
        if id(variable) not in self._known:
            scope = "" if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_name_scope()
            self.unknown.append((variable, scope))
        super().add_update(update)

    def value_of(self, variable: keras.Variable) -> tf.Tensor:
        """The value of a variable now."""
        return self.get_current_value(variable)
