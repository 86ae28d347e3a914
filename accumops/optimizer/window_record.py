"""What an optimizer notes of each window that ends, for a callback that asks for it: how many micro-batches it had, and
the norm of its gradient.

The norm is that of the sums in the accumulators, before the update reads them. So all of the window's micro-batches
have to be in there: while windows are noted, no last gradients go straight into an update. Where the update needs the
norms itself, to clip by them or to unscale a loss, they are computed once for both.

The notes are variables that are not saved. Nothing is copied to the host until somebody reads them.
"""

import contextlib

import keras
import tensorflow as tf

from accumops.window.gradient_norms import norm_of_mean
from accumops.window.micro_batch import Window
from accumops.window.state import WindowState
from accumops.window.state_variables import PER_REPLICA, new_variable


class WindowRecord:
    """Notes of the windows that have ended.

    Args:
        norms: Whether the norms of their gradients are noted.
        per_variable: Whether those of single variables' gradients are noted as well, by `Notes` of the windows.
    """

    def __init__(self, norms: bool, per_variable: bool = False) -> None:
        self.norms = norms
        self.per_variable = per_variable
        self._state: WindowState | None = None

    def build(self, state: WindowState) -> None:
        """Creates the variables, for the windows of a state that is built."""
        strategy = state.strategy
        same = {} if strategy is None else PER_REPLICA["same"]
        with tf.init_scope(), contextlib.nullcontext() if strategy is None else strategy.scope():
            step = state.counters.step
            self._windows = new_variable("noted_windows", (), "int64", beside=step, **same)
            self._micro_batches = new_variable("noted_micro_batches", (), "int64", beside=step, **same)
            beside = state.accumulators[0]
            self._norm = new_variable("noted_norm", (), "float32", beside=beside, **same) if self.norms else None
        self._state = state

    @property
    def variables(self) -> list[keras.Variable]:
        """What it keeps, once it is built."""
        return [each for each in (self._windows, self._micro_batches, self._norm) if each is not None]

    def note(self, window: Window, scale: float | tf.Tensor | None) -> None:
        """Notes a window that ends.

        Args:
            window: The window, with all of its micro-batches in the sums.
            scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
        """
        assert self._state is not None, "built with the optimizer"
        counters = self._state.counters
        with counters.place():
            self._windows.assign_add(1)
            self._micro_batches.assign_add(tf.convert_to_tensor(counters.step))
        if self._norm is not None:
            norm = norm_of_mean(tf.sqrt(tf.reduce_sum(window.squared_norms)), window, scale)
            self._norm.assign(tf.cast(norm, tf.float32))

    def read(self) -> tuple[int, int, float]:
        """Returns how many windows have ended, how many micro-batches they had, and the norm of the last one."""
        if self._state is None:
            return 0, 0, float("nan")
        windows, micro_batches = (int(_value(each)) for each in (self._windows, self._micro_batches))
        return windows, micro_batches, float("nan") if self._norm is None else float(_value(self._norm))


def _value(variable: keras.Variable) -> float:
    return float(keras.ops.convert_to_numpy(variable))
