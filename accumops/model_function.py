"""What `fit` calls once a step, where neither XLA nor a strategy is in play: two functions in place of one.

A call of a `tf.function` takes microseconds for each variable that it uses, and so does a condition that is false. So
a step that cannot end its window gets a function that knows nothing of the update. Which step that is, the step before
has said; if it was wrong, because somebody else has used the window meanwhile, the update follows at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

if TYPE_CHECKING:
    from accumops.model import GradientAccumulateModel

Logs = dict[str, Any]


def train_function(
    model: "GradientAccumulateModel", for_other_iterators: Callable[[Any], Logs]
) -> Callable[[Any], Logs]:
    """Makes a model's train function.

    Args:
        model: The model, compiled.
        for_other_iterators: What to call with what is no `tf.data.Iterator`.
    """
    sliced = model.micro_batch_size is not None

    def make(updates: bool) -> Callable[[tf.data.Iterator], tuple[Logs, tf.Tensor]]:
        def step(iterator: tf.data.Iterator) -> tuple[Logs, tf.Tensor]:
            data = iterator.get_next()
            # At the data's end nothing else has run, what needs no data included.
            with tf.control_dependencies(_tensors(data)):
                if updates:
                    logs = model.train_step(_without_optionals(data))
                else:
                    with model.without_update():
                        logs = model.train_step(_without_optionals(data))
                accumulator = model.optimizer.accumulator
                counted = not sliced and accumulator.built
                return logs, accumulator.remaining if counted else tf.constant(1, tf.int64)

        return tf.function(step, reduce_retracing=True, autograph=False)

    whole, accumulating = make(True), make(False)
    remaining = 1

    def function(iterator: Any) -> Logs:
        nonlocal remaining
        if not isinstance(iterator, tf.data.Iterator):
            remaining = 1
            return for_other_iterators(iterator)
        chosen = accumulating if remaining > 1 else whole
        remaining = 1  # what an error leaves
        try:
            logs, after = chosen(iterator)
        except tf.errors.OutOfRangeError as error:
            raise StopIteration from error
        remaining = int(after)
        if remaining < 1:
            model.flush()
        return logs

    return function


def _tensors(data: Any) -> list[tf.Tensor]:
    return [leaf for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)]


def _without_optionals(data: Any) -> Any:
    """As Keras does for what a dataset may lack."""
    return keras.tree.map_structure(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
