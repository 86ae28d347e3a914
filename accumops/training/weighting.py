"""How a micro-batch is weighed: its share, which is what it counts for in the mean over its window.

A loss that is a mean divides by something: samples, valid positions of a mask, a sum of weights. The window's gradient
is the large batch's if each micro-batch counts by what its own mean has divided by. With `normalization="auto"` that
number is found from each loss as it is called:

reduction of the loss                     divides by
"sum_over_batch_size", "mean"             samples; if the predictions or the loss have a mask (a layer's mask,
                                          `ignore_class`), its valid positions
"mean_with_sample_weight"                 the sum of sample weights, at valid positions if there is a mask; without
                                          sample weights as above

So a ragged window, whose micro-batches differ in size, is exact. If the losses of several outputs divide by different
numbers, no share is exact for all of them, and the first step says so. Losses that are sums over samples
(reduction="sum") are added up: their micro-batches all count 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_losses import LossCall
from accumops.adapters.keras_model import mask_of

Normalization = Callable[[Any, Any, Any], tf.Tensor]
"""A user's own share: `(x, y, sample_weight) -> scalar`."""

NORMALIZATIONS = ("auto", "samples", "steps", "weights")


def count_samples(x: Any, y: Any = None) -> tf.Tensor:
    """The number of samples in a batch, by the first of its targets: an input may be no batch."""
    leaves = [leaf for leaf in (*keras.tree.flatten(y), *keras.tree.flatten(x)) if leaf is not None]
    return tf.shape(leaves[0])[0]


def share_of(
    normalization: str | Normalization,
    calls: Sequence[LossCall],
    *,
    samples: tf.Tensor,
    x: Any,
    y: Any,
    sample_weight: Any,
    dtype: tf.DType,
    on_replica: bool,
) -> float | tf.Tensor:
    """Returns the share of a micro-batch in its window.

    Args:
        normalization: One of `NORMALIZATIONS`, or a callable.
        calls: What the losses of the micro-batch were called with.
        samples: The number of samples of the micro-batch, a scalar.
        x: Its inputs.
        y: Its targets.
        sample_weight: Its sample weights, or None.
        dtype: The dtype to count in.
        on_replica: Whether it is the part of one replica, which may have no samples; its share is 0 then, whatever
            `normalization` says.

    Raises:
        ValueError: If `normalization` is `"auto"` and the losses divide by different numbers, or `"weights"` and there
            are several losses.
    """
    if callable(normalization):
        share = tf.cast(normalization(x, y, sample_weight), dtype)
    elif normalization == "steps" or (calls and reduction_of(calls[0].loss) == "sum"):
        share = 1.0
    elif normalization == "samples":
        share = tf.cast(samples, dtype)
    else:
        if normalization == "weights" and len(calls) > 1:
            raise ValueError(
                "normalization='weights' needs a model with one output, whose loss has one denominator. Received: "
                f"{len(calls)} outputs. Use normalization='samples' or a callable."
            )
        share = common_divisor(calls, dtype)
        share = tf.cast(samples, dtype) if share is None else share
    return tf.where(samples > 0, tf.cast(share, dtype), tf.zeros([], dtype)) if on_replica else share


class _Divisor(NamedTuple):
    """What the mean of a loss divides by: samples, if there are neither masks nor weights."""

    masks: tuple[tf.Tensor, ...] = ()
    """The masks whose valid positions count. They are kept so that no other mask takes the identity of one."""
    weights: tf.Tensor | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """The same for losses that divide by the same number."""
        return tuple(id(each) for each in (*self.masks, self.weights))

    @property
    def description(self) -> str:
        """What it is, for messages."""
        if self.weights is not None:
            return "the sum of its sample weights" + (" at valid positions" if self.masks else "")
        return "the valid positions of its mask" if self.masks else "samples"

    def value(self, dtype: tf.DType) -> tf.Tensor | None:
        """The number, in a dtype; None for samples."""
        weights = None if self.weights is None else tf.cast(self.weights, dtype)
        if not self.masks:
            return None if weights is None else tf.reduce_sum(weights)
        valid = functools.reduce(tf.logical_and, [tf.cast(mask, tf.bool) for mask in self.masks])
        counted = tf.cast(valid, dtype)
        return tf.reduce_sum(counted if weights is None else _of_one_rank(weights, counted))


