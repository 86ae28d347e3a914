"""Logged losses of single outputs, weighted like the total loss.

Keras weights each batch by its size only if the graph knows the size, else by 1: a ragged last batch then counts like a
full one. So the means in which Keras keeps these losses get an `update_state` that takes the number of samples from a
block around the loss, `weighted_by`, and does what Keras's does outside of such a block.

The replacement stays: it cannot be put back at the end of a block. Replicas of a strategy have a thread each, and one
may be in its block while another leaves its own. So the number of samples is a context variable, one for each thread.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.upstream import relies_on, sample

_SAMPLES: contextvars.ContextVar[tf.Tensor | None] = contextvars.ContextVar("samples", default=None)


@sample("<a compiled model>")
def _compiled_model() -> Any:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model


@sample("<a compiled model's losses>")
def _compiled_losses() -> Any:
    return _compiled_model()._compile_loss


@contextlib.contextmanager
def weighted_by(samples: tf.Tensor, model: keras.Model) -> Iterator[None]:
    """Weights the losses of single outputs that `model.compute_loss` logs by a number of samples.

    Args:
        samples: How many samples there are, a scalar. A loss of no samples counts as nothing, whatever it is.
        model: The model, compiled.
    """
    losses = _losses_of(model)
    if losses is not None:
        _heed_samples(losses)
    token = _SAMPLES.set(samples)
    try:
        yield
    finally:
        _SAMPLES.reset(token)


@relies_on("<a compiled model>._compile_loss", feature="logged losses of single outputs")
def _losses_of(model: keras.Model) -> Any:
    return model._compile_loss


@relies_on(
    "<a compiled model's losses>.metrics",
    "<a compiled model's losses>.build(y_true, y_pred)",
    "<a compiled model's losses>.built",
    feature="logged losses of single outputs",
)
def _heed_samples(losses: Any) -> None:
    """Replaces the `update_state` of the metrics, once. Keras makes the metrics when it first computes a loss."""

    def build(*structures: Any) -> None:
        type(losses).build(losses, *structures)
        _heed_samples(losses)

    # Straight into `__dict__`: Keras does not track what stands there.
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
