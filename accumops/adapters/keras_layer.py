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
