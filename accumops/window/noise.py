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

import dataclasses
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.window.noise_schedule import FollowedSteps, NoiseScaleSchedule
from accumops.window.squared_norms import SquaredNorms
from accumops.window.state_variables import PER_REPLICA, new_variable


@dataclasses.dataclass(frozen=True)
class Groups:
    """What is known of a window where it ends; float64 scalars."""

    squares: tf.Tensor
    """The sum over its micro-batches of the share times the squared norm of the gradient."""
    count: tf.Tensor
    """The number of its micro-batches that have a share."""
    shares: tf.Tensor
    """The sum of their shares."""
    sums: tf.Tensor
    """The squared norm of the sums of weighted gradients."""


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

    def build(self, beside: keras.Variable, step: keras.Variable, *, mirrored: bool) -> None:
        """Creates the variables.

        Args:
            beside: A variable on whose device they are to live.
            step: The count of micro-batches in the open window, beside which windows are counted.
            mirrored: Whether replicas of a strategy have a window each.
        """
        same, summed = (PER_REPLICA["same"], PER_REPLICA["summed"]) if mirrored else ({}, {})

        # Few operations are made for a micro-batch and for a window: each variable holds several numbers.
        def new(name: str, shape: tuple[int, ...], **distribution: str) -> keras.Variable:
            return new_variable(f"noise_{name}", shape, "float64", beside=beside, **distribution)

        def new_count(name: str, dtype: str, initializer: Any) -> keras.Variable:
            return new_variable(name, (), dtype, initializer, beside=beside, **same)

        # The squares, count and sums of the open window, as in `Groups`, and the shares of all micro-batches so far.
        self._window = new("window", (4,), **summed)
        # Averages over windows of the trace, of the square and of 1, by which the other two are to be divided.
        self._averages = new("averages", (3,), **same)
        self._norm = new("norm", (), **same)
        # How many windows have ended, and their micro-batches.
        self._ended = new_variable("noise_ended", (2,), "int64", beside=step, **same)
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

    # A micro-batch

    def add(self, norms: SquaredNorms, share: tf.Tensor, starts: tf.Tensor | bool) -> None:
        """Notes a micro-batch that has been added to the window.

        Args:
            norms: What the op has reported of it.
            share: What the micro-batch counts for.
            starts: Whether it is the first of its window.
        """
        self.positions.update(norms.positions)
        share = tf.cast(share, tf.float64)
        gradients, sums = tf.unstack(tf.reduce_sum(norms.report, 1))
        # A share of 0 counts as nothing, whatever the gradient is.
        squares = tf.math.multiply_no_nan(gradients, share)
        new = tf.stack([squares, tf.cast(share != 0, tf.float64), sums, share])
        replaced = tf.stack([starts, starts, True, False])
        self._window.assign(tf.where(replaced, tf.zeros_like(new), tf.convert_to_tensor(self._window)) + new)

    # The end of the window

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
        squares, count, own, _ = tf.unstack(self.part() if part is None else part)
        return Groups(squares, count, tf.cast(shares, tf.float64), own if sums is None else sums)

    def end(self, groups: Groups, applies: tf.Tensor | bool, scale: float | tf.Tensor | None, steps: tf.Tensor) -> None:
        """Takes a window that ends into the averages.

        Windows of one micro-batch tell nothing of the noise, and windows that make no update, or whose gradient is not
        finite, tell nothing at all.

        Args:
            groups: What is known of it.
            applies: Whether it makes an update.
            scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
            steps: How many micro-batches it has, on each replica.
        """
        unscaled = tf.constant(1.0, tf.float64) if scale is None else tf.cast(scale, tf.float64) ** -2
        mean = unscaled * tf.math.divide_no_nan(groups.sums, groups.shares**2)
        trace = tf.math.divide_no_nan(unscaled * groups.squares - groups.shares * mean, groups.count - 1)
        square = mean - tf.math.divide_no_nan(trace, groups.shares)
        makes_update = tf.math.is_finite(mean) & applies
        tells = makes_update & tf.math.is_finite(trace) & (groups.count > 1)
        before = tf.convert_to_tensor(self._averages)
        found = tf.stack([trace, square, tf.ones_like(trace)])
        self._averages.assign(tf.where(tells, self.decay * before + (1 - self.decay) * found, before))
        with tf.device(self._ended.value.device):  # else Keras takes it to a GPU and back
            self._ended.assign_add(tf.stack([tf.constant(1, tf.int64), tf.cast(steps, tf.int64)]))
        self._norm.assign(tf.where(makes_update, tf.sqrt(mean), tf.constant(float("nan"), tf.float64)))
        if self.followed is not None:
            step = tf.math.divide_no_nan(groups.shares, tf.cast(steps, tf.float64))
            self.followed.follow(self.scale, step * tf.cast(self.followed.steps, tf.float64))

    # What is known

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
