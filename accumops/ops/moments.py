"""Merges the moments of a window's micro-batches, and moves running statistics by them."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.variables import as_flag, check_variable, host_constant

Kind = TypeVar("Kind", bound=tuple)

_MOMENTS_DTYPES = (tf.float32, tf.float64)


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
    batch: BatchMoments | None,
    *,
    window: MomentsWindow | None = None,
    moving: MovingStatistics | None = None,
    only_finite: bool = False,
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
        only_finite: Whether a batch with a mean or variance that is not finite counts as one without values: what is
            merged cannot be taken out of the window.

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
        window = _check_window("window", window)
    if moving is not None:
        moving = _check_moving("moving", moving)
    if batch is not None:
        _of_type(BatchMoments, "batch", batch)
    expected = window.moments.shape[1:] if window is not None else None
    _check_shapes(expected, batch=batch, moving=moving)
    variables = [*(window or ()), *(() if moving is None else moving[:2])]
    fused = None if moving is not None and _is_narrow(moving) else library.fused_ops(variables)
    if fused is None:
        reference.merge_moments(batch, window=window, moving=moving, only_finite=only_finite)
        return
    fused.accum_ops_merge_moments(
        window=[variable.handle for variable in window or ()],
        moving=[] if moving is None else [moving.mean.handle, moving.variance.handle],
        count=[] if batch is None else [batch.count],
        moments=[] if batch is None else list(batch[1:]),
        momentum=host_constant(0.0 if moving is None else moving.momentum, tf.float64),
        only_finite=only_finite,
    )


def add_to_windows(
    batches: Sequence[BatchMoments], windows: Sequence[MomentsWindow], *, applies: bool | tf.Tensor = True
) -> None:
    """Merges batches' moments into windows, which stay open, all in one op.

    For each window it does what `merge_moments` does without `moving`. `accumops.ops.reference.add_to_windows` is the
    definition, in plain TensorFlow.

    Args:
        batches: The moments for each window, as `batch_norm` returns them.
        windows: The windows' variables, each given once.
        applies: Whether anything is added: a bool or a scalar bool tensor. If not, nothing is written. A tensor is read
            where the op runs, so no step waits for a GPU.

    Raises:
        ValueError: If the lists differ in length, or numbers of channels do not fit.
        TypeError: If a member of a list is of another type, or something that should be a variable is not.

    Example:

    >>> window = accumops.ops.MomentsWindow(
    ...     tf.Variable([0, 0, 8], dtype=tf.int64), tf.Variable(tf.zeros([2, 1], tf.float64))
    ... )
    >>> y, moments = accumops.ops.batch_norm(tf.constant([[1.0], [3.0]]), None, None)
    >>> accumops.ops.add_to_windows([moments], [window])
    >>> window.counters.numpy(), window.moments.numpy()
    (array([2, 1, 8]), array([[2.],
           [2.]]))
    """
    batches = [_of_type(BatchMoments, f"batches[{i}]", each) for i, each in enumerate(_sequence("batches", batches))]
    windows = [_check_window(f"windows[{i}]", each) for i, each in enumerate(_sequence("windows", windows))]
    adds = as_flag("applies", applies)
    if len(windows) != len(batches):
        raise ValueError(
            f"`batches` must have {len(windows)} items, one for each window. Received: {len(batches)} items."
        )
    for i, (window, each) in enumerate(zip(windows, batches, strict=True)):
        _check_shapes(window.moments.shape[1:], **{f"batches[{i}]": each})
        if each.mean.dtype not in _MOMENTS_DTYPES:
            raise ValueError(f"`batches[{i}].mean` must be float32 or float64. Received: {each.mean.dtype.name}")
    for dtype in _MOMENTS_DTYPES:
        chosen = [i for i, each in enumerate(batches) if each.mean.dtype == dtype]
        if chosen:
            _add([batches[i] for i in chosen], [windows[i] for i in chosen], adds)


def _add(batches: list[BatchMoments], windows: list[MomentsWindow], applies: tf.Tensor) -> None:
    variables = [variable for window in windows for variable in window]
    fused = library.fused_ops(variables)
    if fused is None:
        reference.add_to_windows(batches, windows, applies=applies)
        return
    fused.accum_ops_add_to_windows(
        windows=[variable.handle for variable in variables],
        counts=[batch.count for batch in batches],
        moments=[each for batch in batches for each in batch[1:]],
        applies=applies,
    )


def end_windows(
    windows: Sequence[MomentsWindow],
    moving: Sequence[MovingStatistics] | None = None,
    *,
    applies: bool | tf.Tensor = True,
) -> None:
    """Ends windows, full or not, all in one op: running statistics move by the moments of each.

    For each window it does what `merge_moments` does without a batch. `accumops.ops.reference.end_windows` is the
    definition, in plain TensorFlow.

    Args:
        windows: The windows' variables, each given once.
        moving: The running statistics of each window; or None, which drops the windows' moments. Statistics in half
            precision are moved by plain TensorFlow.
        applies: Whether the windows end: a bool or a scalar bool tensor. If they do not, nothing is written. A tensor
            is read where the op runs, so no step waits for a GPU.

    Raises:
        ValueError: If the lists differ in length, numbers of channels do not fit, or a momentum is not from 0 to 1.
        TypeError: If a member of a list is of another type, or something that should be a variable is not.

    Example:

    >>> window = accumops.ops.MomentsWindow(
    ...     tf.Variable([4, 2, 8], dtype=tf.int64), tf.Variable([[2.0], [12.0]], dtype=tf.float64)
    ... )
    >>> moving = accumops.ops.MovingStatistics(tf.Variable([0.0]), tf.Variable([1.0]), momentum=0.5)
    >>> accumops.ops.end_windows([window], [moving])
    >>> moving.mean.numpy(), moving.variance.numpy(), window.counters.numpy()
    (array([1.], dtype=float32), array([2.], dtype=float32), array([0, 0, 8]))
    """
    windows = [_check_window(f"windows[{i}]", each) for i, each in enumerate(_sequence("windows", windows))]
    ends = as_flag("applies", applies)
    if moving is None:
        if windows:
            _end(windows, None, ends)
        return
    moving = [_check_moving(f"moving[{i}]", each) for i, each in enumerate(_sequence("moving", moving))]
    if len(windows) != len(moving):
        raise ValueError(
            f"`moving` must have {len(windows)} items, one for each window. Received: {len(moving)} items."
        )
    for i, (window, each) in enumerate(zip(windows, moving, strict=True)):
        _check_shapes(window.moments.shape[1:], **{f"moving[{i}]": each})
    for narrow in (False, True):
        chosen = [i for i, each in enumerate(moving) if _is_narrow(each) == narrow]
        if chosen:
            _end([windows[i] for i in chosen], [moving[i] for i in chosen], ends, fuses=not narrow)


def _end(
    windows: list[MomentsWindow], moving: list[MovingStatistics] | None, applies: tf.Tensor, *, fuses: bool = True
) -> None:
    statistics = [variable for each in moving or () for variable in each[:2]]
    variables = [variable for window in windows for variable in window]
    fused = library.fused_ops([*variables, *statistics]) if fuses else None
    if fused is None:
        reference.end_windows(windows, moving, applies=applies)
        return
    fused.accum_ops_end_windows(
        windows=[variable.handle for variable in variables],
        moving=[variable.handle for variable in statistics],
        momenta=host_constant([each.momentum for each in moving or ()], tf.float64),
        applies=applies,
    )


def _sequence(name: str, value: Sequence[Kind]) -> Sequence[Kind]:
    if not isinstance(value, list | tuple) or isinstance(value, BatchMoments | MomentsWindow | MovingStatistics):
        raise TypeError(f"`{name}` must be a list. Received: {value!r}")
    return value


def _check_window(name: str, value: MomentsWindow) -> MomentsWindow:
    names = (f"{name}.{field}" for field in MomentsWindow._fields)
    return MomentsWindow(*map(check_variable, names, _of_type(MomentsWindow, name, value)))


def _check_moving(name: str, value: MovingStatistics) -> MovingStatistics:
    mean, variance, momentum = _of_type(MovingStatistics, name, value)
    if not 0 <= momentum <= 1:
        raise ValueError(f"`{name}.momentum` must be from 0 to 1. Received: {momentum}")
    mean, variance = check_variable(f"{name}.mean", mean), check_variable(f"{name}.variance", variance)
    return MovingStatistics(mean, variance, momentum)


def _is_narrow(moving: MovingStatistics) -> bool:
    """Whether statistics are in half precision, which the fused ops do not move."""
    return moving.mean.dtype.size < 4


def _of_type(kind: type[Kind], name: str, value: Kind) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}. Received: {value!r}")
    return value


def _check_shapes(expected: tf.TensorShape | None, **given: BatchMoments | MovingStatistics | None) -> None:
    """Checks that moments and statistics have one value for each channel: of this shape, or of their first one's."""
    shapes = {
        f"{name}.{field}": getattr(value, field).shape
        for name, value in given.items()
        if value is not None
        for field in ("mean", "rest", "variance")
        if hasattr(value, field)
    }
    expected = next(iter(shapes.values())) if expected is None else expected
    for name, shape in shapes.items():
        if not shape.is_compatible_with(expected):
            raise ValueError(f"`{name}` must have a value for each channel, of shape {expected}. Received: {shape}")
