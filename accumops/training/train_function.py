"""The functions that `fit` calls once a step, or once for several, where XLA does not compile the step.

A call of a `tf.function` takes microseconds for each variable that it uses, and so does a condition. The end of a
window uses all variables of the update. So there are three functions of one step:

function   used when                                         contains
False      the window still needs more than one micro-batch  no update; an assertion comes first
True       this step ends the window                         the update, without condition; an assertion comes first
None       this is not known                                 the update, by flags of its ops or in a condition

The host counts along how many micro-batches the window still needs, and reads nothing. If something else uses the
window, that count is stale: the function then refuses to run, before it has fetched any data, and the counters are
read again.

With `steps_per_execution` one function loops over steps of kind None. The first call makes its steps one by one. So
variables that a step makes, such as those of metrics, exist when the loop is traced.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import bound_call
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.window import replicas
from accumops.window.recorded_operations import Recording

Logs = dict[str, Any]

_ITERATORS = (tf.data.Iterator, tf.distribute.DistributedIterator)
_STALE = "The window does not need as many micro-batches as it should."


class TrainedModel(Protocol):
    """What a train function needs of its model, a `GradientAccumulateModel`."""

    model: keras.Model
    optimizer: GradientAccumulateOptimizer
    micro_batch_size: int | None
    trainable_variables: list[keras.Variable]
    distribute_strategy: tf.distribute.Strategy | None
    steps_per_execution: int

    def get_metrics_result(self) -> Logs:
        """Returns the metrics, by name."""

    def train_step(self, data: Any) -> Logs:
        """Trains on a batch."""

    def window_ends(self, ends: bool | None) -> AbstractContextManager[None]:
        """Says whether the steps of a block end their window."""


def train_function(model: TrainedModel, for_other_iterators: Callable[[Any], Logs]) -> Callable[[Any], Logs]:
    """Makes a model's train function.

    Args:
        model: The model, compiled.
        for_other_iterators: Is called with an iterator that is neither `tf.data`'s nor a strategy's.
    """
    strategy = replicas.mirroring(model.distribute_strategy)

    def step(ends: bool | None, iterator: Any) -> Logs:
        checks = []
        if ends is not None:
            as_known = model.optimizer.accumulator.state.counters.next_ends(ends)
            checks.append(tf.raw_ops.Assert(condition=as_known, data=[_STALE]))
        with tf.control_dependencies(checks):
            data = iterator.get_next()
        data, tensors = (data, _tensors(data)) if strategy is not None else _together(data)
        # All operations wait for the data, so that at the data's end none of them has run.
        with tf.control_dependencies(tensors), model.window_ends(ends):
            return _run(model.train_step, strategy, data)

    several = model.steps_per_execution > 1
    if several:
        with tf.init_scope(), tf.device("/CPU:0"):
            done = tf.Variable(0, name="steps_of_a_call")  # an int32, which is on the host

    def loop(iterator: Any) -> Logs:
        def run(number: tf.Tensor) -> list[tf.Tensor]:
            data, tensors = _together(iterator.get_next())
            with tf.control_dependencies(tensors), model.window_ends(None), Recording() as step:
                _run(model.train_step, None, data)
            # A step ends before the next batch is fetched. So the data's end, or an error in it, stops no step halfway.
            with tf.control_dependencies(step.effects), tf.control_dependencies([done.assign(number + 1)]):
                return [number + 1]

        with tf.control_dependencies([done.assign(0)]):
            first = tf.zeros([], tf.int32)
        tf.while_loop(lambda number: number < model.steps_per_execution, run, [first], parallel_iterations=1)
        return model.get_metrics_result()

    functions: dict[bool | None, Callable[[Any], Any]] = {
        ends: _FunctionOfIterators(functools.partial(step, ends), fixed=strategy is None)
        for ends in (None, False, True)
    }
    if several:
        # TensorFlow counts the traces of functions of the same code, of all models together, and warns of many. A
        # partial has no code.
        together = _FunctionOfIterators(functools.partial(loop), fixed=True)
        functions = {None: _Several(functions[None], together, model, done)}
    missing: int | None = None  # how many micro-batches the window needs, if nothing else has used it since

    def function(iterator: Any) -> Logs:
        nonlocal missing
        known, missing = missing, None  # an error leaves it unknown
        if not isinstance(iterator, _ITERATORS):
            return for_other_iterators(iterator)
        if model.model.built and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        accumulator = model.optimizer.accumulator
        if known is None and model.micro_batch_size is None and not several:
            known = accumulator.missing()
        try:
            try:
                logs = functions[_ends(known)](iterator)
            except tf.errors.InvalidArgumentError as error:
                if known is None or _STALE not in str(error):
                    raise
                # Nothing has run, and no data is lost.
                known = accumulator.missing()
                logs = functions[_ends(known)](iterator)
        except tf.errors.OutOfRangeError as error:
            raise StopIteration from error
        if known is not None:
            steps = accumulator.accum_steps
            missing = known - 1 if known > 1 else steps if isinstance(steps, int) else None
        return logs

    return function


def _ends(missing: int | None) -> bool | None:
    """Whether a step ends a window that needs so many micro-batches."""
    return None if missing is None else missing <= 1


class _FunctionOfIterators:
    """A `tf.function` of an iterator that is quick to call again with the same iterator.

    TensorFlow takes about as long to find the function for an iterator, and to bind its arguments, as to call it. So
    this is done once for each iterator.
    """

    def __init__(self, run: Callable[[Any], Any], *, fixed: bool) -> None:
        self._run = run
        self._fixed = fixed  # whether the function captures the same tensors at each call, as without a strategy
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
        call = bound_call(concrete, iterator)
        if call is None:
            return concrete(iterator)
        self._calls[iterator] = call
        return call()


class _Several:
    """Makes several steps a call: the first call one by one, and all others in one function.

    Args:
        one: Makes a step.
        all_: Makes all of them; at the data's end it fails.
        model: The model.
        done: How many of them it has made.
    """

    def __init__(
        self, one: Callable[[Any], Any], all_: Callable[[Any], Any], model: TrainedModel, done: tf.Variable
    ) -> None:
        self._one, self._all, self._model, self._done = one, all_, model, done
        self._is_first = True

    def __call__(self, iterator: Any) -> Any:
        if self._is_first:
            return self._one_by_one(iterator)
        try:
            return self._all(iterator)
        except tf.errors.OutOfRangeError:
            if int(self._done) == 0:
                raise
            return self._model.get_metrics_result()

    def _one_by_one(self, iterator: Any) -> Any:
        logs = self._one(iterator)
        self._is_first = False
        for _ in range(self._model.steps_per_execution - 1):
            try:
                logs = self._one(iterator)
            except tf.errors.OutOfRangeError:
                break
        return logs


def function_of_workers(
    step: Callable[[Any], Logs], strategy: tf.distribute.Strategy, run_eagerly: bool
) -> Callable[[Any], Logs]:
    """Makes a function that runs a step with an iterator's next batch, for a strategy that spans several processes.

    Keras's function would average the logs of a step over all processes, which fails for scalars.

    Args:
        step: Is run by each replica with its part of the batch.
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
        # Control dependencies from outside do not reach the operations of a replica.
        with tf.control_dependencies(_tensors(share)):
            return step(_without_optionals(share))

    return replicas.run(strategy, run_share, data)


def _tensors(data: Any) -> list[tf.Tensor]:
    return [leaf for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)]


def _together(data: Any) -> tuple[Any, list[tf.Tensor]]:
    """Returns the same data, and its tensors, from one operation.

    TensorFlow hands each operation that waits for a dataset's tensor to another thread. So one operation waits for all
    of them, and the rest waits for that one.
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
    """Returns None for optional parts that a dataset lacks, as Keras does."""
    return keras.tree.map_structure(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
