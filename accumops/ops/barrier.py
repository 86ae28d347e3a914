"""A barrier that computations are not moved or merged across."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from accumops.ops import library, reference


def barrier(tensors: Sequence[tf.Tensor], after: Sequence[tf.Tensor] = ()) -> list[tf.Tensor]:
    """Returns the same tensors, once all inputs are there, and so that no compiler takes them for the same.

    What is computed from the results is computed again, although it has been computed from `tensors` before, and not
    before the tensors in `after` are known. Recomputation rests on this. XLA finds common subexpressions, and would
    otherwise keep what was to be computed again; TensorFlow would compute it at once, long before it is needed.

    Nothing is copied. Gradients pass through unchanged.

    Args:
        tensors: Tensors of any shapes and dtypes; under XLA, no variants or resources.
        after: Tensors to wait for.

    Returns:
        A list of the tensors.

    Raises:
        TypeError: If `tensors` or `after` is a single tensor instead of a sequence.

    Example:

    >>> x = tf.constant([1.0, 2.0])
    >>> (y,) = accumops.ops.barrier([x], after=[tf.reduce_sum(x)])
    >>> y.numpy()
    array([1., 2.], dtype=float32)
    """
    for name, given in (("tensors", tensors), ("after", after)):
        if tf.is_tensor(given):
            raise TypeError(f"`{name}` must be a list of tensors. Received: {given!r}")
    tensors, after = ([tf.convert_to_tensor(each) for each in given] for given in (tensors, after))
    if not tensors:
        return []
    fused = library.fused_ops([*tensors, *after])
    if fused is None:
        return reference.barrier(tensors, after)
    return list(fused.accum_ops_barrier(tensors=tensors, after=after))


@tf.RegisterGradient("AccumOps>Barrier")
def _barrier_gradient(op: Any, *gradients: tf.Tensor) -> list[tf.Tensor | None]:
    return [*gradients, *(None for _ in op.inputs[len(gradients) :])]
