"""Layers that couple the samples of a window, and what their calls exchange where a window runs layer by layer.

Such a layer takes *totals* from the samples of a batch: tensors that are zeros for no samples, and that can be merged,
such as moments or sums. The totals of the window are those of its micro-batches merged. The layer is called in three
ways, with what `at_hand` returns:

    measuring   before the window's totals are known: it gives the totals of a micro-batch
    supplying   when they are: it makes its outputs of them. The gradient takes them for constants, and gives sums for
                the tensors that the layer calls its factors
    tying       in the backward pass, when the sums of the whole window are known: it gives the rest of the gradient,
                which passes through the totals
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

Tensors = Sequence[tf.Tensor]


class Measuring(Protocol):
    """Is at hand while a layer measures."""

    totals: Tensors
    """The totals of the micro-batch, after the call."""


class Supplying(Protocol):
    """Is at hand while a layer is supplied with totals."""

    factors: Tensors
    """The tensors whose gradients are the sums that the tying call needs, after the call."""


class Tying(Protocol):
    """Is at hand while a layer ties."""

    tie: tf.Tensor
    """A scalar whose gradient is the rest, after the call."""


class Coupling(Protocol):
    """How a layer couples the samples of a window."""

    def measuring(self) -> Measuring:
        """Returns what is at hand for a measuring call."""
        ...

    def supplying(self, totals: Tensors, watch: Callable[[tf.Tensor], None]) -> Supplying:
        """Returns what is at hand for a call with the totals of the window.

        Args:
            totals: The totals.
            watch: Has a tape watch a tensor, if one runs.
        """
        ...

    def tying(self, totals: Tensors, sums: Tensors) -> Tying:
        """Returns what is at hand for a tying call.

        Args:
            totals: The totals of the window.
            sums: The gradients of the factors, summed over the window.
        """
        ...

    def merged(self, totals: Tensors, others: Tensors) -> Tensors:
        """Returns the totals of two parts of a window together."""
        ...

    def factor_specs(self, totals: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        """Returns what the factors are like, for totals that are like these."""
        ...

    def over_replicas(self, totals: Sequence[Tensors]) -> list[Tensors]:
        """Returns the totals of all replicas, for several layers that couple in this way. Runs on each replica."""
        ...

    def end(self, calls: Sequence[Tensors], *, pooled: bool) -> None:
        """Takes the totals of a window that has run.

        Args:
            calls: The totals of each call of the layer in the model.
            pooled: Whether they are those of all replicas.
        """
        ...


def couples(layer: Any) -> bool:
    """Whether a layer couples the samples of a window.

    Such a layer has a method `coupling`, which returns how; `coupled_because`, the beginning of an error; and
    `uncoupled`, what may stand in its place.
    """
    return bool(getattr(layer, "follows_window", False))


_AT_HAND: contextvars.ContextVar[Any] = contextvars.ContextVar("at_hand", default=None)


@contextlib.contextmanager
def having_at_hand(what: Measuring | Supplying | Tying) -> Iterator[None]:
    """Gives the layer that is called in a block what `at_hand` returns."""
    token = _AT_HAND.set(what)
    try:
        yield
    finally:
        _AT_HAND.reset(token)


def at_hand() -> Any:
    """What `having_at_hand` gives to the call that is being made, or None."""
    return _AT_HAND.get()
