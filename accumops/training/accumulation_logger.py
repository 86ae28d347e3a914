"""The callback that writes what accumulation does where TensorBoard shows it.

Between two writes it reads nothing. A write reads a few numbers, which waits for the training step on a GPU, as a write
of Keras's callback does. The norm of a window's gradient is computed in the training step: see
`accumops.optimizer.window_record`.
"""

import math
import numbers
import os
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.keras_model import loss_tracker
from accumops.arguments import check_bool
from accumops.memory.device_memory import AllocatorMemory
from accumops.ops.variables import tf_variable
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.optimizer.window_record import WindowRecord
from accumops.training.backup import passes_batches
from accumops.training.callbacks import WindowCallback
from accumops.training.per_variable_norms import per_variable_norms

# What `tf.summary.scalar` writes, which needs the package tensorboard where the model is trained.
_SCALAR = tf.compat.v1.SummaryMetadata(data_class=1, plugin_data={"plugin_name": "scalars"})


class AccumulationLogger(WindowCallback):
    """Writes for TensorBoard what accumulation does: effective batch size, updates, gradient norm, speed, memory.

    Use it beside `keras.callbacks.TensorBoard`, with the same `log_dir` and `update_freq`. The scalars go to
    `log_dir/train`, with the steps of Keras's: epochs, counted from 0, or batches of `fit`, counted from 1. Give it
    after a `PartialWindow`, and before a `BackupAndRestore`. These are the tags:

    - `accumulation/effective_batch_size`: samples an update, on average. With `"epoch"` over the epoch, as
      `EffectiveBatchSize` logs it. Otherwise over the windows since it was last written, and only where none is open.
    - `accumulation/updates`: updates of the optimizer so far.
    - `accumulation/accum_steps`: micro-batches a window: K, or with `micro_batch_size` the average since it was last
      written.
    - `accumulation/gradient_norm`: the norm of the last window's gradient: of the mean over its micro-batches, without
      the factor of a scaled loss, before any clipping. It is NaN for a window that `nonfinite` keeps from an update.
      Without a new window it is not written.
    - `gradient_norm/` and the path of a variable: the norm of its part of that gradient, for each trained variable,
      with `per_variable_norms=True`. `accumops.per_variable_norms` returns the same.
    - `accumulation/nonfinite_windows`: the optimizer's `nonfinite_count`: windows that `nonfinite="drop"` has dropped,
      or micro-batches that `nonfinite="skip"` has skipped. Not written with `"propagate"`.
    - `accumulation/samples_per_second`: the samples trained on since the last write, over the seconds. Validation and
      the time between epochs do not count.
    - `accumulation/memory_peak`: the most bytes that TensorFlow has had in use on the model's device, since the process
      started or its memory statistics were last reset. Not written if TensorFlow does not count there, as on most CPUs,
      nor on a CPU where XLA compiles the step.

    A model with a `train_step` of its own does not tell how many samples it sees: without `effective_batch_size` and
    `samples_per_second` then.

    Writing does not need the package tensorboard. What the callback has the optimizer note stays in the training step
    until the model is compiled with another optimizer.

    Args:
        log_dir: The directory of the logs.
        update_freq: When to write: `"epoch"`, `"batch"`, or an int for every so many batches. With
            `steps_per_execution` a call counts as one batch, as in Keras's callback.
        gradient_norm: Whether to write the norm. The training step then reads the sums of a window once more where it
            ends, and a window's last gradients pass through the accumulators. See `docs/tensorboard.md` for what it
            costs.
        per_variable_norms: Whether to write the norm of each variable's gradient. Beside `gradient_norm` it costs
            nothing that can be measured.

    Raises:
        TypeError: If `gradient_norm` or `per_variable_norms` is not a bool.
        ValueError: If `update_freq` is none of its values; in `fit`, if nothing accumulates.

    Example:

    >>> import tempfile
    >>> logs = tempfile.mkdtemp()
    >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = accumops.GradientAccumulateModel(net, accum_steps=4)
    >>> model.compile("sgd", loss="mse")
    >>> callbacks = [accumops.AccumulationLogger(logs)]
    >>> history = model.fit(tf.ones([64, 3]), tf.ones([64, 1]), batch_size=8, callbacks=callbacks, verbose=0)
    >>> len(tf.io.gfile.glob(f"{logs}/train/events*"))
    1
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        update_freq: str | int = "epoch",
        gradient_norm: bool = True,
        per_variable_norms: bool = False,
    ) -> None:
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self.update_freq = _check_update_freq(update_freq)
        self.gradient_norm = check_bool("gradient_norm", gradient_norm)
        self.per_variable_norms = check_bool("per_variable_norms", per_variable_norms)
        self._writer: Any = None
        self._meter = _Meter(None)
        self._start_anew()

    def _start_anew(self) -> None:
        self._batches = 0
        self._in_epoch = self._passing = False
        self._memory: AllocatorMemory | None = None
        self._asked_for_memory = False
        # What the values of the next write are counted from.
        self._speed_from = (0.0, 0.0)  # samples, seconds
        self._windows_from: tuple[float, int] | None = None  # samples and updates where no window was open
        self._noted_from = (0, 0)  # windows, micro-batches

    def on_train_begin(self, logs: Any = None) -> None:
        """Has the optimizer note what is written."""
        self._close()
        self._start_anew()
        optimizer = self.optimizer
        self._note_windows(optimizer)
        self._meter = _Meter(self.model if self._tells_samples() else None)
        self._noted_from = _noted(optimizer)[:2]
        if not _is_open(optimizer):
            self._windows_from = 0.0, _updates(optimizer)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._in_epoch = True
        self._meter.start()
        if self.update_freq == "epoch":
            self._speed_from = self._meter.samples, self._meter.seconds
            self._windows_from = self._meter.samples, _updates(self.optimizer)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Starts to count anew after the batches that a backup has seen."""
        passing = passes_batches(self.model)
        if self._passing and not passing:
            self._restored()
        self._passing = passing

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Writes, every `update_freq` batches."""
        self._batches += 1
        if isinstance(self.update_freq, int) and self._batches % self.update_freq == 0 and not self._passing:
            self._meter.update()
            self._write(self._batches)

    def on_test_begin(self, logs: Any = None) -> None:
        """Stops the clock, and counts the samples before a validation resets them."""
        if self._in_epoch:
            self._meter.stop()

    def on_test_end(self, logs: Any = None) -> None:
        """Has the clock go on."""
        if self._in_epoch:
            self._meter.start()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes, with `update_freq="epoch"`."""
        self._in_epoch = False
        self._meter.stop()
        if self._passing:  # the whole epoch was in a backup
            self._restored()
            self._passing = False
        if self.update_freq == "epoch":
            self._write(epoch)
        if self._writer is not None:
            self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the file."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _note_windows(self, optimizer: GradientAccumulateOptimizer) -> None:
        """Has the training step note windows, or no longer. A function that was traced otherwise is made anew."""
        # Which micro-batches a batch is split into is known in the step alone.
        splits = getattr(self.model, "micro_batch_size", None) is not None
        now = optimizer.record
        per_variable = self.per_variable_norms or (now is not None and now.per_variable)  # never taken back
        counts = self.gradient_norm or per_variable or splits
        wanted = (self.gradient_norm, per_variable) if counts else None
        if wanted != (None if now is None else (now.norms, now.per_variable)):
            if per_variable:
                optimizer.accumulator.track_norms()
            optimizer.record = None if wanted is None else WindowRecord(*wanted)
            self.model.make_train_function(force=True)

    def _tells_samples(self) -> bool:
        kind = type(self.model)
        ours = any(each.__module__.startswith("accumops.") for each in kind.__mro__)
        return ours or kind.train_step is keras.Model.train_step

    def _restored(self) -> None:
        """Notes that the batches until now were not trained on, but restored from a backup."""
        optimizer = self.optimizer
        self._meter.update()
        self._speed_from = self._meter.samples, self._meter.seconds
        self._noted_from = _noted(optimizer)[:2]  # the last one of them was trained on, and undone
        if self.update_freq != "epoch":
            self._windows_from = None if _is_open(optimizer) else (self._meter.samples, _updates(optimizer))

    def _write(self, step: int) -> None:
        values = self._values()
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.path.join(self.log_dir, "train"))
        # Keras's callback may be within a condition of its own.
        with self._writer.as_default(step), tf.summary.record_if(True), tf.device("/CPU:0"):
            for tag, value in values.items():
                tf.summary.write(tag, np.float32(value), metadata=_SCALAR)

    def _values(self) -> dict[str, float]:
        """The values to write, by tag; what is not known is left out."""
        optimizer = self.optimizer
        updates = _updates(optimizer)
        windows, micro_batches, norm = _noted(optimizer)
        new_windows, new_micro_batches = windows - self._noted_from[0], micro_batches - self._noted_from[1]
        self._noted_from = windows, micro_batches
        values: dict[str, float | None] = {
            "effective_batch_size": self._effective_batch_size(optimizer, updates),
            "updates": updates,
            "accum_steps": _accum_steps(optimizer) or (new_micro_batches / new_windows if new_windows else None),
            "gradient_norm": norm if self.gradient_norm and new_windows else None,
            "nonfinite_windows": _nonfinite(optimizer),
            "samples_per_second": self._samples_per_second(),
            "memory_peak": self._memory_peak(optimizer),
        }
        found = {f"accumulation/{name}": value for name, value in values.items() if value is not None}
        if self.per_variable_norms and new_windows:
            found |= {f"gradient_norm/{path}": each for path, each in per_variable_norms(optimizer).items()}
        return found

    def _effective_batch_size(self, optimizer: GradientAccumulateOptimizer, updates: int) -> float | None:
        if not self._meter.counts or (self.update_freq != "epoch" and _is_open(optimizer)):
            return None
        before, self._windows_from = self._windows_from, (self._meter.samples, updates)
        if before is None or updates == before[1]:
            return None
        return (self._meter.samples - before[0]) / (updates - before[1])

    def _samples_per_second(self) -> float | None:
        samples, seconds = self._speed_from
        self._speed_from = self._meter.samples, self._meter.seconds
        samples, seconds = self._meter.samples - samples, self._meter.seconds - seconds
        return samples / seconds if self._meter.counts and samples and seconds else None

    def _memory_peak(self, optimizer: GradientAccumulateOptimizer) -> float | None:
        if not self._asked_for_memory and optimizer.accumulator.built:
            self._asked_for_memory = True
            device = tf_variable(optimizer.accumulator.accumulators[0]).device.rpartition("device:")[2]
            # What XLA takes on a CPU does not come from the allocator.
            if device.startswith("GPU") or not getattr(self.model, "jit_compile", False):
                self._memory = _memory_of(device or "CPU:0")
        return None if self._memory is None else self._memory.peak() or None  # it does not count small tensors


