"""What does not go together in an optimizer that accumulates, and the errors that say so."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import can_skip_reduction, innermost, strategy_of
from accumops.optimizer import row_update


def check_inner_optimizer(optimizer: keras.optimizers.Optimizer | None) -> keras.optimizers.Optimizer:
    """Returns the optimizer if it, and all within it, make updates and do not accumulate gradients themselves."""
    if optimizer is None:
        raise ValueError("An optimizer is needed, that makes the updates. Received: None")
    ours = hasattr(optimizer, "accum_steps")
    if ours or optimizer.gradient_accumulation_steps:
        how = "accum_steps" if ours else "gradient_accumulation_steps"
        raise ValueError(
            f"`inner_optimizer` must not accumulate gradients itself. Received: {type(optimizer).__name__} with {how}."
        )
    # A LossScaleOptimizer has one optimizer within, a MultiOptimizer several.
    for inner in (getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())):
        if inner is not None:
            check_inner_optimizer(inner)
    return optimizer


def check_gradient_clipping(gradient_clipping: Callable[..., object] | None) -> None:
    """Raises if it is not a callable that can clip gradients."""
    if gradient_clipping is None or (callable(gradient_clipping) and not isinstance(gradient_clipping, type)):
        return
    raise TypeError(
        "`gradient_clipping` must be a callable `(gradients, variables) -> gradients`, such as "
        f"`AdaptiveGradientClipping()`, or None. Received: {gradient_clipping!r}"
    )


def check_goes_with_lazy_rows(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises if rows of tables cannot be updated alone by an optimizer."""
    inner = innermost(optimizer)
    if not row_update.knows(inner):
        raise ValueError(
            f"`lazy_sparse=True` knows the updates of {', '.join(row_update.known_optimizers())}. "
            f"Received: {type(inner).__name__}"
        )
    if inner.use_ema:
        raise ValueError("`lazy_sparse=True` does not go with `use_ema=True`, whose averages are of all rows.")
    if inner.loss_scale_factor is not None:
        raise ValueError(
            "`lazy_sparse=True` does not go with `loss_scale_factor`, which Keras does not take out of sparse "
            "gradients. Use a keras.optimizers.LossScaleOptimizer."
        )


def check_no_constraints(variables: Sequence[keras.Variable]) -> None:
    """Raises if one of the variables, which are updated by rows, has a constraint."""
    for variable in variables:
        if variable.constraint is not None:
            raise ValueError(
                f"`lazy_sparse=True` cannot update '{variable.path}', whose constraint is for all of its rows: "
                f"{variable.constraint}."
            )


def check_variables_of_optimizer(variables: Sequence[keras.Variable]) -> None:
    """Raises if the gradient of a variable is not one to sum."""
    for variable in variables:
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"The variable '{variable.path}' is overwritten with its gradient, as float8 training does: such "
                "gradients cannot be accumulated."
            )


def check_goes_with_strategy(
    strategy: tf.distribute.Strategy,
    optimizers: Sequence[keras.optimizers.Optimizer],
    *,
    lazy_sparse: bool,
    scaled_around: bool,
) -> None:
    """Raises if optimizers cannot work under a mirroring strategy.

    Args:
        strategy: The strategy of the variables.
        optimizers: The optimizer that accumulates, and those within it, the innermost one last.
        lazy_sparse: Whether only touched rows of tables are updated.
        scaled_around: Whether a LossScaleOptimizer is around the first of them.
    """
    name = type(strategy).__name__
    for optimizer in optimizers:
        if strategy_of(optimizer) is not strategy:
            raise ValueError(
                f"The {type(optimizer).__name__} was created outside of the {name} of its variables: create model "
                "and optimizer within one `strategy.scope()`."
            )
    if lazy_sparse:
        raise ValueError(f"`lazy_sparse=True` does not work under {name}, where a window's gradients are dense.")
    if scaled_around and strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"Under {name} a LossScaleOptimizer around a GradientAccumulateOptimizer would look at the gradients "
            "of one replica only. Put it inside: GradientAccumulateOptimizer(LossScaleOptimizer(optimizer), "
            "accum_steps), and `compile(auto_scale_loss=False)`."
        )
    if not can_skip_reduction(optimizers[-1]):
        raise ValueError(
            f"Under {name} the gradients are summed over replicas once a window, and not again by Keras's "
            f"optimizer; that of Keras {keras.__version__} has no `_all_reduce_sum_gradients` to replace."
        )
