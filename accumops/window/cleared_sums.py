"""Sums that start from zeros, for XLA.

XLA makes one operation of a weight gradient's product and its addition to an accumulator, which saves writing and
reading the gradient. It does not where the first micro-batch overwrites what all others add to. So in a function that
XLA compiles, where all micro-batches of a window are added in one loop, zeros are written before the loop:

    matrices              zeros, to which every micro-batch adds
    vectors               overwritten: no product gives their gradients, and XLA needs fewer operations for it
    rows of tables        overwritten, with the flags that mark them
"""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this
from accumops.window.micro_batch import MicroBatch


class ClearedSums:
    """The accumulators that hold zeros, or sums of the window that is being filled."""

    def __init__(self) -> None:
        self._positions: frozenset[int] = frozenset()

    @contextlib.contextmanager
    def within(self, accumulators: Sequence[keras.Variable]) -> Iterator[None]:
        """Clears accumulators for a block that fills a window, where XLA compiles it.

        Args:
            accumulators: All accumulators of the window.
        """
        if not xla_compiles_this():
            yield
            return
        matrices = [i for i, each in enumerate(accumulators) if len(each.shape) > 1]
        for i in matrices:
            accumulators[i].assign(tf.zeros(accumulators[i].shape, accumulators[i].dtype))
        self._positions = frozenset(matrices)
        try:
            yield
        finally:
            self._positions = frozenset()

    def split(self, batch: MicroBatch, positions: Sequence[int]) -> list[tuple[list[int], bool | tf.Tensor]]:
        """Splits positions by whether a micro-batch overwrites what their accumulators hold.

        Args:
            batch: The micro-batch.
            positions: Positions of its gradients.

        Returns:
            Groups of positions, each with whether it is overwritten. A group may be empty.
        """
        added = [i for i in positions if i in self._positions and _adds_a_matrix(batch, i)]
        return [([i for i in positions if i not in added], batch.starts), (added, False)]


def _adds_a_matrix(batch: MicroBatch, i: int) -> bool:
    gradient = batch.gradients[i]
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices) and batch.touched_rows[i] is None
