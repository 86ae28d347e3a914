"""The moments of a pass over a micro-batch, which one op adds to the windows of all layers when the pass has ended.

Each layer would add its own in the forward pass. At the end there is one op for all of them, and it is known by then
whether the micro-batch counts, so that nothing has to be taken out of a window.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from accumops import ops
from accumops.ops.variables import tf_variable


class PendingMoments:
    """The moments that wait. They are tensors of one graph, or of eager code."""

    def __init__(self) -> None:
        self._graph = _graph()
        self._waiting: list[tuple[Any, ops.BatchMoments, ops.MomentsWindow]] = []

    def take(self, owner: Any, moments: ops.BatchMoments, window: ops.MomentsWindow) -> bool:
        """Keeps moments for later. Returns False if they belong to another graph, such as the body of a loop.

        Args:
            owner: The `LayerWindow`.
            moments: The moments.
            window: The variables of the running replica that they are to be added to.
        """
        if _graph() is not self._graph:
            return False
        self._waiting.append((owner, moments, window))
        return True

    @property
    def variables(self) -> set[int]:
        """The ids of the variables that nothing but `add` changes."""
        windows = [window for owner, _, window in self._waiting if not owner.adds_within_functions]
        return {id(tf_variable(variable)) for window in windows for variable in window}

    def add(self, applies: bool | tf.Tensor = True) -> None:
        """Adds all moments to their windows, if `applies`, a bool or a bool scalar, is true."""
        # The op takes each window once, and a layer may have been called several times.
        while self._waiting:
            first: dict[int, tuple[ops.BatchMoments, ops.MomentsWindow]] = {}
            later = []
            for each in self._waiting:
                key = id(tf_variable(each[2].counters))
                if key in first:
                    later.append(each)
                else:
                    first[key] = each[1:]
            self._waiting = later
            by_device: dict[str, list[tuple[ops.BatchMoments, ops.MomentsWindow]]] = {}
            for moments, window in first.values():
                by_device.setdefault(tf_variable(window.counters).device, []).append((moments, window))
            for group in by_device.values():
                ops.add_to_windows([moments for moments, _ in group], [window for _, window in group], applies=applies)


# A context variable, since each replica has a thread and threads switch at every collective.
_PENDING: contextvars.ContextVar[PendingMoments | None] = contextvars.ContextVar("pending", default=None)


@contextlib.contextmanager
def moments_wait() -> Iterator[PendingMoments]:
    """Has moments wait that layers add to open windows while the block runs or is traced; `add` is to follow."""
    pending = PendingMoments()
    token = _PENDING.set(pending)
    try:
        yield pending
    finally:
        _PENDING.reset(token)


def pending_moments() -> PendingMoments | None:
    """The moments that wait, or None where nothing has to wait."""
    return _PENDING.get()


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
