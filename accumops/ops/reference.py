"""Every op in plain TensorFlow: these functions define what the kernels compute, and run where the kernels cannot."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this


def accumulate(
    accumulators: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    *,
    scale: float | tf.Tensor = 1.0,
    overwrite: bool | tf.Tensor = False,
    touched_rows: Sequence[tf.Variable | None] | None = None,
    check_finite: bool = False,
    squared_norms: bool | tf.Tensor = False,
    only_if: tf.Tensor | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    """Defines `accumops.ops.accumulate`. It takes the same arguments and does not check them.

    A scale that is 0 in the accumulator's dtype adds nothing, whatever the gradients hold, and touches no row.
    """

    def add() -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
        flags = touched_rows or [None] * len(accumulators)
        finite = []
        norms = []
        with tf.control_dependencies(_check_indices(accumulators, gradients)):
            for accumulator, gradient, touched in zip(accumulators, gradients, flags, strict=True):
                values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
                if check_finite:
                    finite.append(tf.reduce_all(tf.math.is_finite(values)))
                # Convert a number straight to this dtype: TensorFlow would first make it a float32.
                factor = (
                    tf.cast(scale, accumulator.dtype) if tf.is_tensor(scale) else tf.constant(scale, accumulator.dtype)
                )
                # Not a plain product: 0 * Inf is NaN.
                product = tf.math.multiply_no_nan(tf.cast(values, accumulator.dtype), factor)
                if isinstance(gradient, tf.IndexedSlices):
                    _accumulate_rows(accumulator, product, gradient.indices, overwrite, touched, factor != 0)
                else:
                    accumulator.assign(tf.where(overwrite, product, accumulator + product))
                if squared_norms is not False:
                    norms.append(_norms_beside(gradient, accumulator, squared_norms))
        all_finite = (tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)) if check_finite else None
        if squared_norms is False:
            return all_finite
        return _report(all_finite, tf.transpose(tf.stack(norms)) if norms else tf.zeros([2, 0], tf.float64))

    if only_if is None:
        return add()
    finite = tf.constant(True) if check_finite else None
    norms = None if squared_norms is False else tf.fill([2, len(accumulators)], tf.constant(math.nan, tf.float64))
    return tf.cond(only_if, add, lambda: _report(finite, norms))


def _report(all_finite: tf.Tensor | None, norms: tf.Tensor | None) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    """What `accumulate` returns: each of the two that there is."""
    if all_finite is None or norms is None:
        return all_finite if norms is None else norms
    return all_finite, norms


def _norms_beside(
    gradient: tf.Tensor | tf.IndexedSlices, accumulator: tf.Variable, wanted: bool | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The squared norms of a gradient and of its accumulator, where they are wanted; of rows they are not known."""
    unknown = tf.constant(float("nan"), tf.float64)
    if isinstance(gradient, tf.IndexedSlices):
        return unknown, unknown
    if wanted is True:
        return _squared_norm(gradient), _squared_norm(accumulator)
    norms = tf.cond(wanted, lambda: (_squared_norm(gradient), _squared_norm(accumulator)), lambda: (unknown, unknown))
    return norms[0], norms[1]


def _check_indices(
    accumulators: Sequence[tf.Variable], gradients: Sequence[tf.Tensor | tf.IndexedSlices]
) -> list[tf.Operation]:
    """Asserts that each index is a row of its accumulator, so that a wrong one fails before anything is written.

    On a GPU there is no assertion: TensorFlow's scatters skip an index out of range there.
    """
    checks = []
    for accumulator, gradient in zip(accumulators, gradients, strict=True):
        if isinstance(gradient, tf.IndexedSlices) and "GPU" not in (accumulator.device or ""):
            rows = tf.cast(accumulator.shape[0], gradient.indices.dtype)
            message = f"An index is not a row of '{accumulator.name}', which has {accumulator.shape[0]} rows."
            checks.append(tf.debugging.assert_non_negative(gradient.indices, message=message))
            checks.append(tf.debugging.assert_less(gradient.indices, rows, message=message))
    return [check for check in checks if check is not None]


