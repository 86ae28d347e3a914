"""An optimizer that accumulates gradients over several calls and lets the one it wraps apply them as one update."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.overriding import LOCK, overriding
from accumops.arguments import Schedule, check_accum_steps, check_bool, check_variables
from accumops.optimizer import fused, rows
from accumops.optimizer.fused import FusedUpdate
from accumops.window import replicas
from accumops.window.accumulator import GradientAccumulator
from accumops.window.handover import CountedMicroBatch, Window

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
Clipping = Callable[[Gradients, Sequence[keras.Variable]], Gradients]


@keras.saving.register_keras_serializable(package="accumops")
class GradientAccumulateOptimizer(keras.optimizers.Optimizer):
    """Wraps a Keras optimizer so that every `accum_steps` calls of `apply` make one update.

    The wrapped optimizer sees one gradient a window, the mean over its micro-batches, and nothing in between: its
    clipping, weight decay, moving averages, iteration count and so its learning-rate schedule work as they would with
    the one large batch.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) create and build it within `strategy.scope()`,
    and call `apply` in a function that `strategy.run` calls, with no `tf.cond` or loop around it. Replicas communicate
    where a window ends, and nowhere else. As with any optimizer there, gradients are summed over the replicas, and are
    those of losses that are divided by their number R, as Keras's trainer does: the wrapped optimizer sees
    `R * sum(weight * gradient) / sum(weight)` over the micro-batches of all replicas. A micro-batch of weight 0, such
    as one without samples, counts as nothing, whatever its gradients are. `flush` can be called anywhere.

    Args:
        inner_optimizer: Any `keras.optimizers.Optimizer`, or a string or config that `keras.optimizers.get` knows.
        accum_steps: Micro-batches an update, an int of at least 1; or a callable that gives it for the count of updates
            so far, an int64 scalar; or None: then only `flush` makes an update. An int can be changed, by setting the
            attribute or with the callback `AccumStepsScheduler`, and holds from the next window on.
        gradient_clipping: What clips the window's gradient before the wrapped optimizer's own clipping, such as
            `AdaptiveGradientClipping()`: a callable `(gradients, variables) -> gradients`.
        lazy_sparse: Whether rows of variables with sparse gradients (`tf.IndexedSlices`, from embeddings) stay as they
            are in a window that has no gradient for them: no momentum moves them, no weight decay, and their momentums
            do not decay either. The update then costs what the touched rows cost. It is another algorithm than dense
            training, and known for SGD, Adam, AdamW, RMSprop, Adagrad and Lion. Rows are kept apart without it too
            where that changes nothing: for SGD without momentum and for Adagrad, in tables of at least 1024 rows and
            65,536 values.
        name: The name of this optimizer.

    Raises:
        TypeError: If `accum_steps` is not an int, and no callable that returns one, or `gradient_clipping` is not
            callable.
        ValueError: If `accum_steps` is less than 1, `inner_optimizer` accumulates gradients itself, or it does not
            go with `lazy_sparse`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(1e-3), accum_steps=4)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(tf.ones([64, 3]), tf.ones([64, 1]), batch_size=8, verbose=0)
    >>> int(optimizer.iterations)
    2
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict[str, Any],
        accum_steps: int | Schedule | None,
        name: str | None = None,
        *,
        gradient_clipping: Clipping | None = None,
        lazy_sparse: bool = False,
    ) -> None:
        accum_steps = check_accum_steps(accum_steps)
        inner_optimizer = _check_inner_optimizer(keras.optimizers.get(inner_optimizer))
        check_gradient_clipping(gradient_clipping)
        if check_bool("lazy_sparse", lazy_sparse):
            _check_lazy(inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.gradient_clipping = gradient_clipping
        self.lazy_sparse = lazy_sparse
        self._averages_elsewhere = False
        self._scaled_around = False  # by a LossScaleOptimizer
        # Whether XLA compiles the step, where that is known before a step is traced; see GradientAccumulator.build.
        self.jit_compile: bool | None = None
        self._accumulator = GradientAccumulator(accum_steps, name=f"{self.name}_accumulator")

    def __setattr__(self, name: str, value: Any) -> None:
        # All that a LossScaleOptimizer tells of itself to what it wraps; Keras does not set what is the same.
        if name == "loss_scale_factor" and value is None:
            self._scaled_around = True
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
        """The window's state."""
        return self._accumulator

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the accumulators and the wrapped optimizer's variables.

        Args:
            variables: The trainable variables.

        Raises:
            ValueError: If a variable cannot be accumulated for, or under a mirroring `tf.distribute` strategy.
        """
        variables = list(variables)
        if self.built and (self._trainable_variables or not variables):
            return
        strategy = replicas.strategy_of(variables, type(self).__name__)
        if strategy is not None:
            self._check_goes_with(strategy)
        for variable in variables:
            if self._overwrite_variable_with_gradient(variable):
                raise ValueError(
                    f"The variable '{variable.path}' is overwritten with its gradient, as float8 training does: such "
                    "gradients cannot be accumulated."
                )
        if variables:
            check_variables(variables)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            self.inner_optimizer.build(variables)
            if variables:
                self._accumulator.build(
                    variables,
                    iterations=self.inner_optimizer.iterations,
                    jit_compile=self.jit_compile,
                    track_all_rows=self.lazy_sparse,
                )
            # Moving averages are the wrapped optimizer's; the base class would make others, and give it those.
            self._averages_elsewhere = True
            try:
                super().build(variables)
            finally:
                self._averages_elsewhere = False

    def _check_goes_with(self, strategy: tf.distribute.Strategy) -> None:
        name = type(strategy).__name__
        for optimizer in (self, self.inner_optimizer, _innermost(self.inner_optimizer)):
            if optimizer._distribution_strategy is not strategy:
                raise ValueError(
                    f"The {type(optimizer).__name__} was created outside of the {name} of its variables: create model "
                    "and optimizer within one `strategy.scope()`."
                )
        if self.lazy_sparse:
            raise ValueError(f"`lazy_sparse=True` does not work under {name}, where a window's gradients are dense.")
        if self._scaled_around and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"Under {name} a LossScaleOptimizer around a GradientAccumulateOptimizer would look at the gradients "
                "of one replica only. Put it inside: GradientAccumulateOptimizer(LossScaleOptimizer(optimizer), "
                "accum_steps), and `compile(auto_scale_loss=False)`."
            )
        if not hasattr(_innermost(self.inner_optimizer), "_all_reduce_sum_gradients"):
            raise ValueError(
                f"Under {name} the gradients are summed over replicas once a window, and not again by Keras's "
                f"optimizer; that of Keras {keras.__version__} has no `_all_reduce_sum_gradients` to replace."
            )

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
            weight: This micro-batch's share in the window, a number or scalar tensor that is not negative.

        Raises:
            ValueError: If it is not built and `trainable_variables` is not given, a variable is not known, or a
                gradient does not fit its variable.
        """
        batch = self._prepare(grads, trainable_variables, weight)
        if batch is None:
            return
        accumulator, positions = self._accumulator, self._positions(trainable_variables)
        if self.accum_steps is None:
            accumulator._add(batch)
        elif accumulator.strategy is not None:
            accumulator._add(batch)
            replicas.across_replicas(
                accumulator.strategy,
                lambda: keras.ops.cond(accumulator.ready, lambda: self._update(positions), lambda: None),
            )
        elif self._folds():
            keras.ops.cond(batch.fills, lambda: self._update_with(batch, positions), lambda: accumulator._add(batch))
        else:
            accumulator._add(batch)
            keras.ops.cond(accumulator.ready, lambda: self._update(positions), lambda: None)

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
        batch = self._prepare(grads, trainable_variables, weight)
        if batch is not None:
            self._accumulator._add(batch)

    @tf.autograph.experimental.do_not_convert
    def flush(self) -> None:
        """Ends the open window, full or not, with an update; does nothing where none is open.

        Raises:
            ValueError: If it is not built.
        """
        if not self.built:
            raise ValueError(
                "`flush` needs an optimizer that is built: call `optimizer.build(trainable_variables)` first."
            )
        if not self._accumulator.built:
            return
        strategy = self._accumulator.strategy
        if strategy is None:
            keras.ops.cond(self._accumulator.open, self.close, lambda: None)
            return
        replicas.across_replicas(
            strategy, lambda: keras.ops.cond(self._accumulator.open, lambda: self._update([]), lambda: None)
        )

    @tf.autograph.experimental.do_not_convert
    def close(
        self,
        grads: Gradients | None = None,
        trainable_variables: Sequence[keras.Variable] | None = None,
        *,
        weight: float | tf.Tensor = 1.0,
    ) -> None:
        """Ends the window, full or not, with an update: for who knows that it does.

        Args:
            grads: The gradients of the last micro-batch, as for `apply`; None where the open window has them all.
            trainable_variables: As for `apply`.
            weight: As for `apply`.

        Raises:
            ValueError: As `apply` does; without `grads` also if no window is open, when executing eagerly. In a graph
                that is `tf.errors.InvalidArgumentError`, which a function that XLA compiles does not check.
        """
        if grads is None:
            self._update([])
            return
        batch = self._prepare(grads, trainable_variables, weight)
        if batch is None:
            return
        positions = self._positions(trainable_variables)
        if self._folds():
            self._update_with(batch, positions)
        else:
            self._accumulator._add(batch)
            self._update(positions)

    def _prepare(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable] | None,
        weight: float | tf.Tensor,
    ) -> CountedMicroBatch | None:
        gradients = self._in_order(grads, trainable_variables)
        return None if gradients is None else self._accumulator._prepare(gradients, None, weight)

    def _add_slice(
        self,
        grads: Gradients,
        trainable_variables: Sequence[keras.Variable],
        *,
        weight: float | tf.Tensor,
        starts: tf.Tensor | bool,
    ) -> None:
        """Accumulates gradients of a window that is counted when it holds all, with `_count` of the accumulator."""
        gradients = self._in_order(grads, trainable_variables)
        if gradients is not None:
            self._accumulator._add_slice(self._accumulator._prepare_slice(gradients, weight, starts))

    def _in_order(
        self, grads: Gradients, trainable_variables: Sequence[keras.Variable] | None
    ) -> list[tf.Tensor | tf.IndexedSlices | None] | None:
        """Checks gradients and variables, and returns a gradient or None for each of `build`'s variables."""
        grads = list(grads)
        if not grads:
            return None
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "`apply` without `trainable_variables` needs an optimizer that is built: call "
                    "`optimizer.build(trainable_variables)` first."
                )
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "There must be one gradient for each variable. "
                f"Received: {len(grads)} gradients for {len(trainable_variables)} variables."
            )
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)
        positions = self._positions(trainable_variables)
        if len(set(positions)) < len(positions):
            raise ValueError("A variable is given twice. Give each variable once, and its gradients summed.")
        given = dict(zip(positions, grads, strict=True))
        return [given.get(i) for i in range(len(self._trainable_variables))]

    def _positions(self, variables: Sequence[keras.Variable] | None) -> list[int]:
        """Where these variables stand among those of `build`."""
        if variables is None:
            return list(range(len(self._trainable_variables)))
        return [self._get_variable_index(variable) for variable in variables]

    @property
    def fused_update(self) -> FusedUpdate:
        """Whether the update is one fused op over all variables, by which rule, and if it is not, why: print it.

        It is where the wrapped optimizer is Keras's SGD, Adam, AdamW or Lion, or a LossScaleOptimizer around one, with
        float32 variables, and the compiled ops can run. Else the wrapped optimizer's own `apply` makes the update.
        Both keep their state in the wrapped optimizer's variables.
        """
        if self.gradient_clipping is not None and self.lazy_sparse:
            return FusedUpdate(None, "`gradient_clipping` goes over rows with `lazy_sparse=True`")
        with LOCK:
            return fused.describe(self.inner_optimizer, self._trainable_variables if self.built else [])

    def _folds(self) -> bool:
        """Whether a window's last gradients can go straight into the update."""
        if self._accumulator.strategy is not None:
            return False  # they are summed over replicas first
        needs_all = self.gradient_clipping is not None or fused.needs_norms(self.inner_optimizer)
        return not needs_all and bool(self.fused_update)

    def _update_with(self, batch: CountedMicroBatch, positions: list[int]) -> None:
        """Ends the window with a micro-batch that it does not hold yet, and applies its gradient."""
        with LOCK, self._accumulator._ending_with(batch) as window:
            self._apply_fused(window, positions)

    def _update(self, positions: list[int]) -> None:
        """Closes the window and applies its gradient to all variables that have one.

        Those of `positions` that have none go along, for the wrapped optimizer to warn of.
        """
        strategy = self._accumulator.strategy
        if strategy is not None:
            replicas.across_replicas(strategy, lambda: self._update_across(strategy, positions))
            return
        with LOCK, self._accumulator._ending() as window:
            if not self.fused_update:
                self._apply_unfused(window, positions)
            elif self.gradient_clipping is None:
                self._apply_fused(window, positions)
            else:
                self._apply_fused(self._clipped(window, self.gradient_clipping), positions)

    def _update_across(self, strategy: tf.distribute.Strategy, positions: list[int]) -> None:
        """As `_update`, for all replicas of this process, which make the same update."""
        with LOCK, self._accumulator._ending_across(strategy) as windows:
            clip = self.gradient_clipping
            if not self.fused_update:
                innermost = _innermost(self.inner_optimizer)

                def overwrite(variables: Sequence[keras.Variable]) -> None:
                    averages = innermost._model_variables_moving_average
                    for variable, average in zip(variables, averages, strict=True):
                        replicas.own(variable).assign(replicas.own(average))

                # Keras's would sum the gradients over the replicas once more, and overwrite variables with their moving
                # averages on all replicas at once within a condition of one.
                own = {
                    "_all_reduce_sum_gradients": lambda pairs: pairs,
                    "_overwrite_model_variables_with_average_value": overwrite,
                }
                with overriding(innermost, **own):
                    replicas.on_each_replica(
                        strategy, lambda: self._apply_unfused(windows[replicas.local_replica()], positions)
                    )
                return
            if clip is not None:
                windows = replicas.on_each_replica(
                    strategy, lambda: self._clipped(windows[replicas.local_replica()], clip)
                )
            fused.apply(self.inner_optimizer, windows, self._trainable_variables, positions, lazy=False)

    def _clipped(self, window: Window, clip: Clipping) -> Window:
        """The window with its gradients clipped, for a fused update."""
        clipped = self._clip(window.means(sparse=False), clip)
        latest = {i: tf.cast(each, tf.float32) for i, each in enumerate(clipped) if each is not None}
        return dataclasses.replace(window, weight=tf.constant(1.0), latest=latest, latest_weight=1.0, starts=True)

    def _apply_fused(self, window: Window, positions: list[int]) -> None:
        if self.lazy_sparse:
            _check_no_constraints(
                [
                    variable
                    for i, variable in enumerate(self._trainable_variables)
                    if i not in window.latest
                    and window.accumulators[i] is not None
                    and window.touched_rows(i) is not None
                ]
            )
        fused.apply(self.inner_optimizer, [window], self._trainable_variables, positions, lazy=self.lazy_sparse)

    def _apply_unfused(self, window: Window, positions: list[int]) -> None:
        innermost = _innermost(self.inner_optimizer)
        rows_suffice = rows.leaves_other_rows(innermost) and innermost.loss_scale_factor is None
        if self.lazy_sparse:
            _check_lazy(self.inner_optimizer)
        sparse = self.lazy_sparse or rows_suffice
        variables = self._trainable_variables
        closed = window.means(sparse=sparse)
        sparse_ones = {i: g.indices for i, g in enumerate(closed) if isinstance(g, tf.IndexedSlices)}
        # The wrapped optimizer may have been built for more variables, or in another order.
        touched = {innermost._get_variable_index(variables[i]): indices for i, indices in sparse_ones.items()}
        if self.lazy_sparse:
            _check_no_constraints([variables[i] for i in sparse_ones])
        gradients = closed if self.gradient_clipping is None else self._clip(closed, self.gradient_clipping)
        pairs = [
            (gradient, variable)
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
            if gradient is not None or i in positions
        ]
        with rows.updating_rows(innermost, touched, self.lazy_sparse) if touched else contextlib.nullcontext():
            self.inner_optimizer.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])

    def _clip(self, gradients: Gradients, clip: Clipping) -> Gradients:
        """Clips the gradients of the loss itself, where the wrapped optimizer is to scale them back."""
        inner, scale = self.inner_optimizer, None
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            scale = tf.convert_to_tensor(inner.dynamic_scale)
        elif inner.loss_scale_factor is not None:
            scale = tf.constant(inner.loss_scale_factor, tf.float32)
        if scale is not None:
            gradients = [_times(gradient, 1 / scale) for gradient in gradients]
        clipped = clip(gradients, self._trainable_variables)
        if not isinstance(clipped, list | tuple) or len(clipped) != len(gradients):
            raise ValueError(
                f"`gradient_clipping` must return a list of one gradient for each of {len(gradients)} variables. "
                f"Received: {len(clipped) if isinstance(clipped, list | tuple) else clipped!r}"
            )
        for before, after, variable in zip(gradients, clipped, self._trainable_variables, strict=True):
            if isinstance(after, tf.IndexedSlices) and after.indices is not getattr(before, "indices", None):
                raise ValueError(
                    f"`gradient_clipping` must keep the indices of tf.IndexedSlices. For '{variable.path}' it returned "
                    "others."
                )
        return clipped if scale is None else [_times(gradient, scale) for gradient in clipped]

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
    def iterations(self) -> keras.Variable:
        """The wrapped optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate; setting it sets that one's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self) -> float | None:
        """The wrapped optimizer's loss scale factor, of a LossScaleOptimizer its initial one; it can be set."""
        inner = self.inner_optimizer
        scales_itself = isinstance(inner, keras.optimizers.LossScaleOptimizer)
        return inner.initial_scale if scales_itself else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if not hasattr(self, "inner_optimizer"):
            return  # the base class's constructor
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # Where a LossScaleOptimizer is made, it switches off any scaling by what it wraps. This one it cannot.
            raise ValueError(
                "The wrapped optimizer is a LossScaleOptimizer: scaling the loss twice would undo the training. Use "
                "`compile(auto_scale_loss=False)`, or have one LossScaleOptimizer only, around the "
                "GradientAccumulateOptimizer (a micro-batch that is not finite is skipped) or within it (its window "
                "is)."
            )
        self.inner_optimizer.loss_scale_factor = factor

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Has the wrapped optimizer exclude variables from weight decay."""
        _innermost(self.inner_optimizer).exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Scales the loss as the wrapped optimizer wants it, which takes the scale back out of the gradients."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Has the wrapped optimizer set the variables' final values, such as their moving averages."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` stored, or the variables of the wrapped optimizer alone.

        The latter are what a model holds that was saved before it was wrapped; the next window then starts empty.
        """
        if self._accumulator.built and len(store.keys()) == len(self.inner_optimizer.variables):
            self.inner_optimizer.load_own_variables(store)
            self._accumulator.reset()
            return
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this optimizer again, without its state."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "accum_steps": keras.saving.serialize_keras_object(self.accum_steps),
            "gradient_clipping": keras.saving.serialize_keras_object(self.gradient_clipping),
            "lazy_sparse": self.lazy_sparse,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "GradientAccumulateOptimizer":
        """Makes an optimizer from what `get_config` returned."""
        config = copy.copy(config)
        for key in ("inner_optimizer", "accum_steps", "gradient_clipping"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def __dir__(self) -> list[str]:
        # Keras saves each attribute that it finds here and that can be saved. The wrapped optimizer's variables are
        # saved among this one's, where a plain optimizer has them: once is enough.
        return [name for name in super().__dir__() if name != "inner_optimizer"]

    def __repr__(self) -> str:
        return f"<GradientAccumulateOptimizer {type(self.inner_optimizer).__name__}, accum_steps={self.accum_steps}>"


def _delegated(name: str) -> property:
    def read(self: GradientAccumulateOptimizer) -> Any:
        if name == "use_ema" and self._averages_elsewhere:
            return False
        return getattr(_innermost(self.inner_optimizer), name)

    def write(self: GradientAccumulateOptimizer, value: Any) -> None:
        if hasattr(self, "inner_optimizer"):  # not yet in the base class's constructor
            setattr(_innermost(self.inner_optimizer), name, value)

    return property(read, write, doc=f"The wrapped optimizer's `{name}`.")


# What Keras and its callbacks look up on an optimizer, and what acts once a window: the wrapped one's.
for _setting in (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "_model_variables_moving_average",
):
    setattr(GradientAccumulateOptimizer, _setting, _delegated(_setting))


def _innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _check_lazy(optimizer: keras.optimizers.Optimizer) -> None:
    innermost = _innermost(optimizer)
    if rows.rule_of(innermost) is None:
        raise ValueError(
            f"`lazy_sparse=True` knows the updates of {', '.join(rows.names_of_optimizers())}. "
            f"Received: {type(innermost).__name__}"
        )
    if innermost.use_ema:
        raise ValueError("`lazy_sparse=True` does not go with `use_ema=True`, whose averages are of all rows.")
    if innermost.loss_scale_factor is not None:
        raise ValueError(
            "`lazy_sparse=True` does not go with `loss_scale_factor`, which Keras does not take out of sparse "
            "gradients. Use a keras.optimizers.LossScaleOptimizer."
        )


def _check_no_constraints(variables: Sequence[keras.Variable]) -> None:
    for variable in variables:
        if variable.constraint is not None:
            raise ValueError(
                f"`lazy_sparse=True` cannot update '{variable.path}', whose constraint is for all of its rows: "
                f"{variable.constraint}."
            )


def _times(gradient: tf.Tensor | tf.IndexedSlices | None, factor: tf.Tensor) -> tf.Tensor | tf.IndexedSlices | None:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)


def check_gradient_clipping(gradient_clipping: Clipping | None) -> None:
    """Raises what the user should read if it is not one."""
    if gradient_clipping is None or (callable(gradient_clipping) and not isinstance(gradient_clipping, type)):
        return
    raise TypeError(
        "`gradient_clipping` must be a callable `(gradients, variables) -> gradients`, such as "
        f"`AdaptiveGradientClipping()`, or None. Received: {gradient_clipping!r}"
    )


def _check_inner_optimizer(optimizer: keras.optimizers.Optimizer | None) -> keras.optimizers.Optimizer:
    if optimizer is None:
        raise ValueError("An optimizer is needed, that makes the updates. Received: None")
    if isinstance(optimizer, GradientAccumulateOptimizer) or optimizer.gradient_accumulation_steps:
        own = "accum_steps" if isinstance(optimizer, GradientAccumulateOptimizer) else "gradient_accumulation_steps"
        raise ValueError(
            f"`inner_optimizer` must not accumulate gradients itself. Received: {type(optimizer).__name__} with {own}."
        )
    # Those of a LossScaleOptimizer and of a MultiOptimizer.
    for inner in (getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())):
        if inner is not None:
            _check_inner_optimizer(inner)
    return optimizer
