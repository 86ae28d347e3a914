"""What a layer can ask while it is called: how large the window is that its micro-batch belongs to."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeAlias

import tensorflow as tf

Count: TypeAlias = "int | tf.Tensor"


class CurrentWindow:
    """The window that a micro-batch belongs to, while a `GradientAccumulateModel` trains on it.

    Its numbers are ints or integer scalars, as `keras.ops.shape` gives them.

    Args:
        batch_size: Returns the samples of the window.
        accum_steps: Returns its micro-batches.
    """

    def __init__(self, batch_size: Callable[[], Count], accum_steps: Callable[[], Count]) -> None:
        self._batch_size, self._accum_steps = batch_size, accum_steps

    @property
    def batch_size(self) -> Count:
        """The samples of the window, on this replica: the effective batch.

        With `micro_batch_size` that is the batch of `fit`. With `accum_steps` the micro-batches to come are not known:
        it is what the window has if all of them are like this one.
        """
        return self._batch_size()

    @property
    def accum_steps(self) -> Count:
        """The micro-batches of the window."""
        return self._accum_steps()


_CURRENT: contextvars.ContextVar[CurrentWindow | None] = contextvars.ContextVar("current_window", default=None)


def current_window() -> CurrentWindow | None:
    """Returns the window that the micro-batch in training belongs to; None in inference and outside of training.

    Call it in the `call` of a layer, or in a loss, that needs the effective batch size. The shapes that these see are
    those of the micro-batch.

    Returns:
        The window, with `batch_size` and `accum_steps`, while a `GradientAccumulateModel` trains. None otherwise, as in
        `evaluate` and `predict`, and in a model that has the optimizer alone, which sees no samples.

    Example:

    >>> class DividesByEffectiveBatch(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         window = accumops.current_window()
    ...         samples = keras.ops.shape(inputs)[0] if window is None else window.batch_size
    ...         return inputs / keras.ops.cast(samples, inputs.dtype)
    """
    return _CURRENT.get()


@contextlib.contextmanager
def within_window(window: CurrentWindow) -> Iterator[None]:
    """Has `current_window` return a window while a block runs or is traced."""
    token = _CURRENT.set(window)
    try:
        yield
    finally:
        _CURRENT.reset(token)
