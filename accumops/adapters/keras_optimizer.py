"""What accumops uses of Keras's optimizers beyond their public interface."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.overriding import overriding
from accumops.adapters.upstream import relies_on, sample

_OPTIMIZER = "keras.optimizers.Optimizer"


def _built(optimizer: keras.optimizers.Optimizer) -> Any:
    optimizer.build([keras.Variable([0.0])])
    return optimizer


@sample("<SGD with momentum>")
def _sgd_with_momentum() -> Any:
    return _built(keras.optimizers.SGD(momentum=0.9))


@sample("<Adam with amsgrad>")
def _adam_with_amsgrad() -> Any:
    return _built(keras.optimizers.Adam(amsgrad=True))


@sample("<Lion>")
def _built_lion() -> Any:
    return _built(keras.optimizers.Lion())


@sample("<Adagrad>")
def _built_adagrad() -> Any:
    return _built(keras.optimizers.Adagrad())


@sample("<RMSprop, centered, with momentum>")
def _built_rmsprop() -> Any:
    return _built(keras.optimizers.RMSprop(momentum=0.9, centered=True))


@sample("<an optimizer with moving averages>")
def _with_averages() -> Any:
    return _built(keras.optimizers.SGD(use_ema=True))


# The rule of an optimizer, and its slots


@dataclasses.dataclass(frozen=True)
class Rule:
    """An optimizer's update in the terms of `accumops.ops.update`."""

    name: str
    slots: list[list[keras.Variable]]
    """Empty lists before the optimizer is built."""
    settings: dict[str, float]
    iterations: keras.Variable | None
    """The count of updates that corrects the rate; None for a rule whose rate is the learning rate."""


@relies_on("<SGD with momentum>.momentums", feature="the fused update of SGD with momentum, and its lazy rows")
def _sgd(optimizer: keras.optimizers.SGD) -> Rule:
    if optimizer.momentum == 0:
        return Rule("sgd", [], {}, None)
    name = "nesterov" if optimizer.nesterov else "momentum"
    slots = [list(optimizer.momentums)] if optimizer.built else [[]]
    return Rule(name, slots, {"beta_1": optimizer.momentum}, None)


@relies_on(
    "<Adam with amsgrad>._momentums",
    "<Adam with amsgrad>._velocities",
    "<Adam with amsgrad>._velocity_hats",
    feature="the fused update of Adam and AdamW, and their lazy rows",
)
def _adam(optimizer: keras.optimizers.Adam) -> Rule:
    slots: list[list[keras.Variable]] = [[]] * (3 if optimizer.amsgrad else 2)
    if optimizer.built:
        slots = [list(optimizer._momentums), list(optimizer._velocities)]
        if optimizer.amsgrad:
            slots.append(list(optimizer._velocity_hats))
    settings = {"beta_1": optimizer.beta_1, "beta_2": optimizer.beta_2, "epsilon": optimizer.epsilon}
    return Rule("amsgrad" if optimizer.amsgrad else "adam", slots, settings, optimizer.iterations)


@relies_on("<Lion>._momentums", feature="the fused update of Lion, and its lazy rows")
def _lion(optimizer: keras.optimizers.Lion) -> Rule:
    settings = {"beta_1": optimizer.beta_1, "beta_2": optimizer.beta_2}
    return Rule("lion", [list(optimizer._momentums) if optimizer.built else []], settings, None)


# AdamW uses Adam's step; decoupled weight decay is in the base class.
_RULES: dict[type[keras.optimizers.Optimizer], Callable[[Any], Rule]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Lion: _lion,
}


def rule_of(optimizer: keras.optimizers.Optimizer) -> Rule | None:
    """Returns the rule of Keras's SGD, Adam, AdamW or Lion; None of any other optimizer.

    A subclass that has an `update_step` of its own has no rule.
    """
    make = next((make for kind, make in _RULES.items() if steps_like(optimizer, kind)), None)
    return None if make is None else make(optimizer)


def steps_like(optimizer: keras.optimizers.Optimizer, kind: type[keras.optimizers.Optimizer]) -> bool:
    """Whether an optimizer makes the step of a class of Keras: it has no `update_step` of its own."""
    return type(optimizer).update_step is kind.update_step and "update_step" not in vars(optimizer)


@relies_on("<Adagrad>._accumulators", feature="lazy rows of Adagrad")
def sums_of_adagrad(optimizer: keras.optimizers.Adagrad) -> list[keras.Variable]:
    """Adagrad's sums of squared gradients, one for each variable."""
    return list(optimizer._accumulators)


