"""What passes between the window's state machine and who makes the update."""

import contextlib
import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from accumops.window import replicas


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The gradients of a micro-batch on their way into a window."""

    gradients: list[tf.Tensor | tf.IndexedSlices | None]
    present: list[int]  # the positions of those that are not None
    touched_rows: list[keras.Variable | None]
    weight: tf.Tensor
    starts: tf.Tensor | bool  # whether it is the window's first


@dataclasses.dataclass(frozen=True)
class CountedMicroBatch(MicroBatch):
    """One that is counted by itself, and what the counters become with it."""

    fills: tf.Tensor  # whether it is the window's last
    limit: tf.Tensor
    total: tf.Tensor  # of the weights


@dataclasses.dataclass(frozen=True)
class Window:
    """What a window has come to where it ends.

    The sum of a variable's weighted gradients is what its accumulator holds; for those in `latest` it is
    `(0 if starts else accumulator) + latest_weight * latest`.
    """

    accumulators: list[keras.Variable | None]  # None for a variable without gradient
    weight: tf.Tensor
    touched_rows: Callable[[int], keras.Variable | None]
    latest: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    latest_weight: tf.Tensor | float = 1.0
    starts: tf.Tensor | bool = False
    replica: int | None = None  # under a strategy: whose window it is, of this process's replicas

    def own(self, variable: keras.Variable) -> tf.Variable | keras.Variable:
        """What of a variable this window updates."""
        return variable if self.replica is None else replicas.own(variable, self.replica)

    def place(self, beside: keras.Variable) -> contextlib.AbstractContextManager[None]:
        """Where the update of a variable runs."""
        return contextlib.nullcontext() if self.replica is None else tf.device(self.own(beside).device)

    def means(self, *, sparse: bool) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """The weighted mean of each variable's gradients; with `sparse` of its touched rows, where these are known."""
        return [
            None if accumulator is None else self._mean(i, accumulator, self.touched_rows(i) if sparse else None)
            for i, accumulator in enumerate(self.accumulators)
        ]

    def _mean(self, i: int, accumulator: keras.Variable, flags: keras.Variable | None) -> tf.Tensor | tf.IndexedSlices:
        weight = tf.cast(self.weight, accumulator.dtype)
        if self.starts is True:
            return tf.math.divide_no_nan(self.latest[i], weight)
        if flags is None:
            return tf.math.divide_no_nan(tf.convert_to_tensor(accumulator), weight)
        rows = tf.where(flags)[:, 0]
        values = tf.math.divide_no_nan(tf.gather(accumulator.value, rows), weight)
        return tf.IndexedSlices(values, rows, dense_shape=tf.constant(list(accumulator.shape), rows.dtype))
