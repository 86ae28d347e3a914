"""What the op that accumulates reports of a micro-batch beside adding it."""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class SquaredNorms:
    """Squared norms for the variables that a micro-batch has dense gradients of; NaN where nobody has asked."""

    positions: Sequence[int]
    """The positions of these variables."""
    gradients: tf.Tensor
    """Of the micro-batch's gradients: float64, of shape `[len(positions)]`."""
    sums: tf.Tensor
    """Of the window's sums with it: likewise."""


def joined(norms: Sequence[SquaredNorms]) -> SquaredNorms | None:
    """Returns what several operations have reported; None for none."""
    if len(norms) < 2:
        return norms[0] if norms else None
    positions = [i for each in norms for i in each.positions]
    gradients, sums = (
        tf.concat(each, 0) for each in zip(*((each.gradients, each.sums) for each in norms), strict=True)
    )
    return SquaredNorms(positions, gradients, sums)
