"""Adaptive gradient clipping of a list of gradients in one op."""

from collections.abc import Sequence
from typing import Any, NoReturn

import keras
import tensorflow as tf

from accumops.arguments import check_positive
from accumops.ops import library, reference
from accumops.ops.variables import tf_variable


def clip_units(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    weights: Sequence[tf.Tensor | tf.Variable | keras.Variable],
    *,
    clip_factor: float = 0.01,
    epsilon: float = 1e-3,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """Scales each unit of a gradient down whose norm is more than a share of its weights' norm.

    Adaptive gradient clipping (Brock et al., 2021, https://arxiv.org/abs/2102.06171, equation 3), see
    `accumops.AdaptiveGradientClipping`. A unit is all values at one index of the last axis; a vector or scalar is one
    unit. With `limit = clip_factor * max(norm of the weights, epsilon)`, a unit whose gradient has a larger norm is
    multiplied by `limit / norm`. A unit with a value that is not finite stays as it is.

    One fused op does all gradients and weights of float32, with norms in float64. Rows (`tf.IndexedSlices`) and other
    dtypes are done by `accumops.ops.reference.clip_units`, the definition, in plain TensorFlow. The fused op gives the
    same bits on every run and number of threads, except within functions that XLA compiles. It has no gradient.

    Args:
        gradients: Tensors of floating-point dtypes, or `tf.IndexedSlices`. Rows that repeat are clipped by the norm of
            their sum.
        weights: For each gradient the tensor or variable that it belongs to, of the gradient's shape.
        clip_factor: The largest norm of a unit's gradient, as a share of the norm of its weights.
        epsilon: The smallest norm that weights count with.

    Returns:
        The clipped gradients, each of its own dtype and kind.

    Raises:
        ValueError: If the lists differ in length, a gradient's shape or dtype does not fit, or a number is not finite
            or not greater than 0.
        TypeError: If `clip_factor` or `epsilon` is not a number.

    Example:

    >>> clipped = accumops.ops.clip_units([tf.constant([[3.0, 30.0], [4.0, 40.0]])], [tf.ones([2, 2])], clip_factor=10)
    >>> clipped[0].numpy().round(3)
    array([[ 3.   ,  8.485],
           [ 4.   , 11.314]], dtype=float32)
    """
    if len(gradients) != len(weights):
        raise ValueError(f"`weights` must have {len(gradients)} items, one for each gradient. Received: {len(weights)}")
    for name, value in (("clip_factor", clip_factor), ("epsilon", epsilon)):
        check_positive(name, value)
    settings = {"clip_factor": float(clip_factor), "epsilon": float(epsilon)}
    results = [each if isinstance(each, tf.IndexedSlices) else tf.convert_to_tensor(each) for each in gradients]
    for i, (gradient, weight) in enumerate(zip(results, weights, strict=True)):
        _check(f"gradients[{i}]", gradient, weight)
    plain = [
        i
        for i, (gradient, weight) in enumerate(zip(results, weights, strict=True))
        if isinstance(gradient, tf.IndexedSlices) or (gradient.dtype, tf.as_dtype(weight.dtype)) != (tf.float32,) * 2
    ]
    fusible = [i for i in range(len(results)) if i not in plain]
    operands = [*(results[i] for i in fusible), *(tf_variable(weights[i]) for i in fusible)]
    fused = library.fused_ops(operands) if operands else None
    for ways, clip in ((plain, reference.clip_units), (fusible, reference.clip_units if fused is None else _fused)):
        if ways:
            clipped = clip([results[i] for i in ways], [weights[i] for i in ways], **settings)
            for i, each in zip(ways, clipped, strict=True):
                results[i] = each
    return results


def _fused(gradients: Sequence[tf.Tensor], weights: Sequence[Any], **settings: float) -> list[tf.Tensor]:
    ops, _ = library.load()
    values = [tf.convert_to_tensor(weight) for weight in weights]
    return ops.accum_ops_clip_units(gradients=gradients, weights=values, **settings)  # type: ignore[union-attr]


@tf.RegisterGradient("AccumOps>ClipUnits")
def _no_gradient(op: Any, *unused: Any) -> NoReturn:
    raise LookupError(
        "The fused adaptive gradient clipping has no gradient of its own. Use accumops.set_backend('reference')."
    )


def _check(name: str, gradient: tf.Tensor | tf.IndexedSlices, weight: Any) -> None:
    """Raises unless a gradient is one of `weight`, a tensor or a variable."""
    if not tf.is_tensor(weight) or isinstance(weight, tf.Variable | keras.Variable):
        name = f"The gradient of '{getattr(weight, 'path', weight.name)}'"
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    values = gradient.values if is_sparse else gradient
    if not values.dtype.is_floating:
        raise ValueError(f"{name} must be of a floating-point dtype. Received: {values.dtype.name}.")
    shape = tuple(weight.shape)
    wanted = (None, *shape[1:]) if is_sparse else shape
    if not values.shape.is_compatible_with(wanted) or (is_sparse and not shape):
        raise ValueError(
            f"{name} must have its shape, {shape}. "
            f"Received: {'rows of ' if is_sparse else ''}{values.shape[1:] if is_sparse else values.shape}."
        )
