"""What becomes of the update of a window with a gradient that is not finite, and of the scale that float16 losses have.

The window decides by its policy whether it makes an update; see `accumops.window.nonfinite`. A
`keras.optimizers.LossScaleOptimizer`, which multiplies the loss and takes the factor out of the gradients, decides by
itself. Together, with the LossScaleOptimizer

inside the GradientAccumulateOptimizer, and the policy
    "propagate"    The LossScaleOptimizer finds that the window's gradient is not finite: no variable moves, no update
                   is counted, and the scale backs off. This is what `GradientAccumulateModel` sets up.
    "drop"         The same, and the window counts itself.
    "skip"         The update is made with the other micro-batches, and the scale backs off all the same: else it
                   would never fit a model of which each micro-batch overflows.
around the GradientAccumulateOptimizer
    any            The LossScaleOptimizer skips the micro-batch: it never reaches the window, whose next micro-batch
                   takes its place.

Without a LossScaleOptimizer, "propagate" makes the update with what is not finite, as without accumulation.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import finding_finite
from accumops.adapters.overriding import overriding
from accumops.window.nonfinite import Verdict


def scale_of_loss(optimizer: keras.optimizers.Optimizer) -> float | tf.Tensor | None:
    """The factor that the gradients an optimizer is given have, or None."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return optimizer.loss_scale_factor


def decides_on_device(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> bool:
    """Whether a fused update can leave everything as it is where its device says so, and the host need not know.

    Moving averages and constraints are Keras's own operations: with these an update is in a condition, and the host
    waits for the device to decide it.

    Args:
        optimizer: The optimizer, or a LossScaleOptimizer around it, with a fused update.
        variables: The variables that it updates.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return (
        (inner is optimizer or type(optimizer) is keras.optimizers.LossScaleOptimizer)
        and not inner.use_ema
        and all(variable.constraint is None for variable in variables)
    )


def follow(optimizer: keras.optimizers.LossScaleOptimizer, verdict: Verdict, finite: tf.Tensor) -> None:
    """Has the scale of losses follow a window whose update was decided on the device, as a LossScaleOptimizer would.

    Args:
        optimizer: The LossScaleOptimizer.
        verdict: The window's verdict.
        finite: Whether the window's gradient is finite, a bool scalar.
    """
    backs_off = ~finite if verdict.applies is True else verdict.applies & ~finite
    if verdict.nonfinite is not None:
        backs_off |= verdict.nonfinite > 0
    updates = finite if verdict.applies is True else verdict.applies & finite
    counter, scale = (tf.convert_to_tensor(each) for each in (optimizer.step_counter, optimizer.dynamic_scale))
    grows = tf.equal(counter, tf.cast(optimizer.dynamic_growth_steps - 1, counter.dtype)) & updates & ~backs_off
    factor = tf.where(backs_off, 0.5, tf.where(grows, 2.0, 1.0))
    counted = counter + tf.cast(updates, counter.dtype)
    optimizer.step_counter.assign(tf.where(backs_off | grows, tf.zeros_like(counter), counted))
    optimizer.dynamic_scale.assign(scale * tf.cast(factor, scale.dtype))


def update_if_it_applies(optimizer: keras.optimizers.Optimizer, verdict: Verdict, update: Callable[[], None]) -> None:
    """Makes the update of a window, unless the window's verdict is that it makes none.

    Args:
        optimizer: The optimizer that makes the update, or a LossScaleOptimizer around it.
        verdict: The window's verdict.
        update: Has the optimizer make the update.
    """
    nonfinite = verdict.nonfinite
    if nonfinite is None:
        update()
        return
    keras.ops.cond(verdict.applies, update, lambda: None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        keras.ops.cond(nonfinite > 0, lambda: _back_off(optimizer), lambda: None)


def _back_off(optimizer: keras.optimizers.LossScaleOptimizer) -> None:
    """Halves the scale of losses, as a LossScaleOptimizer does for gradients that are not finite."""
    optimizer.step_counter.assign(0)
    optimizer.dynamic_scale.assign(optimizer.dynamic_scale * 0.5)


def apply_if_finite(
    optimizer: keras.optimizers.LossScaleOptimizer,
    finite: tf.Tensor,
    update: Callable[[], None],
    variables: Sequence[keras.Variable],
    *,
    outside_replicas: bool,
) -> None:
    """Has a LossScaleOptimizer make an update if all gradients are finite, and else back off.

    Args:
        optimizer: The LossScaleOptimizer.
        finite: Whether all gradients are finite, a bool scalar.
        update: Makes the update of the optimizer within.
        variables: The variables that are updated.
        outside_replicas: Whether this runs once for all replicas of a strategy.
    """

    def apply(gradients: Sequence[None], trainable_variables: Sequence[keras.Variable] | None = None) -> None:
        update()

    # LossScaleOptimizer forwards gradients of None as they are, and with a verdict given it never looks at one.
    with (
        finding_finite(optimizer, finite, outside_replicas=outside_replicas),
        overriding(optimizer.inner_optimizer, apply=apply),
    ):
        optimizer.apply([None] * len(variables), list(variables))
