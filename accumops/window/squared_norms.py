"""What the op that accumulates reports of a micro-batch beside adding it."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import enclosing_functions
from accumops.window.state_variables import new_variable


@dataclasses.dataclass(frozen=True)
class SquaredNorms:
    """Squared norms for the variables that a micro-batch has dense gradients of; NaN where nobody has asked."""

    positions: Sequence[int]
    """The positions of these variables."""
    report: tf.Tensor
    """The op's report, for these: float64, of shape `[2, len(positions)]`."""

    @property
    def gradients(self) -> tf.Tensor:
        """Those of the micro-batch's gradients."""
        return self.report[0]

    @property
    def sums(self) -> tf.Tensor:
        """Those of the window's sums with it."""
        return self.report[1]


def joined(norms: Sequence[SquaredNorms]) -> SquaredNorms | None:
    """Returns what several operations have reported; None for none."""
    if len(norms) < 2:
        return norms[0] if norms else None
    positions = [i for each in norms for i in each.positions]
    return SquaredNorms(positions, tf.concat([each.report for each in norms], 1))


class LastSliceReport:
    """What is reported of the last of the slices that a step splits its batch into.

    It is kept in a variable from the loop over the slices to where their window ends, in the same function. There is
    none if slices have dense gradients of different variables.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], keras.Variable] = {}
        self._slices: set[tuple[int, ...]] = set()  # what the traced slices report: the positions of each
        self._whole: tuple[int, tuple[int, ...]] | None = None  # a function, and the positions of its slices

    def add(self, reported: SquaredNorms | None, beside: keras.Variable) -> None:
        """Keeps what is reported of a slice; the next one overwrites it.

        Args:
            reported: The report: NaN where the slice is not the last one; None if nothing was asked.
            beside: A variable on whose device it is to be.
        """
        positions = () if reported is None else tuple(reported.positions)
        self._slices.add(positions)
        if reported is None or not positions:
            return
        if positions not in self._kept:
            with tf.init_scope():
                shape = (2, len(positions))
                self._kept[positions] = new_variable("last_slice_norms", shape, "float64", beside=beside)
        self._kept[positions].assign(reported.report)

    def count(self) -> None:
        """Notes that the slices since the last call are a whole window, which ends in the function that has them."""
        slices, self._slices = self._slices, set()
        self._whole = (enclosing_functions()[0], slices.pop()) if len(slices) == 1 else None

    def clear(self) -> None:
        """Forgets the slices."""
        self._slices, self._whole = set(), None

    def take(self) -> SquaredNorms | None:
        """Returns the report of the window that ends, if it is one that `count` was called for."""
        whole, self._whole = self._whole, None
        if whole is None or whole[0] != enclosing_functions()[0] or not whole[1]:
            return None
        return SquaredNorms(whole[1], tf.convert_to_tensor(self._kept[whole[1]]))
