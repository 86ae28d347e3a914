"""How a micro-batch is weighed: its share, which is what it counts for in the mean over its window.

A loss that is a mean divides by something: samples, valid positions, a sum of weights. The window's gradient is the
large batch's if each micro-batch counts by what its own mean has divided by. So a ragged window, whose micro-batches
differ in size, is exact with `normalization="samples"`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_model import mask_of

Normalization = Callable[[Any, Any, Any], tf.Tensor]
"""A user's own share: `(x, y, sample_weight) -> scalar`."""

NORMALIZATIONS = ("samples", "steps", "weights")


def count_samples(x: Any) -> tf.Tensor:
    """The number of samples in a batch, by the first of its tensors."""
    return tf.shape(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))[0]


def share_of(
    normalization: str | Normalization,
    loss: Any,
    *,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    on_replica: bool,
) -> float | tf.Tensor:
    """Returns the share of a micro-batch in its window.

    Args:
        normalization: One of `NORMALIZATIONS`, or a callable.
        loss: The loss that the model was compiled with.
        x: The inputs of the micro-batch.
        y: Its targets.
        y_pred: The model's outputs.
        sample_weight: Its sample weights, or None.
        on_replica: Whether it is the part of one replica, which may have no samples; its share is 0 then, whatever
            `normalization` says.
    """
    samples = count_samples(x)
    if callable(normalization):
        share = tf.cast(normalization(x, y, sample_weight), tf.float32)
    elif normalization == "steps":
        share = 1.0
    elif normalization == "samples":
        share = tf.cast(samples, tf.float32)
    else:
        share = _denominator(loss, y_pred, sample_weight, samples)
    return tf.where(samples > 0, tf.cast(share, tf.float32), 0.0) if on_replica else share


def _denominator(loss: Any, y_pred: Any, sample_weight: Any, samples: tf.Tensor) -> tf.Tensor:
    """What the loss's mean divides by: valid positions of the predictions' mask, sum of weights, or samples."""
    outputs = keras.tree.flatten(y_pred)
    if len(outputs) != 1:
        raise ValueError(
            "normalization='weights' needs a model with one output, whose loss has one denominator. Received: "
            f"{len(outputs)} outputs. Use normalization='samples' or a callable."
        )
    mask = mask_of(outputs[0])
    share = None if mask is None else tf.cast(mask, tf.float32)
    by_weights = _reduction(next(iter(keras.tree.flatten(loss)), None)) == "mean_with_sample_weight"
    if by_weights and sample_weight is not None:
        weights = tf.cast(keras.tree.flatten(sample_weight)[0], tf.float32)
        if share is None:
            share = weights
        else:
            missing = share.shape.rank - weights.shape.rank
            share *= tf.reshape(weights, tf.concat([tf.shape(weights), [1] * missing], axis=0))
    return tf.cast(samples, tf.float32) if share is None else tf.reduce_sum(share)


def check_normalization(normalization: str | Normalization) -> None:
    """Raises if it is neither one of `NORMALIZATIONS` nor a callable."""
    if normalization not in NORMALIZATIONS and not callable(normalization):
        raise ValueError(f"`normalization` must be one of {NORMALIZATIONS} or a callable. Received: {normalization!r}")


def check_losses(loss: Any, normalization: str | Normalization) -> None:
    """Raises if no share makes a weighted mean of micro-batches the large batch's loss.

    Args:
        loss: The loss, or losses, given to `compile`.
        normalization: One of `NORMALIZATIONS`, or a callable.
    """
    for each in keras.tree.flatten(loss):
        reduction = _reduction(each)
        if reduction in (None, "none", "sum"):
            raise ValueError(
                f"The reduction of the loss '{each.name}' must be a mean, such as 'sum_over_batch_size': the window's "
                f"gradient is a weighted mean over its micro-batches. Received: {reduction!r}"
            )
        if reduction == "mean_with_sample_weight" and normalization in ("samples", "steps"):
            raise ValueError(
                f"The loss '{each.name}' divides by the sum of sample weights: make the model with "
                f"normalization='weights', or a callable. Received: {normalization!r}"
            )


def _reduction(loss: Any) -> str:
    return getattr(loss, "reduction", "sum_over_batch_size")
