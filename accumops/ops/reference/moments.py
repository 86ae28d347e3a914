"""The definitions of what is done with the moments of a window."""

from collections.abc import Sequence

import tensorflow as tf


def merge_moments(
    batch: Sequence[tf.Tensor] | None,
    *,
    window: Sequence[tf.Variable] | None,
    moving: tuple[tf.Variable, tf.Variable, float] | None,
    only_finite: bool = False,
) -> None:
    """Defines `accumops.ops.merge_moments`. It takes the same arguments and does not check them."""
    zero = tf.constant(0, tf.int64)
    values, calls, limit = (zero, zero, zero) if window is None else tf.unstack(window[0])
    count = tf.cast(values, tf.float64)
    mean = centred = tf.constant(0, tf.float64)
    if window is not None:
        mean, centred = tf.unstack(tf.where(values > 0, window[1], tf.zeros_like(window[1])))
    if batch is not None:
        added, batch_mean, rest, variance = (tf.cast(each, tf.float64) for each in batch)
        if only_finite:
            finite = tf.reduce_all(tf.math.is_finite([batch_mean, variance]))
            added = tf.where(finite, added, tf.zeros_like(added))
        share = tf.math.divide_no_nan(added, count + added)
        delta = batch_mean + rest - mean
        some = added > 0
        centred = tf.where(some, centred + variance * added + delta**2 * count * share, centred)
        mean = tf.where(some, mean + delta * share, mean)
        count += added
    if moving is None:
        ends = tf.constant(False)
    else:
        ends = calls + 1 >= limit if window is not None and batch is not None else tf.constant(True)
        momentum = moving[2]
        for variable, value in zip(moving[:2], (mean, tf.math.divide_no_nan(centred, count)), strict=True):
            old = tf.convert_to_tensor(variable)
            variable.assign(tf.where(ends & (count > 0), _moved(old, value, momentum), old))
    if window is not None:
        counters = (tf.where(ends, zero, each) for each in (tf.cast(count, tf.int64), calls + 1))
        window[0].assign(tf.stack([*counters, limit]))
        window[1].assign(tf.stack([mean, centred]))


def add_to_windows(
    batches: Sequence[Sequence[tf.Tensor]], windows: Sequence[Sequence[tf.Variable]], *, applies: tf.Tensor
) -> None:
    """Defines `accumops.ops.add_to_windows`. It takes the same arguments and does not check them."""
    for batch, window in zip(batches, windows, strict=True):
        before = [tf.convert_to_tensor(variable) for variable in window]
        merge_moments(batch, window=window, moving=None)
        for variable, old in zip(window, before, strict=True):
            variable.assign(tf.where(applies, variable, old))


def end_windows(
    windows: Sequence[Sequence[tf.Variable]],
    moving: Sequence[tuple[tf.Variable, tf.Variable, float]] | None,
    *,
    applies: tf.Tensor,
) -> None:
    """Defines `accumops.ops.end_windows`. It takes the same arguments and does not check them."""
    for i, (counters, moments) in enumerate(windows):
        values, _, limit = tf.unstack(counters)
        if moving is not None:
            mean, centred = tf.unstack(moments)
            *statistics, momentum = moving[i]
            count = tf.cast(values, tf.float64)
            for variable, value in zip(statistics, (mean, tf.math.divide_no_nan(centred, count)), strict=True):
                old = tf.convert_to_tensor(variable)
                variable.assign(tf.where(applies & (values > 0), _moved(old, value, momentum), old))
        counters.assign(tf.where(applies, tf.stack([0, 0, limit]), counters))


def _moved(old: tf.Tensor, value: tf.Tensor, momentum: float) -> tf.Tensor:
    wide = tf.float64 if old.dtype == tf.float64 else tf.float32
    return tf.cast(tf.cast(old, wide) * momentum + tf.cast(value, wide) * (1.0 - momentum), old.dtype)
