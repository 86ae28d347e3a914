"""Batch normalization: an op that normalizes by the batch's own moments, and one that normalizes by given moments."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.moments import BatchMoments

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def batch_norm(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, BatchMoments]:
    """Normalizes by the batch's own moments: `(x - mean) / sqrt(variance + epsilon) * gamma + beta`.

    The moments come from centred sums, which are merged by Chan's formula: a mean that is much larger than the
    deviation costs no digits. Half precision is computed in float32, without a float32 copy of `x`. `epsilon` is
    rounded to float32. The fused op gives the same bits on every run and number of threads, except within functions
    that XLA compiles. No gradient flows back from the returned moments, and the fused op has no second-order gradient.
    `accumops.ops.reference.batch_norm` is the definition, in plain TensorFlow.

    Args:
        x: A tensor of rank 1 or more, of float16, bfloat16, float32 or float64.
        gamma: A factor for each channel, of shape `[channels]`; None means 1.
        beta: A summand for each channel, of shape `[channels]`; None means 0.
        axis: The axis of the channels.
        epsilon: The number added to the variance, at least 0.
        mask: None, or a bool tensor of `x`'s shape without the last axis. A mask needs the channels in the last axis.
            The moments are computed from the places where the mask is true. All places are normalized.

    Returns:
        The normalized tensor, of `x`'s dtype, and its `BatchMoments`.

    Raises:
        TypeError: If `x` is not of one of these dtypes, or `axis` is not an int.
        ValueError: If a shape does not fit, `axis` is not an axis of `x`, or `epsilon` is negative.

    Example:

    >>> y, moments = accumops.ops.batch_norm(tf.constant([[1.0], [3.0]]), None, None, epsilon=0.0)
    >>> y.numpy().ravel()
    array([-1.,  1.], dtype=float32)
    >>> float(moments.mean[0]), float(moments.variance[0])
    (2.0, 1.0)
    """
    x, axis = _check_array(x, axis)
    gamma, beta = _parameters(x, axis, gamma=gamma, beta=beta)
    _check_epsilon(epsilon)
    if mask is not None:
        if axis != x.shape.rank - 1:
            raise ValueError(f"A mask needs the channels in the last axis. Received: axis={axis} for shape {x.shape}")
        mask = tf.cast(mask, tf.bool)
        if not mask.shape.is_compatible_with(x.shape[:-1]):
            raise ValueError(f"`mask` must be of x's shape without the last axis. Received: {mask.shape} for {x.shape}")
    fused = library.fused_ops([x])
    if fused is None:
        y, *moments = reference.batch_norm(x, gamma, beta, axis=axis, epsilon=epsilon, mask=mask)
        return y, BatchMoments(*moments)
    y, mean, rest, variance, _, count = fused.accum_ops_batch_norm(
        x=x, gamma=gamma, beta=beta, mask=[] if mask is None else [mask], axis=axis, epsilon=epsilon
    )
    return y, BatchMoments(count, *(tf.stop_gradient(each) for each in (mean, rest, variance)))


def batch_norm_inference(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
) -> tf.Tensor:
    """Normalizes by given moments: `(x - mean) / sqrt(variance + epsilon) * gamma + beta`.

    No gradient flows to `mean` and `variance`.

    Args:
        x: As for `batch_norm`.
        gamma: As for `batch_norm`.
        beta: As for `batch_norm`.
        mean: The mean of each channel, of shape `[channels]`.
        variance: The variance of each channel, of shape `[channels]`.
        axis: As for `batch_norm`.
        epsilon: As for `batch_norm`.

    Returns:
        The normalized tensor, of `x`'s dtype.

    Raises:
        TypeError: As `batch_norm` does.
        ValueError: As `batch_norm` does.
    """
    x, axis = _check_array(x, axis)
    gamma, beta, mean, variance = _parameters(x, axis, gamma=gamma, beta=beta, mean=mean, variance=variance)
    _check_epsilon(epsilon)
    mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    fused = library.fused_ops([x])
    if fused is None:
        return reference.batch_norm_inference(x, gamma, beta, mean, variance, axis=axis, epsilon=epsilon)
    if variance.dtype == tf.float64:  # the fused op has a float32 epsilon
        variance += epsilon - float(np.float32(epsilon))
    return fused.accum_ops_batch_norm_inference(
        x=x, gamma=gamma, beta=beta, mean=mean, variance=variance, axis=axis, epsilon=epsilon
    )


@tf.RegisterGradient("AccumOps>BatchNorm")
def _batch_norm_gradient(op: Any, dy: tf.Tensor, *unused: Any) -> list[tf.Tensor | None]:
    x, gamma, _, *mask = op.inputs
    _, mean, rest, _, inverse, count = op.outputs
    return [*_gradient(op, dy, x, gamma, mean, rest, inverse, count, mask), *(None for _ in mask)]


@tf.RegisterGradient("AccumOps>BatchNormInference")
def _batch_norm_inference_gradient(op: Any, dy: tf.Tensor) -> list[tf.Tensor | None]:
    x, gamma, _, mean, variance = op.inputs
    inverse = tf.math.rsqrt(variance + tf.cast(op.get_attr("epsilon"), variance.dtype))
    none = tf.constant(0, tf.int64)
    return [*_gradient(op, dy, x, gamma, mean, tf.zeros_like(mean), inverse, none, []), None, None]


def _gradient(
    op: Any,
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    mean: tf.Tensor,
    rest: tf.Tensor,
    inverse: tf.Tensor,
    count: tf.Tensor,
    mask: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    ops, _ = library.load()
    return ops.accum_ops_batch_norm_grad(  # type: ignore[union-attr]
        dy=dy, x=x, gamma=gamma, mean=mean, rest=rest, inverse=inverse, count=count, mask=mask, axis=op.get_attr("axis")
    )


@tf.RegisterGradient("AccumOps>BatchNormGrad")
def _no_second_gradient(op: Any, *unused: Any) -> NoReturn:
    raise LookupError(
        "The fused batch normalization has no gradient of second order. Use accumops.set_backend('reference')."
    )


def _check_array(x: tf.Tensor, axis: int) -> tuple[tf.Tensor, int]:
    x = tf.convert_to_tensor(x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"`x` must be of float16, bfloat16, float32 or float64. Received: {x.dtype.name}")
    rank = x.shape.rank
    if rank is None:
        raise ValueError("`x` must have a rank that is known.")
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"`axis` must be an int. Received: {axis!r}")
    if not -rank <= axis < rank:
        raise ValueError(f"`axis` must be an axis of x. Received: {axis} for shape {x.shape}")
    return x, axis % rank


def _check_epsilon(epsilon: float) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        raise TypeError(f"`epsilon` must be a number. Received: {epsilon!r}")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"`epsilon` must be finite and not negative. Received: {epsilon}")


def _parameters(x: tf.Tensor, axis: int, **given: tf.Tensor | None) -> list[tf.Tensor]:
    """Checks tensors of shape `[channels]`, casts them to the statistics' dtype, and fills in defaults for None."""
    dtype = reference.statistics_dtype(x.dtype)
    parameters = []
    for name, value in given.items():
        if value is None:
            parameters.append(tf.fill([tf.shape(x)[axis]], tf.constant(0.0 if name == "beta" else 1.0, dtype)))
            continue
        value = tf.cast(value, dtype)
        if not value.shape.is_compatible_with([x.shape[axis]]):
            raise ValueError(
                f"`{name}` must have a value for each channel. The channels are axis {axis} of x, of shape {x.shape}. "
                f"Received shape: {value.shape}"
            )
        parameters.append(value)
    return parameters
