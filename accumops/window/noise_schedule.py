"""`NoiseScaleSchedule`: micro-batches a window that follow the gradient noise scale."""

from typing import Any

import keras
import tensorflow as tf

from accumops.arguments import check_count, check_decay

RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""How the learning rate follows the effective batch, as a power of it."""


@keras.saving.register_keras_serializable(package="accumops")
class NoiseScaleSchedule:
    """Micro-batches a window that follow the gradient noise scale, for `accum_steps`.

    A window starts with `minimum` micro-batches. Their number doubles when the noise scale has become at least twice
    the effective batch, and halves when it is at most half of it; in between it stays. So an effective batch tends to
    between half and twice the noise scale, where more samples still pay, and fewer updates are needed
    ([McCandlish et al., 2018](https://arxiv.org/abs/1812.06162); [Smith et al., 2018](https://arxiv.org/abs/1711.00489)
    grow the batch instead of lowering the learning rate). `GradientNoiseScale` logs the noise scale.

    The noise scale and the number of micro-batches are computed on the device, and are saved and restored with the
    window. Where a window starts, the host reads one number.

    A larger batch usually wants a larger learning rate, which is a choice of its own:

    - `"none"`: the learning rate stays as it is.
    - `"sqrt"`: it grows with the square root of the effective batch, which suits Adam and its relatives
      ([Malladi et al., 2022](https://arxiv.org/abs/2205.10287)).
    - `"linear"`: it grows with the effective batch, which suits SGD, within limits
      ([Goyal et al., 2017](https://arxiv.org/abs/1706.02677)).

    Give the optimizer the learning rate, or the schedule, that suits a window of `minimum` micro-batches. Schedules of
    the learning rate count updates, and windows that grow make fewer updates.

    Args:
        minimum: The least number of micro-batches, at least 2: one alone tells nothing of noise.
        maximum: The largest number.
        learning_rate: `"none"`, `"sqrt"` or `"linear"`.
        decay: What is left of the averages over windows after one more window.
        patience: Windows between two changes, so that the averages can follow; at least 1.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, or `maximum` is less than `minimum`.

    Example:

    >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> schedule = accumops.NoiseScaleSchedule(2, 16, learning_rate="sqrt", patience=2)
    >>> model = accumops.GradientAccumulateModel(net, accum_steps=schedule)
    >>> model.compile(keras.optimizers.Adam(1e-3), loss="mse")
    >>> x, y = tf.random.normal([256, 3]), tf.random.normal([256, 1])
    >>> history = model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[accumops.EffectiveBatchSize()])
    >>> history.history["effective_batch_size"][-1] >= 8
    True
    """

    def __init__(
        self, minimum: int, maximum: int, *, learning_rate: str, decay: float = 0.99, patience: int = 20
    ) -> None:
        for name, value, what in (
            ("minimum", minimum, "the least number of micro-batches"),
            ("maximum", maximum, "the largest number of micro-batches"),
            ("patience", patience, "the number of windows between two changes"),
        ):
            check_count(name, value, what)
        if minimum < 2:
            raise ValueError(
                f"`minimum` must be at least 2: one micro-batch tells nothing of noise. Received: {minimum}"
            )
        if maximum < minimum:
            raise ValueError(f"`maximum` must not be less than `minimum`, {minimum}. Received: {maximum}")
        if learning_rate not in RULES:
            raise ValueError(
                f"`learning_rate` must be one of {', '.join(map(repr, RULES))}: how the learning rate follows the "
                f"effective batch. Received: {learning_rate!r}"
            )
        self.minimum, self.maximum, self.patience = int(minimum), int(maximum), int(patience)
        self.learning_rate = learning_rate
        self.decay = check_decay(decay)

    def __call__(self, updates: tf.Tensor) -> int:
        """The number that windows start with. A window's state has the number that follows the noise scale."""
        return self.minimum

    def factor(self, steps: tf.Tensor) -> tf.Tensor:
        """What the learning rate is multiplied by for a window of so many micro-batches."""
        ratio = tf.cast(steps, tf.float32) / self.minimum
        return ratio ** RULES[self.learning_rate]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        names = ("minimum", "maximum", "learning_rate", "decay", "patience")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseScaleSchedule":
        """Makes a schedule of what `get_config` returned."""
        return cls(**config)


class FollowedSteps(tf.Module):
    """How many micro-batches the next window has, by a schedule.

    Args:
        schedule: The schedule.
        new: Makes a variable of a name and a dtype.
    """

    def __init__(self, schedule: NoiseScaleSchedule, new: Any) -> None:
        super().__init__(name="followed_steps")
        self._schedule = schedule
        self.steps = new("followed_steps", "int64", keras.initializers.Constant(schedule.minimum))
        self.waited = new("followed_waited", "int64", "zeros")

    def follow(self, scale: tf.Tensor, batch: tf.Tensor) -> None:
        """Decides after a window.

        Args:
            scale: The noise scale, in shares; NaN if it is not known.
            batch: The sum of shares of a window of as many micro-batches as there are now.
        """
        schedule = self._schedule
        steps, waited = tf.convert_to_tensor(self.steps), self.waited + 1
        may = waited >= schedule.patience
        grows = may & (scale >= 2 * batch) & (2 * steps <= schedule.maximum)
        shrinks = may & (2 * scale <= batch) & (steps >= 2 * schedule.minimum)
        self.steps.assign(tf.where(grows, 2 * steps, tf.where(shrinks, steps // 2, steps)))
        self.waited.assign(tf.where(grows | shrinks, tf.zeros_like(waited), waited))
