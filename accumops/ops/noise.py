"""What a window's micro-batches tell of the noise in its gradient."""

from typing import NamedTuple

import tensorflow as tf

from accumops.arguments import check_decay
from accumops.ops import library, reference
from accumops.ops.variables import as_flag, check_variable, host_constant

_SHARES = (tf.float32, tf.float64)


class NoiseStatistics(NamedTuple):
    """The variables that hold what windows have told of the gradient's noise."""

    averages: tf.Variable
    """float64, of shape `(3,)`: averages over windows of the trace, of the square and of 1; divide by the last one."""
    norm: tf.Variable
    """float64, a scalar: the norm of the last window's gradient; NaN if it made no update."""
    ended: tf.Variable
    """int64, of shape `(2,)`: how many windows have ended, and their micro-batches."""


def add_noise_group(
    window: tf.Variable, norms: tf.Tensor, *, share: float | tf.Tensor, starts: bool | tf.Tensor = False
) -> None:
    """Adds what a micro-batch tells of the gradient's noise to what is known of its window, in place.

    A group is what one gradient is of: a micro-batch, or under a strategy one replica's. The variance of gradients
    shows in how much larger the groups' gradients are than the window's, so the squared norms that `accumulate` reports
    are all that is needed. `accumops.ops.reference.add_noise_group` is the
    definition, in plain TensorFlow.

    Args:
        window: A float64 variable of shape `(4,)`. It holds the sum of the micro-batches' shares times the squared
            norms of their gradients, the number of micro-batches that have a share, the squared norm of the window's
            sums, and the sum of all shares, those of earlier windows included.
        norms: What `accumulate` reports with `squared_norms=True`: float64, of shape `[2, number of gradients]`.
        share: What the micro-batch counts for: a number or a floating-point scalar tensor. With 0 it counts as
            nothing, whatever its gradients are.
        starts: Whether it is the first of its window: a bool or a scalar bool tensor.

    Raises:
        ValueError: If a shape or dtype does not fit.
        TypeError: If `window` is not a variable.

    Example:

    >>> window = tf.Variable([0, 0, 0, 0], dtype=tf.float64)
    >>> accumulator = tf.Variable([0.0, 0.0])
    >>> for gradient in ([3.0, 4.0], [1.0, 0.0]):
    ...     norms = accumops.ops.accumulate([accumulator], [tf.constant(gradient)], squared_norms=True)
    ...     accumops.ops.add_noise_group(window, norms, share=1.0)
    >>> window.numpy()
    array([26.,  2., 32.,  2.])
    """
    window = check_variable("window", window)
    _check("window", window, tf.float64, (4,))
    norms = tf.convert_to_tensor(norms)
    _check("norms", norms, tf.float64, (2, None))
    share, starts = _as_share("share", share), as_flag("starts", starts)
    fused = library.fused_ops([window])
    if fused is None:
        reference.add_noise_group(window, norms, share=share, starts=starts)
    else:
        fused.accum_ops_add_noise_group(window=[window.handle], norms=norms, share=share, starts=starts)


