"""How noisy a window's gradient is, from the gradients of its micro-batches.

The gradients g_i of micro-batches with the shares b_i, and their mean g over the window with B = sum b_i, tell

    trace     (sum b_i |g_i|² - B |g|²) / (K - 1)    the variance of the gradient of a share of 1
    square    |g|² - trace / B                       the squared norm of the gradient without noise

Both are unbiased for K >= 2 micro-batches with shares of any size. Their ratio, each averaged over windows first, is
the simple noise scale of McCandlish et al. (https://arxiv.org/abs/1812.06162): the effective batch, in shares, at which
noise and gradient are equally large.

|g_i|², and |g|² of the sums after the last micro-batch, are reports of the op that accumulates: no gradient is read
once more. Variables with sparse gradients are left out, since the rows of such a gradient can occur several times.

Under a strategy each replica's micro-batches are groups of their own. The sums of all replicas exist only where a
window ends, where they are read once more.
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops import ops
from accumops.window import replicas
from accumops.window.noise_schedule import FollowedSteps, NoiseScaleSchedule
from accumops.window.squared_norms import SquaredNorms
from accumops.window.state_variables import PER_REPLICA, new_variable


class Groups(NamedTuple):
    """What is known of a window where it ends."""

    window: tf.Tensor
    """Its sums, as `ops.add_noise_group` adds them."""
    shares: tf.Tensor
    """The sum of its micro-batches' shares, a scalar."""


class Seen(NamedTuple):
    """What has been seen so far."""

    windows: int = 0
    """Windows that have ended."""
    micro_batches: int = 0
    """Their micro-batches; under a strategy those of the first replica."""
    shares: float = 0.0
    """The sum of all micro-batches' shares, those of an open window and of all replicas included."""


class GradientNoise(tf.Module):
    """The noise of gradients, averaged over windows.

    Args:
        decay: What is left of an average after one more window.
        schedule: What the number of micro-batches follows, or None.
    """

    def __init__(self, decay: float, schedule: NoiseScaleSchedule | None = None) -> None:
        super().__init__(name="gradient_noise")
        self.decay = decay
        self.followed: FollowedSteps | None = None
        self._schedule = schedule
        self.positions: set[int] = set()
        """The positions of the variables that count: those with dense gradients."""
        self.built = False

    def build(self, beside: keras.Variable, *, mirrored: bool) -> None:
        """Creates the variables.

        Args:
            beside: A variable on whose device they are to live.
            mirrored: Whether replicas of a strategy have a window each.
        """
        same, summed = (PER_REPLICA["same"], PER_REPLICA["summed"]) if mirrored else ({}, {})

        # Few operations are made for a micro-batch and for a window: each variable holds several numbers.
        def new(name: str, shape: tuple[int, ...], **distribution: str) -> keras.Variable:
            return new_variable(f"noise_{name}", shape, "float64", beside=beside, **distribution)

        def new_count(name: str, dtype: str, initializer: Any) -> keras.Variable:
            return new_variable(name, (), dtype, initializer, beside=beside, **same)

        self._window = new("window", (4,), **summed)
        self._averages = new("averages", (3,), **same)
        self._norm = new("norm", (), **same)
        self._ended = new_variable("noise_ended", (2,), "int64", beside=beside, **same)
        if self._schedule is not None:
            self.followed = FollowedSteps(self._schedule, new_count)
        self.built = True

    @property
    def saved_variables(self) -> list[keras.Variable]:
        """What is saved with the window: all, if the number of micro-batches follows, and else nothing."""
        return [] if self.followed is None else [each for each in self.variables if each is not self._ended]

    @property
    def variables(self) -> list[keras.Variable]:
        """What it keeps."""
        followed = [] if self.followed is None else [self.followed.steps, self.followed.waited]
        return [self._window, self._averages, self._norm, self._ended, *followed]

    def add(self, norms: SquaredNorms, share: tf.Tensor, starts: tf.Tensor | bool) -> None:
        """Notes a micro-batch that has been added to the window.

        Args:
            norms: What the op has reported of it.
            share: What the micro-batch counts for.
            starts: Whether it is the first of its window.
        """
        self.positions.update(norms.positions)
        ops.add_noise_group(replicas.own(self._window), norms.report, share=share, starts=starts)

    def part(self) -> tf.Tensor:
        """What this replica knows of the open window, to be summed over replicas."""
        return tf.convert_to_tensor(self._window)

    def groups(self, shares: tf.Tensor, part: tf.Tensor | None = None, sums: tf.Tensor | None = None) -> Groups:
        """What is known of the open window.

        Args:
            shares: The sum of its micro-batches' shares.
            part: The sum of `part()` over replicas, if there are any.
            sums: The squared norm of the sums of gradients over replicas, if there are any.
        """
        window = self.part() if part is None else part
        if sums is not None:
            squares, count, _, all_shares = tf.unstack(window)
            window = tf.stack([squares, count, sums, all_shares])
        return Groups(window, shares)

    def end(self, groups: Groups, applies: tf.Tensor | bool, scale: float | tf.Tensor | None, steps: tf.Tensor) -> None:
        """Takes a window that ends into the averages.

        Args:
            groups: What is known of it.
            applies: Whether it makes an update.
            scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
            steps: How many micro-batches it has, on each replica.
        """
        given = {"shares": groups.shares, "steps": steps, "decay": self.decay, "scale": 1.0 if scale is None else scale}
        for each in replicas.components(self._averages, self._norm, self._ended):
            ops.end_noise_window(groups.window, ops.NoiseStatistics(*each), **given, applies=applies)
        if self.followed is not None:
            shares = tf.cast(groups.shares, tf.float64)
            step = tf.math.divide_no_nan(shares, tf.cast(steps, tf.float64))
            self.followed.follow(self.scale, step * tf.cast(self.followed.steps, tf.float64))

    def seen(self) -> Seen:
        """Returns what has been seen so far."""
        windows, micro_batches = keras.ops.convert_to_numpy(self._ended)
        return Seen(int(windows), int(micro_batches), float(keras.ops.convert_to_numpy(self._window)[3]))

    @property
    def scale(self) -> tf.Tensor:
        """The noise scale, in shares; NaN before windows have told of it, and Inf where the noise hides all."""
        trace, square, known = tf.unstack(tf.convert_to_tensor(self._averages))
        infinite = tf.constant(float("inf"), tf.float64)
        found = tf.where(square > 0, tf.maximum(trace, 0) / square, infinite)
        return tf.where(known > 0, found, tf.constant(float("nan"), tf.float64))

    @property
    def norm(self) -> tf.Tensor:
        """The norm of the last window's gradient; NaN for one that made no update."""
        return tf.convert_to_tensor(self._norm)
