"""Merges the moments of a window's micro-batches, and moves running statistics by them."""

from typing import NamedTuple, TypeVar

import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.variables import check_variable

Kind = TypeVar("Kind", bound=tuple)


class BatchMoments(NamedTuple):
    """The moments of each channel of a batch: float32, or float64 for float64 data."""

    count: tf.Tensor
    """The number of values in each channel, without masked ones: an int64 scalar."""
    mean: tf.Tensor
    """The mean, rounded to its dtype, of shape `[channels]`."""
    rest: tf.Tensor
    """The part of the mean that rounding removed, of shape `[channels]`: the mean is `mean + rest`."""
    variance: tf.Tensor
    """The biased variance, of shape `[channels]`."""


class MomentsWindow(NamedTuple):
    """The variables that hold an open window."""

    counters: tf.Variable
    """int64, of shape `(3,)`: values of a channel so far, calls so far, and how many calls fill the window."""
    moments: tf.Variable
    """float64, of shape `(2, channels)`: the mean of each channel, and the sum of squared distances from that mean."""


class MovingStatistics(NamedTuple):
    """The running statistics, which move by a window's moments when the window ends."""

    mean: tf.Variable
    """The running mean, of shape `[channels]` and a floating-point dtype."""
    variance: tf.Variable
    """The running variance, of the same shape and dtype."""
    momentum: float
    """The share of the old value that a statistic keeps, from 0 to 1."""


def merge_moments(
    batch: BatchMoments | None, *, window: MomentsWindow | None = None, moving: MovingStatistics | None = None
) -> None:
    """Merges a batch's moments into a window's, in place, and moves running statistics when the window ends.

    Moments are merged by the formula of Chan, Golub and LeVeque, 1983, [Algorithms for Computing the Sample
    Variance](https://doi.org/10.1080/00031305.1983.10483115), so the variance between micro-batches counts as well.

    Only a call with `moving` can end the window. It does so if `batch` fills the window, which then has had as many
    calls as `window.counters` ask for, or if there is no `batch`. The running statistics then move,
    `moving = moving * momentum + moments * (1 - momentum)`, unless the window has no values. After that the window is
    empty again: the next batch starts a new one, whatever `window.moments` holds. Without `window`, the batch alone is
    the window.

    Args:
        batch: The moments as `batch_norm` returns them, or None to end the window.
        window: The window's variables, or None.
        moving: The running statistics, or None if the call must not end the window. Statistics in half precision are
            moved by plain TensorFlow.

    Raises:
        ValueError: If fewer than two of the three are given, their numbers of channels differ, or the momentum is not
            from 0 to 1.
        TypeError: If one of the three is of another type, or a member that should be a variable is not.

    Example:

    >>> window = accumops.ops.MomentsWindow(
    ...     tf.Variable([0, 0, 2], dtype=tf.int64), tf.Variable(tf.zeros([2, 1], tf.float64))
    ... )
    >>> moving = accumops.ops.MovingStatistics(tf.Variable([0.0]), tf.Variable([1.0]), momentum=0.0)
    >>> for values in ([[0.0], [2.0]], [[4.0]]):
    ...     y, moments = accumops.ops.batch_norm(tf.constant(values), None, None)
    ...     accumops.ops.merge_moments(moments, window=window, moving=moving)
    >>> moving.mean.numpy(), moving.variance.numpy()
    (array([2.], dtype=float32), array([2.6666667], dtype=float32))
    """
    if (batch is None) + (window is None) + (moving is None) > 1:
        raise ValueError("Give at least two of `batch`, `window` and `moving`.")
    if window is not None:
        names = (f"window.{name}" for name in MomentsWindow._fields)
        window = MomentsWindow(*map(check_variable, names, _of_type(MomentsWindow, "window", window)))
    if moving is not None:
        mean, variance, momentum = _of_type(MovingStatistics, "moving", moving)
        if not 0 <= momentum <= 1:
            raise ValueError(f"`moving.momentum` must be from 0 to 1. Received: {momentum}")
        mean, variance = check_variable("moving.mean", mean), check_variable("moving.variance", variance)
        moving = MovingStatistics(mean, variance, momentum)
    if batch is not None:
        _of_type(BatchMoments, "batch", batch)
    _check_shapes(batch, window, moving)
    variables = [*(window or ()), *(() if moving is None else moving[:2])]
    narrow = moving is not None and moving.mean.dtype.size < 4
    fused = None if narrow else library.fused_ops(variables)
    if fused is None:
        reference.merge_moments(batch, window=window, moving=moving)
        return
    fused.accum_ops_merge_moments(
        window=[variable.handle for variable in window or ()],
        moving=[] if moving is None else [moving.mean.handle, moving.variance.handle],
        count=[] if batch is None else [batch.count],
        moments=[] if batch is None else list(batch[1:]),
        momentum=tf.constant(0.0 if moving is None else moving.momentum, tf.float64),
    )


def _of_type(kind: type[Kind], name: str, value: Kind) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}. Received: {value!r}")
    return value


def _check_shapes(batch: BatchMoments | None, window: MomentsWindow | None, moving: MovingStatistics | None) -> None:
    shapes = {f"batch.{name}": getattr(batch, name).shape for name in ("mean", "rest", "variance")} if batch else {}
    if moving is not None:
        shapes |= {"moving.mean": moving.mean.shape, "moving.variance": moving.variance.shape}
    expected = window.moments.shape[1:] if window is not None else next(iter(shapes.values()))
    for name, shape in shapes.items():
        if not shape.is_compatible_with(expected):
            raise ValueError(f"`{name}` must have a value for each channel, of shape {expected}. Received: {shape}")
