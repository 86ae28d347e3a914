"""One step of a `GradientAccumulateModel` whose window runs layer by layer, for layers with `statistics="window"`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import regularization_losses
from accumops.adapters.keras_losses import following
from accumops.layerwise.micro_batches import Carried, MicroBatches
from accumops.layerwise.pieces import PiecesOfModel
from accumops.layerwise.window import Gradients, LayerwiseWindow
from accumops.memory.slices import Slices
from accumops.training.weighting import count_samples

Weigh = Callable[..., Any]


class LayerwiseStep:
    """Steps of a model whose windows run layer by layer.

    Args:
        model: The `GradientAccumulateModel`, compiled.
        every: As for `PiecesOfModel`.
    """

    def __init__(self, model: Any, every: int) -> None:
        self._model = model
        self._pieces = PiecesOfModel(model.model, lambda x: model(x, training=True), every)

    def train(
        self,
        slices: Slices,
        static_sizes: bool,
        count: Callable[[Any, Any, list[Any], tf.Tensor, tf.Tensor, Carried], tf.Tensor],
        carried: Carried,
    ) -> tuple[tf.Tensor, tf.Tensor, Carried]:
        """Adds the gradients of a batch's micro-batches to the accumulators.

        Args:
            slices: The batch.
            static_sizes: As for `MicroBatches`.
            count: Takes a micro-batch, its outputs, the calls of losses, the loss, what other layers have added to it
                and carried tensors, which it changes. Returns the share.
            carried: The tensors that its first call gets.

        Returns:
            The number of micro-batches, `MicroBatches.left`, and the tensors that the last call of `count` has left.
        """
        model = self._model
        data = MicroBatches(slices, static_sizes)

        def loss(
            data: Any, outputs: Any, losses: Sequence[tf.Tensor], before: tf.Tensor, carried: Carried
        ) -> tuple[tf.Tensor, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            samples = count_samples(x, y)
            with (
                model.with_losses([*regularization_losses(model), *losses]),
                following(samples, model) as calls,
            ):
                value = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
            share = count(data, outputs, calls, value, before, carried)
            scaled = model.optimizer.scale_loss(value)
            factor = tf.cast(model.optimizer.scale_loss(tf.ones([])), tf.float32) * tf.cast(share, tf.float32)
            return tf.math.multiply_no_nan(scaled, tf.cast(share, scaled.dtype)), factor

        def add(gradients: Gradients, variables: Sequence[keras.Variable], starts: tf.Tensor | bool) -> None:
            model.optimizer.accumulate_part(gradients, variables, starts=starts)

        window = LayerwiseWindow(
            self._pieces,
            data,
            lambda each: keras.utils.unpack_x_y_sample_weight(each)[0],
            add,
            model.trainable_variables,
        )
        carried = window.run(loss, carried)
        return data.number, data.left(), carried
