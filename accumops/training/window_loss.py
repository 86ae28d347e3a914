"""One step of a `GradientAccumulateModel` with a loss over the whole window (`accumops.memory.window_gradients`).

Under a mirroring strategy the loss sees the outputs of all replicas, which are gathered with their gradient. Each
replica computes the same loss, which Keras divides by the number R of replicas, and the gradient of gathered outputs is
summed over the replicas: together that is the gradient of the one loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import regularization_losses
from accumops.adapters.keras_losses import following
from accumops.adapters.keras_model import logits_of, mask_of, with_logits, with_mask
from accumops.memory.slices import Slices
from accumops.memory.window_gradients import Carried, Gradients, WindowPasses
from accumops.training.layerwise_step import LayerwiseStep
from accumops.training.weighting import count_samples


class WindowPass(NamedTuple):
    """What a step gives for the logs and the window's counters."""

    loss: tf.Tensor
    samples: tf.Tensor
    slices: tf.Tensor
    left: tf.Tensor
    """0, for what has to wait for the gradients."""


class WindowLoss:
    """Steps of a model whose loss sees the window.

    Args:
        model: The `GradientAccumulateModel`, compiled.
        layerwise: How its windows run, if they do layer by layer.
    """

    def __init__(self, model: Any, layerwise: LayerwiseStep | None) -> None:
        self._model = model
        self._layerwise = layerwise
        self._passes = WindowPasses(model, lambda x: model(x, training=True))

    def train(self, data: Any, size: int, uncut: Sequence[tf.Tensor], dtype: tf.DType) -> WindowPass:
        """Adds the gradients of a batch's loss to the accumulators, each micro-batch with a share of 1.

        Args:
            data: The batch.
            size: Samples a micro-batch.
            uncut: The inputs that each micro-batch gets whole.
            dtype: The dtype to count in.

        Raises:
            ValueError: If a layer cannot be run again, or an output does not have a row for each sample.
        """
        model, strategy = self._model, self._model.mirroring
        empty = strategy is not None  # a replica may have no samples
        own = Slices(data, size, empty=empty, uncut=uncut)  # targets and weights have as many samples as the inputs
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        computed: dict[str, Any] = {}

        def scaled_loss(y_pred: Any, added: tf.Tensor | None) -> tf.Tensor:
            inputs, targets, outputs, weights, count = (x, y, y_pred, sample_weight, own.count)
            if strategy is not None:
                inputs, targets, outputs, weights = (_of_all_replicas(each) for each in (x, y, y_pred, sample_weight))
                count = count_samples(inputs, targets)
                added = None if added is None else added * _part(own, count, dtype) * strategy.num_replicas_in_sync
            losses = [*regularization_losses(model), *([] if added is None else [added])]
            with model.with_losses(losses), following(count, model):
                loss = model.compute_loss(x=inputs, y=targets, y_pred=outputs, sample_weight=weights, training=True)
            computed.update(loss=loss, y_pred=y_pred)
            return model.optimizer.scale_loss(loss)

        def add(gradients: Gradients, first: bool, carried: Carried) -> Carried:
            model.optimizer.accumulate_slice(gradients, model.trainable_variables, weight=1.0, starts=first)
            return carried

        slices = Slices(x, size, empty=empty, uncut=uncut)
        left = tf.zeros([], tf.int32)
        if self._layerwise is None:
            self._passes.run(slices, scaled_loss, add, dtype=dtype)
        else:
            left = self._layerwise.train_over_window(slices, bool(model.jit_compile), scaled_loss, dtype)
        model.compute_metrics(x, y, computed["y_pred"], sample_weight=sample_weight)
        number = (slices.count + slices.size - 1) // slices.size
        return WindowPass(computed["loss"], count_samples(x, y), number, left)


def _of_all_replicas(structure: Any) -> Any:
    """Tensors with the rows of all replicas, and their masks. Their gradient is summed over the replicas."""
    context = tf.distribute.get_replica_context()

    def gather(tensor: Any) -> Any:
        if tensor is None:
            return None
        gathered = context.all_gather(tensor, axis=0)
        gathered.set_shape([None, *tensor.shape[1:]])
        mask, logits = mask_of(tensor), logits_of(tensor, operations=True)
        if mask is not None:
            with_mask(gathered, tf.cast(context.all_gather(tf.cast(mask, tf.int32), axis=0), tf.bool))
        return with_logits(gathered, None if logits is None else gather(logits), tensor)

    return keras.tree.map_structure(gather, structure)


def _part(own: Slices, count: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The part that a replica has of all samples."""
    return tf.cast(own.count, dtype) / tf.cast(count, dtype)
