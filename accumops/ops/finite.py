"""Whether all values of tensors are finite."""

from collections.abc import Sequence

import tensorflow as tf

from accumops.ops import library
from accumops.ops.update import squared_norms

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def all_finite(tensors: Sequence[tf.Tensor | tf.IndexedSlices]) -> tf.Tensor:
    """Returns whether tensors hold neither Inf nor NaN, from one pass over all of them.

    In the fused op it is the pass of `squared_norms`, whose float64 sums are finite exactly if all values are. The
    square of a float64 can overflow, so float64 tensors are looked at by plain TensorFlow.

    Args:
        tensors: Tensors or `tf.IndexedSlices` of float16, bfloat16, float32 or float64, of any shapes.

    Returns:
        A bool scalar; True if there are no tensors.

    Raises:
        TypeError: If a tensor is not of one of those dtypes.

    Example:

    >>> bool(accumops.ops.all_finite([tf.constant([3.0, 4.0]), tf.constant(float("nan"))]))
    False
    """
    values = [each.values if isinstance(each, tf.IndexedSlices) else tf.convert_to_tensor(each) for each in tensors]
    for i, each in enumerate(values):
        if each.dtype not in _DTYPES:
            raise TypeError(
                f"`tensors[{i}]` must be of float16, bfloat16, float32 or float64. Received: {each.dtype.name}"
            )
    narrow = [each for each in values if each.dtype != tf.float64]
    in_one_pass = bool(narrow) and library.fused_ops(narrow) is not None
    sums = [squared_norms(narrow)] if in_one_pass else narrow
    wide = [each for each in values if each.dtype == tf.float64]
    checks = [tf.reduce_all(tf.math.is_finite(each)) for each in (*sums, *wide)]
    return tf.reduce_all(tf.stack(checks)) if checks else tf.constant(True)
