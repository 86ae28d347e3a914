"""The moments of a window's micro-batches together, and the running statistics that move by them."""

from typing import NamedTuple

import keras
import tensorflow as tf

from accumops.ops import library, reference


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
        ValueError: If fewer than two of the three are given, or they are of different channels.

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
        window = MomentsWindow(*map(_value, window))
    if moving is not None:
        moving = MovingStatistics(_value(moving.mean), _value(moving.variance), moving.momentum)
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


def _value(variable: tf.Variable | keras.Variable) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _check_shapes(batch: BatchMoments | None, window: MomentsWindow | None, moving: MovingStatistics | None) -> None:
    shapes = {f"batch.{name}": getattr(batch, name).shape for name in ("mean", "rest", "variance")} if batch else {}
    if moving is not None:
        shapes |= {"moving.mean": moving.mean.shape, "moving.variance": moving.variance.shape}
    expected = window.moments.shape[1:] if window is not None else next(iter(shapes.values()))
    for name, shape in shapes.items():
        if not shape.is_compatible_with(expected):
            raise ValueError(f"`{name}` must have a value for each channel, of shape {expected}. Received: {shape}")
