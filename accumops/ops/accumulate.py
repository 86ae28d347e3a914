"""The accumulate op: `acc <- (overwrite ? 0 : acc) + scale * gradient` over a list of variables."""

import numbers
import types
from collections.abc import Sequence

import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.variables import as_flag, check_variable

_GRADIENT_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_ACCUMULATOR_DTYPES = (tf.float32, tf.float64)


def accumulate(
    accumulators: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    *,
    scale: float | tf.Tensor = 1.0,
    overwrite: bool | tf.Tensor = False,
    touched_rows: Sequence[tf.Variable | None] | None = None,
    check_finite: bool = False,
    squared_norms: bool | tf.Tensor = False,
    only_if: bool | tf.Tensor | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    """Adds scaled gradients to accumulators in place: `acc <- (overwrite ? 0 : acc) + scale * gradient`.

    One op updates the whole list. Gradient and scale are converted to the accumulator's dtype; then the product and the
    sum are rounded separately. The fused op gives the same bits on every run, device and number of threads, except
    within functions that XLA compiles. `accumops.ops.reference.accumulate` is the definition, in plain TensorFlow.

    Args:
        accumulators: Variables (`tf.Variable` or `keras.Variable`) of float32 or float64, each given once. A float64
            gradient needs a float64 accumulator.
        gradients: One gradient for each accumulator, of the accumulator's shape: a tensor of float16, bfloat16, float32
            or float64 (one list may mix them), or `tf.IndexedSlices`. Rows of `tf.IndexedSlices` are added in their
            order, duplicates included. An index outside the accumulator is an error on a CPU; on a GPU and under XLA
            that row is skipped, as in TensorFlow's own scatters.
        scale: The factor for all gradients: a number or a floating-point scalar tensor. If it is 0 in an accumulator's
            dtype, nothing is added to that accumulator, whatever its gradient holds, NaN included, and no row is
            touched.
        overwrite: Whether to start from zero and ignore what the accumulators hold, NaN included: a bool or a scalar
            bool tensor. A window can start this way, without a separate pass to clear the accumulators.
        touched_rows: One item for each accumulator: None or, if its gradient is `tf.IndexedSlices`, a bool variable of
            shape `[rows]`. The op sets the flag of each row that it adds to. `overwrite` then clears the flagged rows
            only, so all other rows must already be zero. With None, `overwrite` clears all rows.
        check_finite: Whether to report if all gradients are finite. The check is part of the same pass.
        squared_norms: Whether to report the sums of squares of gradients and accumulators, from the same pass. It can
            be a scalar bool tensor, which a GPU's op reads on the host: where it is false, the report is NaN and takes
            no time.
        only_if: Whether to do anything: None, a bool or a scalar bool tensor, which a GPU's op reads on the host. Where
            it is false, no variable is read, written or locked, and no gradient is looked at. With it a graph chooses
            what it adds without a condition, which takes time for each variable and gradient that goes through it.

    Returns:
        None; with `check_finite` a scalar bool tensor, true if all gradients are finite, whatever `scale` is. With
        `squared_norms` a float64 tensor of shape `[2, len(accumulators)]`: the sum of squares of each gradient, as it
        is given, and of each accumulator, as the op leaves it, right to about 1e-6 of themselves. A sum is finite
        exactly if all its values are. It is NaN where the gradient is `tf.IndexedSlices`. With both, a tuple of the
        two. Where `only_if` is false, gradients count as finite, and all sums are NaN.

    Raises:
        ValueError: If lengths, shapes or dtypes do not fit, or a variable is given twice.
        TypeError: If an accumulator is not a variable, or a gradient is neither a tensor nor `tf.IndexedSlices`.
        tf.errors.InvalidArgumentError: If a shape that was unknown when a graph was built does not fit, or an index is
            not a row of its accumulator. In both cases nothing has been added.
        tf.errors.FailedPreconditionError: If a variable is uninitialized.

    Example:

    >>> acc = tf.Variable([10.0, 20.0])
    >>> accumops.ops.accumulate([acc], [tf.constant([1.0, 2.0])], scale=0.5)
    >>> acc.numpy()
    array([10.5, 21. ], dtype=float32)
    >>> accumops.ops.accumulate([acc], [tf.constant([1.0, 2.0])], overwrite=True)
    >>> acc.numpy()
    array([1., 2.], dtype=float32)
    >>> accumops.ops.accumulate([acc], [tf.constant([1.0, 2.0])], only_if=tf.constant(False))
    >>> acc.numpy()
    array([1., 2.], dtype=float32)
    """
    variables = [check_variable(f"accumulators[{i}]", v) for i, v in enumerate(accumulators)]
    checked = [_as_gradient(g, i) for i, g in enumerate(gradients)]
    flags = None
    if touched_rows is not None:
        flags = [None if v is None else check_variable("touched_rows", v) for v in touched_rows]
    _check_lists(variables, checked, flags)
    factor = _as_scale(scale, variables)
    start = as_flag("overwrite", overwrite)
    norms = squared_norms if isinstance(squared_norms, bool) else as_flag("squared_norms", squared_norms)
    acts = None if only_if is None else as_flag("only_if", only_if)
    fused = library.fused_ops(variables)
    if fused is None:
        return reference.accumulate(
            variables,
            checked,
            scale=factor,
            overwrite=start,
            touched_rows=flags,
            check_finite=check_finite,
            squared_norms=norms,
            only_if=acts,
        )
    return _accumulate_fused(fused, variables, checked, factor, start, flags, check_finite, norms, acts)


def _accumulate_fused(
    ops: types.ModuleType,
    variables: list[tf.Variable],
    gradients: list[tf.Tensor | tf.IndexedSlices],
    scale: tf.Tensor,
    overwrite: tf.Tensor,
    touched_rows: list[tf.Variable | None] | None,
    check_finite: bool,
    squared_norms: bool | tf.Tensor,
    only_if: tf.Tensor | None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor] | None:
    flags = touched_rows or [None] * len(variables)
    sparse = [i for i, g in enumerate(gradients) if isinstance(g, tf.IndexedSlices)]
    sparse.sort(key=lambda i: flags[i] is not None)
    tracked = [i for i in sparse if flags[i] is not None]
    # The op takes dense gradients first, and the sparse ones with touched rows last.
    order = [i for i in range(len(variables)) if i not in set(sparse)] + sparse
    reports = ops.accum_ops_accumulate(
        accumulators=[variables[i].handle for i in order],
        gradients=[g.values if isinstance(g, tf.IndexedSlices) else g for g in (gradients[i] for i in order)],
        indices=[gradients[i].indices for i in sparse],
        touched_rows=[flags[i].handle for i in tracked],  # type: ignore[union-attr]
        scale=scale,
        overwrite=overwrite,
        norms_if=[] if isinstance(squared_norms, bool) else [squared_norms],
        only_if=[] if only_if is None else [only_if],
        check_finite=[tf.bool] if check_finite else [],
        squared_norms=[] if squared_norms is False else [tf.float64],
    )
    if not check_finite and squared_norms is False:
        return None
    finite, norms = reports
    found = finite[0] if check_finite else None
    if squared_norms is False:
        return found
    (sums,) = norms
    if sparse:
        unknown = tf.fill([2, len(sparse)], tf.constant(float("nan"), tf.float64))
        sums = tf.gather(tf.concat([sums, unknown], 1), [order.index(i) for i in range(len(variables))], axis=1)
    return (found, sums) if check_finite else sums


def _as_gradient(value: tf.Tensor | tf.IndexedSlices, i: int) -> tf.Tensor | tf.IndexedSlices:
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(tf.convert_to_tensor(value.values), tf.convert_to_tensor(value.indices))
    if value is None:
        raise TypeError(f"`gradients[{i}]` is None: leave out the variables that have no gradient.")
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`gradients[{i}]` must be a tensor or tf.IndexedSlices. Received: {value!r}") from error


def _check_lists(
    variables: list[tf.Variable],
    gradients: list[tf.Tensor | tf.IndexedSlices],
    touched_rows: list[tf.Variable | None] | None,
) -> None:
    if len(gradients) != len(variables):
        raise ValueError(
            f"There must be one gradient for each accumulator. Received: {len(variables)} accumulators and "
            f"{len(gradients)} gradients."
        )
    if touched_rows is not None and len(touched_rows) != len(variables):
        raise ValueError(
            f"`touched_rows` must have one item for each accumulator. Received: {len(touched_rows)} "
            f"for {len(variables)} accumulators."
        )
    names: dict[int, str] = {}
    for i, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
        name = f"accumulators[{i}] ('{variable.name}')"
        if id(variable) in names:
            raise ValueError(f"{names[id(variable)]} and {name} are the same variable; give it once.")
        names[id(variable)] = name
        _check_pair(variable, gradient, name, i)
        touched = touched_rows[i] if touched_rows is not None else None
        if touched is None:
            continue
        if id(touched) in names:
            raise ValueError(f"`touched_rows[{i}]` and {names[id(touched)]} are the same variable; give it once.")
        names[id(touched)] = f"`touched_rows[{i}]`"
        if touched.dtype != tf.bool or touched.shape != variable.shape[:1]:
            raise ValueError(
                f"`touched_rows[{i}]` must be bool of shape {variable.shape[:1]}, one flag for each row of {name}. "
                f"Received: {touched.dtype.name} of shape {touched.shape}."
            )


def _check_pair(variable: tf.Variable, gradient: tf.Tensor | tf.IndexedSlices, name: str, i: int) -> None:
    if variable.dtype not in _ACCUMULATOR_DTYPES:
        raise ValueError(f"{name} must be float32 or float64. Received: {variable.dtype.name}.")
    if not variable.shape.is_fully_defined():
        raise ValueError(f"{name} must have a shape that is known. Received: {variable.shape}.")
    if gradient.dtype not in _GRADIENT_DTYPES:
        raise ValueError(
            f"`gradients[{i}]`, for {name}, must be float16, bfloat16, float32 or float64. "
            f"Received: {gradient.dtype.name}."
        )
    if gradient.dtype == tf.float64 and variable.dtype != tf.float64:
        raise ValueError(f"`gradients[{i}]` is float64: {name} must be float64 too. Received: {variable.dtype.name}.")
    if isinstance(gradient, tf.IndexedSlices):
        values, expected = gradient.values.shape, tf.TensorShape([None]).concatenate(variable.shape[1:])
        if variable.shape.rank == 0:
            raise ValueError(f"{name} is a scalar and cannot take tf.IndexedSlices.")
        if gradient.indices.dtype not in (tf.int32, tf.int64):
            raise ValueError(
                f"The indices of `gradients[{i}]` must be int32 or int64. Received: {gradient.indices.dtype.name}."
            )
        if not gradient.indices.shape.is_compatible_with(values[:1]) or gradient.indices.shape.rank not in (None, 1):
            raise ValueError(
                f"`gradients[{i}]` must have one index for each of its values. Received: indices of shape "
                f"{gradient.indices.shape} and values of shape {values}."
            )
    else:
        values, expected = gradient.shape, variable.shape
    if not values.is_compatible_with(expected):
        raise ValueError(f"`gradients[{i}]` must have the shape {expected} of {name}. Received: {values}.")


def _as_scale(scale: float | tf.Tensor, variables: list[tf.Variable]) -> tf.Tensor:
    wide = any(variable.dtype == tf.float64 for variable in variables)
    if isinstance(scale, numbers.Real):
        return tf.constant(scale, tf.float64 if wide else tf.float32)
    tensor = tf.convert_to_tensor(scale)
    if not tensor.dtype.is_floating or tensor.shape.rank not in (0, None):
        raise ValueError(f"`scale` must be a number or a floating-point scalar tensor. Received: {scale!r}")
    return tensor if tensor.dtype in (tf.float32, tf.float64) else tf.cast(tensor, tf.float32)
