"""A layer that recomputes another."""

from typing import Any

import keras

from accumops.adapters.overriding import overriding
from accumops.memory.recompute import Recomputation


@keras.saving.register_keras_serializable(package="accumops")
class Recompute(keras.layers.Wrapper):
    """Wraps a layer or block so that training keeps its inputs, and computes what its gradient needs again.

    The layer computes what it computed before, with the same weights. Training takes less memory, for another forward
    pass of the layer. Dropout draws the same masks in both passes, and moving statistics move once. Wrap blocks of
    several layers: around a single layer, little more than its inputs and outputs is kept anyway. `recompute_layers`
    does this for a model that exists.

    Masks, losses that layers add, mixed precision and frozen or quantized layers are as without the wrapper.

    Args:
        layer: The `keras.Layer` to wrap, for example a `keras.Sequential` or functional model.
        **kwargs: As for `keras.layers.Layer`. The dtype policy is the layer's unless `dtype` is given.

    Raises:
        ValueError: If `layer` is not a layer. When it is called: if the layer draws random numbers without a Keras
            seed of its own, or assigns a variable that Keras does not know.

    Example:

    >>> inputs = x = keras.Input((32, 32, 8))
    >>> for _ in range(4):
    ...     block = keras.Sequential(
    ...         [keras.layers.Conv2D(8, 3, padding="same"), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    ...     )
    ...     x = accumops.Recompute(block)(x)
    >>> model = keras.Model(inputs, x)

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        if isinstance(layer, keras.Layer):
            kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.supports_masking = True
        self.autocast = False  # the layer casts its inputs itself
        self._recomputation = Recomputation(self._call_layer, [layer])

    def call(self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Calls the layer.

        Args:
            inputs: Its inputs.
            *args: Its other arguments.
            training: Whether it is trained.
            **kwargs: Its keyword arguments.
        """
        return self._recomputation(inputs, *args, training=training, **kwargs)

    def _call_layer(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes and dtypes of the outputs: the layer's."""
        with overriding(self, call=self._call_layer):
            return super().compute_output_spec(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: the outputs have the masks that the layer gave them."""
