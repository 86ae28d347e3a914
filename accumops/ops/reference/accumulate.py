"""The definitions of accumulation and of squared norms."""

import math
from collections.abc import Sequence

import tensorflow as tf


def accumulate(
    accumulators: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    *,
    scale: float | tf.Tensor = 1.0,
    overwrite: bool | tf.Tensor = False,
    touched_rows: Sequence[tf.Variable | None] | None = None,
    check_finite: bool = False,
    squared_norms: bool | tf.Tensor = False,
    only_if: tf.Tensor | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    """Defines `accumops.ops.accumulate`. It takes the same arguments and does not check them.

    A scale that is 0 in the accumulator's dtype adds nothing, whatever the gradients hold, and touches no row.
    """

    def add() -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
        flags = touched_rows or [None] * len(accumulators)
        finite = []
        norms = []
        with tf.control_dependencies(_check_indices(accumulators, gradients)):
            for accumulator, gradient, touched in zip(accumulators, gradients, flags, strict=True):
                values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
                if check_finite:
                    finite.append(tf.reduce_all(tf.math.is_finite(values)))
                # Convert a number straight to this dtype: TensorFlow would first make it a float32.
                factor = (
                    tf.cast(scale, accumulator.dtype) if tf.is_tensor(scale) else tf.constant(scale, accumulator.dtype)
                )
                # Not a plain product: 0 * Inf is NaN.
                product = tf.math.multiply_no_nan(tf.cast(values, accumulator.dtype), factor)
                if isinstance(gradient, tf.IndexedSlices):
                    _accumulate_rows(accumulator, product, gradient.indices, overwrite, touched, factor != 0)
                else:
                    accumulator.assign(tf.where(overwrite, product, accumulator + product))
                if squared_norms is not False:
                    norms.append(_norms_beside(gradient, accumulator, squared_norms))
        all_finite = (tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)) if check_finite else None
        if squared_norms is False:
            return all_finite
        return _report(all_finite, tf.transpose(tf.stack(norms)) if norms else tf.zeros([2, 0], tf.float64))

    if only_if is None:
        return add()
    finite = tf.constant(True) if check_finite else None
    norms = None if squared_norms is False else tf.fill([2, len(accumulators)], tf.constant(math.nan, tf.float64))
    return tf.cond(only_if, add, lambda: _report(finite, norms))


def _report(all_finite: tf.Tensor | None, norms: tf.Tensor | None) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    """What `accumulate` returns: each of the two that there is."""
    if all_finite is None or norms is None:
        return all_finite if norms is None else norms
    return all_finite, norms


def _norms_beside(
    gradient: tf.Tensor | tf.IndexedSlices, accumulator: tf.Variable, wanted: bool | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The squared norms of a gradient and of its accumulator, where they are wanted; of rows they are not known."""
    unknown = tf.constant(float("nan"), tf.float64)
    if isinstance(gradient, tf.IndexedSlices):
        return unknown, unknown
    if wanted is True:
        return _squared_norm(gradient), _squared_norm(accumulator)
    norms = tf.cond(wanted, lambda: (_squared_norm(gradient), _squared_norm(accumulator)), lambda: (unknown, unknown))
    return norms[0], norms[1]


def _check_indices(
    accumulators: Sequence[tf.Variable], gradients: Sequence[tf.Tensor | tf.IndexedSlices]
) -> list[tf.Operation]:
    """Asserts that each index is a row of its accumulator, so that a wrong one fails before anything is written.

    On a GPU there is no assertion: TensorFlow's scatters skip an index out of range there.
    """
    checks = []
    for accumulator, gradient in zip(accumulators, gradients, strict=True):
        if isinstance(gradient, tf.IndexedSlices) and "GPU" not in (accumulator.device or ""):
            rows = tf.cast(accumulator.shape[0], gradient.indices.dtype)
            message = f"An index is not a row of '{accumulator.name}', which has {accumulator.shape[0]} rows."
            checks.append(tf.debugging.assert_non_negative(gradient.indices, message=message))
            checks.append(tf.debugging.assert_less(gradient.indices, rows, message=message))
    return [check for check in checks if check is not None]


def _accumulate_rows(
    accumulator: tf.Variable,
    values: tf.Tensor,
    indices: tf.Tensor,
    overwrite: bool | tf.Tensor,
    touched: tf.Variable | None,
    counts: tf.Tensor,
) -> None:
    def clear() -> tf.Tensor:
        accumulator.assign(tf.zeros_like(accumulator))
        if touched is not None:
            touched.assign(tf.zeros_like(touched))
        return tf.constant(0)

    tf.cond(tf.convert_to_tensor(overwrite), clear, lambda: tf.constant(0))
    # Sum duplicates first, in an op that keeps to an order: in TensorFlow's scatter threads race for a row.
    rows, positions = tf.unique(indices)
    accumulator.scatter_add(tf.IndexedSlices(tf.math.unsorted_segment_sum(values, positions, tf.size(rows)), rows))
    if touched is not None:
        touched.scatter_update(tf.IndexedSlices(tf.gather(touched, rows) | counts, rows))


def squared_norms(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Defines `accumops.ops.squared_norms`. It takes the same arguments and does not check them."""
    if not tensors:
        return tf.zeros([0], tf.float64)
    return tf.stack([_squared_norm(tensor) for tensor in tensors])


def _squared_norm(tensor: tf.Tensor | tf.Variable) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(tensor, tf.float64) ** 2)
