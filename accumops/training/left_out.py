"""Takes back what a pass over a micro-batch has moved in a model, if the micro-batch turns out not to count."""

from collections.abc import Container
from typing import Any

import tensorflow as tf

from accumops.adapters.keras_layer import layers_within
from accumops.adapters.keras_model import loss_tracker
from accumops.ops.variables import tf_variable
from accumops.window import replicas


class Undo:
    """Remembers what the variables are that a pass moves: running statistics, open windows of them, and metrics.

    Seeds and other integers go on. Frozen layers move nothing, and are not looked at; neither are the running
    statistics of layers that follow the model's windows, which move where a window ends. Make it before the pass.

    Args:
        model: The `GradientAccumulateModel`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        moved = [*_statistics(model), *_metrics(model)]
        self._before = {id(variable): tf.identity(variable) for variable in moved}

    def unless(self, counts: tf.Tensor, but: Container[int] = ()) -> None:
        """Gives the variables their values back if `counts`, a bool scalar, is False.

        Args:
            counts: Whether the pass counts.
            but: The ids of variables that the pass has not moved.
        """
        for variable in _statistics(self._model):
            if id(variable) in self._before and id(variable) not in but:
                variable.assign(tf.where(counts, variable, self._before[id(variable)]))
        for variable in _metrics(self._model):
            # A metric may make its variables when it is called, and starts from zeros.
            before = self._before.get(id(variable), tf.zeros_like(variable))
            variable.assign(tf.where(counts, variable, before))


def _statistics(model: Any) -> list[tf.Variable]:
    """The variables of layers that a pass may move; under a strategy those of the replica that runs."""
    members = model.optimizer.accumulator.state.members
    windows = {layer: members.window_of(layer) for layer in model.normalizations() if layer.built}
    following = [layer for layer, window in windows.items() if window is not None]
    still = [layer for layer in layers_within(model) if not layer.trainable] + following
    unmoved = {id(variable) for layer in still for variable in layer.variables}
    moving = [
        replicas.own(variable)
        for variable in model.non_trainable_variables
        if id(variable) not in unmoved and tf.as_dtype(variable.dtype).is_floating
    ]
    return moving + [
        tf_variable(variable) for layer in following for part, _ in windows[layer].parts() for variable in part
    ]


def _metrics(model: Any) -> list[tf.Variable]:
    """The variables of metrics, except the mean of the loss, which moves after the pass."""
    others = [metric for metric in model.metrics if metric is not loss_tracker(model)]
    return [replicas.own(variable) for metric in others for variable in metric.variables]
