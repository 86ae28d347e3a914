"""Calls of one window that give disjoint parts of the variables, such as a GAN's two networks: an error.

A window has one sum of shares. If one call gives part A and the next one part B, the sum counts both calls, and each
part gets half of its update. So the user has to say what is meant, by one call or by two optimizers. Parts that overlap
are no such case: two heads on one trunk have a joint mean.

Eager code sees it before anything has changed. So does Python, where a function that is being traced makes both calls.
Calls of several functions meet only when their graphs run: there an assertion finds it, which XLA drops.
"""

import dataclasses
import weakref
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.tensorflow import enclosing_graphs
from accumops.window.counters import Counters


@dataclasses.dataclass
class _Trace:
    """The window that the calls of a function which is being traced belong to."""

    micro_batches: int
    limit: int | None
    given: set[int]
    is_known: bool = True
    """False once a call may have been made that this trace does not show, as in a loop or a condition."""


class Parts:
    """Finds calls of an open window that give disjoint variables.

    Args:
        names: The names of the variables.
        owner: What the window belongs to, for messages.
        counters: The counters of the window.
        gaps: The counts of `Connections`.
        mirrored: Whether replicas make the calls, whose traces mix.
    """

    def __init__(
        self, names: Sequence[str], owner: str, counters: Counters, gaps: keras.Variable, *, mirrored: bool
    ) -> None:
        self._names = tuple(names)
        self._owner = owner
        self._counters = counters
        self._gaps = gaps
        self._mirrored = mirrored
        self._traces: weakref.WeakKeyDictionary[tf.Graph, _Trace] = weakref.WeakKeyDictionary()

    def check(self, given: Sequence[int], ends: bool | None) -> list[tf.Operation]:
        """Checks that a call shares a variable with the other calls of its window.

        Args:
            given: The positions of the variables that it gives.
            ends: Whether the window ends with it; None if it does when it is full.

        Returns:
            What has to be checked when the graph runs.

        Raises:
            ValueError: If it shares none.
        """
        is_part = len(given) < len(self._names)
        if tf.executing_eagerly():
            step = int(tf.convert_to_tensor(self._counters.step)) if is_part else 0
            if step > 0 and not (tf.convert_to_tensor(self._gaps).numpy()[1, list(given)] < step).any():
                raise ValueError(self._message(given))
            return []
        if not self._mirrored:
            self._check_trace(given, ends)
        if not is_part:
            return []
        with self._counters.place():
            step = tf.convert_to_tensor(self._counters.step)
            fewest = tf.reduce_min(tf.gather(self._gaps[1], list(given)))
            joins = tf.logical_or(tf.equal(step, 0), tf.less(fewest, step))
            return [tf.debugging.Assert(joins, [self._message(given)])]

    def end(self) -> None:
        """Notes that a call ends the window without a micro-batch."""
        if not tf.executing_eagerly() and not self._mirrored:
            trace = self._trace()
            trace.micro_batches, trace.given = 0, set()

    def _check_trace(self, given: Sequence[int], ends: bool | None) -> None:
        trace = self._trace()
        if trace.is_known and trace.micro_batches > 0 and trace.given.isdisjoint(given):
            raise ValueError(self._message(given))
        trace.micro_batches += 1
        trace.given.update(given)
        steps = self._counters.accum_steps
        if trace.micro_batches == 1:
            trace.limit = steps if isinstance(steps, int) else None
        if callable(steps):
            trace.is_known = False
        elif ends or (ends is None and trace.limit is not None and trace.micro_batches >= trace.limit):
            trace.micro_batches, trace.given = 0, set()

    def _trace(self) -> _Trace:
        """What is known of the function that is being traced. It starts with the window as it is now."""
        graph, *around = enclosing_graphs()
        outer = [self._traces[each] for each in around if each in self._traces]
        for each in outer:
            each.is_known = False
        if graph not in self._traces:
            trace = _Trace(0, None, set(), is_known=not outer)
            with tf.init_scope():
                step = self._counters.step
                # Variables of a function that is being traced for the first time are not initialized.
                if step.value.is_initialized() and int(step.numpy()) > 0:
                    trace.micro_batches, trace.limit = int(step.numpy()), int(self._counters.limit.numpy())
                    trace.given.update(np.flatnonzero(self._gaps.numpy()[1] < trace.micro_batches).tolist())
            self._traces[graph] = trace
        return self._traces[graph]

    def _message(self, given: Sequence[int]) -> str:
        names = [self._names[i] for i in given]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return (
            f"{self._owner} has an open window. This call gives it gradients of {shown} only, and no other call of the "
            "window gave any of these. The window's mean is over the micro-batches of all its calls, so each of the "
            "disjoint parts would get a fraction of its update. Give the gradients of all parts in one call, or use an "
            "optimizer for each part. (With `accum_steps=1` each call is a window of its own.)"
        )
