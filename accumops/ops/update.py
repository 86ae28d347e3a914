"""An optimizer's step for a list of variables in one op, and the squared norms that clipping needs."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.ops import library, reference
from accumops.ops.variables import as_flag, check_variable

SLOTS = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "amsgrad": 3, "lion": 1}
"""The number of slot variables that each rule keeps for a variable."""

CORRECTED = ("adam", "amsgrad")
"""The rules whose slots start with a bias, which the rate corrects."""

_LATEST_DTYPES = (tf.float16, tf.bfloat16, tf.float32)
_NORM_DTYPES = (*_LATEST_DTYPES, tf.float64)


def update(
    rule: str,
    variables: Sequence[tf.Variable],
    slots: Sequence[Sequence[tf.Variable]] = (),
    *,
    accumulators: Sequence[tf.Variable] | None = None,
    latest: Sequence[tf.Tensor] | None = None,
    scales: float | tf.Tensor = 1.0,
    rate: float | tf.Tensor,
    iterations: int | tf.Tensor | None = None,
    decay: float | tf.Tensor = 0.0,
    decays: Sequence[bool] | None = None,
    weight: float | tf.Tensor = 1.0,
    overwrite: bool | tf.Tensor = False,
    applies: bool | tf.Tensor = True,
    touched_rows: Sequence[tf.Variable | None] | None = None,
    beta_1: float = 0.0,
    beta_2: float = 0.0,
    epsilon: float = 0.0,
    clip: float = 0.0,
    only_if: bool | tf.Tensor | None = None,
) -> None:
    """Makes an optimizer's step in place, for all variables in one op.

    Values, accumulators and slots are each read once; values and slots are written once, accumulators not at all. The
    gradient of a value is `g = clip(scale * ((overwrite ? 0 : accumulator) + weight * latest))`. The value p first
    decays, `p -= p * decay`. Then the rule changes p and its slots m, v and w:

    - `"sgd"`: p -= rate * g
    - `"momentum"`: m = beta_1 * m - rate * g, p += m
    - `"nesterov"`: m = beta_1 * m - rate * g, p += beta_1 * m - rate * g
    - `"adam"`: m += (g - m) * (1 - beta_1), v += (g² - v) * (1 - beta_2), p -= m * rate / (sqrt(v) + epsilon)
      ([Kingma & Ba, 2014](https://arxiv.org/abs/1412.6980); `iterations` corrects the rate for the bias of m and v)
    - `"amsgrad"`: as `"adam"`, with w = max(w, v) under the root
      ([Reddi et al., 2018](https://openreview.net/forum?id=ryQu7f-RZ))
    - `"lion"`: p -= rate * sign(beta_1 * m + (1 - beta_1) * g), m = beta_2 * m + (1 - beta_2) * g
      ([Chen et al., 2023](https://arxiv.org/abs/2302.06675))

    `accumops.ops.reference.update` is the definition, in plain TensorFlow. The fused op gives the same bits on every
    run and number of threads, except within functions that XLA compiles.

    Args:
        rule: The name of one of the rules above.
        variables: float32 variables (`tf.Variable` or `keras.Variable`), each given once.
        slots: One list of float32 variables for each slot of the rule, in the order m, v, w. Each list has one item for
            each variable, of the variable's shape.
        accumulators: For each variable the float32 variable that holds the sum of its gradients; or None, if `latest`
            is given.
        latest: For each variable a gradient that its accumulator does not hold, a tensor of float16, bfloat16 or
            float32; or None, if `accumulators` is given.
        scales: The factor for all gradients, or a tensor of shape `[len(variables)]` with one factor for each.
        rate: The learning rate, a number or a scalar tensor.
        iterations: For `"adam"` and `"amsgrad"` the number of updates before this one, an integer or a scalar integer
            tensor. The step's rate is then `rate * sqrt(1 - beta_2**t) / (1 - beta_1**t)` with `t = iterations + 1`. By
            default `rate` is taken to include these factors.
        decay: The share that a value loses before the step, a number or a scalar tensor.
        decays: For each variable, whether it decays; by default all do.
        weight: The factor for the latest gradients, a number or a scalar tensor. With 0 they count as zero, whatever
            they hold, NaN included.
        overwrite: Whether the accumulators count as zero, whatever they hold: a bool or a scalar bool tensor.
        applies: Whether the step is made: a bool or a scalar bool tensor. If it is not, nothing is written. A tensor is
            read where the op runs, so no step waits for a GPU.
        touched_rows: For each variable None, or a bool variable of shape `[rows]`. Rows whose flag is not set stay as
            they are, in the variable and in its slots.
        beta_1: The momentum, or the first of two decay rates.
        beta_2: The second decay rate.
        epsilon: The number added to the root.
        clip: The largest magnitude of a gradient's values; 0 means no limit.
        only_if: Whether to do anything: None, a bool or a scalar bool tensor. Where it is false, no variable is read,
            written or locked. A GPU's op reads it on the host, where `applies` may be what a GPU has computed.

    Raises:
        ValueError: If lengths, shapes or dtypes do not fit, a variable is given twice, or a setting is out of range.
        TypeError: If an argument that should be a variable or a number is not.
        tf.errors.InvalidArgumentError: If a shape that was unknown when a graph was built does not fit. Nothing has
            been updated then.

    Example:

    >>> weights, momentum, total = tf.Variable([1.0, 2.0]), tf.Variable([0.0, 0.0]), tf.Variable([4.0, 8.0])
    >>> accumops.ops.update(
    ...     "momentum", [weights], [[momentum]], accumulators=[total], scales=1 / 4, rate=0.1, beta_1=0.9
    ... )
    >>> weights.numpy()
    array([0.9, 1.8], dtype=float32)
    """
    if rule not in SLOTS:
        raise ValueError(f"`rule` must be one of {', '.join(map(repr, SLOTS))}. Received: {rule!r}")
    targets = _variables("variables", variables)
    if not isinstance(slots, Sequence):
        raise TypeError(f"`slots` must be a list of lists of variables. Received: {slots!r}")
    kept = [_variables(f"slots[{i}]", slot) for i, slot in enumerate(slots)]
    if len(kept) != SLOTS[rule]:
        raise ValueError(f"The rule {rule!r} has {SLOTS[rule]} slots. Received: {len(kept)}")
    sums = None if accumulators is None else _variables("accumulators", accumulators)
    if sums is None and latest is None:
        raise ValueError("Gradients are needed: give `accumulators`, or `latest`, or both.")
    flags: list[tf.Variable | None] = [None] * len(targets)
    if touched_rows is not None:
        flags = [None if each is None else _variables("touched_rows", [each])[0] for each in touched_rows]
    tensors = None if latest is None else [tf.convert_to_tensor(each) for each in latest]
    if decays is None:
        decays = [not (isinstance(decay, numbers.Real) and decay == 0)] * len(targets)
    decaying = [bool(each) for each in decays]
    _check_lists(targets, kept, sums, tensors, flags, decaying)
    if iterations is not None and rule not in CORRECTED:
        raise ValueError(f"`iterations` is for the rules {' and '.join(map(repr, CORRECTED))}, not for {rule!r}.")
    for name, value in (("beta_1", beta_1), ("beta_2", beta_2), ("epsilon", epsilon), ("clip", clip)):
        _check_setting(name, value)
    arguments: dict[str, Any] = {
        "scales": _as_factor("scales", scales, len(targets)),
        "rate": _as_factor("rate", rate),
        "iterations": None if iterations is None else _as_count("iterations", iterations),
        "decay": _as_factor("decay", decay),
        "weight": _as_factor("weight", weight),
        "overwrite": as_flag("overwrite", overwrite),
        "applies": as_flag("applies", applies),
        "only_if": None if only_if is None else as_flag("only_if", only_if),
        "decays": decaying,
        "beta_1": float(beta_1),
        "beta_2": float(beta_2),
        "epsilon": float(epsilon),
        "clip": float(clip),
    }
    fused = library.fused_ops(targets)
    if fused is None:
        reference.update(rule, targets, kept, accumulators=sums, latest=tensors, touched_rows=flags, **arguments)
        return
    for name in ("iterations", "only_if"):  # a list of one tensor, or of none
        arguments[name] = [] if arguments[name] is None else [arguments[name]]
    fused.accum_ops_update(
        rule=rule,
        variables=[variable.handle for variable in targets],
        slots=[variable.handle for slot in kept for variable in slot],
        accumulators=[variable.handle for variable in sums or []],
        latest=tensors or [],
        touched_rows=[variable.handle for variable in flags if variable is not None],
        rows_of=[i for i, variable in enumerate(flags) if variable is not None],
        new_1=1.0 - beta_1,
        new_2=1.0 - beta_2,
        **arguments,
    )


def squared_norms(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the sum of squares of each tensor, from one pass over all of them.

    Sums are float64. There no square of a float32 overflows, so a sum is finite exactly if all values are. The fused op
    gives the same bits on every run and number of threads. `accumops.ops.reference.squared_norms` is the definition, in
    plain TensorFlow.

    Args:
        tensors: Tensors of float16, bfloat16, float32 or float64, of any shapes.

    Returns:
        A float64 tensor of shape `[len(tensors)]`.

    Raises:
        TypeError: If a tensor is not of one of those dtypes.

    Example:

    >>> accumops.ops.squared_norms([tf.constant([3.0, 4.0]), tf.constant(2.0)]).numpy()
    array([25.,  4.])
    """
    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _NORM_DTYPES:
            raise TypeError(
                f"`tensors[{i}]` must be of float16, bfloat16, float32 or float64. Received: {tensor.dtype.name}"
            )
    fused = library.fused_ops(tensors)
    return reference.squared_norms(tensors) if fused is None else fused.accum_ops_squared_norms(values=tensors)


def _variables(name: str, values: Sequence[tf.Variable | keras.Variable]) -> list[tf.Variable]:
    if not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a list of variables. Received: {values!r}")
    return [check_variable(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _check_lists(
    variables: list[tf.Variable],
    slots: list[list[tf.Variable]],
    accumulators: list[tf.Variable] | None,
    latest: list[tf.Tensor] | None,
    touched_rows: list[tf.Variable | None],
    decays: list[bool],
) -> None:
    beside = {f"slots[{i}]": slot for i, slot in enumerate(slots)}
    if accumulators is not None:
        beside["accumulators"] = accumulators
    lengths = {**beside, "latest": latest, "touched_rows": touched_rows, "decays": decays}
    for name, values in lengths.items():
        if values is not None and len(values) != len(variables):
            raise ValueError(
                f"`{name}` must have {len(variables)} items, one for each variable. Received: {len(values)}"
            )
    known: dict[int, str] = {}
    for name, values in {"variables": variables, **beside}.items():
        for i, (variable, value) in enumerate(zip(variables, values, strict=True)):
            place = f"`{name}[{i}]` ('{value.name}')"
            if value.dtype != tf.float32 or value.shape != variable.shape:
                raise ValueError(
                    f"{place} must be float32 of shape {variable.shape}. Received: {value.dtype.name} of shape "
                    f"{value.shape}."
                )
            if id(value) in known:
                raise ValueError(f"{known[id(value)]} and {place} are the same variable; give it once.")
            known[id(value)] = place
    for i, (variable, gradient) in enumerate(zip(variables, latest or [], strict=False)):
        if gradient.dtype not in _LATEST_DTYPES or not gradient.shape.is_compatible_with(variable.shape):
            raise ValueError(
                f"`latest[{i}]` must be float16, bfloat16 or float32 of shape {variable.shape}. "
                f"Received: {gradient.dtype.name} of shape {gradient.shape}."
            )
    for i, (variable, flags) in enumerate(zip(variables, touched_rows, strict=True)):
        if flags is not None and (
            flags.dtype != tf.bool or variable.shape.rank == 0 or flags.shape != variable.shape[:1]
        ):
            raise ValueError(
                f"`touched_rows[{i}]` must be bool with a flag for each row of a variable of shape {variable.shape}. "
                f"Received: {flags.dtype.name} of shape {flags.shape}."
            )


def _check_setting(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and not negative. Received: {value}")


def _as_factor(name: str, value: float | tf.Tensor, length: int | None = None) -> tf.Tensor:
    tensor = tf.cast(value, tf.float32)
    shapes = ((),) if length is None else ((), (length,))
    if not any(tensor.shape.is_compatible_with(shape) for shape in shapes):
        raise ValueError(f"`{name}` must be of shape {' or '.join(map(str, shapes))}. Received: {tensor.shape}")
    return tensor


def _as_count(name: str, value: int | tf.Tensor) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if not tensor.dtype.is_integer or not tensor.shape.is_compatible_with(()):
        raise ValueError(f"`{name}` must be an integer or a scalar integer tensor. Received: {value!r}")
    return tf.cast(tensor, tf.int64)
