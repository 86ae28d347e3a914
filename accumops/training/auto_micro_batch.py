"""`micro_batch_size="auto"`: the micro-batch is found at the first step, and halved when memory runs out.

A step that may be repeated has four functions:

fetch       takes the batch from the iterator, outside of anything compiled: a step that fails has its batch still
accumulate  all micro-batches of the window; what it moves, such as running statistics, seeds and metrics, was
            remembered before, and accumulators start anew with the first micro-batch anyway
update      the update alone. Where it is one fused op, that op has all memory that it needs before it writes anything,
            nothing else can fail beside or after it, and the optimizer's `iterations` say whether it has been made.
            Otherwise the old values of what the optimizer writes are kept until it has succeeded.
close       notes and closes the window. The old values of counters and notes are kept. Running statistics move, and
            their window is emptied, in one op, so that closing twice moves them once.

So where memory runs out, in whichever function, it is made again from the state before it.
"""

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_model import global_seed
from accumops.adapters.keras_optimizer import innermost
from accumops.ops.variables import tf_variable
from accumops.planning.find_micro_batch_size import plan_for_model
from accumops.planning.micro_batch_plan import MicroBatchPlan
from accumops.training.first_batch import plain, samples_of

Logs = dict[str, Any]


class AutoMicroBatch:
    """Trains a model with a micro-batch that fits.

    Args:
        model: The `GradientAccumulateModel`.
        memory_limit: As for `find_micro_batch_size`.
    """

    def __init__(self, model: Any, memory_limit: str | int | None) -> None:
        self._model = model
        self.memory_limit = memory_limit
        self.plan: MicroBatchPlan | None = None
        """The plan, once it is found."""
        self._accumulate: Callable[[Any], tf.Tensor] | None = None
        self._update: Callable[[], None] | None = None
        self._in_one_op = False  # whether the update is one op, and all that comes after it counts it
        self._close: Callable[[], Logs] | None = None
        self._moved: list[tf.Variable] = []
        self._values_of_moved: Callable[[], list[tf.Tensor]] | None = None

    def start_anew(self) -> None:
        """Forgets functions: the model has been compiled, or its micro-batch has changed."""
        self._accumulate = self._update = self._close = self._values_of_moved = None

    def train_function(self, check: Callable[[Callable[[Any], Logs]], Callable[[Any], Logs]]) -> Callable[[Any], Logs]:
        """Makes the train function.

        Args:
            check: Returns a train function that checks the loss before it trains.
        """
        self.start_anew()
        checked = check(lambda iterator: self._train(plain(next(iterator))))

        def function(iterator: Any) -> Logs:
            batch = next(iterator)  # raises StopIteration at the end, as Keras wants it
            self._find(plain(batch))
            return checked(iter([batch]))

        return function

    def _find(self, batch: Any) -> None:
        samples = samples_of(batch)
        if self.plan is not None and samples <= self.plan.effective_batch_size:
            return
        self.plan = plan_for_model(self._model, batch, samples, self.memory_limit, stored=True)
        self.plan.apply(self._model)
        size, steps = self.plan.micro_batch_size, self.plan.accum_steps
        print(f"\naccumops: {str(self.plan).splitlines()[0]} ({size} x {steps} >= {samples})", flush=True)

    def _train(self, data: Any) -> Logs:
        model = self._model
        if model.model.built and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        before = self._values_before()
        counted: list[tf.Tensor] = []  # what the optimizer's `iterations` are once the update is made
        while (failure := self._failure_of(lambda: counted.append(self._passes()(data)))) is not None:
            self._put_back(before)
            size = model.micro_batch_size
            if size == 1:
                raise _out_of_memory(_ONE_SAMPLE, failure)
            model.micro_batch_size = size // 2
            gc.collect()  # the functions for the size before, whose graphs hold memory
            print(f"\naccumops: memory ran out ({failure}). micro_batch_size={size // 2} from here on.", flush=True)
        return self._end(before, counted[0])

    def _end(self, before: list[tf.Tensor], counted: tf.Tensor) -> Logs:
        """Ends the window. Where memory runs out it tries once more, without what the passes hold."""
        optimizer = self._model.optimizer
        if not (optimizer.accumulator.built and self._model.trainable_variables):
            return self._model.get_metrics_result()
        update = self._updating()
        in_one_op = self._in_one_op
        written = [] if in_one_op else [*self._model.trainable_variables, *optimizer.inner_optimizer.variables]

        def is_made() -> bool:
            return in_one_op and tf_variable(innermost(optimizer).iterations).numpy() == counted.numpy()

        failure = self._failure_of_two(update, written, is_made)
        if failure is not None:
            self._put_back(before)
            raise _out_of_memory(_UPDATE, failure)
        logs: list[Logs] = []
        failure = self._failure_of_two(lambda: logs.append(self._closing()()), self._written_where_it_closes())
        if failure is not None:
            raise _out_of_memory(_CLOSE, failure)
        return logs[0]

    def _failure_of_two(
        self, run: Callable[[], Any], written: Sequence[Any], is_made: Callable[[], bool] = lambda: False
    ) -> str | None:
        """Runs something, once more where memory runs out. Returns what was said if it does so twice.

        Args:
            run: What runs.
            written: What is to have its old values before it runs again.
            is_made: Says after a failure whether nothing is left to be done.
        """
        variables = list({id(each): each for each in map(tf_variable, written)}.values())
        values = [each.read_value() for each in variables]
        for _ in range(2):
            failure = self._failure_of(run)
            if failure is None or is_made():
                return None
            _assign(variables, values)
            self._accumulate = None
            gc.collect()
        return failure

    def _is_one_op(self, update: Any) -> bool:
        inner = self._model.optimizer.inner_optimizer
        if self._model.run_eagerly or isinstance(inner, keras.optimizers.LossScaleOptimizer) or inner.use_ema:
            return False
        graph = update.get_concrete_function().graph.as_graph_def()
        operations = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
        return [each.op for each in operations].count("AccumOps>Update") == 1

    def _written_where_it_closes(self) -> list[Any]:
        """What `close` must not write twice."""
        optimizer = self._model.optimizer
        state = optimizer.accumulator.state
        notes = [each.variables for each in (state.notes.noise, optimizer.record) if each is not None]
        return [*state.small_variables, *itertools.chain.from_iterable(notes)]

    @staticmethod
    def _failure_of(run: Callable[[], Any]) -> str | None:
        """Runs something, and returns the first line of what was said if memory ran out."""
        try:
            run()
        except tf.errors.ResourceExhaustedError as error:
            return str(error).strip().splitlines()[0]
        return None

    def _passes(self) -> Callable[[Any], tf.Tensor]:
        def accumulate(data: Any) -> tf.Tensor:
            self._model.training_step.accumulate(data)
            return innermost(self._model.optimizer).iterations + 1

        if self._accumulate is None:
            self._accumulate = self._function(accumulate)
        return self._accumulate

    def _updating(self) -> Any:
        if self._update is None:
            self._update = self._function(self._model.optimizer.update_alone)
            self._in_one_op = self._is_one_op(self._update)
        return self._update

    def _closing(self) -> Callable[[], Logs]:
        def close() -> Logs:
            self._model.optimizer.close_alone()
            return self._model.get_metrics_result()

        if self._close is None:
            self._close = self._function(close)
        return self._close

    def _function(self, run: Callable[..., Any]) -> Callable[..., Any]:
        model = self._model

        def within(*data: Any) -> Any:
            with model.owning_windows():
                return run(*data)

        if model.run_eagerly:
            return within
        whole = bool(model.jit_compile) and not model.compiles_passes
        return tf.function(within, jit_compile=whole or None, reduce_retracing=True, autograph=False)

    def _values_before(self) -> list[tf.Tensor]:
        """The values of what `accumulate` moves. They are no copies: what is written next gets memory of its own."""
        model = self._model
        seed = global_seed(create=False)
        moved: Sequence[Any] = [
            *model.non_trainable_variables,
            *(variable for metric in model.metrics for variable in metric.variables),
            *([] if seed is None else [seed]),
        ]
        variables = list({id(each): each for each in map(tf_variable, moved)}.values())
        if self._values_of_moved is None or [id(each) for each in variables] != [id(each) for each in self._moved]:
            self._moved = variables
            self._values_of_moved = tf.function(lambda: [each.read_value() for each in variables], autograph=False)
        return list(self._values_of_moved())

    def _put_back(self, before: list[tf.Tensor]) -> None:
        """Gives what `accumulate` moves its values back. Metrics that the step has made start anew."""
        _assign(self._moved, before)
        known = {id(each) for each in self._moved}
        for metric in self._model.metrics:
            if any(id(tf_variable(each)) not in known for each in metric.variables):
                metric.reset_state()


def _assign(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


_ONE_SAMPLE = (
    "Memory ran out in a micro-batch of one sample: {}\nNothing of this step has changed the model. What helps: "
    "recompute for less memory (`accumops.recompute_layers`), a smaller batch in `fit`, mixed precision, or an "
    "optimizer with fewer slots."
)
_UPDATE = (
    "Memory ran out in the update, which takes no less with smaller micro-batches: {}\nNothing of this step has "
    "changed the model. What helps: an optimizer that accumops fuses (`model.optimizer.fused_update` says why not), or "
    "one with fewer slots."
)


_CLOSE = (
    "Memory ran out after the update, where little of it is needed: {}\nThe update of this step is made, and is not "
    "counted in the logs. What helps: less that takes memory beside the training."
)


def _out_of_memory(message: str, failure: str | None) -> Exception:
    return tf.errors.ResourceExhaustedError(None, None, message.format(failure))
