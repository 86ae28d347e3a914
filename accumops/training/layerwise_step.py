"""One step of a `GradientAccumulateModel` whose window runs layer by layer, for layers with `statistics="window"`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import regularization_losses
from accumops.adapters.keras_losses import following
from accumops.layerwise.micro_batches import Carried, MicroBatches
from accumops.layerwise.pieces import PiecesOfModel, couples
from accumops.layerwise.window import Gradients, LayerwiseWindow
from accumops.memory.slices import Slices
from accumops.training.weighting import count_samples

Count = Callable[[Any, Any, list[Any], tf.Tensor, tf.Tensor, Carried], tf.Tensor]


def layerwise_step(model: Any) -> "LayerwiseStep | None":
    """Returns the steps of a compiled model, or None if none of its layers needs its windows layer by layer.

    Raises:
        ValueError: If one does, and the model cannot train so; with the layer's name.
    """
    layers = [layer for layer in model.normalizations() if couples(layer)]
    if not layers or model.micro_batch_size is None:
        return None
    what = f"The layer '{layers[0].name}' has statistics='window'"
    if model.finds_micro_batch:
        raise ValueError(
            f"{what}, and micro_batch_size='auto' measures micro-batches by themselves: give a number of samples."
        )
    if model.parallel_micro_batches > 1:
        raise ValueError(f"{what}, whose micro-batches run one after another: leave out `parallel_micro_batches`.")
    if model.nonfinite == "skip":
        raise ValueError(
            f"{what}, so that all samples of a window depend on each other, and none can be left out as "
            "nonfinite='skip' does. Use nonfinite='drop', which leaves out the window."
        )
    step = LayerwiseStep(model)
    if model.model.built:
        step.prepare()
    return step


class LayerwiseStep:
    """Steps of a model whose windows run layer by layer.

    Args:
        model: The `GradientAccumulateModel`, compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pieces: PiecesOfModel | None = None

    def prepare(self) -> PiecesOfModel:
        """Returns the model in pieces.

        Raises:
            ValueError: If it cannot be cut.
        """
        if self._pieces is None:
            every = min(layer.every for layer in self._model.normalizations() if couples(layer))
            self._pieces = PiecesOfModel(self._model.model, lambda x: self._model(x, training=True), every)
        return self._pieces

    def train(
        self, slices: Slices, static_sizes: bool, count: Count, carried: Carried
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

        def loss(
            data: Any, outputs: Any, losses: Sequence[tf.Tensor], before: tf.Tensor, carried: Carried
        ) -> tuple[tf.Tensor, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with (
                model.with_losses([*regularization_losses(model), *losses]),
                following(count_samples(x, y), model) as calls,
            ):
                value = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
            share = count(data, outputs, calls, value, before, carried)
            scaled = model.optimizer.scale_loss(value)
            factor = tf.cast(model.optimizer.scale_loss(tf.ones([])), tf.float32) * tf.cast(share, tf.float32)
            return tf.math.multiply_no_nan(scaled, tf.cast(share, scaled.dtype)), factor

        data = MicroBatches(slices, static_sizes)
        window = self._window(data, lambda each: keras.utils.unpack_x_y_sample_weight(each)[0])
        carried = window.run(loss, carried)
        return data.number, data.left(), carried

    def train_over_window(
        self,
        slices: Slices,
        static_sizes: bool,
        scaled_loss: Callable[[Any, tf.Tensor | None], tf.Tensor],
        dtype: tf.DType,
    ) -> tf.Tensor:
        """Adds the gradients of one loss of a batch to the accumulators.

        Args:
            slices: The inputs.
            static_sizes: As for `MicroBatches`.
            scaled_loss: As for `WindowPasses.run`.
            dtype: As for `WindowPasses.run`.

        Returns:
            `MicroBatches.left`.
        """
        data = MicroBatches(slices, static_sizes)
        self._window(data, lambda x: x).run_over_window(scaled_loss, dtype)
        return data.left()

    def _window(self, data: MicroBatches, inputs_of: Callable[[Any], Any]) -> LayerwiseWindow:
        model = self._model

        def add(gradients: Gradients, variables: Sequence[keras.Variable], starts: tf.Tensor | bool) -> None:
            model.optimizer.accumulate_part(gradients, variables, starts=starts)

        return LayerwiseWindow(self.prepare(), data, inputs_of, add, model.trainable_variables)