class _Meter:
    """Counts the samples that `fit` trains on, and the seconds that it takes, while it runs.

    Args:
        model: The model; None if its samples are not to be counted.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.samples = 0.0
        self.seconds = 0.0
        self._started: tuple[float, float] | None = None  # samples of the epoch, time

    @property
    def counts(self) -> bool:
        """Whether samples are counted."""
        return self._model is not None

    def start(self) -> None:
        """Goes on from here."""
        self._started = self._seen(), time.perf_counter()

    def stop(self) -> None:
        """Counts what there is until here, if it runs."""
        if self._started is not None:
            seen = self._seen()  # waits for a GPU
            self.samples += seen - self._started[0]
            self.seconds += time.perf_counter() - self._started[1]
            self._started = None

    def update(self) -> None:
        """Counts what there is until here, and goes on if it runs."""
        if self._started is not None:
            self.stop()
            self.start()

    def _seen(self) -> float:
        # Keras weighs the mean of the losses by the batches' sizes.
        return 0.0 if self._model is None else float(loss_tracker(self._model).count.numpy())


def _updates(optimizer: GradientAccumulateOptimizer) -> int:
    return int(optimizer.iterations.numpy())


def _is_open(optimizer: GradientAccumulateOptimizer) -> bool:
    accumulator = optimizer.accumulator
    return accumulator.built and int(accumulator.step) > 0


def _noted(optimizer: GradientAccumulateOptimizer) -> tuple[int, int, float]:
    return (0, 0, math.nan) if optimizer.record is None else optimizer.record.read()


def _accum_steps(optimizer: GradientAccumulateOptimizer) -> int | None:
    """The micro-batches of the open or the last window, or those of each window; None where the batch decides."""
    steps = optimizer.accum_steps
    if steps is None or isinstance(steps, int):
        return steps
    accumulator = optimizer.accumulator
    return int(accumulator.state.counters.limit.numpy()) if accumulator.built else None


def _nonfinite(optimizer: GradientAccumulateOptimizer) -> int | None:
    if optimizer.nonfinite == "propagate":
        return None
    return int(optimizer.nonfinite_count.numpy()) if optimizer.accumulator.built else 0


def _memory_of(device: str) -> AllocatorMemory | None:
    """What counts the memory of a device; None if its allocator does not."""
    try:
        return AllocatorMemory(device)
    except ValueError:
        return None


def _check_update_freq(update_freq: str | int) -> str | int:
    if update_freq == "epoch":
        return "epoch"
    if update_freq == "batch":
        return 1
    if isinstance(update_freq, bool) or not isinstance(update_freq, numbers.Integral) or update_freq < 1:
        raise ValueError(
            f"`update_freq` must be 'batch', 'epoch', or an int of at least 1, a number of batches. "
            f"Received: {update_freq!r}"
        )
    return int(update_freq)
