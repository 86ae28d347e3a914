"""The means of single outputs' losses, weighted as that of the total.

Keras takes for the weight of a batch its size, where the graph knows it, and else 1.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

# Of each replica's thread its own, as replicas take turns where they communicate.
_SAMPLES: contextvars.ContextVar[tf.Tensor | None] = contextvars.ContextVar("samples", default=None)


@contextlib.contextmanager
def weighted_by(samples: tf.Tensor, model: keras.Model) -> Iterator[None]:
    """Has the losses that `model.compute_loss` reports of its outputs count as a number of samples.

    Args:
        samples: How many there are, a scalar. What is reported of none counts as nothing, whatever it is.
        model: The model, compiled.
    """
    losses = getattr(model, "_compile_loss", None)
    if losses is not None:
        _replace_updates(losses)
    token = _SAMPLES.set(samples)
    try:
        yield
    finally:
        _SAMPLES.reset(token)


def _replace_updates(losses: Any) -> None:
    """Does so once, beside what Keras tracks; the metrics are made when a loss is first computed."""

    def build(*structures: Any) -> None:
        type(losses).build(losses, *structures)
        _replace_updates(losses)

    if not losses.built:
        vars(losses).setdefault("build", build)
    for metric in losses.metrics:
        vars(metric).setdefault("update_state", _update_of(metric))


def _update_of(metric: keras.metrics.Metric) -> Any:
    def update_state(value: tf.Tensor, sample_weight: Any = None) -> Any:
        samples = _SAMPLES.get()
        if samples is not None:
            value, sample_weight = tf.where(samples > 0, value, tf.zeros_like(value)), samples
        return type(metric).update_state(metric, value, sample_weight=sample_weight)

    return update_state
