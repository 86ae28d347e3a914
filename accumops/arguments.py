"""Checks of what callers give, made once, with messages that name the argument and its value."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops.sizes import bytes_from

Schedule = Callable[[tf.Tensor], "tf.Tensor | int"]
"""Gives `accum_steps` for a count of updates, an int64 scalar."""


def check_accum_steps(accum_steps: int | Schedule | None) -> int | Schedule | None:
    """Returns `accum_steps`, an int as a plain int.

    Raises:
        TypeError: If it is neither an int, nor a callable that returns one, nor None.
        ValueError: If it is less than 1.
    """
    if accum_steps is None:
        return None
    steps: Any = accum_steps
    if callable(accum_steps):
        try:
            steps = tf.function(accum_steps)(tf.constant(0, tf.int64))
        except tf.errors.OperatorNotAllowedInGraphError as error:
            raise TypeError(
                "The callable `accum_steps` decides by the value of a tensor, and its source cannot be read well "
                "enough to compile that. Use tf.where, or a function on lines of its own."
            ) from error
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The callable `accum_steps` must take a count of updates, an int64 scalar. Received: {accum_steps!r}, "
                f"which raises {type(error).__name__}: {error}"
            ) from error
        if tf.is_tensor(steps) and steps.shape.rank == 0 and steps.dtype.is_integer:
            steps = int(steps)
    source = "" if steps is accum_steps else " from the callable for 0 updates"
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        hint = " In an AccumStepsScheduler callback a dict of epochs can be given." if isinstance(steps, dict) else ""
        raise TypeError(
            f"`accum_steps` must be an int, the number of micro-batches, or a callable that returns one.{hint} "
            f"Received{source}: {steps!r}"
        )
    if not 1 <= int(steps) < 1 << 63:
        raise ValueError(f"`accum_steps` must be at least 1, and an int64. Received{source}: {steps}")
    return accum_steps if callable(accum_steps) else int(steps)


def check_variables(variables: Sequence[tf.Variable | keras.Variable]) -> list[tf.Variable | keras.Variable]:
    """Returns the variables as a list, if gradients for them can be accumulated."""
    if is_variable(variables) or not isinstance(variables, Iterable):
        raise TypeError(f"`variables` must be a list of variables. Received: {variables!r}")
    variables = list(variables)
    if not variables:
        raise ValueError("At least one variable is needed to accumulate gradients for. Received none.")
    known: set[int] = set()
    for variable in variables:
        if not is_variable(variable):
            raise TypeError(f"`variables` must hold tf.Variable or keras.Variable. Received: {variable!r}")
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ValueError(
                f"Gradients of '{name_of(variable)}' cannot be accumulated: its dtype must be floating-point. "
                f"Received: {tf.as_dtype(variable.dtype).name}."
            )
        if id(variable) in known:
            raise ValueError(
                f"'{name_of(variable)}' is given twice. Give each variable once, and its gradients summed."
            )
        known.add(id(variable))
    return variables


def check_reduction(reduction: str) -> str:
    """Returns `reduction` if it is one that windows have."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum'. Received: {reduction!r}")
    return reduction


def check_nonfinite(nonfinite: str) -> str:
    """Returns `nonfinite` if it says what becomes of gradients that are not finite."""
    if nonfinite not in ("propagate", "skip", "drop"):
        raise ValueError(f"`nonfinite` must be 'propagate', 'skip' or 'drop'. Received: {nonfinite!r}")
    return nonfinite


def check_statistics(statistics: str) -> str:
    """Returns `statistics` if it is one of the two choices of batch normalization; raises ValueError otherwise."""
    if statistics not in ("micro_batch", "window"):
        raise ValueError(f"`statistics` must be 'micro_batch' or 'window'. Received: {statistics!r}")
    return statistics


def check_window_memory(statistics: str, every: int | None, memory: str | int | None) -> None:
    """Raises unless at most one of `every` and `memory` is given, and only where a window's statistics are asked for.

    Raises:
        TypeError: If one has another type than it should.
        ValueError: If it has another value.
    """
    given = [name for name, value in (("every", every), ("memory", memory)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give `every` or `memory`, not both. Received: every={every!r}, memory={memory!r}")
    if given and statistics != "window":
        raise ValueError(f"`{given[0]}` is for statistics='window'. Received: statistics={statistics!r}")
    if every is not None:
        check_count("every", every, "a number of layers")
    if memory is not None:
        bytes_from("memory", memory)


def check_bool(name: str, value: bool) -> bool:
    """Returns `value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False. Received: {value!r}")
    return value


def check_decay(decay: float) -> float:
    """Checks what is left of an average after one more value."""
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real):
        raise TypeError(f"`decay` must be a number. Received: {decay!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be at least 0 and less than 1. Received: {decay}")
    return float(decay)


def is_variable(value: object) -> bool:
    """Whether it is a variable of TensorFlow or Keras."""
    return isinstance(value, tf.Variable | keras.Variable)


def name_of(variable: tf.Variable | keras.Variable) -> str:
    """The name of a variable in messages."""
    return getattr(variable, "path", variable.name)


def as_weight(weight: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns a micro-batch's share in its window as a scalar of a dtype."""
    if isinstance(weight, bool) or not (
        isinstance(weight, numbers.Real | np.ndarray) or tf.is_tensor(weight) or is_variable(weight)
    ):
        raise TypeError(f"`weight` must be a number or a scalar tensor. Received: {weight!r}")
    if isinstance(weight, numbers.Real) and not 0 <= float(weight) < math.inf:
        raise ValueError(f"`weight` must be finite and not negative. Received: {weight}")
    # A number straight to this dtype: on its own it would become float32 first.
    tensor = tf.cast(weight, dtype) if tf.is_tensor(weight) or is_variable(weight) else tf.constant(weight, dtype)
    if tensor.shape.rank not in (0, None):
        raise ValueError(f"`weight` must be a number or a scalar tensor. Received shape: {tensor.shape}")
    return tensor


def check_positive(name: str, value: float) -> float:
    """Returns a number as a float; raises an error that names the argument if it is not finite and greater than 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be finite and greater than 0. Received: {value}")
    return float(value)


def check_count(name: str, value: int, what: str) -> None:
    """Raises unless an argument is an int of at least 1.

    Args:
        name: The argument's name.
        value: The argument.
        what: What it counts, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, {what}. Received: {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {value}")
