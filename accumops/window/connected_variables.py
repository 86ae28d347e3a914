"""Which variables a window has a gradient for. The others stay where they are, as without accumulation.

A micro-batch has no gradient for a variable if the gradient is None, or if the call leaves the variable out. The
variable `gaps` counts both for the open window, one column for each trained variable:

    gaps[0]   the micro-batches without a gradient for it; none had one if this is `step`
    gaps[1]   the micro-batches that left it out; all did if this is `step`

A micro-batch with a gradient for every variable adds nothing to it. The end of a window clears it.

Eager code reads `gaps`. A graph that ends windows knows the gradients of its own micro-batch when it is traced; which
others the window has, `gaps` says when the graph runs.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import tensorflow as tf

from accumops.adapters.tensorflow import enclosing_functions
from accumops.adapters.untracked import Untracked
from accumops.window.counters import Counters
from accumops.window.state_variables import counter_device, new_variable


@dataclasses.dataclass(frozen=True)
class Connected:
    """The variables that a window has a gradient for, by position."""

    positions: Collection[int]
    """Those that have a gradient or, in a graph, may have one."""
    maybe: Mapping[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    """Those of which only the running graph knows it, each with a bool scalar that says it."""
    without: Collection[int] = ()
    """Those that were given without a gradient, for Keras to warn of."""


class Connections(tf.Module):
    """Which variables the open window has a gradient for.

    Args:
        names: The names of the variables.
        owner: What asks, for messages.
        counters: The counters of the window.
        jit_compile: As for the counters.
        **distribution: How `gaps` is distributed; see `PER_REPLICA`.
    """

    def __init__(
        self, names: Sequence[str], owner: str, counters: Counters, jit_compile: bool | None, **distribution: str
    ) -> None:
        super().__init__(name="connections")
        self._names = tuple(names)
        self._owner = owner
        self._counters = counters
        with counter_device(jit_compile):
            self.gaps = new_variable("gaps", (2, len(names)), "int64", **distribution)
        self._known: set[int] | None = None  # in this process, or in the window that it was started with
        self._nones: set[int] = set()  # given without a gradient in this process
        self._left_out: set[int] = set()  # by a function that returns windows' gradients and is traced already
        # `slices`: what the slices of one batch have a gradient for, and what they were given, for each call that is
        # traced. `whole`: a function, and the variables of the window that its slices make.
        self._untracked = Untracked(slices=[], whole=None)

    # A micro-batch on its way in

    def check(self, present: Sequence[int]) -> None:
        """Raises for a gradient that comes too late.

        Args:
            present: The positions of a micro-batch's gradients that are not None.

        Raises:
            ValueError: If the function that returns the window's gradients was traced without one of the variables.
        """
        self._seen()  # now, before the step says that a window is open
        late = self._left_out.intersection(present)
        if late:
            raise ValueError(
                f"The gradient of {self._list(late)} was None in every call when the function that closes "
                f"{self._owner} was traced, which therefore leaves it out. Give zeros instead of None for a variable "
                "that has a gradient in some calls only."
            )

    def note(self, present: Sequence[int], given: Sequence[int]) -> None:
        """Has Python remember what a micro-batch has a gradient for.

        Args:
            present: The positions of its gradients that are not None.
            given: The positions of the variables that it was given with.
        """
        self._untracked.whole = None
        self._seen().update(present)
        self._nones.update(set(given).difference(present))

    def add(self, present: Sequence[int], given: Sequence[int]) -> None:
        """Counts the gaps of a micro-batch; the arguments are those of `note`."""
        self.note(present, given)
        if len(present) == len(self._names):
            return
        gaps = np.ones((2, len(self._names)), "int64")
        gaps[0, list(present)] = 0
        gaps[1, list(given)] = 0
        with self._counters.place():
            self.gaps.assign_add(tf.constant(gaps))

    def add_slice(self, present: Sequence[int], given: Sequence[int]) -> None:
        """As `add`, for a micro-batch that `count_slices` counts."""
        self.add(present, given)
        self._untracked.slices.append((tuple(present), tuple(given)))

    def count_slices(self) -> None:
        """Notes that the slices since the last call are a whole window, which ends in the function that has them."""
        kinds, self._untracked.slices = set(self._untracked.slices), []
        if len(kinds) == 1:
            present, given = kinds.pop()
            whole = Connected(present, without=sorted(set(given).difference(present)))
            self._untracked.whole = enclosing_functions()[0], whole

    # The window on its way out

    def at_end(self, present: Sequence[int], given: Sequence[int]) -> Connected:
        """The variables that a window which ends has a gradient for.

        Args:
            present: As for `note`, of the window's last micro-batch; empty if that is not known. `gaps` and `step`
                count it both, or both do not yet.
            given: As for `note`, of the same micro-batch.
        """
        everything = range(len(self._names))
        if len(present) == len(everything):
            return Connected(everything)
        whole: tuple[int, Connected] | None = self._untracked.whole
        self._untracked.whole = None
        if not present and whole is not None and whole[0] == enclosing_functions()[0]:
            return whole[1]
        if tf.executing_eagerly():
            step, gaps = int(tf.convert_to_tensor(self._counters.step)), tf.convert_to_tensor(self.gaps).numpy()
            has, was_given = gaps < step
            positions = [i for i in everything if has[i] or i in present]
            unanswered = [i for i in everything if (was_given[i] or i in given) and i not in positions]
            return Connected(positions, without=unanswered)
        with self._counters.place():
            flags = tf.unstack(tf.less(self.gaps[0], tf.convert_to_tensor(self._counters.step)))
        maybe = {i: flag for i, flag in enumerate(flags) if i not in present}
        without = set(given).difference(present) if given else self._nones.difference(self._seen())
        return Connected(everything, maybe, sorted(without))

    def at_end_by_trace(self) -> tuple[Connected, list[tf.Operation]]:
        """As `at_end`, where a graph has to know the variables when it is traced.

        Returns:
            The variables that have had a gradient so far, and checks that the window has one for the same.
        """
        if tf.executing_eagerly():
            return self.at_end((), ()), []
        everything = range(len(self._names))
        # Before the first gradient all variables may have one: the function that closes is traced before the others.
        seen = self._seen() or set(everything)
        self._left_out.update(set(everything).difference(seen))
        shown = ", ".join(self._list(seen))
        message = (
            f"The function that closes {self._owner} was traced for windows with gradients of {shown}. This window has "
            "gradients of other variables, and a graph cannot return None in some windows only. Give zeros instead of "
            "None for a variable that has a gradient in some windows only, close the window outside of tf.function, or "
            "use a GradientAccumulateOptimizer, which leaves out what a window has no gradient for."
        )
        with self._counters.place():
            has = tf.less(self.gaps[0], tf.convert_to_tensor(self._counters.step))
            differs = tf.math.logical_xor(has, tf.constant([i in seen for i in everything]))
            return Connected(sorted(seen)), [tf.debugging.Assert(tf.logical_not(tf.reduce_any(differs)), [message])]

    def clear(self) -> None:
        """Counts from the start, for the next window."""
        self._untracked.slices, self._untracked.whole = [], None
        with self._counters.place():
            self.gaps.assign(tf.zeros(self.gaps.shape, tf.int64))

    def _seen(self) -> set[int]:
        """The positions of the variables that have had a gradient, in this process or in a restored window."""
        if self._known is None:
            self._known = set()
            with tf.init_scope():
                step = self._counters.step
                # Variables of a function that is being traced for the first time are not initialized: nor restored.
                if step.value.is_initialized() and int(step.numpy()) > 0:
                    self._known.update(np.flatnonzero(self.gaps.numpy()[0] < int(step.numpy())).tolist())
        return self._known

    def _list(self, positions: Collection[int]) -> list[str]:
        return [self._names[i] for i in sorted(positions)]
