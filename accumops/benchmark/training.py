"""Ways to train in windows of micro-batches, as functions that run one window."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

LEARNING_RATE = 1e-3

Gradients = Sequence[tf.Tensor | tf.IndexedSlices]
Step = Callable[[tf.Tensor, tf.Tensor], Any]


def loss_function(library: ModuleType = keras) -> Any:
    """Returns the loss function of all models, from the given Keras module."""
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def split(x: tf.Tensor, y: tf.Tensor, micro_batch: int) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Splits a window into its micro-batches."""
    return [(x[i : i + micro_batch], y[i : i + micro_batch]) for i in range(0, len(x), micro_batch)]


def train_steps(model: Any, x: Any, y: tf.Tensor, batch_size: int) -> Callable[[], object]:
    """Returns a function that takes a compiled model once through the data, as `fit` does, but without callbacks.

    A call of several steps may be more than the data: it takes the model through it several times.
    """
    model.make_train_function()
    with tf.device("CPU:0"):  # datasets stay on the CPU, whichever device the steps run on
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size, drop_remainder=True)
        batches = iter(data.cache().repeat())
    calls = max(len(y) // batch_size // model.steps_per_execution, 1)

    def window() -> None:
        for _ in range(calls):
            model.train_function(batches)

    return window


def gradients_of(model: Any) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, Gradients]]:
    """Returns a function that computes the loss of a batch and its gradients."""
    loss = loss_function()
    variables = [variable.value for variable in model.trainable_variables]

    def compute(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, Gradients]:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return value, tape.gradient(value, variables)

    return compute


def forward_and_backward(model: Any, *, drop: bool) -> Step:
    """Returns a `tf.function` that only computes a micro-batch's gradients: the floor for every way to train.

    Args:
        model: The model.
        drop: Whether to drop the gradients in an assertion, instead of returning them. Something must use the
            gradients, or TensorFlow prunes the backward pass, and on a CPU an assertion is the cheapest use. On a GPU
            an assertion would copy the gradients to the host.
    """
    compute = gradients_of(model)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        value, gradients = compute(x, y)
        dense = [each.values if isinstance(each, tf.IndexedSlices) else each for each in gradients]
        if not drop:
            return value, dense
        tf.raw_ops.Assert(condition=tf.equal(tf.size(y), tf.size(y)), data=dense)
        return value

    return step


def forward_and_backward_in_one_call(model: Any, x: tf.Tensor, y: tf.Tensor, micro_batch: int) -> Callable[[], object]:
    """Returns `forward_and_backward` with dropped gradients, for a window in a loop within one `tf.function`."""
    step = forward_and_backward(model, drop=True)
    count = len(x) // micro_batch
    parts = [tf.reshape(each, (count, micro_batch, *each.shape[1:])) for each in (x, y)]

    @tf.function
    def window() -> None:
        def body(i: tf.Tensor) -> list[tf.Tensor]:
            step(*(tf.gather(part, i) for part in parts))
            return [i + 1]

        tf.while_loop(lambda i: i < count, body, [0], parallel_iterations=1)

    return window


def each_micro_batch(step: Step, parts: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> Callable[[], object]:
    """Returns a function that runs the step on each micro-batch."""

    def window() -> None:
        for x, y in parts:
            step(x, y)

    return window


def hand_written(
    model: Any, optimizer: keras.optimizers.Optimizer, parts: Sequence[tuple[tf.Tensor, tf.Tensor]]
) -> Callable[[], object]:
    """Returns accumulation as written by hand: variables sum the gradients, and a function applies their mean."""
    compute = gradients_of(model)
    optimizer.build(model.trainable_variables)
    sums = [tf.Variable(tf.zeros(variable.shape)) for variable in model.trainable_variables]

    @tf.function
    def accumulate(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        value, gradients = compute(x, y)
        for total, gradient in zip(sums, gradients, strict=True):
            total.assign_add(gradient)
        return value

    @tf.function
    def apply() -> None:
        optimizer.apply([total / len(parts) for total in sums], model.trainable_variables)
        for total in sums:
            total.assign(tf.zeros_like(total))

    accumulate_all = each_micro_batch(accumulate, parts)

    def window() -> None:
        accumulate_all()
        apply()

    return window
