"""The gradient of a loss over a whole window, in the memory of a micro-batch.

A loss that couples the samples of a batch, such as a contrastive loss, is no mean over micro-batches. But its gradient
needs no more than the outputs of all micro-batches, which are small (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup"):

1. Forward over all micro-batches. Their outputs are kept; their activations are not, except for the last one's.
2. The loss of all outputs, and its gradient with respect to them.
3. Each micro-batch but the last again: forward from the state in which it ran first, backward from its slice of that
   gradient. Gradients add up.

The second run of a micro-batch has the bits of the first (`replay.py`): it draws the same masks. State, such as moving
statistics, ends where one run over all micro-batches leaves it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import regularization_losses
from accumops.adapters.keras_model import logits_of, mask_of, with_logits, with_mask
from accumops.arguments import check_count
from accumops.memory.replay import State, Stretch
from accumops.memory.slices import Slices

_logits_of = functools.partial(logits_of, operations=True)
Gradients = Sequence[tf.Tensor | None]
Carried = Sequence[tf.Tensor]


class _Kept(NamedTuple):
    """What is kept of the micro-batches before the last."""

    outputs: list[tf.Tensor]
    """Each output, and after them each mask and the logits that one has, of all their samples."""
    losses: tf.Tensor
    """The sum of the losses that layers have added, each times the samples of its micro-batch."""
    state: State


class WindowPasses:
    """Runs a window's micro-batches, its loss, and the micro-batches again.

    Args:
        layer: The layer or model, built.
        call: Calls it with a micro-batch of inputs, in training.
    """

    def __init__(self, layer: keras.Layer, call: Callable[[Any], Any]) -> None:
        self._layer = layer
        self._call_of_layer = call
        self._stretch = Stretch(layer, self._call)
        self._outputs: Any = None
        """The outputs, with their masks and logits, of the last call."""
        self._specs: dict[str, list[tf.TensorSpec]] = {}

    def run(
        self,
        slices: Slices,
        scaled_loss: Callable[[Any, tf.Tensor | None], tf.Tensor],
        add: Callable[[Gradients, bool, Carried], Carried],
        carried: Carried = (),
        dtype: tf.DType = tf.float32,
    ) -> Carried:
        """Adds up the gradients of a window's loss, each micro-batch's by itself.

        Args:
            slices: The inputs, in micro-batches.
            scaled_loss: Takes the outputs of the window, and the mean of the losses that layers have added or None;
                returns the loss.
            add: Takes the gradients of a micro-batch for `layer.trainable_variables`, whether they are the first, and
                tensors that go from micro-batch to micro-batch; returns the tensors.
            carried: The tensors that the first call of `add` gets.
            dtype: The dtype to add layers' losses in.

        Returns:
            The tensors that the last call of `add` has returned.

        Raises:
            ValueError: If a layer cannot be run again, or an output does not have a row for each sample.
        """
        stretch, variables = self._stretch, self._layer.trainable_variables
        before_last = (slices.count - 1) // slices.size  # full micro-batches
        last = slices.part(before_last * slices.size, slices.count)
        several = slices.known is None or slices.known > slices.size
        specs = self._check(slices.full(0) if several else last)
        start = stretch.state()
        kept = _Kept([], tf.zeros([], dtype), start)
        if several:
            kept = self._run_first(slices, before_last, specs, kept)

        with tf.GradientTape() as tape:
            tape.watch([each for each in kept.outputs if each.dtype.is_floating])
            tape.watch(kept.losses)
            run = stretch.run(kept.state, last, collect_moments=True)
            losses = kept.losses + _sum_of(run.losses, slices.count - before_last * slices.size, dtype)
            outputs = self._window_outputs(kept.outputs, run.outputs, before_last)
            loss = scaled_loss(outputs, losses / tf.cast(slices.count, dtype) if run.losses else None)
        gradients, of_outputs, of_losses = tape.gradient(loss, (variables, kept.outputs, kept.losses))
        of_outputs = [each if each is None else tf.convert_to_tensor(each) for each in of_outputs]
        carried = add(gradients, True, carried)
        if several:
            carried = self._run_again(slices, before_last, start, of_outputs, of_losses, add, carried)
        stretch.assign(run.state)
        return carried

    def _call(self, x: Any) -> list[tf.Tensor]:
        """Calls the layer. Returns its outputs as a list, after them their masks, and then their logits."""
        self._outputs = self._call_of_layer(x)
        flat = keras.tree.flatten(self._outputs)
        for each in flat:
            if not isinstance(each, tf.Tensor) or each.shape.rank == 0:
                raise ValueError(
                    "A loss over the window needs outputs that are dense tensors with a row for each sample. "
                    f"Received: {each}"
                )
        beside = [*map(mask_of, flat), *map(_logits_of, flat)]
        return [*flat, *(each for each in beside if each is not None)]

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
            written = [array.write(i, each) for array, each in zip(arrays, run.outputs, strict=True)]
            return i + 1, losses, run.state, written

        arrays = [tf.TensorArray(spec.dtype, count, element_shape=spec.shape) for spec in specs]
        first = (tf.zeros_like(count), kept.losses, kept.state, arrays)
        _, losses, state, arrays = tf.while_loop(lambda i, *_: i < count, body, first, parallel_iterations=1)
        return _Kept([_all_rows(array, spec, count) for array, spec in zip(arrays, specs, strict=True)], losses, state)

    def _run_again(
        self,
        slices: Slices,
        count: tf.Tensor,
        start: State,
        of_outputs: Gradients,
        of_losses: tf.Tensor | None,
        add: Callable[[Gradients, bool, Carried], Carried],
        carried: Carried,
    ) -> Carried:
        """Runs the micro-batches before the last again, and adds their gradients."""
        variables = self._layer.trainable_variables

        def body(i: tf.Tensor, state: State, carried: Carried) -> Any:
            with tf.GradientTape() as tape:
                run = self._stretch.run(state, slices.full(i * slices.size), collect_moments=True)
            targets, upstream = [], []
            for output, gradient in zip(run.outputs, of_outputs, strict=True):
                if gradient is not None:
                    targets.append(output)
                    rest = gradient.shape.rank - 1
                    # XLA has to know the size of the slice.
                    upstream.append(tf.slice(gradient, [i * slices.size] + [0] * rest, [slices.size] + [-1] * rest))
            if of_losses is not None:
                of_each = of_losses * slices.size
                targets.extend(run.losses)
                upstream.extend(tf.fill(tf.shape(loss), tf.cast(of_each, loss.dtype)) for loss in run.losses)
            gradients: Gradients = tape.gradient(targets, variables, output_gradients=upstream)
            return i + 1, run.state, add(gradients, False, carried)

        if of_losses is None and all(gradient is None for gradient in of_outputs):
            return carried  # the loss depends on no output
        first = (tf.zeros_like(count), start, carried)
        return tf.while_loop(lambda i, *_: i < count, body, first, parallel_iterations=1)[2]

    def _window_outputs(self, kept: Sequence[tf.Tensor], last: Sequence[tf.Tensor], before_last: tf.Tensor) -> Any:
        """The outputs of the whole window, in the layer's structure, with their masks and logits."""
        rows = list(last)
        if kept:
            rows = [
                tf.concat(each, 0) if each[0].shape[1:].is_fully_defined() else _joined(*each, before_last)
                for each in zip(kept, last, strict=True)
            ]
        of_last = keras.tree.flatten(self._outputs)
        outputs, beside = rows[: len(of_last)], iter(rows[len(of_last) :])
        for one, output in zip(of_last, outputs, strict=True):
            with_mask(output, None if mask_of(one) is None else next(beside))
        outputs = [
            with_logits(output, None if _logits_of(one) is None else next(beside), one)
            for one, output in zip(of_last, outputs, strict=True)
        ]
        return keras.tree.pack_sequence_as(self._outputs, outputs)