def _accumulate_rows(
    accumulator: tf.Variable,
    values: tf.Tensor,
    indices: tf.Tensor,
    overwrite: bool | tf.Tensor,
    touched: tf.Variable | None,
    counts: tf.Tensor,
) -> None:
    def clear() -> tf.Tensor:
        accumulator.assign(tf.zeros_like(accumulator))
        if touched is not None:
            touched.assign(tf.zeros_like(touched))
        return tf.constant(0)

    tf.cond(tf.convert_to_tensor(overwrite), clear, lambda: tf.constant(0))
    # Sum duplicates first, in an op that keeps to an order: in TensorFlow's scatter threads race for a row.
    rows, positions = tf.unique(indices)
    accumulator.scatter_add(tf.IndexedSlices(tf.math.unsorted_segment_sum(values, positions, tf.size(rows)), rows))
    if touched is not None:
        touched.scatter_update(tf.IndexedSlices(tf.gather(touched, rows) | counts, rows))


def squared_norms(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Defines `accumops.ops.squared_norms`. It takes the same arguments and does not check them."""
    if not tensors:
        return tf.zeros([0], tf.float64)
    return tf.stack([_squared_norm(tensor) for tensor in tensors])


def _squared_norm(tensor: tf.Tensor | tf.Variable) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(tensor, tf.float64) ** 2)


def update(
    rule: str,
    variables: Sequence[tf.Variable],
    slots: Sequence[Sequence[tf.Variable]],
    *,
    accumulators: Sequence[tf.Variable] | None,
    latest: Sequence[tf.Tensor] | None,
    scales: tf.Tensor,
    rate: tf.Tensor,
    iterations: tf.Tensor | None = None,
    decay: tf.Tensor,
    decays: Sequence[bool],
    weight: tf.Tensor,
    overwrite: tf.Tensor,
    applies: tf.Tensor,
    touched_rows: Sequence[tf.Variable | None],
    beta_1: float,
    beta_2: float,
    epsilon: float,
    clip: float,
    only_if: tf.Tensor | None = None,
) -> None:
    """Defines `accumops.ops.update`. It takes the same arguments, all of them but `only_if`, and does not check them.

    A weight of 0 counts as no latest gradients, whatever they hold.
    """

    def make() -> None:
        factors = tf.broadcast_to(scales, [len(variables)])
        rate_of_step = rate if iterations is None else corrected_rate(rate, iterations, beta_1, beta_2)
        for i, variable in enumerate(variables):
            gradient = tf.zeros_like(variable)
            if accumulators is not None:
                gradient = tf.where(overwrite, gradient, accumulators[i])
            if latest is not None:
                gradient += tf.math.multiply_no_nan(tf.cast(latest[i], tf.float32), weight)
            gradient *= factors[i]
            if clip:
                gradient = tf.clip_by_value(gradient, -clip, clip)
            before = [tf.convert_to_tensor(each) for each in (variable, *(slot[i] for slot in slots))]
            value = before[0] - before[0] * decay if decays[i] else before[0]
            after = step(rule, value, before[1:], gradient, rate_of_step, beta_1, beta_2, epsilon)
            rows = touched_rows[i]
            for target, old, new in zip((variable, *(slot[i] for slot in slots)), before, after, strict=True):
                if rows is not None:
                    new = tf.where(tf.reshape(rows, [-1] + [1] * (new.shape.rank - 1)), new, old)
                target.assign(tf.where(applies, new, old))

    if only_if is None:
        make()
    else:
        tf.cond(only_if, make, lambda: None)


def corrected_rate(rate: tf.Tensor, iterations: tf.Tensor, beta_1: float, beta_2: float) -> tf.Tensor:
    """Returns the rate of Adam's step, corrected for the bias that the slots have from their start at zero.

    It is computed in the dtype of `rate` and in the order of Keras.

    Args:
        rate: The learning rate, a scalar float tensor.
        iterations: The number of updates before this one, a scalar integer tensor or variable.
        beta_1: The decay rate of m.
        beta_2: The decay rate of v.
    """
    number = tf.cast(iterations + 1, rate.dtype)
    bias_1, bias_2 = (1 - tf.cast(beta, rate.dtype) ** number for beta in (beta_1, beta_2))
    return rate * tf.sqrt(bias_2) / bias_1


def step(
    rule: str,
    value: tf.Tensor,
    slots: Sequence[tf.Tensor],
    gradient: tf.Tensor,
    rate: tf.Tensor,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> tuple[tf.Tensor, ...]:
    """Returns the value and the slots after one step of a rule.

    This is the one place where the rules SGD, momentum, nesterov, Adam, AMSGrad and Lion are written in Python;
    `accumops.ops.update` has their formulas and sources. Only the verifier and the tests have formulas of their own, to
    check these by. Each element is computed by itself, so the arguments may be rows of a variable as well.

    Args:
        rule: `"sgd"`, `"momentum"`, `"nesterov"`, `"adam"`, `"amsgrad"` or `"lion"`.
        value: A float tensor: the value, after its decay.
        slots: The slots of the rule, in the order m, v, w: tensors of the value's shape and dtype.
        gradient: The gradient, scaled and clipped: a tensor of the value's shape and dtype.
        rate: The learning rate, a scalar tensor of the value's dtype; for Adam with its bias corrections.
        beta_1: The momentum, or the first of two decay rates.
        beta_2: The second decay rate.
        epsilon: The number added to the root.

    Returns:
        The new value, then the new slots in their order.

    Raises:
        ValueError: If there is no such rule.

    Example:

    >>> value, momentum = accumops.ops.reference.step(
    ...     "momentum", tf.constant([1.0]), [tf.constant([0.0])], tf.constant([2.0]), tf.constant(0.5), 0.9, 0.0, 0.0
    ... )
    >>> value.numpy(), momentum.numpy()
    (array([0.], dtype=float32), array([-1.], dtype=float32))
    """
    if rule == "sgd":
        return (value - rate * gradient,)
    if rule in ("momentum", "nesterov"):
        descent = rate * gradient
        momentum = slots[0] * beta_1 - descent
        return value + (momentum * beta_1 - descent if rule == "nesterov" else momentum), momentum
    if rule == "lion":
        direction = slots[0] * beta_1 + gradient * (1 - beta_1)
        return value - rate * tf.sign(direction), slots[0] * beta_2 + gradient * (1 - beta_2)
    if rule not in ("adam", "amsgrad"):
        raise ValueError(
            f"`rule` must be one of 'sgd', 'momentum', 'nesterov', 'adam', 'amsgrad', 'lion'. Received: {rule!r}"
        )
    momentum = slots[0] + (gradient - slots[0]) * (1 - beta_1)
    velocity = slots[1] + (gradient * gradient - slots[1]) * (1 - beta_2)
    largest = (tf.maximum(slots[2], velocity),) if rule == "amsgrad" else ()
    under = largest[0] if largest else velocity
    return value - momentum * rate / (tf.sqrt(under) + epsilon), momentum, velocity, *largest


def clip_units(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    weights: Sequence[tf.Tensor | tf.Variable],
    *,
    clip_factor: float,
    epsilon: float,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """Defines `accumops.ops.clip_units`. It takes the same arguments and does not check them."""
    return [_clip(*each, clip_factor, epsilon) for each in zip(gradients, weights, strict=True)]


def _clip(
    gradient: tf.Tensor | tf.IndexedSlices, weights: tf.Tensor | tf.Variable, clip_factor: float, epsilon: float
) -> tf.Tensor | tf.IndexedSlices:
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.convert_to_tensor(gradient.values if is_sparse else gradient)
    weights = tf.convert_to_tensor(weights)
    dtype = tf.float64 if tf.float64 in (values.dtype, weights.dtype) else tf.float32
    axes = list(range(weights.shape.rank - 1)) if weights.shape.rank >= 2 else None
    scale, norm = _scaled_norm(weights, axes, dtype)
    limit = tf.constant(clip_factor, dtype) * tf.maximum(scale * norm, tf.constant(epsilon, dtype))
    scale, norm = _scaled_norm(values, axes, dtype, gradient.indices if is_sparse else None)
    # False for a norm that is not a number: a unit that is not finite stays as it is.
    exceeds = scale * norm > limit
    clipped = tf.where(exceeds, tf.cast(tf.cast(values, dtype) / scale * (limit / norm), values.dtype), values)
    return tf.IndexedSlices(clipped, gradient.indices, gradient.dense_shape) if is_sparse else clipped


def _scaled_norm(
    values: tf.Tensor, axes: list[int] | None, dtype: tf.DType, indices: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the largest magnitude of each unit, 1 for a unit of zeros, and the unit's norm divided by it.

    So no square overflows. The norm of a unit with a value that is not finite is not a number. With `indices`, rows of
    the same index are summed first.
    """
    values = tf.cast(values, dtype)
    largest = tf.reduce_max(tf.abs(values), axis=axes, keepdims=True)
    scale = tf.where(largest > 0, largest, tf.ones_like(largest))
    scaled = values / scale
    if indices is not None:
        # As many segments as rows, a number that XLA knows. Segments without rows add zero.
        scaled = tf.math.unsorted_segment_sum(scaled, tf.unique(indices).idx, tf.shape(indices)[0])
    return scale, tf.sqrt(tf.reduce_sum(tf.square(scaled), axis=axes, keepdims=True))


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of the statistics of `dtype` data: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def batch_norm(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *, axis: int, epsilon: float, mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Defines `accumops.ops.batch_norm`. Returns y, count, mean, rest and variance.

    `gamma` and `beta` must be tensors, and `axis` must not be negative. Nothing is checked.
    """
    values = tf.cast(x, statistics_dtype(x.dtype))
    others = [i for i in range(x.shape.rank) if i != axis]
    places = tf.fill(tf.gather(tf.shape(x), tf.constant(others, tf.int32)), True) if mask is None else mask
    count = tf.math.count_nonzero(places)
    included = tf.expand_dims(places, axis)

    def mean_of(values: tf.Tensor) -> tf.Tensor:
        # Sum in float64: TensorFlow adds one value after another, and a float32 sum would stop growing.
        total = tf.reduce_sum(tf.cast(tf.where(included, values, 0), tf.float64), others)
        return tf.cast(tf.math.divide_no_nan(total, tf.cast(count, tf.float64)), values.dtype)

    mean = tf.stop_gradient(mean_of(values))
    rest = mean_of(values - _spread(mean, x, axis))
    distance = values - _spread(mean, x, axis) - _spread(rest, x, axis)
    variance = mean_of(distance**2)
    inverse = tf.math.rsqrt(variance + tf.constant(epsilon, variance.dtype))
    y = distance * _spread(inverse * gamma, x, axis) + _spread(beta, x, axis)
    return tf.cast(y, x.dtype), count, mean, tf.stop_gradient(rest), tf.stop_gradient(variance)


def batch_norm_inference(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    axis: int,
    epsilon: float,
) -> tf.Tensor:
    """Defines `accumops.ops.batch_norm_inference`.

    `gamma` and `beta` must be tensors, and `axis` must not be negative. Nothing is checked.
    """
    scale = gamma * tf.math.rsqrt(variance + tf.constant(epsilon, variance.dtype))
    values = tf.cast(x, statistics_dtype(x.dtype)) - _spread(mean, x, axis)
    return tf.cast(values * _spread(scale, x, axis) + _spread(beta, x, axis), x.dtype)


def merge_moments(
    batch: Sequence[tf.Tensor] | None,
    *,
    window: Sequence[tf.Variable] | None,
    moving: tuple[tf.Variable, tf.Variable, float] | None,
    only_finite: bool = False,
) -> None:
    """Defines `accumops.ops.merge_moments`. It takes the same arguments and does not check them."""
    zero = tf.constant(0, tf.int64)
    values, calls, limit = (zero, zero, zero) if window is None else tf.unstack(window[0])
    count = tf.cast(values, tf.float64)
    mean = centred = tf.constant(0, tf.float64)
    if window is not None:
        mean, centred = tf.unstack(tf.where(values > 0, window[1], tf.zeros_like(window[1])))
    if batch is not None:
        added, batch_mean, rest, variance = (tf.cast(each, tf.float64) for each in batch)
        if only_finite:
            finite = tf.reduce_all(tf.math.is_finite([batch_mean, variance]))
            added = tf.where(finite, added, tf.zeros_like(added))
        share = tf.math.divide_no_nan(added, count + added)
        delta = batch_mean + rest - mean
        some = added > 0
        centred = tf.where(some, centred + variance * added + delta**2 * count * share, centred)
        mean = tf.where(some, mean + delta * share, mean)
        count += added
    if moving is None:
        ends = tf.constant(False)
    else:
        ends = calls + 1 >= limit if window is not None and batch is not None else tf.constant(True)
        momentum = moving[2]
        for variable, value in zip(moving[:2], (mean, tf.math.divide_no_nan(centred, count)), strict=True):
            old = tf.convert_to_tensor(variable)
            variable.assign(tf.where(ends & (count > 0), _moved(old, value, momentum), old))
    if window is not None:
        counters = (tf.where(ends, zero, each) for each in (tf.cast(count, tf.int64), calls + 1))
        window[0].assign(tf.stack([*counters, limit]))
        window[1].assign(tf.stack([mean, centred]))


def add_to_windows(
    batches: Sequence[Sequence[tf.Tensor]], windows: Sequence[Sequence[tf.Variable]], *, applies: tf.Tensor
) -> None:
    """Defines `accumops.ops.add_to_windows`. It takes the same arguments and does not check them."""
    for batch, window in zip(batches, windows, strict=True):
        before = [tf.convert_to_tensor(variable) for variable in window]
        merge_moments(batch, window=window, moving=None)
        for variable, old in zip(window, before, strict=True):
            variable.assign(tf.where(applies, variable, old))


def end_windows(
    windows: Sequence[Sequence[tf.Variable]],
    moving: Sequence[tuple[tf.Variable, tf.Variable, float]] | None,
    *,
    applies: tf.Tensor,
) -> None:
    """Defines `accumops.ops.end_windows`. It takes the same arguments and does not check them."""
    for i, (counters, moments) in enumerate(windows):
        values, _, limit = tf.unstack(counters)
        if moving is not None:
            mean, centred = tf.unstack(moments)
            *statistics, momentum = moving[i]
            count = tf.cast(values, tf.float64)
            for variable, value in zip(statistics, (mean, tf.math.divide_no_nan(centred, count)), strict=True):
                old = tf.convert_to_tensor(variable)
                variable.assign(tf.where(applies & (values > 0), _moved(old, value, momentum), old))
        counters.assign(tf.where(applies, tf.stack([0, 0, limit]), counters))


def _moved(old: tf.Tensor, value: tf.Tensor, momentum: float) -> tf.Tensor:
    wide = tf.float64 if old.dtype == tf.float64 else tf.float32
    return tf.cast(tf.cast(old, wide) * momentum + tf.cast(value, wide) * (1.0 - momentum), old.dtype)


def _spread(channels: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """Returns the values of the channels in a shape that broadcasts with `x`."""
    return tf.reshape(channels, [-1 if i == axis else 1 for i in range(x.shape.rank)])


def barrier(tensors: Sequence[tf.Tensor], after: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Defines `accumops.ops.barrier`. It takes the same arguments and does not check them.

    Control dependencies are enough for TensorFlow. XLA looks through them and through its own barriers, at least on a
    CPU, but not through a choice between the tensor and zeros whose condition is never true.
    """

    @tf.custom_gradient
    def same(*tensors: tf.Tensor) -> Any:
        with tf.control_dependencies(after):
            results = [tf.identity(tensor) for tensor in tensors]
        floats = [each for each in after if each.dtype.is_floating]
        if floats and xla_compiles_this(unknown=False):
            values = tf.concat([tf.cast(tf.reshape(each, [-1])[:1], tf.float32) for each in floats], 0)
            never = tf.reduce_any(tf.math.is_nan(values) & tf.math.is_inf(values))
            results = [tf.where(never, tf.zeros_like(tensor), tensor) for tensor in tensors]
        return results, lambda *gradients: gradients

    return list(same(*tensors))
