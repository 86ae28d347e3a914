"""Which variables have had a gradient. The others close with None, as they would without accumulation.

A gradient is None or not when a function is traced, so this is known in Python. A process that goes on with a saved
window has traced nothing yet: for it the variable `connected` keeps the answer, once some gradient was None. All False
means that every variable has a gradient.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from accumops.window.state_variables import new_variable


class Connections(tf.Module):
    """Which variables have had a gradient.

    Args:
        names: The names of the variables.
        owner: What asks, for messages.
        step: How many micro-batches the open window holds.
        **distribution: How `connected` is distributed; see `PER_REPLICA`.
    """

    def __init__(self, names: Sequence[str], owner: str, step: tf.Variable, **distribution: str) -> None:
        super().__init__(name="connections")
        self._names = tuple(names)
        self._owner = owner
        self._step = step
        self.connected = new_variable("connected", (len(names),), "bool", **distribution)
        self._known: set[int] | None = None  # in this process, or in the window that it was started with
        self._has_gaps = False  # whether some gradient was None
        self._left_out: set[int] = set()  # by a function that closes windows and is traced already

    def seen(self) -> set[int]:
        """The positions of the variables that have had a gradient, in this process or in a restored window."""
        if self._known is None:
            self._known = set()
            with tf.init_scope():
                # Variables of a function that is being traced for the first time are not initialized: nor restored.
                if self._step.value.is_initialized() and int(self._step.numpy()) > 0:
                    restored = np.flatnonzero(self.connected.numpy()).tolist()
                    self._known.update(restored or range(len(self._names)))
        return self._known

    def closing(self) -> set[int]:
        """The positions of the variables that a window closes with a gradient."""
        # Before the first gradient all variables may have one: the function that closes is traced before the others.
        seen = self.seen() or set(range(len(self._names)))
        if not tf.executing_eagerly():
            self._left_out.update(set(range(len(self._names))).difference(seen))
        return seen

    def check(self, present: Sequence[int]) -> None:
        """Raises for a gradient that comes too late.

        Args:
            present: The positions of a micro-batch's gradients that are not None.

        Raises:
            ValueError: If the function that closes the window was traced without one of the variables.
        """
        self.seen()  # now, before the step says that a window is open
        late = self._left_out.intersection(present)
        if late:
            raise ValueError(
                f"The gradient of {[self._names[i] for i in sorted(late)]} was None in every call when the function "
                f"that closes {self._owner} was traced, which therefore leaves it out. Give zeros instead of None for "
                "a variable that has a gradient in some calls only."
            )

    def add(self, present: Sequence[int]) -> None:
        """Notes the variables that a micro-batch has a gradient for, by position."""
        seen = self.seen()
        before = len(seen)
        seen.update(present)
        if len(seen) < len(self._names) or before not in (0, len(seen)):
            self._has_gaps = True
        if self._has_gaps:
            self.connected.assign([i in seen for i in range(len(self._names))])
