"""The moments that calls of a batch normalization layer have added in one trainer's windows.

A layer that several models share has one of these for each model, so that each model's window holds the moments of its
own micro-batches, in whatever order the models are trained.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.normalization import replica_moments
from accumops.normalization.pending_moments import pending_moments
from accumops.window import replicas

Saved = tuple[Any, Any]
"""A window that is saved: its number of values and of calls, and its moments."""

Part = tuple[ops.MomentsWindow, ops.MovingStatistics]
"""A window and the statistics that it moves, on one device."""


class LayerWindow:
    """A layer's window. It can be made before the layer is built, and then is built by the layer.

    Args:
        layer: The `AccumBatchNormalization`.
        name: What its trainer is called, in files.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self.member = layer
        self.name = name.replace("/", "_")
        self.released = False
        """Whether the trainer has left the layer."""
        self.adds_within_functions = False
        """Whether a call has added moments within a loop, a condition or a function that a pass calls."""
        self._variables: ops.MomentsWindow | None = None
        self._earlier: dict[int, list[ops.BatchMoments]] = {}
        """For each replica, what the layer's calls but the last have had, where each moves the statistics."""

    def build(self, limit: int) -> None:
        """Creates the variables.

        Args:
            limit: How many calls make the window full, if the layer itself ends it.

        Raises:
            ValueError: On a replica of a strategy, for a layer that was built before: it would be created for this
                replica only.
        """
        with contextlib.ExitStack() as outside:
            if self.member.built:  # and now gets another trainer, maybe while a function is traced
                if replicas.running() is not None:
                    raise ValueError(
                        f"The layer '{self.member.name}' was made after the model '{self.name}' was compiled, and a "
                        "step on a replica cannot create its window: compile the model again."
                    )
                outside.enter_context(tf.init_scope())
                strategy = replicas.strategy_of_variable(self.member.moving_mean)
                if strategy is not None:
                    outside.enter_context(strategy.scope())
            channels = self.member.moving_mean.shape[0]
            self._variables = ops.MomentsWindow(
                _variable("counters", [0, 0, limit], "int64"), _variable("moments", np.zeros([2, channels]), "float64")
            )

    @property
    def variables(self) -> ops.MomentsWindow:
        """The variables, of a layer that is built."""
        if self._variables is None:
            raise ValueError(f"The layer '{self.member.name}' is not built.")
        return self._variables

    def parts(self) -> list[Part]:
        """The variables on the replica that runs; outside of replicas, on each of this process's replicas."""
        layer = self.member
        variables = (*self.variables, layer.moving_mean, layer.moving_variance)
        return [
            (ops.MomentsWindow(counters, moments), ops.MovingStatistics(mean, variance, layer.momentum))
            for counters, moments, mean, variance in replicas.components(*variables)
        ]

    def add(self, moments: ops.BatchMoments, *, only_finite: bool = False) -> None:
        """Adds a batch's moments on the replica that runs, or leaves them to `moments_wait`. The window stays open.

        Args:
            moments: The moments.
            only_finite: Whether moments that are not finite count as moments of no values.
        """
        pending = None if only_finite else pending_moments()
        for window, _ in self.parts():
            if pending is not None and pending.take(self, moments, window):
                continue
            self.adds_within_functions |= pending is not None
            ops.merge_moments(moments, window=window, only_finite=only_finite)

    def add_calls(self, calls: Sequence[ops.BatchMoments], *, pooled: bool) -> None:
        """Adds the moments of a whole window, for each call of the layer in a model.

        The statistics move call by call where the window ends, as in Keras on the whole batch. The function that is
        being traced has to end the window as well.

        Args:
            calls: The moments of each call.
            pooled: Whether they are those of all replicas.
        """
        *earlier, last = calls
        self._earlier[_replica()] = list(earlier)
        if pooled:  # only one replica adds what counts the values of all
            first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
            last = last._replace(count=tf.where(first, last.count, 0))
        self.add(last)

    def move_by_earlier_calls(self, moving: ops.MovingStatistics) -> None:
        """Moves the statistics by all calls of `add_calls` but the last."""
        for moments in self._earlier.pop(_replica(), []):
            ops.merge_moments(moments, moving=moving)

    @classmethod
    def close_windows(cls, windows: "Sequence[LayerWindow]") -> None:
        """Ends windows, full or not: running statistics move by the window's moments, if it has any.

        On a replica of a strategy they move by the moments of all replicas. All replicas have to call this.

        Args:
            windows: The windows, of different layers.
        """
        built = [window for window in windows if window.member.built]
        if replicas.running() is None:
            for each in built:
                for _, moving in each.parts():
                    each.move_by_earlier_calls(moving)
            for parts in _by_device(built):
                ops.end_windows([window for window, _ in parts], [moving for _, moving in parts])
        elif built:
            for each, pooled in zip(built, _pool(built), strict=True):
                ((_, moving),) = each.parts()
                each.move_by_earlier_calls(moving)
                ops.merge_moments(pooled, moving=moving)
            cls.drop_windows(built)

    @classmethod
    def drop_windows(cls, windows: "Sequence[LayerWindow]", unless: tf.Tensor | None = None) -> None:
        """Drops the moments: they never reach the running statistics. If `unless` is true, nothing is dropped."""
        for parts in _by_device([each for each in windows if each.member.built]):
            ops.end_windows([window for window, _ in parts], applies=True if unless is None else ~unless)
        for each in windows:
            each.drop_earlier_calls(unless)

    def drop_earlier_calls(self, unless: tf.Tensor | None = None) -> None:
        """Drops what `add_calls` keeps of all calls but the last, unless a bool scalar is true."""
        earlier = self._earlier.pop(_replica(), [])
        if unless is not None and earlier:
            self._earlier[_replica()] = [
                each._replace(count=tf.where(unless, each.count, tf.zeros_like(each.count))) for each in earlier
            ]

    def forget(self) -> None:
        """Drops the moments now, even while a function is traced."""
        if self.member.built:
            with tf.init_scope():
                # The variables are not initialized while a function is traced for the first time.
                if self.variables.counters.value.is_initialized():
                    self.drop_windows([self])

    def set_limit(self, limit: int) -> None:
        """Starts anew, even while a function is traced, with another number of calls that make the window full."""
        if self.member.built:
            with tf.init_scope():
                self.variables.counters.assign([0, 0, limit])

    def release(self) -> None:
        """Is called where the trainer leaves the layer, as when its model is compiled anew."""
        self.released = True

    def saved(self) -> Saved:
        """What is to be saved; under a strategy, the moments of all replicas together."""
        strategy = replicas.strategy_of_variable(self.variables.counters)
        parts = [[each.numpy() for each in window] for window, _ in self.parts()]
        counters, moments = parts[0]
        if strategy is None or counters[1] == 0:  # all replicas have made as many calls
            return counters[:2], moments
        if not replicas.spans_processes(strategy):
            counters, moments = replica_moments.pool_arrays(parts)
            return counters[:2], moments

        def pooled() -> tuple[tf.Tensor, tf.Tensor]:
            (moments,) = _pool([self])
            count = tf.cast(moments.count, tf.float64)
            return moments.count, tf.stack([moments.mean, moments.variance * count])

        results = tf.function(lambda: strategy.run(pooled), autograph=False)()
        count, moments = (strategy.experimental_local_results(each)[0].numpy() for each in results)
        return np.array([count, counters[1]]), moments

    def load(self, saved: Saved) -> None:
        """Restores what `saved` has returned. How many calls make the window full is the layer's own."""
        (values, calls), moments = saved[0], np.array(saved[1])
        strategy = replicas.strategy_of_variable(self.variables.counters)
        ids = [0] if strategy is None else replicas.replica_ids(strategy)
        for replica, (own, held) in zip(ids, replicas.components(*self.variables), strict=True):
            # The saved moments are those of all replicas together: one replica takes them, the others start empty.
            own.assign([values if replica == 0 else 0, calls, own.numpy()[2]])
            held.assign(moments if replica == 0 else np.zeros_like(moments))


