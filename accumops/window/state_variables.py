"""How the variables of a window are made, and where they live."""

import contextlib

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this
from accumops.arguments import name_of
from accumops.ops.variables import tf_variable

PER_REPLICA = {
    "same": {"synchronization": "on_read", "aggregation": "only_first_replica"},
    "summed": {"synchronization": "on_read", "aggregation": "sum"},
}
"""Arguments of a variable that each replica of a mirroring strategy has a component of.

What is saved is the first component, where all are the same, or the sum of all components.
"""


def new_variable(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    initializer: str | keras.Initializer = "zeros",
    beside: tf.Variable | keras.Variable | None = None,
    **distribution: str,
) -> keras.Variable:
    """Makes a variable that is not trained and never cast.

    Args:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype.
        initializer: What it starts with.
        beside: A variable on whose device it is to live, if not on the current one.
        **distribution: Items of `PER_REPLICA`, under a mirroring strategy.
    """
    device = contextlib.nullcontext() if beside is None else tf.device(tf_variable(beside).device)
    with device:
        return keras.Variable(
            initializer=initializer,
            shape=shape,
            dtype=dtype,
            trainable=False,
            autocast=False,
            name=name,
            **distribution,
        )


def new_accumulator(variable: tf.Variable | keras.Variable, mirrored: bool) -> keras.Variable:
    """Makes the accumulator of a variable, on its device: float64 for float64, else float32."""
    dtype = "float64" if tf.as_dtype(variable.dtype) == tf.float64 else "float32"
    name = f"{flat_name(variable)}_accumulator"
    distribution = PER_REPLICA["summed"] if mirrored else {}
    return new_variable(name, tuple(variable.shape), dtype, beside=variable, **distribution)


def counter_device(jit_compile: bool | None) -> contextlib.AbstractContextManager[None]:
    """Where counters are made: on the host, unless XLA compiles what reads them, which takes them from its device.

    Args:
        jit_compile: Whether XLA compiles it. If None, what the function that is being traced says; when executing
            eagerly nothing is known about the functions to come, and counters are made where XLA could use them.
    """
    if jit_compile is None:
        jit_compile = tf.executing_eagerly() or xla_compiles_this()
    return contextlib.nullcontext() if jit_compile else tf.device("/CPU:0")


def flat_name(variable: tf.Variable | keras.Variable) -> str:
    """The name of a variable without the characters that structure names."""
    return name_of(variable).replace("/", "_").replace(":", "_")