def end_noise_window(
    window: tf.Tensor,
    statistics: NoiseStatistics,
    *,
    shares: float | tf.Tensor,
    steps: int | tf.Tensor,
    decay: float,
    scale: float | tf.Tensor = 1.0,
    applies: bool | tf.Tensor = True,
) -> None:
    """Takes a window that ends into the averages of the gradient's noise, in place.

    With the sums of `add_noise_group`, B the sum of shares and g the mean gradient,

        trace     (sum of shares · |gradient|² - B |g|²) / (micro-batches - 1)
        square    |g|² - trace / B

    are unbiased estimates of the variance of the gradient of a share of 1 and of the squared norm of the gradient
    without noise; trace / square, each averaged first, is the simple noise scale of McCandlish et al., 2018
    (https://arxiv.org/abs/1812.06162). Windows of one micro-batch tell nothing of the noise; windows that make no
    update, or whose gradient is not finite, tell nothing at all. All of them are counted.
    `accumops.ops.reference.end_noise_window` is the definition, in plain TensorFlow.

    Args:
        window: The value of the variable of `add_noise_group`, float64 of shape `(4,)`.
        statistics: The variables that change.
        shares: The sum of the micro-batches' shares: a number or a floating-point scalar tensor.
        steps: How many micro-batches the window has: an int or an integer scalar tensor, which a GPU's op reads on the
            host.
        decay: What is left of the averages, at least 0 and less than 1.
        scale: A factor that the gradients have, such as a loss scale: a number or a floating-point scalar tensor.
        applies: Whether the window makes an update: a bool or a scalar bool tensor.

    Raises:
        ValueError: If a shape or dtype does not fit, or `decay` is out of range.
        TypeError: If `statistics` is no `NoiseStatistics`, something in it is not a variable, or `decay` is no number.

    Example:

    >>> averages, norm = tf.Variable(tf.zeros([3], tf.float64)), tf.Variable(0.0, dtype=tf.float64)
    >>> statistics = accumops.ops.NoiseStatistics(averages, norm, tf.Variable([0, 0], dtype=tf.int64))
    >>> window = tf.constant([26, 2, 32, 2], tf.float64)  # after the gradients [3, 4] and [1, 0]
    >>> accumops.ops.end_noise_window(window, statistics, shares=2.0, steps=2, decay=0.0)
    >>> averages.numpy(), norm.numpy().round(3)
    (array([10.,  3.,  1.]), np.float64(2.828))
    """
    if not isinstance(statistics, NoiseStatistics):
        raise TypeError(f"`statistics` must be a NoiseStatistics. Received: {statistics!r}")
    window = tf.convert_to_tensor(window)
    _check("window", window, tf.float64, (4,))
    fields = (("averages", tf.float64, (3,)), ("norm", tf.float64, ()), ("ended", tf.int64, (2,)))
    variables = []
    for (name, dtype, shape), variable in zip(fields, statistics, strict=True):
        variables.append(check_variable(f"statistics.{name}", variable))
        _check(f"statistics.{name}", variables[-1], dtype, shape)
    check_decay(decay)
    shares, scale = _as_share("shares", shares), tf.cast(_as_share("scale", scale), tf.float64)
    arguments = {
        "shares": shares,
        "scale": scale,
        "applies": as_flag("applies", applies),
        "steps": _as_steps(steps),
    }
    fused = library.fused_ops(variables)
    if fused is None:
        reference.end_noise_window(window, NoiseStatistics(*variables), decay=decay, **arguments)
    else:
        handles = [variable.handle for variable in variables]
        decay = host_constant(decay, tf.float64)  # an attribute would be a float32
        fused.accum_ops_end_noise_window(statistics=handles, window=window, decay=decay, **arguments)


def _check(name: str, value: tf.Tensor | tf.Variable, dtype: tf.DType, shape: tuple[int | None, ...]) -> None:
    if tf.as_dtype(value.dtype) != dtype or not value.shape.is_compatible_with(shape):
        raise ValueError(
            f"`{name}` must be {dtype.name} of shape {shape}. Received: {tf.as_dtype(value.dtype).name} of shape "
            f"{value.shape}"
        )


def _as_share(name: str, value: float | tf.Tensor) -> tf.Tensor:
    """Returns a number as a scalar of float32 or float64."""
    tensor = tf.convert_to_tensor(value) if tf.is_tensor(value) else tf.constant(value, tf.float64)
    if not tensor.dtype.is_floating or tensor.shape.rank not in (0, None):
        raise ValueError(f"`{name}` must be a number or a floating-point scalar tensor. Received: {value!r}")
    return tensor if tensor.dtype in _SHARES else tf.cast(tensor, tf.float32)


def _as_steps(value: int | tf.Tensor) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if not tensor.dtype.is_integer or tensor.shape.rank not in (0, None):
        raise ValueError(f"`steps` must be an int or an integer scalar tensor. Received: {value!r}")
    return tf.cast(tensor, tf.int64)
