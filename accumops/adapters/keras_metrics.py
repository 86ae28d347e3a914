"""Metric functions that give one value for a batch, where a batch comes in parts.

Keras makes a `MeanMetricWrapper` of a metric function. It counts a scalar as one value, so that a scalar of each part
would count the same, whatever the part's size. So these metrics get an `update_state` that keeps scalars back within a
block, `scalars_of`. What opens the block has them counted with `count_scalars`, once for the whole batch. Outside of
such a block `update_state` does what Keras's does, and values for each sample pass through it anywhere.

The replacements stay, and a block's values are a context variable, for the reasons in `keras_losses.py`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_model import mask_of
from accumops.adapters.upstream import relies_on, sample

_FEATURE = "metric functions that give one value for a batch"

Scalars = dict[int, list[tf.Tensor]]

_SCALARS: contextvars.ContextVar[Scalars | None] = contextvars.ContextVar("scalars", default=None)


@sample("<a compiled model with metrics>")
def _compiled_model() -> Any:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse", metrics=[keras.losses.mean_squared_error])
    model.compute_metrics(None, tf.zeros([1, 1]), tf.zeros([1, 1]))
    return model


@sample("<a compiled model's metrics>")
def _compiled_metrics() -> Any:
    return _compiled_model()._compile_metrics


@sample("<a metric of a function>")
def _metric_of_a_function() -> Any:
    return keras.metrics.MeanMetricWrapper(keras.losses.mean_squared_error)


@contextlib.contextmanager
def scalars_of(model: keras.Model) -> Iterator[Scalars]:
    """Keeps back what metric functions give for a whole batch, where `model.compute_metrics` is called in a block.

    Args:
        model: The model, compiled.

    Returns:
        The scalars of each such metric, by the metric's identity. `stack` and `count_scalars` take them.
    """
    metrics = _metrics_of(model)
    if metrics is not None:
        _replace(metrics)
    scalars: Scalars = {}
    token = _SCALARS.set(scalars)
    try:
        yield scalars
    finally:
        _SCALARS.reset(token)


def stack(model: keras.Model, scalars: Scalars, samples: tf.Tensor, dtype: tf.DType) -> tf.Tensor | None:
    """Returns scalars times the number of samples that they are of, so that those of several parts add up.

    Args:
        model: The model, whose metrics have given `scalars`.
        scalars: What `scalars_of` has returned for a part of a batch.
        samples: How many samples the part has, a scalar. Scalars of no samples count as nothing, whatever they are.
        dtype: The dtype to count in.

    Returns:
        A vector with an item for each metric that the model was compiled with, 0 for those without scalars; None if
        there are no metrics.
    """
    if number_of_metrics(model) == 0:
        return None
    items = [tf.zeros([], dtype)] * number_of_metrics(model)
    for i, hook in enumerate(_hooks(model)):
        values = scalars.get(id(hook.metric), [])
        hook.calls = len(values)
        if values:
            value = tf.add_n([tf.cast(value, dtype) for value in values])
            value = value if hook.sums else value * tf.cast(samples, dtype)
            items[i] = tf.where(samples > 0, value, tf.zeros([], dtype))
    return tf.stack(items)


def count_scalars(model: keras.Model, vector: tf.Tensor, samples: tf.Tensor) -> None:
    """Updates metrics with their mean over the samples of a batch, which counts once, as Keras counts a batch.

    Args:
        model: The model.
        vector: The sum of what `stack` has returned for all parts of the batch.
        samples: How many samples the batch has, a scalar. A batch without samples counts as nothing.
    """
    for i, hook in enumerate(_hooks(model)):
        if hook.calls:
            value = vector[i] / hook.calls
            value = value if hook.sums else tf.math.divide_no_nan(value, tf.cast(samples, value.dtype))
            hook.count(value, tf.cast(samples > 0, value.dtype) * hook.calls)


@relies_on(
    "<a compiled model's metrics>._user_metrics",
    "<a compiled model's metrics>._user_weighted_metrics",
    feature=_FEATURE,
)
def number_of_metrics(model: keras.Model) -> int:
    """How many metrics a model was compiled with, whether Keras has made them yet or not."""
    metrics = _metrics_of(model)
    if metrics is None:
        return 0
    given = keras.tree.flatten([metrics._user_metrics, metrics._user_weighted_metrics])
    return len([each for each in given if each is not None])


@relies_on("<a compiled model with metrics>._compile_metrics", feature=_FEATURE)
def _metrics_of(model: keras.Model) -> Any:
    return model._compile_metrics


@relies_on(
    "<a compiled model's metrics>.metrics",
    "<a compiled model's metrics>.build(y_true, y_pred)",
    "<a compiled model's metrics>.built",
    feature=_FEATURE,
)
def _replace(metrics: Any) -> None:
    """Replaces the `update_state` of metrics, once. Keras makes them when it first computes them."""

    def build(*structures: Any) -> None:
        type(metrics).build(metrics, *structures)
        _replace(metrics)

    # Straight into `__dict__`: Keras does not track what stands there.
    if not metrics.built:
        vars(metrics).setdefault("build", build)
        return
    for metric in metrics.metrics:
        if type(metric).update_state is keras.metrics.MeanMetricWrapper.update_state:
            vars(metric).setdefault("update_state", _UpdateState(metric))


def _hooks(model: keras.Model) -> "list[_UpdateState]":
    metrics = _metrics_of(model)
    found = [] if metrics is None else [vars(metric).get("update_state") for metric in metrics.metrics]
    return list(dict.fromkeys(each for each in found if isinstance(each, _UpdateState)))


class _UpdateState:
    """The `update_state` of a metric of a function, which keeps scalars back in a block."""

    def __init__(self, metric: keras.metrics.MeanMetricWrapper) -> None:
        self.metric = metric
        self.calls = 0
        """How many scalars a batch gives: one for each output that the metric is of. 0 if its values are of samples."""

    @relies_on(
        "<a metric of a function>._fn(y_true, y_pred)",
        "<a metric of a function>._fn_kwargs",
        feature=_FEATURE,
    )
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        scalars = _SCALARS.get()
        if scalars is None or sample_weight is not None or mask_of(y_pred) is not None:
            return type(self.metric).update_state(self.metric, y_true, y_pred, sample_weight)
        values = self.metric._fn(y_true, y_pred, **self.metric._fn_kwargs)
        if len(getattr(values, "shape", ())) > 0:
            return self.count(values, None)
        scalars.setdefault(id(self.metric), []).append(tf.convert_to_tensor(values))
        return None

    @property
    @relies_on("<a metric of a function>._fn", feature=_FEATURE)
    def sums(self) -> bool:
        """Whether the function is a loss that sums over samples."""
        function = self.metric._fn
        return isinstance(function, keras.losses.Loss) and function.reduction == "sum"

    def count(self, values: Any, sample_weight: Any) -> Any:
        """Updates the metric with values of its function."""
        mean: Any = super(keras.metrics.MeanMetricWrapper, self.metric)
        return mean.update_state(values, sample_weight=sample_weight)