@relies_on(
    "<RMSprop, centered, with momentum>._velocities",
    "<RMSprop, centered, with momentum>._average_gradients",
    "<RMSprop, centered, with momentum>._momentums",
    feature="lazy rows of RMSprop",
)
def slots_of_rmsprop(
    optimizer: keras.optimizers.RMSprop,
) -> tuple[list[keras.Variable], list[keras.Variable], list[keras.Variable]]:
    """RMSprop's mean squares, mean gradients (if it is centered) and momentums (if it has momentum)."""
    means = list(optimizer._average_gradients) if optimizer.centered else []
    momentums = list(optimizer._momentums) if optimizer.momentum > 0 else []
    return list(optimizer._velocities), means, momentums


# Questions about one variable


@relies_on(f"{_OPTIMIZER}._get_variable_index(variable)", feature="fused updates and lazy rows")
def index_of(optimizer: keras.optimizers.Optimizer, variable: tf.Variable | keras.Variable) -> int:
    """Where a variable stands among those that the optimizer was built for, and so in its slots."""
    return int(optimizer._get_variable_index(variable))


@relies_on(f"{_OPTIMIZER}._use_weight_decay(variable)", feature="weight decay in fused updates and lazy rows")
def decays(optimizer: keras.optimizers.Optimizer, variable: tf.Variable | keras.Variable) -> bool:
    """Whether the optimizer's weight decay applies to a variable; see `exclude_from_weight_decay`."""
    return bool(optimizer._use_weight_decay(variable))


# Parts of `apply` replaced while it runs

# What a fused update stands in for: a subclass that has its own may do anything in it.
_ARITHMETIC = ("apply", "_backend_apply_gradients", "_backend_update_step", "_clip_gradients", "_apply_weight_decay")


def why_arithmetic_is_kept(optimizer: keras.optimizers.Optimizer) -> str | None:
    """Says why `replacing_arithmetic` cannot be used for an optimizer, or returns None."""
    base = keras.optimizers.Optimizer
    unknown = next((name for name in _ARITHMETIC if not hasattr(base, name)), None)
    if unknown is not None:
        return f"the optimizers of Keras {keras.__version__} have no `{unknown}`"
    own = next((name for name in _ARITHMETIC if getattr(type(optimizer), name) is not getattr(base, name)), None)
    return None if own is None else f"{type(optimizer).__name__} has its own `{own}`"


@relies_on(
    f"{_OPTIMIZER}._backend_update_step(gradients, variables, learning_rate)",
    f"{_OPTIMIZER}._clip_gradients(gradients)",
    f"{_OPTIMIZER}._apply_weight_decay(variables)",
    f"{_OPTIMIZER}._backend_apply_gradients(gradients, variables)",
    feature="fused updates: without it each optimizer's own `apply` makes the update",
)
def replacing_arithmetic(
    optimizer: keras.optimizers.Optimizer,
    update: Callable[[Sequence[Any], Sequence[keras.Variable], tf.Tensor], None],
) -> contextlib.AbstractContextManager[None]:
    """Has `optimizer.apply` call `update` where it would unscale, clip, decay and step.

    What is left of `apply` is Keras's: it looks up the learning rate, moves averages, applies constraints and counts.

    Args:
        optimizer: One that `why_arithmetic_is_kept` has nothing against.
        update: Called with the gradients, the variables and the learning rate.
    """
    return overriding(
        optimizer,
        loss_scale_factor=None,
        _clip_gradients=lambda gradients: gradients,
        _apply_weight_decay=lambda variables: None,
        _backend_update_step=update,
    )


