"""TensorFlow's variables, which Keras's hold."""

from typing import Any

import keras
import tensorflow as tf


def tf_variable(variable: tf.Variable | keras.Variable) -> tf.Variable:
    """Returns the variable that a Keras variable holds; any other is its own."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def check_variable(name: str, value: Any) -> tf.Variable:
    """Returns the `tf_variable` of an argument, or raises what the user should read."""
    variable = tf_variable(value)
    if not hasattr(variable, "handle"):
        raise TypeError(f"`{name}` must be a tf.Variable or keras.Variable. Received: {value!r}")
    return variable