def window_gradients(
    model: keras.Model,
    inputs: Any,
    loss: Callable[[Any], tf.Tensor],
    micro_batch_size: int,
) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
    """Returns a loss of a model's outputs for a whole batch, and its gradients, in the memory of a micro-batch.

    The loss may couple samples in any way. The model runs twice over each micro-batch but the last, with the same
    dropout masks, and its state, such as moving statistics, moves once. Regularizers and `add_loss` of layers are part
    of the loss, as in `fit`.

    For several towers, give the `keras.Model` that has all of them. The loss may use other tensors, such as the keys of
    a momentum encoder or a queue of negatives. They get no gradient.

    Args:
        model: The model, built.
        inputs: Its inputs for the whole batch, a structure of tensors with a row for each sample.
        loss: Takes the model's outputs for the whole batch, and returns a scalar.
        micro_batch_size: Samples a micro-batch, an int of at least 1. The last one may be smaller.

    Returns:
        The loss, a scalar, and a gradient for each of `model.trainable_variables`; None where there is none.

    Raises:
        TypeError: If `model` is not a Keras model, `loss` not callable, or `micro_batch_size` not an int.
        ValueError: If the model is not built, `micro_batch_size` is less than 1, inputs have different numbers of
            samples, an output has no row for each sample, or a layer cannot run twice with the same result: it draws
            random numbers without a Keras seed, or changes a variable that Keras does not know.

    Example:

    >>> towers = keras.Sequential([keras.Input((2, 5)), keras.layers.Dense(3)])
    >>> clip = accumops.losses.CLIPLoss()
    >>> pairs = tf.random.normal([64, 2, 5])
    >>> loss, gradients = accumops.window_gradients(
    ...     towers, pairs, lambda embeddings: clip(tf.zeros(64), embeddings), micro_batch_size=16
    ... )
    >>> keras.optimizers.SGD(0.1).apply(gradients, towers.trainable_variables)

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError(f"The model '{model.name}' is not built: call it once, or `build` it.")
    if not callable(loss):
        raise TypeError(f"`loss` must be a function of the model's outputs. Received: {loss!r}")
    check_count("micro_batch_size", micro_batch_size, "a number of samples")
    inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
    values: list[tf.Tensor] = []
    connected: list[bool] = [False] * len(model.trainable_variables)

    def whole_loss(outputs: Any, added: tf.Tensor | None) -> tf.Tensor:
        value = tf.convert_to_tensor(loss(outputs))
        if value.shape.rank != 0:
            raise ValueError(f"`loss` must return a scalar. Received: {value}")
        more = [*regularization_losses(model), *([] if added is None else [added])]
        value = functools.reduce(tf.add, [tf.cast(each, value.dtype) for each in more], value)
        values.append(value)
        return value

    def add(gradients: Gradients, first: bool, sums: Carried) -> Carried:
        for i, gradient in enumerate(gradients):
            connected[i] = connected[i] or gradient is not None
        return [
            total if gradient is None else total + tf.convert_to_tensor(gradient)
            for total, gradient in zip(sums, gradients, strict=True)
        ]

    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in model.trainable_variables]
    passes = WindowPasses(model, lambda x: model(x, training=True))
    sums = passes.run(Slices(inputs, int(micro_batch_size)), whole_loss, add, zeros)
    return values[0], [total if has else None for total, has in zip(sums, connected, strict=True)]


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
