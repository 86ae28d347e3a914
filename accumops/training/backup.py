"""The callback with which a training that is killed anywhere goes on bit for bit.

Keras's callback of this name is not enough for that. It writes weights and epoch into two files, and a kill between
them repeats an epoch. It repeats the batches of an epoch that it has backed up from the middle. And it does not save
the seeds of dropout.

A backup from the middle of an epoch is loaded twice. First before the first epoch, as any other. `fit` then starts the
epoch from its first batch, and the batches that the backup has seen are passed without training, up to the last one.
That one is trained on, since Keras builds metrics and functions in a step. The backup is loaded over it where it was
made: at the end of this batch, between the same callbacks.
"""

import contextlib
import math
import numbers
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.adapters.keras_model import global_seed, is_remote_path, start_at_epoch
from accumops.arguments import check_bool
from accumops.training.backup_files import Backup, BackupFiles, check_room
from accumops.training.callbacks import accumulating_optimizer
from accumops.window import replicas

_WEIGHTS, _STATE = "model.weights.h5", "state.npz"
_OF_KERAS = ("latest.weights.h5", "training_metadata.json")
_BYTES_OF_A_NAME = 8 << 10  # what HDF5 takes for an object, at most
_COMPARED = 4  # how many backups each process of a strategy tells the others about


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Backs up a training, and goes on after a restart as if the process had not been killed, bit for bit.

    It is used as `keras.callbacks.BackupAndRestore`: run the same script again, and `fit` goes on. It works with any
    Keras model. A backup is there whole or not at all, wherever the process is killed. It holds:

    - the weights, the optimizer and an open window, as `save_weights` does;
    - the seeds of dropout and of other random layers, and the seed of `keras.random` functions that get none;
    - the epoch, and with an int as `save_freq` also the batch and the metrics so far;
    - an `accum_steps` that has changed since `fit` started.

    It does not hold the order of the data, nor what other callbacks remember, such as the patience of EarlyStopping.
    Each start of `fit` must give the same batches, and each epoch the same ones: see `docs/resuming.md`.

    Give it as the last callback, so that a backup has what the others change. If a backup is from the middle of an
    epoch, `fit` passes the batches that it has seen without training, and callbacks get its logs for each of them.

    Under a strategy that spans several processes, give each a directory of its own. All go on from the newest backup
    that each of them has; for this, two are kept.

    Args:
        backup_dir: The directory of the backups, a local path. Nothing else should be in it.
        save_freq: `"epoch"` makes a backup at the end of each epoch; an int makes one after so many batches, counted
            on from epoch to epoch.
        double_checkpoint: Whether to keep the backup before the newest. If the newest is found damaged, as by a disk
            that fails, training goes on from the one before, with a warning.
        delete_checkpoint: Whether to delete the backups when training ends. With False, a restart of a training that
            has ended trains no further.

    Raises:
        TypeError: If `double_checkpoint` or `delete_checkpoint` is not a bool.
        ValueError: If `backup_dir` is empty or not local, such as `gs://…`, or `save_freq` is neither `"epoch"` nor an
            int of at least 1. In `fit`, if the model is not built, the backup is of another model, the data is shorter
            than at the time of the backup, or the directory has a backup of Keras's callback.
        OSError: In `fit`, if there are backups and all of them are damaged, or a backup cannot be written.

    Example:

    >>> import tempfile
    >>> backups = tempfile.mkdtemp()
    >>> def train(*callbacks):
    ...     keras.utils.set_random_seed(0)
    ...     net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    ...     model = accumops.GradientAccumulateModel(net, accum_steps=4, partial_window="carry")
    ...     model.compile("adam", loss="mse")
    ...     callbacks = [*callbacks, accumops.BackupAndRestore(backups, save_freq=5)]
    ...     x, y = tf.ones([48, 3]), tf.ones([48, 1])
    ...     history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, callbacks=callbacks, verbose=0)
    ...     return history.epoch, int(model.optimizer.iterations)
    >>> class Kill(keras.callbacks.Callback):
    ...     def on_epoch_end(self, epoch, logs=None):
    ...         if epoch == 1:
    ...             raise KeyboardInterrupt
    >>> try:
    ...     train(Kill())
    ... except KeyboardInterrupt:
    ...     print("killed")
    killed
    >>> train()
    ([1, 2], 4)
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        if not backup_dir:
            raise ValueError("Empty `backup_dir` argument passed")
        path = os.fspath(backup_dir)
        if is_remote_path(path):
            raise ValueError(
                f"`backup_dir` must be a local path. Received: {path!r}. Remote file systems have no step in which a "
                "whole backup appears. Back up to a local or mounted disk, or use keras.callbacks.BackupAndRestore, "
                "whose backups a kill may tear."
            )
        super().__init__(
            backup_dir, _check_save_freq(save_freq), check_bool("double_checkpoint", double_checkpoint), True
        )
        self.delete_checkpoint = check_bool("delete_checkpoint", delete_checkpoint)
        self._files = BackupFiles(path)
        self._restored: Backup | None = None
        self._newest: str | None = None
        self._position = (0, 0)  # the epoch, and how many of its batches are done
        self._since_backup = 0  # batches
        self._updates_before_epoch = 0
        self._first_accum_steps: int | None = None
        self._epoch_of_fit: tuple[int | None] | None = None  # what was set before this callback set an epoch

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the newest backup."""
        if not self.model.built:
            raise ValueError(
                "To use the BackupAndRestore callback, your model must be built before you call `fit()`. Model "
                f"{self.model} is unbuilt. You can build it beforehand by calling it on a batch of data."
            )
        self._let_fit_choose_the_epoch()  # if the last `fit` has failed
        self._since_backup = 0
        self._first_accum_steps = self._accum_steps()
        self._files.prepare()
        self._restored = backup = self._choose()
        self._newest = None if backup is None else backup.path
        if backup is None:
            return
        self._check_backend(backup)
        self._load(backup)
        self._epoch_of_fit = (start_at_epoch(self.model, backup.record["epoch"]),)
        optimizer = self._optimizer()
        if backup.record["batches"] and optimizer is not None:
            # For callbacks that look at it at the start of the epoch. `on_train_batch_end` loads the count of then.
            optimizer.iterations.assign(backup.record["updates_before_epoch"])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Prepares to pass the batches that the backup has seen."""
        self._let_fit_choose_the_epoch()
        self._position = (epoch, 0)
        self._updates_before_epoch = self._updates()
        backup = self._restored
        if backup is None or not backup.record["batches"] or backup.record["epoch"] != epoch:
            self._restored = None
            return
        before, now = backup.record["batches_of_epoch"], self._batches_of_epoch()
        if None not in (before, now) and before != now:
            raise ValueError(
                f"The backup in {backup.path!r} was made after {backup.record['batches']} of {before} batches of an "
                f"epoch. Now an epoch has {now} batches: give `fit` the data and the batch size of the training that "
                "was interrupted."
            )
        self.model.train_function = _Passing(self.model, backup)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Makes a backup, every `save_freq` batches."""
        epoch, before = self._position
        done = batch + 1
        self._position = (epoch, done)
        if self._restored is not None:
            seen = self._restored.record["batches"]
            if done > seen:
                raise ValueError(
                    f"The backup in {self._restored.path!r} was made after {seen} batches of the epoch, and "
                    f"`steps_per_execution={self.model.steps_per_execution}` does not stop there. Use the number of "
                    "the training that was interrupted."
                )
            if done == seen:
                self._load(self._restored, metrics=True)
                self._restored = None
            return
        if self.save_freq == "epoch":
            return
        self._since_backup += done - before
        if self._since_backup >= self.save_freq:
            self._since_backup = 0
            self._save(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Makes a backup, with `save_freq="epoch"`."""
        if self._restored is not None:
            raise _too_short(self._restored, self._position[1])
        self._position = (epoch + 1, 0)
        if self.save_freq == "epoch":
            self._save(None)

    def on_train_end(self, logs: Any = None) -> None:
        """Deletes the backups."""
        self._let_fit_choose_the_epoch()
        if self.delete_checkpoint:
            self._files.delete()

    def _let_fit_choose_the_epoch(self) -> None:
        if self._epoch_of_fit is not None:
            start_at_epoch(self.model, *self._epoch_of_fit)
            self._epoch_of_fit = None

    # What is saved

    def _save(self, logs: dict[str, Any] | None) -> None:
        epoch, batches = self._position
        record = {
            "epoch": epoch,
            "batches": batches,
            "batches_of_epoch": self._batches_of_epoch(),
            "updates_before_epoch": self._updates_before_epoch,
            "accum_steps": [self._first_accum_steps, self._accum_steps()],
            "backend": self._backend(),
            "logs": {name: _plain(value) for name, value in (logs or {}).items()},
        }
        keep = [self._newest] if self._newest is not None and self._keeps_two else []
        self._newest = self._files.write(record, self._write_files, keep)

    def _write_files(self, directory: str) -> None:
        # HDF5 may end the process when a disk runs full beneath it.
        check_room(directory, _bytes_of_weights(self.model))
        with _errors_of_the_disk():
            self.model.save_weights(os.path.join(directory, _WEIGHTS))
        arrays: dict[str, Any] = {f"seed_{i}": _array(variable) for i, variable in enumerate(self._seeds())}
        seed = global_seed(create=False)
        if seed is not None:
            arrays["global_seed"] = _array(seed)
        if self._position[1]:
            metrics = self.model.metrics_variables
            arrays |= {f"metric_{i}": _array(variable) for i, variable in enumerate(metrics)}
        np.savez(os.path.join(directory, _STATE), **arrays)

    def _load(self, backup: Backup, *, metrics: bool = False) -> None:
        model = self.model
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)  # else there is nothing to load its state into
        try:
            model.load_weights(os.path.join(backup.path, _WEIGHTS))
        except ValueError as error:
            raise ValueError(f"The backup in {backup.path!r} is not of this model: {error}") from error
        with np.load(os.path.join(backup.path, _STATE)) as arrays:
            _assign(self._seeds(), arrays, "seed_", "random seeds", backup)
            if "global_seed" in arrays:
                global_seed(create=True).assign(arrays["global_seed"])  # type: ignore[union-attr]
            if metrics:
                _assign(model.metrics_variables, arrays, "metric_", "variables of metrics", backup)
        first, last = backup.record["accum_steps"]
        optimizer = accumulating_optimizer(model)
        # A number that a callback has set goes on. One that is given anew for this start holds.
        if optimizer is not None and last is not None and self._first_accum_steps == first:
            optimizer.accum_steps = last

    def _seeds(self) -> list[keras.Variable]:
        """The model's variables that Keras's files do not have."""
        known = {id(variable) for variable in [*self.model.weights, *self.model.metrics_variables]}
        return list({id(each): each for each in self.model.variables if id(each) not in known}.values())

    def _backend(self) -> str | None:
        """The backend of accumops' ops that the model runs, or None if it accumulates nothing."""
        if accumulating_optimizer(self.model) is None:
            return None
        return "fused" if ops.get_backend() != "reference" and ops.build_info()["loaded"] else "reference"

    def _check_backend(self, backup: Backup) -> None:
        before, now = backup.record["backend"], self._backend()
        if None not in (before, now) and before != now:
            why = ops.build_info()["reason"]
            warnings.warn(
                f"The backup in {backup.path!r} was made by the {before} ops, and this process runs the {now} ones"
                f"{f', as {why}' if now == 'reference' and why else ''}. The two differ by roundings, so this training "
                "goes on, but not bit for bit.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _batches_of_epoch(self) -> int | None:
        return (self.params or {}).get("steps")

    def _optimizer(self) -> Any:
        return accumulating_optimizer(self.model) or self.model.optimizer

    def _updates(self) -> int:
        optimizer = self._optimizer()
        return 0 if optimizer is None else int(optimizer.iterations.numpy())

    def _accum_steps(self) -> int | None:
        steps = getattr(accumulating_optimizer(self.model), "accum_steps", None)
        return steps if isinstance(steps, int) else None

    # Which backup is restored

    @property
    def _keeps_two(self) -> bool:
        return bool(self.double_checkpoint) or replicas.spans_processes(self.model.distribute_strategy)

    def _choose(self) -> Backup | None:
        whole, damages = self._files.read()
        strategy = self.model.distribute_strategy
        if replicas.spans_processes(strategy):
            whole = _common(strategy, whole)
        directory = self._files.directory
        if damages and not whole:
            raise OSError(
                f"No backup in {directory!r} is whole. {'. '.join(damages)}. Training does not start, since it could "
                "only start from the beginning: if that is wanted, delete the directory."
            )
        if damages:
            warnings.warn(
                f"A backup in {directory!r} is damaged. {'. '.join(damages)}. Training goes on from "
                f"{os.path.basename(whole[0].path)}.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not whole and any(os.path.exists(os.path.join(directory, name)) for name in _OF_KERAS):
            raise ValueError(
                f"{directory!r} has a backup of keras.callbacks.BackupAndRestore, which this callback does not read. "
                "Finish that training with Keras's callback, or give another directory."
            )
        return whole[0] if whole else None


def passes_batches(model: Any) -> bool:
    """Whether the next batch of `fit` is one that a backup has seen, which is passed without training."""
    return isinstance(getattr(model, "train_function", None), _Passing)


class _Passing:
    """Stands for a model's train function while `fit` passes the batches that a backup has seen.

    It takes the batches, trains on the last one only, and returns the logs of the backup.
    """

    def __init__(self, model: Any, backup: Backup) -> None:
        self._model = model
        function = model.train_function
        # One of a `fit` that has failed may still be there.
        self.train_function: Callable[[Any], Any] = (
            function.train_function if isinstance(function, _Passing) else function
        )
        self._backup = backup
        self._passed = 0
        self._history = getattr(model, "history", None)  # each `fit` has its own
        self._iterator: Any = None

    def __call__(self, iterator: Any) -> Any:
        if getattr(self._model, "history", None) is not self._history or (
            self._iterator is not None and self._iterator is not iterator
        ):
            # Another `fit`, after one that has failed before it had passed all.
            self._model.train_function = self.train_function
            return self.train_function(iterator)
        self._iterator = iterator
        steps = self._model.steps_per_execution
        last = self._passed + steps >= self._backup.record["batches"]
        try:
            if last:
                self._model.train_function = self.train_function
                self.train_function(iterator)
            else:
                for _ in range(steps):
                    next(iterator)
        except StopIteration as error:
            self._model.train_function = self.train_function
            raise _too_short(self._backup, self._passed) from error
        self._passed += steps
        return dict(self._backup.record["logs"])


@contextlib.contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """Has an error of the disk be an OSError: h5py raises a RuntimeError where a file cannot be closed."""
    try:
        yield
    except RuntimeError as error:
        number = re.search(r"errno = (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _bytes_of_weights(model: Any) -> int:
    """The most bytes that a file of a model's weights and its optimizer's state takes."""
    variables = [*model.variables, *([] if model.optimizer is None else model.optimizer.variables)]
    values = sum(math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in variables)
    return values + (len(variables) + len(model.layers) + 8) * _BYTES_OF_A_NAME


def _too_short(backup: Backup, batches: int) -> ValueError:
    return ValueError(
        f"The backup in {backup.path!r} was made after {backup.record['batches']} batches of the epoch, and the data "
        f"has ended after {batches}. Give `fit` the data of the training that was interrupted."
    )


def _common(strategy: Any, backups: list[Backup]) -> list[Backup]:
    """Returns the backups of this process that all processes of a strategy have, the newest first.

    Raises:
        RuntimeError: If some have backups, but no two of the same point.
    """
    mine: dict[tuple[int, int], Backup] = {}
    for backup in backups[:_COMPARED]:
        mine.setdefault((backup.record["epoch"], backup.record["batches"]), backup)
    points = [*mine, *[(-1, -1)] * (_COMPARED - len(mine))]
    rows = replicas.gather_from_processes(strategy, [number for point in points for number in point])
    theirs = [{(int(e), int(b)) for e, b in row.reshape(-1, 2) if e >= 0} for row in rows]
    common = set.intersection(*theirs)
    if not common and any(theirs):
        each = "; ".join(
            ", ".join(f"epoch {e} after batch {b}" for e, b in sorted(points)) or "none" for points in theirs
        )
        raise RuntimeError(
            f"The processes of the {type(strategy).__name__} have no backup of the same point. They have: {each}. Give "
            "each a directory of its own, and restore or delete all of these directories together."
        )
    return [backup for point, backup in mine.items() if point in common]


def _assign(variables: list[keras.Variable], arrays: Any, prefix: str, what: str, backup: Backup) -> None:
    values = [arrays[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in arrays))]
    wanted, found = ([tuple(each.shape) for each in group] for group in (variables, values))
    if wanted != found:
        raise ValueError(
            f"The backup in {backup.path!r} is not of this model: the model's {what} have the shapes {wanted}. "
            f"Received: {found}"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _array(variable: keras.Variable) -> np.ndarray:
    array = keras.ops.convert_to_numpy(variable)
    return array.astype("float32") if array.dtype.kind == "V" else array  # NumPy's files have no bfloat16


def _plain(value: Any) -> Any:
    """A value of logs as JSON has it."""
    return float(value) if isinstance(value, numbers.Real) else np.asarray(value).tolist()


def _check_save_freq(save_freq: str | int) -> str | int:
    if save_freq == "epoch":
        return save_freq
    if isinstance(save_freq, bool) or not isinstance(save_freq, numbers.Integral) or save_freq < 1:
        raise ValueError(
            f"Invalid value for argument `save_freq`. Received: save_freq={save_freq!r}. Expected either 'epoch' or an "
            "integer value of at least 1, the number of batches."
        )
    return int(save_freq)