def saved_windows(windows: Sequence[LayerWindow]) -> dict[str, Saved]:
    """What is to be saved of a layer's windows, by the names of their trainers.

    If there are several, those without moments are saved too: so whoever loads one window knows that it is not the only
    one, and that its name counts.
    """
    saved = {name: window.saved() for name, window in _by_name(windows).items()}
    return saved if len(saved) > 1 else {name: each for name, each in saved.items() if each[0][0] > 0}


def load_windows(windows: Sequence[LayerWindow], saved: Mapping[str, Saved]) -> list[str]:
    """Restores what `saved_windows` has returned.

    Each window gets what its trainer's name has, or nothing. A single window of a single trainer needs no name.

    Returns:
        The names of windows that were saved with moments, if this layer has none of the names.
    """
    if len(saved) == len(windows) == 1:
        windows[0].load(*saved.values())
        return []
    named = _by_name(windows)
    for name, window in named.items():
        window.load(saved.get(name, ([0, 0], np.zeros(window.variables.moments.shape))))
    if named.keys() & saved.keys():
        return []
    return [name for name, (counters, _) in saved.items() if counters[0] > 0]


def _by_name(windows: Sequence[LayerWindow]) -> dict[str, LayerWindow]:
    named: dict[str, LayerWindow] = {}
    for window in windows:
        alike = [name for name in named if name.partition(":")[0] == window.name]
        named[f"{window.name}:{len(alike)}" if alike else window.name] = window
    return named


def _replica() -> int:
    """The number of the replica that runs, or 0."""
    return 0 if replicas.running() is None else replicas.local_replica()


def _by_device(windows: Sequence[LayerWindow]) -> list[list[Part]]:
    """The parts of windows of layers that are built, in groups that one op can work on."""
    groups: dict[str, list[Part]] = {}
    for each in windows:
        for part in each.parts():
            groups.setdefault(part[0].counters.device, []).append(part)
    return list(groups.values())


def _pool(windows: Sequence[LayerWindow]) -> list[ops.BatchMoments]:
    parts = [window.parts()[0][0] for window in windows]
    return replica_moments.pool([(part.counters[0], part.moments[0], part.moments[1]) for part in parts])


def _variable(name: str, value: Any, dtype: str) -> keras.Variable:
    value = np.array(value, dtype)
    return keras.Variable(
        initializer=lambda shape, dtype: tf.constant(value, dtype),
        shape=value.shape,
        dtype=dtype,
        trainable=False,
        autocast=False,
        name=f"window_{name}",
    )
