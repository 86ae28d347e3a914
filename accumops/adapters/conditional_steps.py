"""Updates of Keras's optimizers that leave out variables on conditions of a graph.

Keras leaves out the variables whose gradient is None, which a graph knows when it is traced. Where only the running
graph knows it, each variable's step, weight decay and constraint are put in a condition here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.overriding import overriding
from accumops.adapters.upstream import relies_on, sample

_OPTIMIZER = "keras.optimizers.Optimizer"


@sample("<a variable>")
def _variable() -> Any:
    return keras.Variable(0.0)


@sample("<a TensorFlow variable>")
def _tensorflow_variable() -> Any:
    return tf.Variable(0.0)


# What takes one step for each variable, if Keras's own runs.
_SINGLE_STEPS = ("apply", "_backend_apply_gradients", "_backend_update_step")


def steps_singly(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `stepping_if` works: whether an optimizer, and all within it, update by Keras's loop over variables."""
    while hasattr(optimizer, "inner_optimizer"):
        if not type(optimizer).apply.__module__.startswith("keras."):
            return False
        optimizer = optimizer.inner_optimizer
    return all(
        name not in vars(each) and getattr(type(each), name).__module__.startswith("keras.")
        for each in _steppers(optimizer)
        for name in _SINGLE_STEPS
    )


def _steppers(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The optimizers that make the steps: those of a MultiOptimizer, or the optimizer itself."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


@relies_on(
    "keras.optimizers.Optimizer.update_step(gradient, variable, learning_rate)",
    f"{_OPTIMIZER}._apply_weight_decay(variables)",
    f"{_OPTIMIZER}._use_weight_decay(variable)",
    f"{_OPTIMIZER}._var_key(variable)",
    feature="variables that have a gradient in some windows only, in a graph",
)
@contextlib.contextmanager
def stepping_if(
    optimizer: keras.optimizers.Optimizer, conditions: Sequence[tuple[keras.Variable, tf.Tensor]]
) -> Iterator[None]:
    """Has `optimizer.apply` leave variables as they are whose condition is false when the graph runs.

    Args:
        optimizer: The innermost optimizer, one that `steps_singly` accepts.
        conditions: Variables, each with a bool scalar.
    """
    flags = {optimizer._var_key(variable): flag for variable, flag in conditions}
    with contextlib.ExitStack() as replaced:
        for each in _steppers(optimizer):
            replaced.enter_context(overriding(each, **_steps_on_conditions(each, flags)))
        replaced.enter_context(constraining_if(conditions))
        yield


def _steps_on_conditions(optimizer: Any, flags: Mapping[str, tf.Tensor]) -> dict[str, Callable[..., None]]:
    """What `stepping_if` replaces in an optimizer, by name."""
    own_step, own_decay = optimizer.update_step, optimizer._apply_weight_decay
    # Keras's decay is part of the step then, as it cannot be in a condition of a replica.
    with_step = type(optimizer)._apply_weight_decay is keras.optimizers.Optimizer._apply_weight_decay

    def decay(variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        if with_step and optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
            factor = tf.cast(optimizer.weight_decay, variable.dtype)
            variable.assign_sub(variable * factor * tf.cast(learning_rate, variable.dtype))

    def update_step(gradient: Any, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        flag = flags.get(optimizer._var_key(variable))

        def step() -> None:
            decay(variable, learning_rate)
            own_step(gradient, variable, learning_rate)

        if flag is None:
            own_step(gradient, variable, learning_rate)
        else:
            tf.cond(flag, step, lambda: None)

    def apply_weight_decay(variables: Sequence[keras.Variable]) -> None:
        keyed = [(variable, flags.get(optimizer._var_key(variable))) for variable in variables]
        own_decay([variable for variable, flag in keyed if flag is None])
        for variable, flag in keyed:
            if flag is not None and not with_step:
                tf.cond(flag, lambda variable=variable: own_decay([variable]), lambda: None)

    return {"update_step": update_step, "_apply_weight_decay": apply_weight_decay}


@relies_on(
    "<a variable>._constraint",
    "<a TensorFlow variable>._constraint",
    feature="constraints of variables that have a gradient in some windows only, in a graph",
)
@contextlib.contextmanager
def constraining_if(conditions: Sequence[tuple[keras.Variable, tf.Tensor]]) -> Iterator[None]:
    """Has the constraint of a variable change nothing where a condition is false when the graph runs.

    Args:
        conditions: Variables, each with a bool scalar.
    """
    with contextlib.ExitStack() as replaced:
        for variable, flag in conditions:
            own = variable.constraint
            if own is not None:
                replaced.enter_context(overriding(variable, _constraint=_constraint_if(own, flag)))
        yield


def _constraint_if(constraint: Callable[[Any], tf.Tensor], flag: tf.Tensor) -> Callable[[Any], tf.Tensor]:
    def constrain(variable: Any) -> tf.Tensor:
        before = tf.convert_to_tensor(variable)
        return tf.cond(flag, lambda: tf.convert_to_tensor(constraint(before)), lambda: before)

    return constrain


@relies_on(f"{_OPTIMIZER}._filter_empty_gradients(gradients, variables)", feature="warnings of missing gradients")
def warn_of_missing_gradients(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Has Keras warn that there are no gradients of some variables."""
    optimizer._filter_empty_gradients([tf.constant(0.0), *[None] * len(variables)], [variables[0], *variables])
