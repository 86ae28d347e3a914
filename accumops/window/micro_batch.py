"""What passes between a window's state and the optimizer that makes the update: micro-batches in, the window out."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops import ops
from accumops.adapters.tensorflow import xla_compiles_this
from accumops.ops.variables import tf_variable
from accumops.window import replicas
from accumops.window.connected_variables import Connected
from accumops.window.noise import Groups
from accumops.window.nonfinite import MAKES_UPDATE, Share, Verdict
from accumops.window.squared_norms import SquaredNorms
from accumops.window.touched_rows import TouchedRows


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The gradients of a micro-batch on their way into a window."""

    gradients: list[tf.Tensor | tf.IndexedSlices | None]
    present: list[int]
    """The positions of the gradients that are not None."""
    given: Sequence[int]
    """The positions of the variables that the call gave, with a gradient or None."""
    touched_rows: list[keras.Variable | None]
    """For each gradient the flags of the rows that it touches, if it relies on flags."""
    share: Share
    """What the micro-batch counts for in its window."""
    starts: tf.Tensor | bool
    """Whether it is the window's first."""

    @property
    def weight(self) -> tf.Tensor:
        """The share as a number."""
        return self.share.weight


@dataclasses.dataclass(frozen=True)
class CountedMicroBatch(MicroBatch):
    """A micro-batch that is counted by itself, with the values of the counters after it."""

    fills: tf.Tensor
    """Whether it makes the window full."""
    limit: tf.Tensor
    """The micro-batches of a full window."""
    total: tf.Tensor
    """The sum of shares, its own included."""
    checks: list[tf.Operation]
    """What has to hold before the window changes, in a graph."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A window's sums, where it ends.

    The sum of a variable's weighted gradients is in its accumulator. For variables in `latest` the last micro-batch is
    not in there yet, and the sum is `(0 if starts else accumulator) + latest_weight * latest`.
    """

    accumulators: list[keras.Variable | None]
    """None for a variable without gradient."""
    connected: Connected
    """The variables with a gradient. In a graph it may take a run to know them: see `Connected.maybe`."""
    weight: tf.Tensor
    """What the sums are divided by: the sum of shares, or 1 if the window's gradient is a sum."""
    tables: TouchedRows
    """The flags of tables' touched rows."""
    latest: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    """Gradients by position."""
    latest_weight: tf.Tensor | float = 1.0
    starts: tf.Tensor | bool = False
    """Whether the accumulators of `latest` hold nothing of this window."""
    replica: int | None = None
    """Under a strategy, the number of the window's replica among those of this process."""
    verdict: Verdict = MAKES_UPDATE
    """Whether it makes an update."""
    groups: Groups | None = None
    """What its micro-batches tell of the noise in their gradients, where that is tracked."""
    reported: SquaredNorms | None = None
    """What the op that has added the last micro-batch has reported of the sums in the accumulators."""

    def touched_rows(self, i: int) -> keras.Variable | None:
        """The flags of touched rows of the accumulator at a position, or None if they are not known."""
        return self.tables.track(i)

    @functools.cached_property
    def squared_norms(self) -> tf.Tensor:
        """The squared norms of the sums, from where they are first asked for; zero for one without gradient.

        Only sums of which nothing is reported are read. They are in the accumulators or, where the last micro-batch
        makes the whole window, in `latest`.
        """
        held = [i for i, accumulator in enumerate(self.accumulators) if accumulator is not None]
        reported = () if self.reported is None else self.reported.positions
        others = [i for i in held if i not in reported]
        norms = [] if self.reported is None else [self.reported.sums]
        if others:
            norms.append(ops.squared_norms([self._values_of_sum(i) for i in others]))
        order = [*reported, *others]
        if order == list(range(len(self.accumulators))):
            return tf.concat(norms, 0) if len(norms) > 1 else norms[0]
        return tf.scatter_nd([[i] for i in order], tf.concat(norms, 0), [len(self.accumulators)])

    def _values_of_sum(self, i: int) -> tf.Tensor:
        """Values with the norm of a sum. Rows of a table that the window has not touched are zero."""
        if i in self.latest:
            return self.latest[i]
        accumulator = tf_variable(self.accumulators[i])
        flags = None if xla_compiles_this() else self.tables.tracked(i)
        # To find rows, the host would wait for a GPU.
        if flags is None or "GPU" in (accumulator.device or ""):
            return tf.convert_to_tensor(accumulator)
        return tf.gather(accumulator, tf.where(flags)[:, 0])

    def of(self, connected: Connected) -> "Window":
        """The same window, for some of its variables."""
        positions = set(connected.positions)
        held = [each if i in positions else None for i, each in enumerate(self.accumulators)]
        latest = {i: each for i, each in self.latest.items() if i in positions}
        return dataclasses.replace(self, accumulators=held, connected=connected, latest=latest, reported=None)

    def own(self, variable: keras.Variable) -> tf.Variable | keras.Variable:
        """The component of a variable that this window updates."""
        return variable if self.replica is None else replicas.own(variable, self.replica)

    def place(self, beside: keras.Variable) -> contextlib.AbstractContextManager[None]:
        """The device on which a variable is updated."""
        return contextlib.nullcontext() if self.replica is None else tf.device(self.own(beside).device)

    def or_zero(self) -> "Window":
        """Returns the window, with gradients of zero if it makes no update."""
        applies = self.verdict.applies
        if applies is True:
            return self
        return dataclasses.replace(self, weight=tf.where(applies, self.weight, tf.zeros_like(self.weight)))

    def means(self, *, sparse: bool) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """Returns the weighted mean of each variable's gradients.

        Args:
            sparse: Whether a table whose touched rows are known gives the mean of these rows only.
        """
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
