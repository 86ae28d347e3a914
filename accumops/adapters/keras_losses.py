"""The losses of a compiled model: what each is called with, and how its mean in the logs is weighted.

Keras weights the logged loss of an output by the size of each batch only if the graph knows the size, else by 1: a
ragged last batch then counts like a full one. So the means in which Keras keeps these losses get an `update_state` that
takes the number of samples from a block around the loss, `following`. The same block records what each loss is called
with. Outside of such a block, both do what Keras's do.

The replacements stay: they cannot be put back at the end of a block. Replicas of a strategy have a thread each, and one
may be in its block while another leaves its own. So a block's values are a context variable, one for each thread.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.upstream import relies_on, sample


class LossCall(NamedTuple):
    """What the loss of an output was called with."""

    output: str
    """The name of the output, as in the logs."""
    loss: keras.losses.Loss
    y_true: Any
    y_pred: Any
    sample_weight: Any


class _Block(NamedTuple):
    samples: tf.Tensor | None
    calls: list[LossCall]


_BLOCK: contextvars.ContextVar[_Block | None] = contextvars.ContextVar("block", default=None)


@sample("<a compiled model>")
def _compiled_model() -> Any:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    model.compute_loss(None, tf.zeros([1, 1]), tf.zeros([1, 1]))
    return model


@sample("<a compiled model's losses>")
def _compiled_losses() -> Any:
    return _compiled_model()._compile_loss


@contextlib.contextmanager
def following(samples: tf.Tensor | None, model: keras.Model) -> Iterator[list[LossCall]]:
    """Follows the losses that `model.compute_loss` computes within a block.

    Args:
        samples: How many samples there are, a scalar: what the logged losses of single outputs count for. A loss of no
            samples counts as nothing, whatever it is. None leaves the logged losses as they are.
        model: The model, compiled.

    Returns:
        A list that each call of a loss adds an item to.
    """
    losses = _losses_of(model)
    if losses is not None:
        _replace(losses)
    block = _Block(samples, [])
    token = _BLOCK.set(block)
    try:
        yield block.calls
    finally:
        _BLOCK.reset(token)


@relies_on("<a compiled model>._compile_loss", feature="logged losses of single outputs")
def _losses_of(model: keras.Model) -> Any:
    return model._compile_loss


@relies_on(
    "<a compiled model's losses>.metrics",
    "<a compiled model's losses>.build(y_true, y_pred)",
    "<a compiled model's losses>.built",
    "<a compiled model's losses>._flat_losses",
    feature="logged losses of single outputs, and what a micro-batch counts for",
)
def _replace(losses: Any) -> None:
    """Replaces metrics' `update_state` and the losses, once. Keras makes both when it first computes a loss."""

    def build(*structures: Any) -> None:
        type(losses).build(losses, *structures)
        _replace(losses)

    # Straight into `__dict__`: Keras does not track what stands there.
    if not losses.built:
        vars(losses).setdefault("build", build)
        return
    for metric in losses.metrics:
        vars(metric).setdefault("update_state", _update_of(metric))
    losses._flat_losses = [
        each if isinstance(each.loss, _Recorded) else each._replace(loss=_Recorded(each.name, each.loss))
        for each in losses._flat_losses
    ]


class _Recorded:
    """A loss that records what it is called with."""

    def __init__(self, output: str, loss: Any) -> None:
        self._output = output
        self._loss = loss

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        block = _BLOCK.get()
        if block is not None:
            block.calls.append(LossCall(self._output, self._loss, y_true, y_pred, sample_weight))
        return self._loss(y_true, y_pred, sample_weight)


def _update_of(metric: keras.metrics.Metric) -> Any:
    def update_state(value: tf.Tensor, sample_weight: Any = None) -> Any:
        block = _BLOCK.get()
        if block is not None and block.samples is None:
            return None
        if block is not None:
            sample_weight = block.samples
            value = tf.where(sample_weight > 0, value, tf.zeros_like(value))
        return type(metric).update_state(metric, value, sample_weight=sample_weight)

    return update_state
