"""`micro_batch_size="auto"`: the micro-batch is found at the first step, and halved when memory runs out.

A step that may be repeated has three functions:

fetch       takes the batch from the iterator, outside of anything compiled: a step that fails has its batch still
accumulate  all micro-batches of the window; what it moves, such as running statistics, seeds and metrics, was
            remembered before, and accumulators start anew with the first micro-batch anyway
end         the update. A fused update is one op, which has all memory that it needs before it writes anything. An
            optimizer whose update is not fused has the old values of what it writes kept until it has succeeded.

So where memory runs out, in whichever function, the same step is made again from the state before it.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from accumops.adapters.keras_model import global_seed
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
        self._accumulate: Callable[[Any], None] | None = None
        self._end: Callable[[], Logs] | None = None
        self._moved: list[tf.Variable] = []
        self._values_of_moved: Callable[[], list[tf.Tensor]] | None = None

    def start_anew(self) -> None:
        """Forgets functions: the model has been compiled, or its micro-batch has changed."""
        self._accumulate = self._end = self._values_of_moved = None

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
        while (failure := self._failure_of(lambda: self._passes()(data))) is not None:
            self._put_back(before)
            size = model.micro_batch_size
            if size == 1:
                raise _out_of_memory(_ONE_SAMPLE, failure)
            model.micro_batch_size = size // 2
            gc.collect()  # the functions for the size before, whose graphs hold memory
            print(f"\naccumops: memory ran out ({failure}). micro_batch_size={size // 2} from here on.", flush=True)
        return self._update(before)

    def _update(self, before: list[tf.Tensor]) -> Logs:
        """Ends the window. Where memory runs out it tries once more, without what the passes hold."""
        optimizer = self._model.optimizer
        # A fused update would copy what somebody else holds, and needs nothing of it.
        inner = [*self._model.trainable_variables, *optimizer.inner_optimizer.variables]
        written = [] if optimizer.fused_update else [tf_variable(each) for each in inner]
        values = [each.read_value() for each in written]
        logs: list[Logs] = []
        for _ in range(2):
            failure = self._failure_of(lambda: logs.append(self._ending()()))
            if failure is None:
                return logs[0]
            if not bool(optimizer.accumulator.open):
                # The update is made, and some of what follows it has failed: all of that may be done twice.
                optimizer.accumulator.state.connections.clear()
                optimizer.accumulator.state.members.close()
                return self._model.get_metrics_result()
            _assign(written, values)
            self._accumulate = None
            gc.collect()
        self._put_back(before)
        raise _out_of_memory(_UPDATE, failure)

    @staticmethod
    def _failure_of(run: Callable[[], Any]) -> str | None:
        """Runs something, and returns the first line of what was said if memory ran out."""
        try:
            run()
        except tf.errors.ResourceExhaustedError as error:
            return str(error).strip().splitlines()[0]
        return None

    def _passes(self) -> Callable[[Any], None]:
        if self._accumulate is None:
            self._accumulate = self._function(self._model.training_step.accumulate)
        return self._accumulate

    def _ending(self) -> Callable[[], Logs]:
        def end() -> Logs:
            self._model.training_step.end_window()
            return self._model.get_metrics_result()

        if self._end is None:
            self._end = self._function(end)
        return self._end

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


def _out_of_memory(message: str, failure: str | None) -> Exception:
    return tf.errors.ResourceExhaustedError(None, None, message.format(failure))
