"""Which rows of a table, such as an embedding, a window's sparse gradients have touched.

A table's accumulator has a flag for each row. A window starts by clearing the rows whose flag is set, instead of all
rows, and ends with an update of those rows. `ops.accumulate` sets and clears the flags.

Flags are right only if every gradient that reaches the accumulator sets them. A dense gradient touches all rows, and a
function that was traced with one does not set flags. So a table is *tracked* or *untracked*, whichever is needed first:

tracked     A sparse gradient, or an update of rows, relies on the flags. Dense gradients then set all of them.
untracked   A function was traced that adds a dense gradient without setting flags. The flags are never used again, and
            sparse gradients clear the whole accumulator where a window starts.
"""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.window.state_variables import PER_REPLICA, flat_name, new_variable

# Below this size, clearing the whole accumulator at a window's start is as cheap as reading its flags.
_TABLE_VALUES = 1 << 16


class TouchedRows(tf.Module):
    """The flags of the accumulators that are tables.

    Args:
        variables: The variables that are trained.
        accumulators: Their accumulators.
        track_all: Whether smaller accumulators have flags as well.
        mirrored: Whether the variables are those of a mirroring strategy, whose gradients are dense.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable | keras.Variable],
        accumulators: Sequence[keras.Variable],
        *,
        track_all: bool,
        mirrored: bool,
    ) -> None:
        super().__init__(name="touched_rows")
        # By position, as text: TensorFlow saves no dict with other keys. Flags start set, as any row of a new
        # accumulator may be other than zero.
        self._flags = {
            str(i): new_variable(
                f"{flat_name(variable)}_touched_rows",
                (accumulator.shape[0],),
                "bool",
                initializer="ones",
                beside=variable,
                **(PER_REPLICA["same"] if mirrored else {}),
            )
            for i, (variable, accumulator) in enumerate(zip(variables, accumulators, strict=True))
            if is_table(accumulator) or (track_all and len(accumulator.shape) >= 1)
        }
        self._tracked: set[int] = set()
        self._untracked: set[int] = set(range(len(variables))) if mirrored else set()

    @property
    def flags(self) -> list[keras.Variable]:
        """All flags, to save and to restore."""
        return list(self._flags.values())

    def track(self, i: int) -> keras.Variable | None:
        """Returns the flags of the accumulator at a position, from now on kept right; None if they cannot be."""
        if str(i) not in self._flags or i in self._untracked:
            return None
        self._tracked.add(i)
        return self._flags[str(i)]

    def tracked(self, i: int) -> keras.Variable | None:
        """Returns the flags of the accumulator at a position if they are kept right already, or None."""
        return self._flags[str(i)] if i in self._tracked else None

    def prepare(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices | None]) -> list[keras.Variable | None]:
        """Returns the flags that the sparse gradients of a micro-batch rely on, by position."""
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                self.track(i)
            elif gradient is not None and i not in self._tracked and i not in self._untracked:
                self._untracked.add(i)
                self._set_for_others(i)
        return [self._flags[str(i)] if i in self._tracked else None for i in range(len(gradients))]

    def add(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices | None]) -> None:
        """Sets all flags of tracked tables that a micro-batch gives a dense gradient."""
        for i in self._tracked:
            if gradients[i] is not None and not isinstance(gradients[i], tf.IndexedSlices):
                self._set(self._flags[str(i)])

    def set_all(self) -> None:
        """Sets all flags, for a process without replicas that restores the window."""
        for flags in self.flags:
            self._set(flags)

    def _set(self, flags: keras.Variable) -> None:
        flags.assign(tf.ones(flags.shape, tf.bool))

    def _set_for_others(self, i: int) -> None:
        """Sets the flags of a table that becomes untracked: a restored window and traced functions still read them."""
        flags = self._flags.get(str(i))
        if flags is not None:
            with tf.init_scope():
                if flags.value.is_initialized():  # otherwise they will start set
                    self._set(flags)


def is_table(accumulator: keras.Variable) -> bool:
    """Whether an accumulator is large enough for flags to pay."""
    shape = accumulator.shape
    return len(shape) >= 2 and shape[0] >= 1024 and math.prod(shape) >= _TABLE_VALUES
