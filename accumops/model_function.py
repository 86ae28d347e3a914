"""What `fit` calls once a step, where XLA is not in play: functions that know where a window ends.

A call of a `tf.function` takes microseconds for each variable that it uses, and so does a condition. So a step that
cannot end its window gets a function that knows nothing of the update, and one that does a function without condition.
Where a window ends the variables are asked; of the steps before, each has said that the next is none. If that was
wrong, because somebody else has used the window meanwhile, the update follows at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from accumops import distribution

if TYPE_CHECKING:
    from accumops.model import GradientAccumulateModel

Logs = dict[str, Any]

_ITERATORS = (tf.data.Iterator, tf.distribute.DistributedIterator)


def train_function(
    model: "GradientAccumulateModel", for_other_iterators: Callable[[Any], Logs]
) -> Callable[[Any], Logs]:
    """Makes a model's train function.

    Args:
        model: The model, compiled.
        for_other_iterators: What to call with what is no `tf.data.Iterator`.
    """
    sliced = model.micro_batch_size is not None
    strategy = distribution.mirroring(model.distribute_strategy)

    def make(ends: bool | None) -> Callable[[tf.data.Iterator], tuple[Logs, tf.Tensor]]:
        def step(iterator: tf.data.Iterator) -> tuple[Logs, tf.Tensor]:
            data = iterator.get_next()
            # At the data's end nothing else has run, what needs no data included.
            with tf.control_dependencies(_tensors(data)), model.window_that(ends):
                logs = _run(model.train_step, strategy, data)
                accumulator = model.optimizer.accumulator
                counted = not sliced and accumulator.built
                return logs, accumulator.remaining if counted else tf.constant(1, tf.int64)

        return tf.function(step, reduce_retracing=True, autograph=False)

    functions = {ends: make(ends) for ends in (None, False, True)}
    remaining = 1

    def function(iterator: Any) -> Logs:
        nonlocal remaining
        if not isinstance(iterator, _ITERATORS):
            remaining = 1
            return for_other_iterators(iterator)
        if model.model.built and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        if remaining > 1:
            ends: bool | None = False
        else:
            missing = None if sliced else model.optimizer.accumulator.missing()
            ends = None if missing is None else missing <= 1
        remaining = 1  # what an error leaves
        try:
            logs, after = functions[ends](iterator)
        except tf.errors.OutOfRangeError as error:
            raise StopIteration from error
        remaining = int(after)
        if remaining < 1:
            model.flush()
        return logs

    return function


def function_of_workers(
    step: Callable[[Any], Logs], strategy: tf.distribute.Strategy, run_eagerly: bool
) -> Callable[[Any], Logs]:
    """Makes a function that runs a step with an iterator's next batch where the replicas are of several processes.

    Keras's would average what a step returns over all of them, which fails for scalars.

    Args:
        step: What a replica does with its share.
        strategy: The strategy.
        run_eagerly: Whether nothing is to be traced.
    """

    def run_next(iterator: tf.distribute.DistributedIterator) -> Logs:
        return _run(step, strategy, iterator.get_next())

    def run(data: Any) -> Logs:
        return _run(step, strategy, data)

    if not run_eagerly:
        run_next = tf.function(run_next, reduce_retracing=True, autograph=False)
        run = tf.function(run, reduce_retracing=True, autograph=False)

    def function(iterator: Any) -> Logs:
        if not isinstance(iterator, _ITERATORS):
            return run(next(iter(iterator)))
        try:
            return run_next(iterator)
        except tf.errors.OutOfRangeError as error:
            raise StopIteration from error

    return function


def _run(step: Callable[[Any], Logs], strategy: tf.distribute.Strategy | None, data: Any) -> Logs:
    if strategy is None:
        return step(_without_optionals(data))
    return distribution.run(strategy, lambda share: step(_without_optionals(share)), data)


def _tensors(data: Any) -> list[tf.Tensor]:
    return [leaf for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)]


def _without_optionals(data: Any) -> Any:
    """As Keras does for what a dataset may lack."""
    return keras.tree.map_structure(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
