"""What the ops take: the TensorFlow variable inside a Keras variable, flags, and constants on the host."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this


def tf_variable(variable: tf.Variable | keras.Variable) -> tf.Variable:
    """Returns the TensorFlow variable that a Keras variable holds; any other variable is returned as it is."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def check_variable(name: str, value: Any) -> tf.Variable:
    """Returns the `tf_variable` of an argument; raises a TypeError that names the argument if it is not a variable."""
    variable = tf_variable(value)
    if not hasattr(variable, "handle"):
        raise TypeError(f"`{name}` must be a tf.Variable or keras.Variable. Received: {value!r}")
    return variable


def as_flag(name: str, value: bool | tf.Tensor) -> tf.Tensor:
    """Returns an argument as a bool scalar; raises a ValueError that names the argument if it is none."""
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype != tf.bool or tensor.shape.rank not in (0, None):
        raise ValueError(f"`{name}` must be a bool or a scalar bool tensor. Received: {value!r}")
    return tensor


def host_constant(value: Any, dtype: tf.DType) -> tf.Tensor:
    """Returns a constant in the memory of the host, where a GPU's op reads it."""
    # XLA has constants of its own.
    with contextlib.nullcontext() if xla_compiles_this() else tf.device("/CPU:0"):
        return tf.constant(value, dtype)
