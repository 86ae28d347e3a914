"""How the gradients of a micro-batch are added to accumulators, in one operation."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops import ops
from accumops.window.micro_batch import MicroBatch
from accumops.window.squared_norms import SquaredNorms, joined


@dataclasses.dataclass(frozen=True)
class Found:
    """What the accumulate op has found in gradients."""

    finite: tf.Tensor | None
    """If a window is to be dropped for it, whether they are finite; otherwise None."""
    norms: SquaredNorms | None
    """Their squared norms, and those of the sums, if somebody asks."""


def together(found: Sequence[Found]) -> Found:
    """Returns what several operations have found."""
    flags = [each.finite for each in found if each.finite is not None]
    norms = joined([each.norms for each in found if each.norms is not None])
    return Found(tf.reduce_all(flags) if flags else None, norms)


def add_gradients(
    accumulators: Sequence[tf.Variable | keras.Variable],
    batch: MicroBatch,
    positions: Sequence[int],
    scale: tf.Tensor,
    *,
    overwrite: bool | tf.Tensor,
    check_finite: bool,
    norms: bool | tf.Tensor,
    only_if: tf.Tensor | None = None,
) -> Found:
    """Adds the gradients of a micro-batch at some positions to their accumulators.

    Args:
        accumulators: All accumulators.
        batch: The micro-batch.
        positions: The positions.
        scale: The factor for the gradients.
        overwrite: Whether the accumulators' own values count for nothing.
        check_finite: Whether to look if the gradients are finite.
        norms: Whether to report squared norms.
        only_if: Whether to add anything, as for `ops.accumulate`.
    """
    gradients = [batch.gradients[i] for i in positions]
    reports = ops.accumulate(
        [accumulators[i] for i in positions],
        [
            _no_change(accumulators[i]) if gradient is None else gradient
            for i, gradient in zip(positions, gradients, strict=True)
        ],
        scale=scale,
        overwrite=overwrite,
        touched_rows=[batch.touched_rows[i] for i in positions],
        check_finite=check_finite,
        squared_norms=norms,
        only_if=only_if,
    )
    if norms is False:
        return Found(reports, None)
    finite, squares = reports if isinstance(reports, tuple) else (None, reports)
    dense = [i for i, each in enumerate(gradients) if each is not None and not isinstance(each, tf.IndexedSlices)]
    if len(dense) < len(positions):
        squares = tf.gather(squares, tf.constant(dense, tf.int32), axis=1)
    return Found(finite, SquaredNorms([positions[i] for i in dense], squares))


def as_gradient(
    gradient: tf.Tensor | tf.IndexedSlices | None, accumulator: keras.Variable
) -> tf.Tensor | tf.IndexedSlices | None:
    """Returns the gradient in a dtype that the ops add: as with Keras's optimizers, any number will do."""
    if gradient is None:
        return None
    sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.convert_to_tensor(gradient.values if sparse else gradient)
    added = (tf.float16, tf.bfloat16, tf.float32, tf.as_dtype(accumulator.dtype))
    if values.dtype in added or not (values.dtype.is_floating or values.dtype.is_integer):
        return gradient if sparse else values
    values = tf.cast(values, accumulator.dtype)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape) if sparse else values


def check_gradients(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
    names: Sequence[str],
    accumulators: Sequence[keras.Variable],
    owner: str,
) -> None:
    """Checks that the gradients of a micro-batch fit the accumulators.

    Args:
        gradients: The gradients.
        names: The names of the variables.
        accumulators: One for each variable.
        owner: What the accumulators belong to, for messages.

    Raises:
        ValueError: If they do not.
    """
    if len(gradients) != len(accumulators):
        raise ValueError(f"{owner} was built for {len(accumulators)} variables. Received: {len(gradients)} gradients.")
    if all(gradient is None for gradient in gradients):
        raise ValueError(f"No gradients provided for any variable: {list(names)}.")
    for name, accumulator, gradient in zip(names, accumulators, gradients, strict=True):
        shape = getattr(gradient, "shape", None)
        if shape is not None and not tf.TensorShape(shape).is_compatible_with(accumulator.shape):
            raise ValueError(
                f"The gradient of '{name}' must have its shape, {tuple(accumulator.shape)}. "
                f"Received: {tf.TensorShape(shape)}."
            )


def _no_change(accumulator: tf.Variable | keras.Variable) -> tf.Tensor | tf.IndexedSlices:
    """Returns a gradient of no rows: it costs nothing to add, and still clears the accumulator of a new window."""
    if len(accumulator.shape) == 0:
        return tf.zeros([], accumulator.dtype)
    values = tf.zeros([0, *accumulator.shape[1:]], accumulator.dtype)
    return tf.IndexedSlices(values, tf.zeros([0], tf.int32))
