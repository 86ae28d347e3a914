"""What a batch normalization layer does where a window runs layer by layer (`window/coupling.py`).

Its totals are the moments, and its factors gamma and beta.

With x' = (x - mean) / deviation, y = gamma * x' + beta, and the gradient dy of y, the gradient of x is (Ioffe and
Szegedy 2015, https://arxiv.org/abs/1502.03167)

    dx = gamma / deviation * (dy - sum(dy) / count - x' * sum(dy * x') / count)

where both sums go over the window. `Supplied` gives the first term, and the sums as its gradients of beta and gamma.
`Tied` gives the other two terms.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from accumops import ops
from accumops.normalization import replica_moments
from accumops.ops.reference import statistics_dtype
from accumops.window.coupling import Tensors


class WindowMoments(NamedTuple):
    """The moments of a channel's values: float64, so that merging them loses nothing."""

    count: tf.Tensor
    """The number of values, a scalar."""
    mean: tf.Tensor
    squares: tf.Tensor
    """The sum of squared distances from the mean."""

    @classmethod
    def of(cls, moments: ops.BatchMoments) -> "WindowMoments":
        """The moments that `ops.batch_norm` gives of a batch."""
        count, mean, rest, variance = (tf.cast(each, tf.float64) for each in moments)
        return cls(count, mean + rest, variance * count)

    def merged(self, other: "WindowMoments") -> "WindowMoments":
        """The moments of both, by the formula of Chan, Golub and LeVeque; those of no values count as nothing."""
        count = self.count + other.count
        share = tf.math.divide_no_nan(other.count, count)
        some = other.count > 0
        distance = tf.where(some, other.mean - self.mean, tf.zeros_like(self.mean))
        squares = tf.where(some, other.squares, tf.zeros_like(other.squares)) + distance**2 * self.count * share
        return WindowMoments(count, self.mean + distance * share, self.squares + squares)

    @property
    def variance(self) -> tf.Tensor:
        """The biased variance."""
        return tf.math.divide_no_nan(self.squares, self.count)

    def as_batch(self) -> ops.BatchMoments:
        """The moments as those of one batch."""
        return ops.BatchMoments(tf.cast(self.count, tf.int64), self.mean, tf.zeros_like(self.mean), self.variance)


