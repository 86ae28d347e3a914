"""The definition of adaptive gradient clipping."""

from collections.abc import Sequence

import tensorflow as tf


def clip_units(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    weights: Sequence[tf.Tensor | tf.Variable],
    *,
    clip_factor: float,
    epsilon: float,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """Defines `accumops.ops.clip_units`. It takes the same arguments and does not check them."""
    return [_clip(*each, clip_factor, epsilon) for each in zip(gradients, weights, strict=True)]


def _clip(
    gradient: tf.Tensor | tf.IndexedSlices, weights: tf.Tensor | tf.Variable, clip_factor: float, epsilon: float
) -> tf.Tensor | tf.IndexedSlices:
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.convert_to_tensor(gradient.values if is_sparse else gradient)
    weights = tf.convert_to_tensor(weights)
    dtype = tf.float64 if tf.float64 in (values.dtype, weights.dtype) else tf.float32
    axes = list(range(weights.shape.rank - 1)) if weights.shape.rank >= 2 else None
    scale, norm = _scaled_norm(weights, axes, dtype)
    limit = tf.constant(clip_factor, dtype) * tf.maximum(scale * norm, tf.constant(epsilon, dtype))
    scale, norm = _scaled_norm(values, axes, dtype, gradient.indices if is_sparse else None)
    # False for a norm that is not a number: a unit that is not finite stays as it is.
    exceeds = scale * norm > limit
    clipped = tf.where(exceeds, tf.cast(tf.cast(values, dtype) / scale * (limit / norm), values.dtype), values)
    return tf.IndexedSlices(clipped, gradient.indices, gradient.dense_shape) if is_sparse else clipped


def _scaled_norm(
    values: tf.Tensor, axes: list[int] | None, dtype: tf.DType, indices: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the largest magnitude of each unit, 1 for a unit of zeros, and the unit's norm divided by it.

    So no square overflows. The norm of a unit with a value that is not finite is not a number. With `indices`, rows of
    the same index are summed first.
    """
    values = tf.cast(values, dtype)
    largest = tf.reduce_max(tf.abs(values), axis=axes, keepdims=True)
    scale = tf.where(largest > 0, largest, tf.ones_like(largest))
    scaled = values / scale
    if indices is not None:
        # As many segments as rows, a number that XLA knows. Segments without rows add zero.
        scaled = tf.math.unsorted_segment_sum(scaled, tf.unique(indices).idx, tf.shape(indices)[0])
    return scale, tf.sqrt(tf.reduce_sum(tf.square(scaled), axis=axes, keepdims=True))
