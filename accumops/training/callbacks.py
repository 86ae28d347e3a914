"""Callbacks for `fit`: a K that changes, and what they add to the logs."""

import numbers
from collections.abc import Callable
from typing import Any

import keras

from accumops.adapters.keras_model import loss_tracker
from accumops.arguments import check_accum_steps
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.renamed import explains_renamed


def accumulating_optimizer(model: Any) -> GradientAccumulateOptimizer | None:
    """Returns the optimizer of a model that accumulates, also within a LossScaleOptimizer, or None."""
    return accumulating_within(getattr(model, "optimizer", None))


def accumulating_within(optimizer: Any) -> GradientAccumulateOptimizer | None:
    """Returns an optimizer if it accumulates, the one that does within it, or None."""
    while optimizer is not None and not isinstance(optimizer, GradientAccumulateOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


class WindowCallback(keras.callbacks.Callback):
    """A callback that finds the optimizer that accumulates, also within a LossScaleOptimizer."""

    @property
    def optimizer(self) -> GradientAccumulateOptimizer:
        """The optimizer that accumulates.

        Raises:
            ValueError: If the model has none.
        """
        optimizer = accumulating_optimizer(self.model)
        if optimizer is None:
            raise ValueError(
                f"{type(self).__name__} needs a model that is compiled with a GradientAccumulateOptimizer, or a "
                f"GradientAccumulateModel. Received: {type(self.model).__name__} with "
                f"{type(getattr(self.model, 'optimizer', None)).__name__}"
            )
        return optimizer


class AccumStepsScheduler(WindowCallback):
    """Sets `accum_steps` at the start of each epoch, and logs it as `accum_steps`.

    A window that is open then goes on with the number it started with.

    Args:
        schedule: The number of micro-batches a window: a dict from epochs, counted from 0, to the number from this
            epoch on, with an entry for epoch 0; or a callable `(epoch, accum_steps) -> accum_steps`.
        verbose: 1 prints the number where it changes.

    Raises:
        TypeError: If `schedule` is neither, or a number is not an int.
        ValueError: If there is no entry for epoch 0, or a number is out of range; in `fit`, if nothing accumulates, or
            the number of micro-batches is not an int that can be changed.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(accumops.GradientAccumulateOptimizer("sgd", accum_steps=1), loss="mse")
    >>> scheduler = accumops.AccumStepsScheduler({0: 1, 2: 4})
    >>> history = model.fit(
    ...     tf.ones([64, 3]), tf.ones([64, 1]), batch_size=8, epochs=3, callbacks=[scheduler], verbose=0
    ... )
    >>> history.history["accum_steps"]
    [1, 1, 4]
    """

    @explains_renamed
    def __init__(self, schedule: dict[int, int] | Callable[[int, int], int], verbose: int = 0) -> None:
        super().__init__()
        if isinstance(schedule, dict):
            _check_epochs(schedule)
            self._schedule = lambda epoch, _: schedule[max(key for key in schedule if key <= epoch)]
        elif callable(schedule):
            self._schedule = schedule
        else:
            raise TypeError(
                "`schedule` must be a dict of epochs to numbers of micro-batches, or a callable "
                f"`(epoch, accum_steps) -> accum_steps`. Received: {schedule!r}"
            )
        self.verbose = verbose

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Sets the number of micro-batches."""
        optimizer = self.optimizer
        before = optimizer.accum_steps
        optimizer.accum_steps = self._schedule(epoch, before)
        if self.verbose and optimizer.accum_steps != before:
            print(f"\nEpoch {epoch + 1}: accum_steps={optimizer.accum_steps}.")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the number to the logs."""
        if logs is not None:
            logs["accum_steps"] = self.optimizer.accum_steps


class EffectiveBatchSize(WindowCallback):
    """Adds `effective_batch_size` to the logs of each epoch: samples an update, on average over the epoch.

    It is `nan` in an epoch without an update. Samples of a window that is dropped count; those of a micro-batch that
    `nonfinite="skip"` leaves out do not. An update that a
    `PartialWindow` makes counts if that callback comes earlier in the list.

    Raises:
        ValueError: In `fit`, if nothing accumulates, or if the model has a `train_step` of its own, whose samples are
            not counted.

    Example:

    >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = accumops.GradientAccumulateModel(net, accum_steps=4)
    >>> model.compile("sgd", loss="mse")
    >>> callbacks = [accumops.EffectiveBatchSize()]
    >>> history = model.fit(tf.ones([64, 3]), tf.ones([64, 1]), batch_size=8, callbacks=callbacks, verbose=0)
    >>> history.history["effective_batch_size"]
    [32.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self._samples: float | None = None
        self._updates = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that samples are counted."""
        kind = type(self.model)
        ours = any(each.__module__.startswith("accumops.") for each in kind.__mro__)
        if kind.train_step is not keras.Model.train_step and not ours:
            raise ValueError(
                f"EffectiveBatchSize cannot tell how many samples the `train_step` of {kind.__name__} sees."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts to count."""
        self._samples = None
        self._updates = int(self.optimizer.iterations.numpy())

    def on_test_begin(self, logs: Any = None) -> None:
        """Keeps the count of samples before the epoch's validation resets it."""
        self._samples = self._seen()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the effective batch size to the logs."""
        if logs is not None:
            updates = int(self.optimizer.iterations.numpy()) - self._updates
            logs["effective_batch_size"] = self._samples_seen / updates if updates else float("nan")

    @property
    def _samples_seen(self) -> float:
        """The epoch's samples so far, those of its validation excepted."""
        return self._seen() if self._samples is None else self._samples

    def _seen(self) -> float:
        # Keras weighs the mean of the losses by the batches' sizes.
        return float(loss_tracker(self.model).count.numpy())


class NonfiniteCount(WindowCallback):
    """Adds `nonfinite_count` to the logs of each epoch, for an optimizer with `nonfinite="skip"` or `"drop"`.

    It is the optimizer's `nonfinite_count` at the end of the epoch: how many micro-batches have been skipped so far, or
    windows dropped. A `GradientAccumulateModel` has this callback in each `fit` already.

    Raises:
        ValueError: In `fit`, if nothing accumulates.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(accumops.GradientAccumulateOptimizer("sgd", accum_steps=4, nonfinite="skip"), loss="mse")
    >>> x, y = tf.fill([64, 3], float("inf")), tf.ones([64, 1])
    >>> history = model.fit(x, y, batch_size=8, callbacks=[accumops.NonfiniteCount()], verbose=0)
    >>> history.history["nonfinite_count"]
    [8]
    """

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the count to the logs."""
        accumulator = self.optimizer.accumulator
        if logs is not None and accumulator.nonfinite != "propagate":
            logs["nonfinite_count"] = int(accumulator.nonfinite_count.numpy()) if accumulator.built else 0


def _check_epochs(schedule: dict[int, int]) -> None:
    for epoch, steps in schedule.items():
        if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
            raise TypeError(f"The keys of a schedule must be epochs, ints counted from 0. Received: {epoch!r}")
        if not isinstance(check_accum_steps(steps), int):
            raise TypeError(f"The schedule must have an int for epoch {epoch}. Received: {steps!r}")
    if 0 not in schedule or min(schedule) < 0:
        raise ValueError(f"A schedule must have an entry for epoch 0, its first. Received: {schedule}")
