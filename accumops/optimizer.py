"""An optimizer that accumulates gradients over several calls and lets the one it wraps apply them as one update."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.accumulator import GradientAccumulator, check_accum_steps


@keras.saving.register_keras_serializable(package="accumops")
class GradientAccumulateOptimizer(keras.optimizers.Optimizer):
    """Wraps a Keras optimizer so that every `accum_steps` calls of `apply` make one update.

    The wrapped optimizer sees one gradient a window, the mean over its micro-batches, and nothing in between: its
    clipping, weight decay, moving averages, iteration count and so its learning-rate schedule work as they would with
    the one large batch.

    Args:
        inner_optimizer: Any `keras.optimizers.Optimizer`, or a string or config that `keras.optimizers.get` knows.
        accum_steps: Micro-batches an update, an int of at least 1, or None: then only `flush` makes an update.
        name: The name of this optimizer.

    Raises:
        TypeError: If `accum_steps` is not an int.
        ValueError: If `accum_steps` is less than 1, or `inner_optimizer` accumulates gradients itself.

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
        accum_steps: int | None,
        name: str | None = None,
    ) -> None:
        accum_steps = check_accum_steps(accum_steps)
        inner_optimizer = _check_inner_optimizer(keras.optimizers.get(inner_optimizer))
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self._accumulator = GradientAccumulator(accum_steps, name=f"{self.name}_accumulator")

    @property
    def accum_steps(self) -> int | None:
        """Micro-batches an update, or None."""
        return self._accumulator.accum_steps

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
        _check_strategy()
        for variable in variables:
            if self._overwrite_variable_with_gradient(variable):
                raise ValueError(
                    f"The variable '{variable.path}' is overwritten with its gradient, as float8 training does: such "
                    "gradients cannot be accumulated."
                )
        self.inner_optimizer.build(variables)
        if variables:
            self._accumulator.build(variables)
        super().build(variables)

    def apply(
        self,
        grads: Sequence[tf.Tensor | tf.IndexedSlices | None],
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
        positions = self._accumulate(grads, trainable_variables, weight)
        if positions and self.accum_steps is not None:
            keras.ops.cond(self._accumulator.ready, lambda: self._update(positions), lambda: None)

    def accumulate(
        self,
        grads: Sequence[tf.Tensor | tf.IndexedSlices | None],
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
        self._accumulate(grads, trainable_variables, weight)

    def flush(self) -> None:
        """Ends the open window, full or not, with an update; does nothing where none is open.

        Raises:
            ValueError: If it is not built.
        """
        if not self.built:
            raise ValueError(
                "`flush` needs an optimizer that is built: call `optimizer.build(trainable_variables)` first."
            )
        if self._accumulator.built:
            keras.ops.cond(self._accumulator.step > 0, lambda: self._update([]), lambda: None)

    def _accumulate(
        self,
        grads: Sequence[tf.Tensor | tf.IndexedSlices | None],
        trainable_variables: Sequence[keras.Variable] | None,
        weight: float | tf.Tensor,
    ) -> list[int]:
        """Returns the positions of the given variables among those of `build`."""
        grads = list(grads)
        if not grads:
            return []
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
        positions = [self._get_variable_index(variable) for variable in trainable_variables]
        given = dict(zip(positions, grads, strict=True))
        self._accumulator.accumulate([given.get(i) for i in range(len(self._trainable_variables))], weight=weight)
        return positions

    def _update(self, positions: list[int]) -> None:
        """Closes the window and applies its gradient to all variables that have one.

        Those of `positions` that have none go along, for the wrapped optimizer to warn of.
        """
        pairs = [
            (gradient, variable)
            for i, (gradient, variable) in enumerate(
                zip(self._accumulator.close(), self._trainable_variables, strict=True)
            )
            if gradient is not None or i in positions
        ]
        self.inner_optimizer.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])

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
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

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
            "accum_steps": self.accum_steps,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "GradientAccumulateOptimizer":
        """Makes an optimizer from what `get_config` returned."""
        config = copy.copy(config)
        config["inner_optimizer"] = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(**config)

    def __dir__(self) -> list[str]:
        # Keras saves each attribute that it finds here and that can be saved. The wrapped optimizer's variables are
        # saved among this one's, where a plain optimizer has them: once is enough.
        return [name for name in super().__dir__() if name != "inner_optimizer"]

    def __repr__(self) -> str:
        return f"<GradientAccumulateOptimizer {type(self.inner_optimizer).__name__}, accum_steps={self.accum_steps}>"


def _delegated(name: str) -> property:
    def read(self: GradientAccumulateOptimizer) -> Any:
        return getattr(self.inner_optimizer, name)

    def write(self: GradientAccumulateOptimizer, value: Any) -> None:
        if hasattr(self, "inner_optimizer"):  # not yet in the base class's constructor
            setattr(self.inner_optimizer, name, value)

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


def _check_strategy() -> None:
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync > 1 or not tf.__internal__.distribute.strategy_supports_no_merge_call():
        raise ValueError(
            f"GradientAccumulateOptimizer does not work under {type(strategy).__name__}: it accumulates on one device, "
            "without a strategy or under OneDeviceStrategy."
        )


def _check_inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    inner = optimizer
    while inner is not None:
        if isinstance(inner, GradientAccumulateOptimizer) or inner.gradient_accumulation_steps:
            raise ValueError(
                f"`inner_optimizer` must not accumulate gradients itself. Received: {type(inner).__name__} with "
                f"{'accum_steps' if isinstance(inner, GradientAccumulateOptimizer) else 'gradient_accumulation_steps'}."
            )
        inner = getattr(inner, "inner_optimizer", None)
    return optimizer
