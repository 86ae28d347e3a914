"""What a window makes of gradients that are not finite.

    policy         a micro-batch with such a gradient        its window
    "propagate"    is summed as any other                    gives a gradient that is not finite either
    "skip"         has a share of 0                          is the mean over the others; without any others, no update
    "drop"         is summed as any other                    makes no update

"skip" has to know before it sums, so it reads all gradients once more. "drop" finds out while it sums; only gradients
that go straight into an update are read once more. Nothing is read on the host: the verdict is a tensor, which scales
gradients and, where a window ends, decides a condition.

A micro-batch of weight 0 is finite: it counts as nothing anyway.
"""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from accumops import ops
from accumops.arguments import as_weight, check_nonfinite
from accumops.window.state_variables import PER_REPLICA, new_variable

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]


@dataclasses.dataclass(frozen=True)
class Share:
    """What a micro-batch counts for in its window, once its gradients have been looked at."""

    weight: tf.Tensor
    """0 if the micro-batch is skipped."""
    counts: tf.Tensor | bool
    """Whether it is not skipped."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a window makes an update."""

    applies: tf.Tensor | bool = True
    """Whether it does."""
    nonfinite: tf.Tensor | None = None
    """How many of its micro-batches were not finite, in floating point; None if nobody asks."""
    uncounted: tf.Tensor | None = None
    """What the end of the window adds to `nonfinite_count`."""


MAKES_UPDATE = Verdict()
"""The verdict where nobody asks."""


class NonfiniteGradients(tf.Module):
    """The policy of a window for gradients that are not finite, and their counts.

    Args:
        policy: `"propagate"`, `"skip"` or `"drop"`.
    """

    def __init__(self, policy: str) -> None:
        super().__init__(name="nonfinite")
        self.policy = check_nonfinite(policy)

    def build(self, dtype: tf.DType, *, mirrored: bool) -> None:
        """Creates the variables, which do not depend on the policy: a saved window can go on with another one.

        Args:
            dtype: What shares are counted in. Both are summed over replicas in one operation.
            mirrored: Whether replicas of a strategy have a window each.
        """
        same, summed = (PER_REPLICA["same"], PER_REPLICA["summed"]) if mirrored else ({}, {})
        self.count = new_variable("nonfinite_count", (), "int64", **same)
        self.in_window = new_variable("nonfinite_in_window", (), tf.as_dtype(dtype).name, **summed)
        self._dtype = tf.as_dtype(dtype)
        # Replicas know each other's micro-batches only where a window ends.
        self._counts_at_once = self.policy == "skip" and not mirrored

    @property
    def acts(self) -> bool:
        """Whether the policy is another than to let gradients propagate."""
        return self.policy != "propagate"

    # A micro-batch

    def share(self, gradients: Gradients, weight: float | tf.Tensor | Share) -> Share:
        """Returns what a micro-batch counts for in its window.

        Args:
            gradients: Its gradients.
            weight: Its share as it is given; a `Share` is returned as it is.
        """
        if isinstance(weight, Share):
            return weight
        given = as_weight(weight, self._dtype)
        if self.policy != "skip":
            return Share(given, True)
        counts = self._fine(ops.all_finite(_values(gradients)), given)
        return Share(tf.where(counts, given, tf.zeros_like(given)), counts)

    def _fine(self, finite: tf.Tensor | bool, weight: tf.Tensor) -> tf.Tensor:
        """Whether a micro-batch is finite, by its gradients and its weight."""
        return (finite & tf.math.is_finite(weight)) | tf.equal(weight, 0)

    def with_next(self, share: Share, finite: tf.Tensor | None, starts: tf.Tensor | bool) -> tf.Tensor | None:
        """How many micro-batches of the window are not finite with one more; None if the policy does not ask.

        Args:
            share: The micro-batch's share.
            finite: With "drop", whether its gradients are finite; None if it has none.
            starts: Whether it is the first of its window.
        """
        if not self.acts:
            return None
        fine = share.counts if self.policy == "skip" else self._fine(True if finite is None else finite, share.weight)
        before = tf.convert_to_tensor(self.in_window)
        return tf.where(starts, tf.zeros_like(before), before) + tf.cast(~fine, self._dtype)

    def add(self, share: Share, finite: tf.Tensor | None, starts: tf.Tensor | bool) -> None:
        """Notes a micro-batch that has been added to the window. The arguments are those of `with_next`."""
        nonfinite = self.with_next(share, finite, starts)
        if nonfinite is None:
            return
        self.in_window.assign(nonfinite)
        if self._counts_at_once:
            self.count.assign_add(tf.cast(~share.counts, tf.int64))

    # The end of the window

    def verdict(self, total: tf.Tensor, nonfinite: tf.Tensor | None, last: Share | None = None) -> Verdict:
        """Says whether a window makes an update.

        Args:
            total: The sum of its shares, over all replicas.
            nonfinite: How many of its micro-batches are not finite, over all replicas.
            last: The share of a micro-batch that is within both, and that `add` has not been called for.
        """
        if not self.acts or nonfinite is None:
            return MAKES_UPDATE
        some = nonfinite > 0
        if self.policy == "drop":
            return Verdict(~some, nonfinite, tf.cast(some, tf.int64))
        uncounted = None
        if not self._counts_at_once:
            uncounted = tf.cast(tf.round(nonfinite), tf.int64)
        elif last is not None:
            uncounted = tf.cast(~last.counts, tf.int64)
        return Verdict(~(some & tf.equal(total, 0)), nonfinite, uncounted)

    def count_more(self, uncounted: tf.Tensor | None) -> None:
        """Counts what the end of a window adds."""
        if uncounted is not None:
            self.count.assign_add(uncounted)


def _values(gradients: Gradients) -> list[tf.Tensor]:
    """The gradients that can be other than finite, in dtypes that the ops take."""
    values = [each.values if isinstance(each, tf.IndexedSlices) else each for each in gradients if each is not None]
    tensors = [tf.convert_to_tensor(each) for each in values]
    taken = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
    return [each if each.dtype in taken else tf.cast(each, tf.float32) for each in tensors if each.dtype.is_floating]
