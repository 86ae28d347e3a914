"""The moments of a window's micro-batches together, and the running statistics that move by them."""

from typing import NamedTuple, TypeVar

import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.variables import check_variable

Kind = TypeVar("Kind", bound=tuple)


class BatchMoments(NamedTuple):
    """A batch's moments, of each channel: float32, or float64 for float64 data."""

    count: tf.Tensor
    """How many values of a channel there are, without masked ones: an int64 scalar."""
    mean: tf.Tensor
    """The mean, rounded to its dtype."""
    rest: tf.Tensor
    """What rounding took from it: `mean + rest` is the mean."""
    variance: tf.Tensor
    """The biased variance."""


class MomentsWindow(NamedTuple):
    """The variables of a window."""

    counters: tf.Variable
    """int64, of shape `(3,)`: values of a channel in the window, calls, and how many calls are a window."""
    moments: tf.Variable
    """float64, of shape `(2, channels)`: the means, and the sums of squared distances from them."""


class MovingStatistics(NamedTuple):
    """Variables that move by a window's moments at its end."""

    mean: tf.Variable
    """A value for each channel, of a floating-point dtype."""
    variance: tf.Variable
    """A value for each channel, of the same dtype."""
    momentum: float
    """What they keep of themselves."""


def merge_moments(
    batch: BatchMoments | None, *, window: MomentsWindow | None = None, moving: MovingStatistics | None = None
) -> None:
    """Merges a batch's moments with those of a window, in place; at its end running statistics move by them.

    Moments are merged by the formula of Chan, Golub and LeVeque, 1983, [Algorithms for Computing the Sample
    Variance](https://doi.org/10.1080/00031305.1983.10483115): the variance between micro-batches counts as well. A
    window without values is a new one. It ends with a call that has `moving` when its calls are as many as
    `window.counters` say, or without `batch`: then `moving = moving * momentum + moments * (1 - momentum)`, if it had
    values, and it has none again. Without `window` the batch is all of it.

    Args:
        batch: As `batch_norm` returns it; None to end the window.
        window: The window's variables, or None.
        moving: The running statistics, or None for a call that does not end the window. Those in half precision are
            moved by plain TensorFlow.

    Raises:
        ValueError: If fewer than two of the three are given, they are of different channels, or the momentum is none.
        TypeError: If one of them is of another type, or holds no variables.

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
