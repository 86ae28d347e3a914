"""What `fit` calls once a step, where XLA is not in play: functions that know where a window ends.

A call of a `tf.function` takes microseconds for each variable that it uses, and so does a condition. So a step that
cannot end its window gets a function that knows nothing of the update, and one that does a function without condition.
Of the steps before each says how many are missing. If that has become wrong, because somebody else has used the window
meanwhile, the function that ends it does nothing, and the variables are asked; and where one that does not end it has
filled it, the update follows at once.
"""

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from accumops.window import replicas

if TYPE_CHECKING:
    from accumops.training.model import GradientAccumulateModel

Logs = dict[str, Any]

_ITERATORS = (tf.data.Iterator, tf.distribute.DistributedIterator)
_NOT_THE_END = "The window does not end with this step."


def train_function(
    model: "GradientAccumulateModel", for_other_iterators: Callable[[Any], Logs]
) -> Callable[[Any], Logs]:
    """Makes a model's train function.

    Args:
        model: The model, compiled.
        for_other_iterators: What to call with what is no `tf.data.Iterator`.
    """
    strategy = replicas.mirroring(model.distribute_strategy)

    def step(ends: bool | None, iterator: Any) -> tuple[Logs, list[tf.Tensor]]:
        accumulator = model.optimizer.accumulator
        checks = []
        if ends:
            last = tf.less_equal(accumulator.remaining, 1)
            checks.append(tf.raw_ops.Assert(condition=last, data=[_NOT_THE_END]))
        with tf.control_dependencies(checks):
            data = iterator.get_next()
        data, tensors = (data, _tensors(data)) if strategy is not None else _together(data)
        # At the data's end nothing else has run, what needs no data included.
        with tf.control_dependencies(tensors), model.window_that(ends):
            logs = _run(model.train_step, strategy, data)
            return logs, [accumulator.remaining] if ends is False else []

    functions = {
        ends: _FunctionOfIterators(functools.partial(step, ends), fixed=strategy is None)
        for ends in (None, False, True)
    }
    missing: int | None = None  # how many micro-batches the window needs, if nobody else has used it since

    def function(iterator: Any) -> Logs:
        nonlocal missing
        known, missing = missing, None  # what an error leaves
        if not isinstance(iterator, _ITERATORS):
            return for_other_iterators(iterator)
        if model.model.built and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        accumulator = model.optimizer.accumulator
        if known is None:
            known = None if model.micro_batch_size is not None else accumulator.missing()
        ends = None if known is None else known <= 1
        try:
            try:
                logs, remaining = functions[ends](iterator)
            except tf.errors.InvalidArgumentError as error:
                if not ends or _NOT_THE_END not in str(error):
                    raise
                # Nothing has run, and no data is lost.
                ends = False if (accumulator.missing() or 0) > 1 else None
                logs, remaining = functions[ends](iterator)
        except tf.errors.OutOfRangeError as error:
            raise StopIteration from error
        if ends:
            missing = accumulator.accum_steps
        elif remaining:
            missing = int(remaining[0])
            if missing < 1:
                model.flush()
                missing = accumulator.accum_steps
        return logs

    return function


class _FunctionOfIterators:
    """As `tf.function(run)` of an iterator, and quicker to call again with the same one.

    To find the function for an iterator and to bind its arguments takes TensorFlow about as long as to call it. So that
    is done once for each.
    """

    def __init__(self, run: Callable[[Any], Any], *, fixed: bool) -> None:
        self._run = run
        self._fixed = fixed  # whether what the function captures stays the same, as without a strategy
        self._function: Any = None
        # Weak, as an iterator keeps its dataset alive.
        self._calls: weakref.WeakKeyDictionary[Any, Callable[[], Any]] = weakref.WeakKeyDictionary()

    def __call__(self, iterator: Any) -> Any:
        if tf.config.functions_run_eagerly():
            return self._run(iterator)
        call = self._calls.get(iterator)
        if call is not None:
            return call()
        first = self._function is None
        if first:
            self._function = tf.function(self._run, reduce_retracing=True, autograph=False)
        if first or not self._fixed:  # it may make variables
            return self._function(iterator)
        concrete = self._function.get_concrete_function(iterator)
        if not hasattr(concrete, "_call_flat"):
            return concrete(iterator)
        parts = tf.nest.flatten(iterator, expand_composites=True)
        call = self._calls[iterator] = functools.partial(concrete._call_flat, parts, list(concrete.captured_inputs))
        return call()


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

    def run_share(share: Any) -> Logs:
        # Dependencies from outside do not hold for what a replica does.
        with tf.control_dependencies(_tensors(share)):
            return step(_without_optionals(share))

    return replicas.run(strategy, run_share, data)


def _tensors(data: Any) -> list[tf.Tensor]:
    return [leaf for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)]


def _together(data: Any) -> tuple[Any, list[tf.Tensor]]:
    """The same data, and its tensors, from one operation.

    All that waits for a tensor of a dataset TensorFlow hands to other threads, each operation by itself. So one does,
    and the rest waits for it.
    """
    tensors = _tensors(data)
    if tf.executing_eagerly():
        return data, tensors
    with tensors[0].graph.colocate_with(tensors[0].op):  # a dataset's strings are for no GPU
        tensors = tf.raw_ops.IdentityN(input=tensors)
    rest = iter(tensors)
    leaves = [next(rest) if tf.is_tensor(leaf) else leaf for leaf in tf.nest.flatten(data, expand_composites=True)]
    return tf.nest.pack_sequence_as(data, leaves, expand_composites=True), tensors


def _without_optionals(data: Any) -> Any:
    """As Keras does for what a dataset may lack."""
    return keras.tree.map_structure(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
