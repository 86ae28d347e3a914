"""One step with a loss over the whole window, in the memory of a micro-batch.

A loss that couples the samples of a batch, such as a contrastive loss, is no mean over micro-batches. But its gradient
needs no more than the outputs of all micro-batches, which are small (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup"):

1. Forward over all micro-batches. Their outputs are kept; their activations are not, except for the last one's.
2. The loss of all outputs, and its gradient with respect to them.
3. Each micro-batch but the last again: forward from the state in which it ran first, backward from its slice of that
   gradient. Gradients add up in the accumulators.

The second run of a micro-batch has the bits of the first (`accumops.memory.replay`): it draws the same masks. State,
such as moving statistics, ends where one run over all micro-batches leaves it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import regularization_losses
from accumops.adapters.keras_losses import following
from accumops.adapters.keras_model import mask_of, set_mask
from accumops.memory.replay import State, Stretch
from accumops.training.slicing import Slices


class WindowPass(NamedTuple):
    """What a step gives for the logs and the window's counters."""

    loss: tf.Tensor
    samples: tf.Tensor
    slices: tf.Tensor


class _Kept(NamedTuple):
    """What is kept of the micro-batches before the last."""

    outputs: list[tf.Tensor]
    """Each output, and after them each mask that one has, of all their samples."""
    losses: tf.Tensor
    """The sum of the losses that layers have added, each times the samples of its micro-batch."""
    state: State