def common_divisor(calls: Sequence[LossCall], dtype: tf.DType) -> tf.Tensor | None:
    """What all losses divide by; None if they divide by samples."""
    divisors = [_divisor_of(call) for call in calls]
    if len({divisor.key for divisor in divisors}) > 1:
        each = [f"'{call.output}' by {divisor.description}" for call, divisor in zip(calls, divisors, strict=True)]
        raise ValueError(
            f"The losses of this model's outputs divide by different numbers: {'; '.join(each)}. No weight of a "
            "micro-batch makes all of them the large batch's mean. With `micro_batch_size`, loss_over='window' gives "
            "the loss of the whole batch, exactly. Or choose a weight: normalization='samples' weighs micro-batches by "
            "their samples, which is exact for equal counts only, and a callable `(x, y, sample_weight) -> scalar` by "
            "what you count."
        )
    return divisors[0].value(dtype) if divisors else None


def _divisor_of(call: LossCall) -> _Divisor:
    """Finds what a loss divides by, as `keras.losses.Loss` does; for a loss with its own `__call__`, samples."""
    loss = call.loss
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        return _Divisor()
    y_true, y_pred = (
        keras.tree.map_structure(lambda leaf: keras.ops.convert_to_tensor(leaf, dtype=loss.dtype), each)
        for each in (call.y_true, call.y_pred)
    )
    # TensorFlow computes the values once: the loss has the same operations.
    masks = (mask_of(call.y_pred), mask_of(loss.call(y_true, y_pred)))
    by_weights = reduction_of(loss) == "mean_with_sample_weight"
    return _Divisor(tuple(mask for mask in masks if mask is not None), call.sample_weight if by_weights else None)


def _of_one_rank(weights: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The product of weights and mask, of which either may lack dimensions at the end."""
    for _ in range(weights.shape.rank - mask.shape.rank):
        weights = tf.squeeze(weights, -1)
    for _ in range(mask.shape.rank - weights.shape.rank):
        weights = weights[..., tf.newaxis]
    return weights * mask


def check_normalization(normalization: str | Normalization) -> None:
    """Raises if it is neither one of `NORMALIZATIONS` nor a callable."""
    if normalization not in NORMALIZATIONS and not callable(normalization):
        raise ValueError(f"`normalization` must be one of {NORMALIZATIONS} or a callable. Received: {normalization!r}")


def check_losses(loss: Any, normalization: str | Normalization) -> str:
    """Returns whether the losses are means or sums over samples, `"mean"` or `"sum"`.

    Args:
        loss: The loss, or losses, given to `compile`.
        normalization: One of `NORMALIZATIONS`, or a callable.

    Raises:
        ValueError: If no weighted mean, and no sum, of micro-batches is the large batch's loss.
    """
    losses = [each for each in keras.tree.flatten(loss) if each is not None]
    sums = [each for each in losses if reduction_of(each) == "sum"]
    if sums and len(sums) < len(losses):
        raise ValueError(
            f"The loss '{sums[0].name}' is a sum over samples (reduction='sum') and another one is a mean: no window's "
            "gradient is that of both. Give all losses the same kind of reduction, and `loss_weights`."
        )
    if sums and callable(normalization):
        raise ValueError(
            f"The loss '{sums[0].name}' is a sum over samples (reduction='sum'), whose micro-batches are added up: a "
            "callable `normalization` would weigh them. Leave it out."
        )
    for each in losses:
        reduction = reduction_of(each)
        if reduction in (None, "none"):
            raise ValueError(
                f"The reduction of the loss '{each.name}' must be a mean, such as 'sum_over_batch_size', or 'sum': the "
                f"window's gradient is a weighted mean, or the sum, over its micro-batches. Received: {reduction!r}"
            )
        if reduction == "mean_with_sample_weight" and normalization in ("samples", "steps"):
            raise ValueError(
                f"The loss '{each.name}' divides by the sum of sample weights: make the model with "
                f"normalization='auto', or a callable. Received: {normalization!r}"
            )
    return "sum" if sums else "mean"


def reduction_of(loss: Any) -> str:
    """The reduction of a loss; a function's values are averaged."""
    return getattr(loss, "reduction", "sum_over_batch_size")
