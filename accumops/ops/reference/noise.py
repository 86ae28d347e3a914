"""The definitions of the ops for the noise scale."""

import math
from collections.abc import Sequence

import tensorflow as tf


def add_noise_group(window: tf.Variable, norms: tf.Tensor, *, share: tf.Tensor, starts: tf.Tensor) -> None:
    """Defines `accumops.ops.add_noise_group`. It takes the same arguments and does not check them.

    A share of 0 counts as nothing, whatever the gradients hold.
    """
    share = tf.cast(share, tf.float64)
    gradients, sums = tf.unstack(tf.reduce_sum(norms, 1))
    before = tf.convert_to_tensor(window)
    group = tf.stack([tf.math.multiply_no_nan(gradients, share), tf.cast(share != 0, tf.float64), sums, share])
    window.assign(tf.where(tf.stack([starts, starts, True, False]), tf.zeros_like(before), before) + group)


def end_noise_window(
    window: tf.Tensor,
    statistics: Sequence[tf.Variable],
    *,
    shares: tf.Tensor,
    steps: tf.Tensor,
    decay: float,
    scale: tf.Tensor,
    applies: tf.Tensor,
) -> None:
    """Defines `accumops.ops.end_noise_window`. It takes the same arguments and does not check them."""
    averages, norm, ended = statistics
    squares, count, sums, _ = tf.unstack(window)
    shares, unscaled = tf.cast(shares, tf.float64), 1 / scale**2
    mean = unscaled * tf.math.divide_no_nan(sums, shares**2)
    trace = tf.math.divide_no_nan(unscaled * squares - shares * mean, count - 1)
    found = tf.stack([trace, mean - tf.math.divide_no_nan(trace, shares), tf.ones_like(trace)])
    makes_update = tf.math.is_finite(mean) & applies
    tells = makes_update & tf.math.is_finite(trace) & (count > 1)
    before = tf.convert_to_tensor(averages)
    averages.assign(tf.where(tells, decay * before + (1 - decay) * found, before))
    norm.assign(tf.where(makes_update, tf.sqrt(mean), tf.constant(math.nan, tf.float64)))
    ended.assign_add(tf.stack([tf.ones_like(steps), steps]))
