"""The norm of each variable's gradient, of the last window that has ended.

The variables that hold the norms are not saved. Nothing is copied to the host until somebody reads them.
"""

import contextlib
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.window.micro_batch import Window
from accumops.window.state_variables import PER_REPLICA, new_variable


class GradientNorms:
    """Notes the norms of windows that end.

    Args:
        names: The names of the trained variables.
        beside: A variable on whose device the norms are to be.
        strategy: The mirroring strategy that the windows are under, or None.
    """

    def __init__(self, names: Sequence[str], beside: keras.Variable, strategy: tf.distribute.Strategy | None) -> None:
        self._names = _distinct(names)
        unknown = keras.initializers.Constant(float("nan"))
        same = {} if strategy is None else PER_REPLICA["same"]
        with tf.init_scope(), contextlib.nullcontext() if strategy is None else strategy.scope():
            self._norms = new_variable("gradient_norms", (len(names),), "float64", unknown, beside=beside, **same)

    def note(self, window: Window, scale: float | tf.Tensor | None) -> None:
        """Notes a window that ends.

        Args:
            window: The window, with all of its micro-batches in the sums.
            scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
        """
        self._norms.assign(norm_of_mean(tf.sqrt(window.squared_norms), window, scale))

    def read(self) -> dict[str, float]:
        """Returns the norms by the variables' names."""
        return dict(zip(self._names, map(float, keras.ops.convert_to_numpy(self._norms)), strict=True))


def norm_of_mean(norm: tf.Tensor, window: Window, scale: float | tf.Tensor | None) -> tf.Tensor:
    """Returns norms of a window's gradient for those of its sums; NaN if the window makes no update.

    Args:
        norm: Norms of the sums, in float64.
        window: The window.
        scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
    """
    norm = tf.math.divide_no_nan(norm, tf.cast(window.weight, norm.dtype))
    if scale is not None:
        norm /= tf.cast(scale, norm.dtype)
    if window.verdict.applies is True:
        return norm
    return tf.where(window.verdict.applies, norm, tf.constant(float("nan"), norm.dtype))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after one that came before: TensorFlow gives all its variables one name."""
    taken: set[str] = set()
    result = []
    for name in names:
        number, distinct = 0, name
        while distinct in taken:
            number += 1
            distinct = f"{name}_{number}"
        taken.add(distinct)
        result.append(distinct)
    return result
