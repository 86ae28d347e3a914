"""`GradientAccumulateOptimizer`: a Keras optimizer that makes one update of several calls."""

import contextlib
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import innermost
from accumops.adapters.untracked import Untracked
from accumops.arguments import (
    Schedule,
    check_accum_steps,
    check_bool,
    check_nonfinite,
    check_reduction,
    check_variables,
)
from accumops.optimizer.checks import (
    check_goes_with_lazy_rows,
    check_goes_with_strategy,
    check_gradient_clipping,
    check_inner_optimizer,
    check_variables_of_optimizer,
)
from accumops.optimizer.ending import Clipping, Ending, Gradients
from accumops.optimizer.fused_update import FusedUpdate
from accumops.optimizer.known_variables import KnownVariables
from accumops.optimizer.loading import LoadsState
from accumops.optimizer.window_record import WindowRecord
from accumops.renamed import explains_renamed
from accumops.window import replicas
from accumops.window.accumulator import GradientAccumulator
from accumops.window.micro_batch import CountedMicroBatch


@keras.saving.register_keras_serializable(package="accumops")
class GradientAccumulateOptimizer(LoadsState):
    """Wraps a Keras optimizer so that every `accum_steps` calls of `apply` make one update.

    The wrapped optimizer sees one gradient a window, the mean over its micro-batches, and nothing in between: its
    clipping, weight decay, moving averages, iteration count and so its learning-rate schedule work as they would with
    the one large batch.

    A variable that no call of a window gives a gradient for stays where it is, as in Keras. A call whose gradient for a
    variable is None, or that leaves the variable out, adds nothing to it, and counts in the mean. A call that gives
    only variables which no other call of its window gives is an error; use an optimizer for each of such parts.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) create and build it within `strategy.scope()`,
    and call `apply` in a function that `strategy.run` calls, with no `tf.cond` or loop around it. Replicas communicate
    where a window ends, and nowhere else. As with any optimizer there, gradients are summed over the replicas, and come
    from losses that are divided by the number R of replicas, as in Keras's trainer: the wrapped optimizer sees
    `R * sum(weight * gradient) / sum(weight)` over the micro-batches of all replicas. `flush` can be called anywhere.

    A micro-batch of weight 0, such as one without samples, counts as nothing, whatever its gradients are, NaN included.
    A window whose weights are all 0 makes an update with gradients of zero, as Keras does for a batch of weight 0.

    Args:
        inner_optimizer: Any `keras.optimizers.Optimizer`, or a string or config that `keras.optimizers.get` knows.
        accum_steps: Micro-batches an update, an int of at least 1; or a callable that returns it for the count of
            updates so far, an int64 scalar; or None: then only `flush` makes an update. An int can be changed by
            setting the attribute or with the callback `AccumStepsScheduler`, for the next window on.
        gradient_clipping: What clips the window's gradient before the wrapped optimizer's own clipping, such as
            `AdaptiveGradientClipping()`: a callable `(gradients, variables) -> gradients`.
        lazy_sparse: Whether rows of variables with sparse gradients (`tf.IndexedSlices`, from embeddings) stay as they
            are in a window that has no gradient for them: no momentum moves them, no weight decay, and their momentums
            do not decay either. The update then costs what the touched rows cost. It is another algorithm than dense
            training, and known for SGD, Adam, AdamW, RMSprop, Adagrad and Lion. For SGD without momentum and for
            Adagrad it changes nothing, so in tables of at least 1024 rows and 65,536 values their updates touch only
            these rows without it too.
        reduction: `"mean"`, or `"sum"` for a loss that is a sum over samples: the wrapped optimizer then sees the sum
            of the micro-batches' gradients. The optimizer does not see the loss, and cannot check this.
        nonfinite: What becomes of gradients with Inf or NaN. `"propagate"`: they make the update what they are.
            `"skip"`: the micro-batch is left out of its window, and the update is made with the mean over the others;
            without any others, there is none. The micro-batch still is one of the window's `accum_steps`. `"drop"`: the
            window makes no update. A window without an update moves no variable, and is not counted in `iterations`. A
            LossScaleOptimizer inside backs off in each of these cases; one around skips such micro-batches by itself,
            before they get here.
        name: The name of this optimizer.

    Raises:
        TypeError: If `accum_steps` is neither an int nor a callable that returns one, or `gradient_clipping` is not
            callable.
        ValueError: If `accum_steps` is less than 1, `reduction` or `nonfinite` is none of its values,
            `inner_optimizer` accumulates gradients itself, or it does not go with `lazy_sparse`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(1e-3), accum_steps=4)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(tf.ones([64, 3]), tf.ones([64, 1]), batch_size=8, verbose=0)
    >>> int(optimizer.iterations)
    2
    """

    @explains_renamed
    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict[str, Any],
        accum_steps: int | Schedule | None,
        name: str | None = None,
        *,
        gradient_clipping: Clipping | None = None,
        lazy_sparse: bool = False,
        reduction: str = "mean",
        nonfinite: str = "propagate",
    ) -> None:
        accum_steps = check_accum_steps(accum_steps)
        inner_optimizer = check_inner_optimizer(keras.optimizers.get(inner_optimizer))
        check_gradient_clipping(gradient_clipping)
        check_reduction(reduction)
        check_nonfinite(nonfinite)
        if check_bool("lazy_sparse", lazy_sparse):
            check_goes_with_lazy_rows(inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.gradient_clipping = gradient_clipping
        self.lazy_sparse = lazy_sparse
        self.jit_compile: bool | None = None
        """Whether XLA will compile the step; see `GradientAccumulator.build`. None if that is not known yet."""
        self._accumulator = GradientAccumulator(
            accum_steps, f"{self.name}_accumulator", reduction=reduction, nonfinite=nonfinite
        )
        self._untracked = Untracked(known=KnownVariables(()), scaled_around=False, record=None)

    def __setattr__(self, name: str, value: Any) -> None:
        # A LossScaleOptimizer around this one announces itself in one way only: it sets `loss_scale_factor = None`. The
        # property's setter would not see that, as Keras does not set an attribute to what it is already.
        if name == "loss_scale_factor" and value is None and hasattr(self, "_untracked"):
            self._untracked.scaled_around = True
        super().__setattr__(name, value)

    @property
    def accum_steps(self) -> int | Schedule | None:
        """Micro-batches an update, a callable that gives them, or None. An int can be set, for the next window on."""
        return self._accumulator.accum_steps

    @accum_steps.setter
    def accum_steps(self, accum_steps: int) -> None:
        self._accumulator.accum_steps = accum_steps

    @property
    def accumulator(self) -> GradientAccumulator:
        """The accumulator of the window's gradients."""
        return self._accumulator

    @property
    def nonfinite(self) -> str:
        """What becomes of gradients that are not finite: `"propagate"`, `"skip"` or `"drop"`."""
        return self._accumulator.nonfinite

    @property
    def nonfinite_count(self) -> keras.Variable:
        """How many micro-batches have been skipped, or windows dropped; see `GradientAccumulator.nonfinite_count`."""
        return self._accumulator.nonfinite_count

    @property
    def record(self) -> WindowRecord | None:
        """What notes the windows that end, for a callback that has asked for it; not public.

        A function that is traced while there is one makes the notes, and one that was traced before makes none.
        """
        record: WindowRecord | None = self._untracked.record
        return record

    @record.setter
    def record(self, record: WindowRecord | None) -> None:
        if record is not None and self._accumulator.built:
            record.build(self._accumulator.state)
        self._untracked.record = record

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the accumulators and the wrapped optimizer's variables.

        Args:
            variables: The trainable variables.

        Raises:
            ValueError: If a variable cannot be accumulated for, or under a mirroring `tf.distribute` strategy.
        """
        variables = list(variables)
        if self.built and (self._known.variables or not variables):
            return
        strategy = replicas.strategy_of(variables, type(self).__name__)
        inner = self.inner_optimizer
        if strategy is not None:
            check_goes_with_strategy(
                strategy,
                [self, inner, innermost(inner)],
                lazy_sparse=self.lazy_sparse,
                scaled_around=self._untracked.scaled_around,
            )
        check_variables_of_optimizer(variables)
        if variables:
            check_variables(variables)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            inner.build(variables)
            if variables:
                self._accumulator.build(
                    variables,
                    iterations=inner.iterations,
                    jit_compile=self.jit_compile,
                    track_all_rows=self.lazy_sparse,
                )
                if self.record is not None:
                    self.record.build(self._accumulator.state)
        # Not the base class's `build`: it would make moving averages, which the wrapped optimizer has made.
        self._untracked.known = KnownVariables(variables)
        self.built = True

    @tf.autograph.experimental.do_not_convert
    def apply(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable] | None = None,
        *,
        weight: float | tf.Tensor = 1.0,
    ) -> None:
        """Accumulates the gradients of one micro-batch; the last one of a window updates the variables.

        This is `accumulate`, and `flush` when the window is full.

        Args:
            grads: One gradient for each variable: tensors, `tf.IndexedSlices` or None.
            trainable_variables: The variables, in the order of `grads`; by default those of `build`.
            weight: This micro-batch's share in the window, a number or scalar tensor that is not negative. With 0 the
                micro-batch counts as nothing, whatever its gradients are.

        Raises:
            ValueError: If it is not built and `trainable_variables` is not given, a variable is not known, a gradient
                does not fit its variable, or the call shares no variable with the other calls of its window. If only
                the running graph knows that, `tf.errors.InvalidArgumentError`, which XLA does not check.
        """
        ends = False if self.accum_steps is None else None
        batch = self._prepare(grads, trainable_variables, weight, ends=ends)
        if batch is not None:
            self._ending.add(batch, ends=ends)

    @tf.autograph.experimental.do_not_convert
    def accumulate(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable] | None = None,
        *,
        weight: float | tf.Tensor = 1.0,
    ) -> None:
        """Accumulates the gradients of one micro-batch, and leaves the update to `flush`.

        Args:
            grads: As for `apply`.
            trainable_variables: As for `apply`.
            weight: As for `apply`.

        Raises:
            ValueError: As `apply` does.
        """
        batch = self._prepare(grads, trainable_variables, weight, ends=False)
        if batch is not None:
            self._ending.add(batch, ends=False)

    @tf.autograph.experimental.do_not_convert
    def accumulate_slice(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable],
        *,
        weight: float | tf.Tensor,
        starts: tf.Tensor | bool,
        last: tf.Tensor | bool = False,
    ) -> None:
        """Accumulates one of the micro-batches that a step splits its batch into, without counting it; not public.

        When all have been accumulated, the step counts them with `accumulator.state.count`, and calls `close`.

        Args:
            grads: As for `apply`.
            trainable_variables: As for `apply`.
            weight: As for `apply`.
            starts: Whether it is the first micro-batch of its window, a bool or a bool scalar.
            last: Whether it is the last one, if that is known: norms that are needed then come from its addition.

        Raises:
            ValueError: As `apply` does.
        """
        gradients = self._in_order(grads, trainable_variables)
        if gradients is not None:
            given = self._known.positions(trainable_variables)
            batch = self._accumulator.state.prepare_slice(gradients, weight, starts, given)
            self._ending.add_slice(batch, last=last)

    def accumulate_part(
        self, grads: Gradients, trainable_variables: Sequence[keras.Variable], *, starts: tf.Tensor | bool
    ) -> None:
        """Accumulates what a part of a model gives its variables as gradients, without counting it; not public.

        When all have been accumulated, the step counts them with `accumulator.state.count_parts`, and calls `close`.

        Args:
            grads: As for `apply`.
            trainable_variables: As for `apply`.
            starts: Whether they are the first of their window, a bool or a bool scalar.
        """
        gradients = self._in_order(grads, trainable_variables)
        if gradients is not None:
            self._accumulator.state.add_part(gradients, starts)

    @tf.autograph.experimental.do_not_convert
    def flush(self) -> None:
        """Ends the open window, full or not, with an update. Does nothing if none is open.

        Raises:
            ValueError: If it is not built.
        """
        if not self.built:
            raise ValueError(
                "`flush` needs an optimizer that is built: call `optimizer.build(trainable_variables)` first."
            )
        if not self._accumulator.built:
            return
        self._ending.end_if_open()

    @tf.autograph.experimental.do_not_convert
    def close(
        self,
        grads: Gradients | None = None,
        trainable_variables: Sequence[keras.Variable] | None = None,
        *,
        weight: float | tf.Tensor = 1.0,
    ) -> None:
        """Ends the window, full or not, with an update. Call it where it is known that the window ends.

        Args:
            grads: The gradients of the last micro-batch, as for `apply`; None if they have all been accumulated.
            trainable_variables: As for `apply`.
            weight: As for `apply`.

        Raises:
            ValueError: As `apply` does; without `grads` also if no window is open, when executing eagerly. In a graph
                that is `tf.errors.InvalidArgumentError`, which a function that XLA compiles does not check.
        """
        if grads is None:
            self._ending.end()
            return
        batch = self._prepare(grads, trainable_variables, weight, ends=True)
        if batch is not None:
            self._ending.add(batch, ends=True)

    def update_alone(self) -> None:
        """Makes the update of a window whose micro-batches have all been accumulated, and leaves it open; not public.

        It comes before `close_alone`, where one of them may run out of memory: then it is known which one did.
        """
        self._ending.update_alone()

    def close_alone(self) -> None:
        """Closes a window whose update `update_alone` has made; not public."""
        self._ending.close_alone()

    @property
    def _ending(self) -> Ending:
        return Ending(
            self.inner_optimizer,
            self._accumulator.state,
            self._known.variables,
            self.gradient_clipping,
            self.lazy_sparse,
            self.record,
        )

    def _prepare(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable] | None,
        weight: float | tf.Tensor,
        *,
        ends: bool | None,
    ) -> CountedMicroBatch | None:
        """Returns the micro-batch of a call; None if `grads` is empty, as Keras allows."""
        gradients = self._in_order(grads, trainable_variables)
        if gradients is None:
            return None
        given = self._known.positions(trainable_variables)
        return self._accumulator.state.prepare(gradients, weight, given, ends=ends)

    def _in_order(
        self, grads: Gradients, trainable_variables: Sequence[keras.Variable] | None
    ) -> list[tf.Tensor | tf.IndexedSlices | None] | None:
        """Returns a gradient or None for each of `build`'s variables; None if `grads` is empty, as Keras allows."""
        grads = list(grads)
        if not grads:
            return None
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "`apply` without `trainable_variables` needs an optimizer that is built: call "
                    "`optimizer.build(trainable_variables)` first."
                )
            return self._known.in_order(grads, self._known.variables)
        trainable_variables = list(trainable_variables)
        if not self.built and len(grads) == len(trainable_variables):
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        return self._known.in_order(grads, trainable_variables)

    @property
    def _known(self) -> KnownVariables:
        return self._untracked.known

    @property
    def fused_update(self) -> FusedUpdate:
        """Whether the update is one fused op over all variables, by which rule, and if it is not, why: print it.

        It is one if the wrapped optimizer is Keras's SGD, Adam, AdamW or Lion, or a LossScaleOptimizer around one, the
        variables are float32, and the compiled ops can run. Otherwise the wrapped optimizer's own `apply` makes the
        update. Both keep their state in the wrapped optimizer's variables.
        """
        return self._ending.fused_update

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, keras.Variable]]) -> keras.Variable:
        """Calls `apply` with pairs of gradient and variable, and returns `iterations`."""
        pairs = list(grads_and_vars)
        self.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])
        return self.iterations

    @property
    def variables(self) -> list[keras.Variable]:
        """The wrapped optimizer's variables, then the window's state."""
        return self.inner_optimizer.variables + (self._accumulator.variables if self._accumulator.built else [])

    @property
    def loss_scale_factor(self) -> float | None:
        """The wrapped optimizer's loss scale factor, or the initial scale of a LossScaleOptimizer. It can be set."""
        inner = self.inner_optimizer
        scales_itself = isinstance(inner, keras.optimizers.LossScaleOptimizer)
        return inner.initial_scale if scales_itself else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if not hasattr(self, "inner_optimizer"):
            return  # the base class's constructor
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # A new LossScaleOptimizer switches off the scaling of the optimizer that it wraps. It cannot do so here.
            raise ValueError(
                "The wrapped optimizer is a LossScaleOptimizer: scaling the loss twice would undo the training. Use "
                "`compile(auto_scale_loss=False)`, or have one LossScaleOptimizer only, around the "
                "GradientAccumulateOptimizer (a micro-batch that is not finite is skipped) or within it (its window "
                "is)."
            )
        self.inner_optimizer.loss_scale_factor = factor

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this optimizer again, without its state."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "accum_steps": keras.saving.serialize_keras_object(self.accum_steps),
            "gradient_clipping": keras.saving.serialize_keras_object(self.gradient_clipping),
            "lazy_sparse": self.lazy_sparse,
            "reduction": self._accumulator.reduction,
            "nonfinite": self.nonfinite,
            # For those who look it up, as in the config of any optimizer. The wrapped optimizer has its own.
            "learning_rate": innermost(self.inner_optimizer).get_config().get("learning_rate"),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "GradientAccumulateOptimizer":
        """Makes an optimizer from what `get_config` returned."""
        config = copy.deepcopy(config)  # Keras takes apart the configs that it is given
        config.pop("learning_rate", None)
        for key in ("inner_optimizer", "accum_steps", "gradient_clipping"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def __dir__(self) -> list[str]:
        # Keras walks `dir()` to find what to save. `inner_optimizer` is left out because `variables` already holds its
        # variables, at the place where a plain optimizer has them.
        return [name for name in super().__dir__() if name not in ("inner_optimizer", "optimizers")]

    def __repr__(self) -> str:
        return f"<GradientAccumulateOptimizer {type(self.inner_optimizer).__name__}, accum_steps={self.accum_steps}>"