class WindowLoss:
    """Steps of a model whose loss sees the window.

    Args:
        model: The `GradientAccumulateModel`, compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stretch = Stretch(model, self._call)
        self._outputs: tuple[Any, list[bool]] = None, []
        """The structure of the model's outputs, and which of them have masks, as of the last call."""
        self._specs: dict[str, list[tf.TensorSpec]] = {}

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
        model, stretch = self._model, self._stretch
        Slices(data, size, uncut=uncut)  # targets and sample weights have to have as many samples as the inputs
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        slices = Slices(x, size, uncut=uncut)
        before_last = (slices.count - 1) // slices.size  # full micro-batches
        last = slices.part(before_last * slices.size, slices.count)
        several = slices.known is None or slices.known > slices.size
        specs = self._check(slices.full(0) if several else last)
        start = stretch.state()
        kept = _Kept([], tf.zeros([], dtype), start)
        if several:
            kept = self._run_first(slices, before_last, specs, kept)

        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch([each for each in kept.outputs if each.dtype.is_floating])
            tape.watch(kept.losses)
            run = stretch.run(kept.state, last, collect_moments=True)
            rest = slices.count - before_last * slices.size
            losses = kept.losses + _sum_of(run.losses, rest, dtype)
            y_pred = self._window_outputs(kept.outputs, run.outputs, before_last)
            added = [losses / tf.cast(slices.count, dtype)] if run.losses else []
            with model.with_losses([*regularization_losses(model), *added]), following(slices.count, model):
                loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            scaled = model.optimizer.scale_loss(loss)
        gradients, of_outputs, of_losses = tape.gradient(scaled, (variables, kept.outputs, kept.losses))
        of_outputs = [each if each is None else tf.convert_to_tensor(each) for each in of_outputs]
        model.optimizer.accumulate_slice(gradients, variables, weight=1.0, starts=True)
        if several:
            self._run_again(slices, before_last, start, of_outputs, of_losses)
        stretch.assign(run.state)
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return WindowPass(loss, slices.count, before_last + 1)

    def _call(self, x: Any) -> list[tf.Tensor]:
        """Calls the model. Returns its outputs as a list, and after them each mask that one has."""
        outputs = self._model(x, training=True)
        flat = keras.tree.flatten(outputs)
        masks = [mask_of(each) for each in flat]
        self._outputs = outputs, [mask is not None for mask in masks]
        for each in flat:
            if not isinstance(each, tf.Tensor) or each.shape.rank == 0:
                raise ValueError(
                    "loss_over='window' needs outputs that are dense tensors with a row for each sample. "
                    f"Received: {each}"
                )
        return [*flat, *(mask for mask in masks if mask is not None)]

    def _check(self, x: Any) -> list[tf.TensorSpec]:
        """Returns the specs of what `_call` returns for a micro-batch. Each shape of one is checked once."""
        key = str([(leaf.shape, leaf.dtype) for leaf in keras.tree.flatten(x) if leaf is not None])
        if key not in self._specs:
            self._specs[key] = self._stretch.check(x)[0]
        return self._specs[key]

    def _run_first(self, slices: Slices, count: tf.Tensor, specs: list[tf.TensorSpec], kept: _Kept) -> _Kept:
        """Runs the micro-batches before the last, and keeps what they return."""

        def body(i: tf.Tensor, losses: tf.Tensor, state: State, arrays: Sequence[tf.TensorArray]) -> Any:
            run = self._stretch.run(state, slices.full(i * slices.size))
            losses += _sum_of(run.losses, slices.size, losses.dtype)
            return (
                i + 1,
                losses,
                run.state,
                [array.write(i, each) for array, each in zip(arrays, run.outputs, strict=True)],
            )

        arrays = [tf.TensorArray(spec.dtype, count, element_shape=spec.shape) for spec in specs]
        _, losses, state, arrays = tf.while_loop(
            lambda i, *_: i < count,
            body,
            (tf.zeros_like(count), kept.losses, kept.state, arrays),
            parallel_iterations=1,
        )
        return _Kept([_all_rows(array, spec, count) for array, spec in zip(arrays, specs, strict=True)], losses, state)

    def _run_again(
        self, slices: Slices, count: tf.Tensor, start: State, of_outputs: Sequence[tf.Tensor | None], of_losses: Any
    ) -> None:
        """Runs the micro-batches before the last again, and accumulates their gradients."""
        model, variables = self._model, self._model.trainable_variables

        def body(i: tf.Tensor, state: State) -> Any:
            with tf.GradientTape() as tape:
                run = self._stretch.run(state, slices.full(i * slices.size), collect_moments=True)
            targets, upstream = [], []
            for output, gradient in zip(run.outputs, of_outputs, strict=True):
                if gradient is not None:
                    targets.append(output)
                    rest = gradient.shape.rank - 1
                    # Of a size that XLA knows.
                    upstream.append(tf.slice(gradient, [i * slices.size] + [0] * rest, [slices.size] + [-1] * rest))
            for loss in run.losses if of_losses is not None else []:
                targets.append(loss)
                upstream.append(tf.fill(tf.shape(loss), tf.cast(of_losses * slices.size, loss.dtype)))
            gradients = tape.gradient(targets, variables, output_gradients=upstream)
            model.optimizer.accumulate_slice(gradients, variables, weight=1.0, starts=False)
            return i + 1, run.state

        tf.while_loop(lambda i, *_: i < count, body, (tf.zeros_like(count), start), parallel_iterations=1)

    def _window_outputs(self, kept: Sequence[tf.Tensor], last: Sequence[tf.Tensor], before_last: tf.Tensor) -> Any:
        """The outputs of the whole window, in the model's structure, with their masks."""
        structure, masked = self._outputs
        rows = list(last)
        if kept:
            rows = [
                tf.concat(each, 0) if each[0].shape[1:].is_fully_defined() else _joined(*each, before_last)
                for each in zip(kept, last, strict=True)
            ]
        flat, masks = rows[: len(masked)], iter(rows[len(masked) :])
        for output, has_mask in zip(flat, masked, strict=True):
            if has_mask:
                set_mask(output, next(masks))
        return keras.tree.pack_sequence_as(structure, flat)


def _joined(kept: tf.Tensor, last: tf.Tensor, before_last: tf.Tensor) -> tf.Tensor:
    """The rows of both; without a micro-batch before the last, `kept` has no rows, and none of their shape."""
    return tf.cond(before_last > 0, lambda: tf.concat([kept, last], 0), lambda: tf.identity(last))


def _sum_of(losses: Sequence[tf.Tensor], samples: int | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The sum of layers' losses, times the samples of their micro-batch."""
    total = functools.reduce(tf.add, [tf.cast(tf.reduce_sum(loss), dtype) for loss in losses], tf.zeros([], dtype))
    return total * tf.cast(samples, dtype)


def _all_rows(array: tf.TensorArray, spec: tf.TensorSpec, count: tf.Tensor) -> tf.Tensor:
    """The rows that the micro-batches have written to an array."""

    def rows() -> tf.Tensor:
        stacked = array.stack()
        return tf.reshape(stacked, tf.concat([[count * spec.shape[0]], tf.shape(stacked)[2:]], 0))

    if spec.shape.is_fully_defined():
        return tf.ensure_shape(rows(), [None, *spec.shape[1:]])
    none = [0 if size is None else size for size in spec.shape[1:]]
    return tf.cond(count > 0, rows, lambda: tf.zeros([0, *none], spec.dtype))
