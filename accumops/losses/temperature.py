"""A learned temperature, which belongs to the model because its loss has no variables that are trained."""

import math
from typing import Any

import keras
import tensorflow as tf

from accumops.losses.contrastive import unit_length


@keras.saving.register_keras_serializable(package="accumops")
class LearnedTemperature(keras.layers.Layer):
    """Scales embeddings so that dot products of a sample's left and another's right one are the logits.

    Put it at the end of a model whose loss is one of `accumops.losses` with `temperature=None`. Embeddings get length
    1 and are divided by the square root of the temperature, whose logarithm is a trainable variable. A learned bias is
    one more feature of them.

    Args:
        temperature: The temperature at the start, a positive float.
        minimum: The temperature never falls below this, a positive float. CLIP's paper has 0.01.
        bias: What logits have added at the start, learned from there; None adds nothing. SigLIP's paper has -10.
        **kwargs: As for `keras.layers.Layer`.

    Raises:
        ValueError: If a temperature is not positive.

    Example:

    >>> embeddings = tf.random.normal([4, 2, 8])
    >>> accumops.losses.LearnedTemperature(0.07)(embeddings).shape
    TensorShape([4, 2, 8])
    >>> accumops.losses.LearnedTemperature(0.1, bias=-10.0)(embeddings).shape
    TensorShape([4, 2, 9])
    """

    def __init__(
        self, temperature: float = 0.07, *, minimum: float = 0.01, bias: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("temperature", temperature), ("minimum", minimum)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive. Received: {value}")
        self.temperature = float(temperature)
        self.minimum = float(minimum)
        self.initial_bias = bias

    def build(self, input_shape: Any) -> None:
        """Creates the scale and the bias."""
        constant = keras.initializers.Constant
        self.log_scale = self.add_weight(
            name="log_scale", shape=(), initializer=constant(-math.log(self.temperature)), dtype="float32"
        )
        self.bias = None
        if self.initial_bias is not None:
            self.bias = self.add_weight(name="bias", shape=(), initializer=constant(self.initial_bias), dtype="float32")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Scales embeddings of shape (batch, 2, features), and adds a feature if there is a bias."""
        scale = tf.exp(tf.minimum(tf.convert_to_tensor(self.log_scale), -math.log(self.minimum)) / 2)
        embeddings = unit_length(inputs) * tf.cast(scale, inputs.dtype)
        if self.bias is None:
            return embeddings
        one = tf.ones_like(embeddings[:, :1, :1])
        left = one * tf.cast(tf.convert_to_tensor(self.bias), embeddings.dtype)
        return tf.concat([embeddings, tf.concat([left, one], 1)], -1)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the embeddings."""
        *batch, features = input_shape
        return (*batch, features if self.initial_bias is None or features is None else features + 1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this layer again."""
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "minimum": self.minimum,
            "bias": self.initial_bias,
        }
