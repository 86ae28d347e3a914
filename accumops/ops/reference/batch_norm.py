"""The definitions of batch normalization."""

import tensorflow as tf


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of the statistics of `dtype` data: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def batch_norm(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *, axis: int, epsilon: float, mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Defines `accumops.ops.batch_norm`. Returns y, count, mean, rest and variance.

    `gamma` and `beta` must be tensors, and `axis` must not be negative. Nothing is checked.
    """
    values = tf.cast(x, statistics_dtype(x.dtype))
    others = [i for i in range(x.shape.rank) if i != axis]
    places = tf.fill(tf.gather(tf.shape(x), tf.constant(others, tf.int32)), True) if mask is None else mask
    count = tf.math.count_nonzero(places)
    included = tf.expand_dims(places, axis)

    def mean_of(values: tf.Tensor) -> tf.Tensor:
        # Sum in float64: TensorFlow adds one value after another, and a float32 sum would stop growing.
        total = tf.reduce_sum(tf.cast(tf.where(included, values, 0), tf.float64), others)
        return tf.cast(tf.math.divide_no_nan(total, tf.cast(count, tf.float64)), values.dtype)

    mean = tf.stop_gradient(mean_of(values))
    rest = mean_of(values - _spread(mean, x, axis))
    distance = values - _spread(mean, x, axis) - _spread(rest, x, axis)
    variance = mean_of(distance**2)
    inverse = tf.math.rsqrt(variance + tf.constant(epsilon, variance.dtype))
    y = distance * _spread(inverse * gamma, x, axis) + _spread(beta, x, axis)
    return tf.cast(y, x.dtype), count, mean, tf.stop_gradient(rest), tf.stop_gradient(variance)


def batch_norm_inference(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    axis: int,
    epsilon: float,
) -> tf.Tensor:
    """Defines `accumops.ops.batch_norm_inference`.

    `gamma` and `beta` must be tensors, and `axis` must not be negative. Nothing is checked.
    """
    scale = gamma * tf.math.rsqrt(variance + tf.constant(epsilon, variance.dtype))
    values = tf.cast(x, statistics_dtype(x.dtype)) - _spread(mean, x, axis)
    return tf.cast(values * _spread(scale, x, axis) + _spread(beta, x, axis), x.dtype)


def _spread(channels: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """Returns the values of the channels in a shape that broadcasts with `x`."""
    return tf.reshape(channels, [-1 if i == axis else 1 for i in range(x.shape.rank)])