@relies_on(
    f"{_OPTIMIZER}._get_current_learning_rate()",
    feature="fused updates in graphs that do not know whether a window ends",
)
@contextlib.contextmanager
def without_arithmetic(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Has `optimizer.apply` do only what `replacing_arithmetic` leaves of it, and look up no learning rate.

    Args:
        optimizer: One that `why_arithmetic_is_kept` has nothing against.
    """
    with (
        replacing_arithmetic(optimizer, lambda gradients, variables, learning_rate: None),
        overriding(optimizer, _get_current_learning_rate=lambda: 0.0),
    ):
        yield


@relies_on(
    "keras.optimizers.LossScaleOptimizer._common_apply(gradients, variables)",
    "keras.optimizers.LossScaleOptimizer._tf_apply(gradients, variables)",
    "keras.optimizers.LossScaleOptimizer.check_finite(gradients)",
    feature="a LossScaleOptimizer inside a GradientAccumulateOptimizer",
)
def finding_finite(
    optimizer: keras.optimizers.LossScaleOptimizer, finite: tf.Tensor, *, outside_replicas: bool
) -> contextlib.AbstractContextManager[None]:
    """Has a LossScaleOptimizer take `finite` for its verdict on the gradients, which it then never looks at.

    Args:
        optimizer: The LossScaleOptimizer.
        finite: Whether all gradients are finite, a bool scalar.
        outside_replicas: Whether `apply` is called where Keras would first have to leave the replicas.
    """
    own: dict[str, Any] = {"check_finite": lambda gradients: finite}
    if outside_replicas:
        own["_tf_apply"] = optimizer._common_apply
    return overriding(optimizer, **own)


@relies_on(
    f"{_OPTIMIZER}._all_reduce_sum_gradients(pairs)",
    f"{_OPTIMIZER}._overwrite_model_variables_with_average_value(variables)",
    feature="updates under MirroredStrategy and MultiWorkerMirroredStrategy that are not fused",
)
def without_reduction(
    optimizer: keras.optimizers.Optimizer, own: Callable[[Any], tf.Variable]
) -> contextlib.AbstractContextManager[None]:
    """Has `optimizer.apply` take gradients that are summed over the replicas already.

    Keras would sum them once more. It would also overwrite variables with their moving averages on all replicas at
    once, which cannot be in a condition of one replica.

    Args:
        optimizer: The optimizer.
        own: Gives the component of a variable on the replica that runs.
    """

    def overwrite(variables: Sequence[keras.Variable]) -> None:
        for variable, average in zip(variables, averages_of(optimizer), strict=True):
            own(variable).assign(own(average))

    return overriding(
        optimizer,
        _all_reduce_sum_gradients=lambda pairs: pairs,
        _overwrite_model_variables_with_average_value=overwrite,
    )


def can_skip_reduction(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `without_reduction` can be used with the installed Keras."""
    return hasattr(optimizer, "_all_reduce_sum_gradients")


@relies_on(
    "keras.optimizers.Optimizer.update_step(gradient, variable, learning_rate)",
    f"{_OPTIMIZER}._use_weight_decay(variable)",
    feature="updates of the touched rows of tables",
)
@contextlib.contextmanager
def stepping_by(
    optimizer: keras.optimizers.Optimizer,
    step: Callable[[Any, tf.Variable, tf.Tensor, bool], bool],
    decays_here: Callable[[tf.Variable], bool],
) -> Iterator[None]:
    """Has `optimizer.apply` update variables by `step`, and decay only those that `decays_here` allows.

    Args:
        optimizer: The optimizer.
        step: Called with gradient, variable, learning rate, and whether weight decay applies to the variable. If it
            returns False, Keras's own step is made.
        decays_here: Asked for each variable that Keras would decay.
    """
    own_step, own_decays = optimizer.update_step, optimizer._use_weight_decay

    def update_step(gradient: Any, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        if not step(gradient, variable, learning_rate, bool(own_decays(variable))):
            own_step(gradient, variable, learning_rate)

    def use_weight_decay(variable: tf.Variable) -> bool:
        return bool(own_decays(variable)) and decays_here(variable)

    with overriding(optimizer, update_step=update_step, _use_weight_decay=use_weight_decay):
        yield


@relies_on(f"{_OPTIMIZER}._get_current_learning_rate()", feature="learning rates that follow the effective batch")
def scaling_learning_rate(
    optimizer: keras.optimizers.Optimizer, factor: tf.Tensor
) -> contextlib.AbstractContextManager[None]:
    """Has `optimizer.apply` multiply its learning rate by a factor.

    Args:
        optimizer: An optimizer that makes the update itself.
        factor: A scalar.
    """
    own = optimizer._get_current_learning_rate

    def scaled() -> tf.Tensor:
        rate = tf.convert_to_tensor(own())
        return rate * tf.cast(factor, rate.dtype)

    return overriding(optimizer, _get_current_learning_rate=scaled)


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer that makes the update, inside of all that wrap it, such as a LossScaleOptimizer."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


# State that is not public


@relies_on(
    "<an optimizer with moving averages>._model_variables_moving_average",
    feature="moving averages (`use_ema`) of a wrapped optimizer",
)
def averages_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The moving averages of the variables, of an optimizer with `use_ema=True`."""
    return list(optimizer._model_variables_moving_average)


@relies_on(
    "<an optimizer with moving averages>._trainable_variables",
    feature="moving averages (`use_ema`) of a wrapped optimizer",
)
def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for, in the order of its moving averages."""
    return list(optimizer._trainable_variables)


@relies_on("<SGD with momentum>._distribution_strategy", feature="windows under tf.distribute")
def strategy_of(optimizer: keras.optimizers.Optimizer) -> tf.distribute.Strategy:
    """The strategy that the optimizer was created under."""
    return optimizer._distribution_strategy


class SharesAverages(keras.optimizers.Optimizer):
    """A base class for optimizers whose moving averages are those of an `inner_optimizer`.

    Keras's callbacks, such as SwapEMAWeights, look for them and for their variables under these names.
    """

    @property
    def _model_variables_moving_average(self) -> list[keras.Variable]:
        return averages_of(innermost(self))

    @property
    def _trainable_variables(self) -> list[keras.Variable]:
        return trained_by(innermost(self)) if hasattr(self, "inner_optimizer") else []

    @_trainable_variables.setter
    def _trainable_variables(self, variables: list[keras.Variable]) -> None:
        """Does nothing: the base class's constructor sets an empty list."""