class Statistics(Protocol):
    """What stands for the moments of a layer's own batch."""

    def normalize(
        self, x: tf.Tensor, gamma: Any, beta: Any, *, axis: int, epsilon: float, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns what the layer returns. The arguments are those of `ops.batch_norm`."""
        ...


class Measured(Statistics):
    """Takes the moments of what a layer is called with."""

    def __init__(self) -> None:
        self.totals: Tensors = ()

    def normalize(
        self, x: tf.Tensor, gamma: Any, beta: Any, *, axis: int, epsilon: float, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns `x`, and keeps its moments."""
        _, moments = ops.batch_norm(x, None, None, axis=axis, epsilon=epsilon, mask=mask)
        self.totals = WindowMoments.of(moments)
        return x


class Supplied(Statistics):
    """Normalizes by the window's moments.

    Args:
        moments: The moments.
        watch: Has a tape watch a tensor, if one runs.
    """

    def __init__(self, moments: WindowMoments, watch: Callable[[tf.Tensor], None] = lambda tensor: None) -> None:
        self._of_window, self._watch = moments, watch
        self.factors: Tensors = ()
        """What it has multiplied by and added. Their gradients are the sums that `Tied` needs."""

    def normalize(
        self, x: tf.Tensor, gamma: Any, beta: Any, *, axis: int, epsilon: float, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns the normalized `x`."""
        dtype, channels = statistics_dtype(x.dtype), tf.shape(self._of_window.mean)
        gamma = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
        beta = tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)
        gamma, beta = self.factors = tf.identity(gamma), tf.identity(beta)
        for each in self.factors:
            self._watch(each)
        return _normalized(x, gamma, beta, self._of_window, axis, epsilon)


class Sums(NamedTuple):
    """Sums over the window, for each channel, in the dtype of statistics."""

    of_gamma: tf.Tensor
    """Of the gradient of the output times the normalized input."""
    of_beta: tf.Tensor
    """Of the gradient of the output."""


class Tied(Statistics):
    """Gives the part of a gradient that passes through the window's moments.

    Args:
        moments: The moments.
        sums: The sums over the window.
    """

    def __init__(self, moments: WindowMoments, sums: Sums) -> None:
        self._of_window, self._sums = moments, sums
        self.tie: Any = None
        """A scalar whose gradient is this part."""

    def normalize(
        self, x: tf.Tensor, gamma: Any, beta: Any, *, axis: int, epsilon: float, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns `x`, and keeps the tie."""
        dtype = statistics_dtype(x.dtype)
        variance = tf.cast(self._of_window.variance, dtype)
        scale = tf.math.rsqrt(variance + tf.constant(epsilon, dtype))
        scale *= 1.0 if gamma is None else tf.stop_gradient(tf.cast(gamma, dtype))
        scale = tf.math.divide_no_nan(-scale, tf.cast(self._of_window.count, dtype))
        of_gamma, of_beta = (tf.cast(each, dtype) for each in self._sums)

        @tf.custom_gradient
        def tie(x: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                # -(sum(dy) + x' * sum(dy * x')) * gamma / deviation / count is a normalization, too.
                part = _normalized(x, scale * of_gamma, scale * of_beta, self._of_window, axis, epsilon)
                return part if mask is None else tf.where(mask[..., tf.newaxis], part, tf.zeros_like(part))

            return tf.zeros([], dtype), gradient

        self.tie = tie(x)
        return x


class NormalizationOverWindow:
    """How a layer normalizes by the moments of windows: a `Coupling`.

    Args:
        layer: The `AccumBatchNormalization`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def measuring(self) -> Measured:
        """See `Coupling`."""
        return Measured()

    def supplying(self, totals: Tensors, watch: Callable[[tf.Tensor], None]) -> Supplied:
        """See `Coupling`."""
        return Supplied(WindowMoments(*totals), watch)

    def tying(self, totals: Tensors, sums: Tensors) -> Tied:
        """See `Coupling`."""
        return Tied(WindowMoments(*totals), Sums(*sums))

    def merged(self, totals: Tensors, others: Tensors) -> Tensors:
        """See `Coupling`."""
        return WindowMoments(*totals).merged(WindowMoments(*others))

    def factor_specs(self, totals: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        """See `Coupling`."""
        dtype = tf.float64 if self._layer.compute_dtype == "float64" else tf.float32
        return [tf.TensorSpec(totals[1].shape, dtype)] * len(Sums._fields)

    def over_replicas(self, totals: Sequence[Tensors]) -> list[Tensors]:
        """See `Coupling`."""
        pooled = replica_moments.pool([WindowMoments(*each) for each in totals])
        return [WindowMoments.of(each) for each in pooled]

    def end(self, calls: Sequence[Tensors], *, pooled: bool) -> None:
        """See `Coupling`."""
        self._layer.add_window([WindowMoments(*each).as_batch() for each in calls], pooled=pooled)


def _normalized(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: WindowMoments, axis: int, epsilon: float
) -> tf.Tensor:
    """(x - mean) / deviation * gamma + beta, for a mean that may be much larger than the deviation.

    The op takes the mean rounded to the dtype of statistics. What rounding has taken off is taken off here.
    """
    dtype = gamma.dtype
    mean = tf.cast(moments.mean, dtype)
    rest = tf.cast(moments.mean - tf.cast(mean, tf.float64), dtype)
    variance = tf.cast(moments.variance, dtype)
    beta -= rest * tf.math.rsqrt(variance + tf.constant(epsilon, dtype)) * gamma
    return ops.batch_norm_inference(x, gamma, beta, mean, variance, axis=axis, epsilon=epsilon)
