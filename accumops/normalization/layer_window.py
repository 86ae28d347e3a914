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
from accumops.window import replicas

Saved = tuple[Any, Any]
"""A window that is saved: its number of values and of calls, and its moments."""


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
        self._variables: ops.MomentsWindow | None = None
        self._limit = 0
        self._further_calls: list[LayerWindow] = []

    def of_call(self, number: int) -> "LayerWindow":
        """Returns the window of one of a layer's calls in a step, if each moves the statistics by itself.

        Such windows end in the step that opens them, so that none is saved.

        Args:
            number: The number of the call. The window of the first one is this.
        """
        while len(self._further_calls) < number:
            window = LayerWindow(self.member, self.name)
            if self._variables is not None:
                window.build(self._limit)
            self._further_calls.append(window)
        return self if number == 0 else self._further_calls[number - 1]

    def of_all_calls(self) -> "list[LayerWindow]":
        """The windows of all calls."""
        return [self, *self._further_calls]

    def build(self, limit: int) -> None:
        """Creates the variables.

        Args:
            limit: How many calls make the window full, if the layer itself ends it.

        Raises:
            ValueError: On a replica of a strategy, for a layer that was built before: it would be created for this
                replica only.
        """
        self._limit = limit
        for window in self._further_calls:
            window.build(limit)
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

    def parts(self) -> list[tuple[ops.MomentsWindow, ops.MovingStatistics]]:
        """The variables on the replica that runs; outside of replicas, on each of this process's replicas."""
        layer = self.member
        variables = (*self.variables, layer.moving_mean, layer.moving_variance)
        return [
            (ops.MomentsWindow(counters, moments), ops.MovingStatistics(mean, variance, layer.momentum))
            for counters, moments, mean, variance in replicas.components(*variables)
        ]

    def add(self, moments: ops.BatchMoments) -> None:
        """Adds a batch's moments on the replica that runs. The window stays open."""
        for window, _ in self.parts():
            ops.merge_moments(moments, window=window)

    @classmethod
    def close_windows(cls, windows: "Sequence[LayerWindow]") -> None:
        """Ends windows, full or not: running statistics move by the window's moments, if it has any.

        On a replica of a strategy they move by the moments of all replicas. All replicas have to call this.

        Args:
            windows: The windows, of different layers.
        """
        built = [each for window in windows if window.member.built for each in window.of_all_calls()]
        if replicas.running() is None:
            for each in built:
                for window, moving in each.parts():
                    ops.merge_moments(None, window=window, moving=moving)
        elif built:
            for each, pooled in zip(built, _pool(built), strict=True):
                ((_, moving),) = each.parts()
                ops.merge_moments(pooled, moving=moving)
                each.drop_window()

    def drop_window(self, unless: tf.Tensor | None = None) -> None:
        """Drops the moments: they never reach the running statistics. If `unless` is true, nothing is dropped."""
        if self.member.built:
            limit_alone = tf.constant([0, 0, 1], tf.int64)
            kept = limit_alone if unless is None else tf.where(unless, tf.ones_like(limit_alone), limit_alone)
            for each in self.of_all_calls():
                for window, _ in each.parts():
                    window.counters.assign(window.counters * kept)

    def forget(self) -> None:
        """Drops the moments now, even while a function is traced."""
        if self.member.built:
            with tf.init_scope():
                # The variables are not initialized while a function is traced for the first time.
                if self.variables.counters.value.is_initialized():
                    self.drop_window()

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
