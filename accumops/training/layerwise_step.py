"""One step of a `GradientAccumulateModel` whose window runs layer by layer, for layers that couple its samples."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import layers_within, regularization_losses
from accumops.adapters.keras_losses import following
from accumops.layerwise.graph import graph_of_calls
from accumops.layerwise.micro_batches import Carried, MicroBatches
from accumops.layerwise.pieces import PiecesOfModel
from accumops.layerwise.plan import Cut, plan_every, plan_for_memory
from accumops.layerwise.stages import Stages
from accumops.layerwise.window import Gradients, LayerwiseWindow
from accumops.memory.slices import Slices
from accumops.sizes import bytes_from
from accumops.training.weighting import count_samples
from accumops.window.coupling import couples

EVERY = 2
"""The layers from one kept tensor to the next, if nobody says."""
Count = Callable[[Any, Any, list[Any], tf.Tensor, tf.Tensor | None, Carried], tf.Tensor]


def layerwise_step(model: Any) -> "LayerwiseStep | None":
    """Returns the steps of a compiled model, or None if none of its layers needs its windows layer by layer.

    Raises:
        ValueError: If one does, and the model cannot train so; with the layer's name.
    """
    layers = [layer for layer in layers_within(model) if couples(layer)]
    if not layers:
        return None
    what = layers[0].coupled_because
    if model.micro_batch_size is None:
        if model.accum_steps != 1:
            raise ValueError(
                f"{what}, and with accum_steps={model.accum_steps} the samples of a window are not there at the same "
                "time. Use `micro_batch_size` in place of `accum_steps`, with whole windows as batches, or "
                f"{layers[0].uncoupled}."
            )
        return None
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
    if model.model.built and not model.trainable_variables:
        raise ValueError(
            f"{what}, and the model has no trainable weights, so that its windows make no update. Call it with whole "
            "batches, in plain Keras."
        )
    step = LayerwiseStep(model, layers)
    if model.model.built:
        step.check()
    return step


def check_noise(model: Any) -> None:
    """Raises if the noise of gradients cannot be told, since a model's windows run layer by layer.

    Args:
        model: Any model.

    Raises:
        ValueError: If so, with a layer's name.
    """
    layers = [layer for layer in layers_within(model) if couples(layer)]
    if layers and getattr(model, "micro_batch_size", None) is not None:
        raise ValueError(
            f"{layers[0].coupled_because}, so that the gradients of micro-batches depend on each other, and their "
            "noise cannot be told from how they differ. Leave out `GradientNoiseScale` and `track_noise`, compile the "
            f"model again if it has been trained with one, or use {layers[0].uncoupled}."
        )


class LayerwiseStep:
    """Steps of a model whose windows run layer by layer.

    Args:
        model: The `GradientAccumulateModel`, compiled.
        layers: The layers that need it.

    Raises:
        ValueError: If the layers do not agree on how much the windows keep.
    """

    def __init__(self, model: Any, layers: Sequence[keras.Layer]) -> None:
        self._model = model
        self._pieces: dict[tuple[int | None, int], PiecesOfModel] = {}
        self._memory, self._every = (_agreed(layers, name) for name in ("memory", "every"))

    def check(self) -> None:
        """Raises a ValueError if the model cannot be cut, with the layer's name."""
        graph_of_calls(self._model.model)

    def _in_pieces(self, slices: Slices) -> PiecesOfModel:
        """The model in pieces, for windows like this one."""
        model = self._model.model
        samples = slices.known if self._memory is not None else None
        key = samples, slices.size

        def plan(stages: Stages) -> list[Cut]:
            if self._memory is None:
                return plan_every(stages, self._every or EVERY)
            if samples is None:
                raise ValueError(
                    "`memory` of batch normalization with statistics='window' needs batches whose size is known, such "
                    "as those of `dataset.batch(size, drop_remainder=True)`. Or give `every` in place of it."
                )
            with tf.init_scope():
                return plan_for_memory(model, stages, samples, slices.size, bytes_from("memory", self._memory))

        if key not in self._pieces:
            self._pieces[key] = PiecesOfModel(model, lambda x: self._model(x, training=True), plan)
        return self._pieces[key]

    def train(
        self, slices: Slices, static_sizes: bool, count: Count, carried: Carried
    ) -> tuple[tf.Tensor, tf.Tensor, Carried]:
        """Adds the gradients of a batch's micro-batches to the accumulators.

        Args:
            slices: The batch.
            static_sizes: As for `MicroBatches`.
            count: Takes a micro-batch, its outputs, the calls of losses, the loss, what earlier stages have added to it
                or None, and carried tensors, which it changes. Returns the share. The model's `losses` are all of them.
            carried: The tensors that its first call gets.

        Returns:
            The number of micro-batches, `MicroBatches.left`, and the tensors that the last call of `count` has left.
        """
        model = self._model

        def loss(
            data: Any, outputs: Any, losses: Sequence[tf.Tensor], before: tf.Tensor | None, carried: Carried
        ) -> tuple[tf.Tensor, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            losses = [*regularization_losses(model), *losses]
            with model.with_losses(losses), following(count_samples(x, y), model) as calls:
                value = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
            with model.with_losses(losses if before is None else [*losses, before]):
                share = count(data, outputs, calls, value, before, carried)
            scaled = model.optimizer.scale_loss(value)
            factor = tf.cast(model.optimizer.scale_loss(tf.ones([])), tf.float64) * tf.cast(share, tf.float64)
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
        if model.optimizer.accumulator.state.notes.noise is not None:
            check_noise(model)

        def add(gradients: Gradients, variables: Sequence[keras.Variable], starts: tf.Tensor | bool) -> None:
            model.optimizer.accumulate_part(gradients, variables, starts=starts)

        return LayerwiseWindow(self._in_pieces(data.slices), data, inputs_of, add, model.trainable_variables)


def _agreed(layers: Sequence[keras.Layer], name: str) -> Any:
    """What the layers that have an attribute say there."""
    given = {getattr(layer, name) for layer in layers if hasattr(layer, name)}
    if len(given) > 1:
        raise ValueError(
            f"All layers with statistics='window' of a model must have the same `{name}`. Received: {given}"
        )
    return given.pop() if given else None
