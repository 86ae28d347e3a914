"""Moments pooled over the replicas of a `tf.distribute` strategy."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from accumops.ops import BatchMoments
from accumops.ops.reference import statistics_dtype
from accumops.window import replicas


def pool(moments: Sequence[tuple[tf.Tensor, tf.Tensor, tf.Tensor]]) -> list[BatchMoments]:
    """Pools the moments of layers over all replicas; every replica has to call it.

    It communicates twice, each time for all layers together: counts and sums first, which give the means, then squared
    distances from these means.

    Args:
        moments: For each layer, on this replica, the count, a scalar, and for each channel the mean and the sum of
            squared distances from the mean. Where the count is 0, mean and sum count as nothing, whatever they are.

    Returns:
        For each layer the moments over all replicas, in float64.
    """
    wide = [[tf.cast(each, tf.float64) for each in layer] for layer in moments]
    wide = [[count, *(tf.where(count > 0, each, tf.zeros_like(each)) for each in rest)] for count, *rest in wide]
    firsts = [tf.concat([count[tf.newaxis], count * mean], 0) for count, mean, _ in wide]
    totals = [(total[0], tf.math.divide_no_nan(total[1:], total[0])) for total in _sums(firsts)]
    seconds = [
        centred + count * (mean - pooled) ** 2 for (count, mean, centred), (_, pooled) in zip(wide, totals, strict=True)
    ]
    return [
        BatchMoments(
            tf.cast(count, tf.int64), mean, tf.zeros_like(mean), tf.math.divide_no_nan(centred, count)
        )
        for (count, mean), centred in zip(totals, _sums(seconds), strict=True)
    ]  # fmt: skip


def pool_arrays(windows: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pools one layer's windows, on arrays.

    Args:
        windows: For each replica the counters and the moments of its window.

    Returns:
        The counters and the moments of a window that holds the values of all.
    """
    held = [(counters[0], *moments) for counters, moments in windows if counters[0] > 0]
    counters, moments = (np.array(each) for each in windows[0])
    counters[0] = sum(count for count, _, _ in held)
    if held:
        mean = sum(count * mean for count, mean, _ in held) / counters[0]
        moments = np.stack([mean, sum(centred + count * (each - mean) ** 2 for count, each, centred in held)])
    return counters, moments


def _sums(vectors: list[tf.Tensor]) -> list[tf.Tensor]:
    together = replicas.sum_over_replicas([tf.concat(vectors, 0)])[0]
    return tf.split(together, [vector.shape[0] for vector in vectors])


def batch_norm(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *, axis: int, epsilon: float, mask: tf.Tensor | None
) -> tuple[tf.Tensor, BatchMoments]:
    """Normalizes as `accumops.ops.batch_norm` does, but by the moments of all replicas' batches, in plain TensorFlow.

    Every replica has to call it, and to take gradients if one does: gradients flow through the pooled moments.
    """
    dtype = statistics_dtype(x.dtype)
    axis %= x.shape.rank
    others = [i for i in range(x.shape.rank) if i != axis]
    values = tf.cast(x, dtype)
    valid = None if mask is None else mask[..., tf.newaxis]

    def total(each: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(each if valid is None else tf.where(valid, each, tf.zeros_like(each)), others)

    def spread(channels: tf.Tensor) -> tf.Tensor:
        return tf.reshape(channels, [-1 if i == axis else 1 for i in range(x.shape.rank)])

    own = tf.size(x) // tf.shape(x)[axis] if mask is None else tf.reduce_sum(tf.cast(mask, tf.int32))
    count, sums = replicas.sum_over_replicas([tf.cast(own, dtype), total(values)])
    mean = tf.math.divide_no_nan(sums, count)
    distance = values - spread(mean)
    variance = tf.math.divide_no_nan(replicas.sum_over_replicas([total(distance**2)])[0], count)
    scale = tf.math.rsqrt(variance + tf.constant(epsilon, dtype))
    if gamma is not None:
        scale *= tf.cast(gamma, dtype)
    y = distance * spread(scale)
    if beta is not None:
        y += spread(tf.cast(beta, dtype))
    whole, mean, variance = (tf.stop_gradient(each) for each in (count, mean, variance))
    return tf.cast(y, x.dtype), BatchMoments(tf.cast(whole, tf.int64), mean, tf.zeros_like(mean), variance)
