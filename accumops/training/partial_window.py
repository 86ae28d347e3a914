"""What becomes of a window that an epoch's end leaves open, because its batches are no multiple of `accum_steps`."""

from typing import Any

from accumops.adapters.keras_model import loss_tracker
from accumops.training.callbacks import NonfiniteCount, WindowCallback
from accumops.window import replicas

PARTIAL_WINDOWS = ("flush", "carry", "drop")
"""The policies; see `PartialWindow`."""


def check_policy(policy: str, name: str = "partial_window") -> str:
    """Returns `policy` if it is one of `PARTIAL_WINDOWS`."""
    if policy not in PARTIAL_WINDOWS:
        raise ValueError(f"`{name}` must be one of {PARTIAL_WINDOWS}. Received: {policy!r}")
    return policy


class PartialWindow(WindowCallback):
    """Settles the window that an epoch's end leaves open, for a model compiled with a GradientAccumulateOptimizer.

    It does so before the epoch's validation. Without this callback the window goes on in the next epoch. A
    `GradientAccumulateModel` needs no such callback: it settles its windows itself. Give it as the first callback, so
    that the others see, and save, the settled state.

    Args:
        policy: `"flush"` makes an update, correctly weighted; `"drop"` makes none; with `"carry"` the window goes on in
            the next epoch. A window that was open before `fit` starts is dropped, unless the policy is `"carry"`.

    Raises:
        ValueError: If `policy` is another; in `fit`, if nothing accumulates.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(accumops.GradientAccumulateOptimizer("sgd", accum_steps=4), loss="mse")
    >>> x, y = tf.ones([48, 3]), tf.ones([48, 1])
    >>> history = model.fit(x, y, batch_size=8, callbacks=[accumops.PartialWindow("flush")], verbose=0)
    >>> int(model.optimizer.iterations)
    2
    """

    def __init__(self, policy: str = "flush") -> None:
        super().__init__()
        self.policy = check_policy(policy, "policy")
        self._in_epoch = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Drops a window that an interrupted training has left open."""
        if self.policy != "carry":
            self.drop()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes that an epoch is running: `on_test_begin` is then its validation, and not `evaluate`."""
        self._in_epoch = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Settles the window before the validation of an epoch."""
        if self._in_epoch:
            self._settle()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Settles the window of an epoch without validation."""
        self._settle()
        self._in_epoch = False

    def flush(self) -> None:
        """Makes an update of the open window."""
        optimizer = self.optimizer
        if optimizer.accumulator.built:
            optimizer.flush()

    def _settle(self) -> None:
        if self.policy == "flush":
            self.flush()
        elif self.policy == "drop":
            self.drop()

    def drop(self) -> None:
        """Drops the open window."""
        accumulator = self.optimizer.accumulator
        if accumulator.built:
            accumulator.reset()


class PartialWindowOfModel(PartialWindow):
    """The callback that a `GradientAccumulateModel` has in each `fit`. It also has the logs say what was skipped."""

    def __init__(self, policy: str = "flush") -> None:
        super().__init__(policy)
        self._nonfinite_count = NonfiniteCount()
        self._nothing_counted = False

    def set_model(self, model: Any) -> None:
        """Takes the model."""
        super().set_model(model)
        self._nonfinite_count.set_model(model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Checks that the processes of a strategy start an epoch from the same point."""
        super().on_epoch_begin(epoch, logs)
        strategy = self.model.distribute_strategy
        accumulator = self.optimizer.accumulator
        if replicas.spans_processes(strategy) and accumulator.built:
            # Each process has restored the backup that it found.
            updates, step = int(self.optimizer.iterations.numpy()), int(accumulator.step)
            numbers = {"epoch": epoch, "updates": updates, "micro-batches in the window": step}
            replicas.check_agreement(strategy, numbers)

    def on_test_begin(self, logs: Any = None) -> None:
        """Looks at the epoch's loss before its validation resets it."""
        if self._in_epoch:
            self._nothing_counted = self._has_no_loss()
        super().on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Has the logs say what was skipped. Where all was, there is no loss: Keras's mean over nothing would be 0."""
        nothing_counted = self._nothing_counted or self._has_no_loss()
        self._nothing_counted = False
        super().on_epoch_end(epoch, logs)
        self._nonfinite_count.on_epoch_end(epoch, logs)
        if nothing_counted and logs is not None and "loss" in logs:
            logs["loss"] = float("nan")

    def _has_no_loss(self) -> bool:
        if self.optimizer.accumulator.nonfinite == "propagate":
            return False
        return float(loss_tracker(self.model).count.numpy()) == 0

    def flush(self) -> None:
        """Makes an update of the open window, in a function that is traced once."""
        self.model.flush()

    def drop(self) -> None:
        """Drops the open window."""
        super().drop()
        if not self.optimizer.accumulator.built:
            self.optimizer.accumulator.state.members.drop()  # layers may have loaded an open window
