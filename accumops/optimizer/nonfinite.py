"""What becomes of a window with a gradient that is not finite, and of the scale that float16 losses have.

Such a gradient is summed as any other, and makes the window's sum not finite. What happens then depends on where a
`keras.optimizers.LossScaleOptimizer` is, which multiplies the loss and takes the factor out of the gradients:

inside the GradientAccumulateOptimizer    The window is dropped: no variable moves, no update is counted, and the
                                          scale backs off. This is what `GradientAccumulateModel` sets up.
around the GradientAccumulateOptimizer    The micro-batch is skipped: it never reaches the window, which goes on.
nowhere                                   The update is made with what is not finite, as without accumulation.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import finding_finite
from accumops.adapters.overriding import overriding


def scale_of_loss(optimizer: keras.optimizers.Optimizer) -> float | tf.Tensor | None:
    """The factor that the gradients an optimizer is given have, or None."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return optimizer.loss_scale_factor


def apply_if_finite(
    optimizer: keras.optimizers.LossScaleOptimizer,
    squared_norms: tf.Tensor,
    update: Callable[[], None],
    variables: Sequence[keras.Variable],
    *,
    outside_replicas: bool,
) -> None:
    """Has a LossScaleOptimizer make an update if all gradients are finite, and else back off.

    Args:
        optimizer: The LossScaleOptimizer.
        squared_norms: The squared norm of each gradient, in float64, where they are finite if the gradients are.
        update: Makes the update of the optimizer within.
        variables: The variables that are updated.
        outside_replicas: Whether this runs once for all replicas of a strategy.
    """
    finite = tf.reduce_all(tf.math.is_finite(squared_norms))

    def apply(gradients: Sequence[None], trainable_variables: Sequence[keras.Variable] | None = None) -> None:
        update()

    # LossScaleOptimizer forwards gradients of None as they are, and with a verdict given it never looks at one.
    with (
        finding_finite(optimizer, finite, outside_replicas=outside_replicas),
        overriding(optimizer.inner_optimizer, apply=apply),
    ):
        optimizer.apply([None] * len(variables), list(variables))
