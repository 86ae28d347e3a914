"""The cases of `accumops.ops.update`, `accumops.ops.squared_norms` and `accumops.ops.clip_units`."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.ops import reference
from accumops.ops.update import CORRECTED, SLOTS
from accumops.verification.case import MODES, Case, Expected, Implementation, Subject, Trial, ulp

_SETTINGS = {"beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-7}
# A generous count of the roundings behind one value: gradient and its square, averages, root, quotient, decay.
_ROUNDINGS = 64
# Sizes around one, a vector and the kernels' blocks.
_SHAPES: list[tuple[int, ...]] = [(), (3,), (17,), (5, 111), (8191,), (8193,), (777, 77)]


@dataclass(frozen=True)
class _Gradients:
    """The sources of the gradients."""

    accumulated: bool = True  # whether there are accumulators
    latest: str | None = None  # the dtype of the latest gradients, if there are any
    overwrite: bool = False
    applies: bool = True
    rows: bool = False  # whether only some rows are updated
    iterations: int | None = None  # the updates before, where a rule's rate is corrected by them
    clip: float = 0.0

    def __str__(self) -> str:
        parts = {
            "accumulators": self.accumulated,
            f"latest {self.latest}": self.latest,
            "overwrite": self.overwrite,
            "does not apply": not self.applies,
            "touched rows": self.rows,
            f"clip {self.clip}": self.clip,
            f"{self.iterations} updates before": self.iterations is not None,
        }
        return ", ".join(name for name, there in parts.items() if there)


_GRADIENTS = [
    _Gradients(),
    _Gradients(latest="float32"),
    _Gradients(latest="bfloat16", clip=0.5),
    _Gradients(latest="float16", overwrite=True),
    _Gradients(accumulated=False, latest="float32"),
    _Gradients(rows=True),
    _Gradients(latest="float32", applies=False),
]


def _cases(quick: bool) -> Iterator[Case]:
    corrected = [(rule, _Gradients(iterations=number)) for rule in CORRECTED for number in (0, 1, 5000)]
    for i, (rule, gradients) in enumerate([*itertools.product(SLOTS, _GRADIENTS), *corrected]):
        modes: Sequence[str] = MODES if i % 5 == 0 or not quick else MODES[:1]
        yield Case(rule, str(gradients), partial(_trial, rule, gradients), modes)


def _trial(rule: str, gradients: _Gradients, rng: np.random.Generator) -> Trial:
    shapes = [shape for shape in _SHAPES if shape or not gradients.rows]

    def draw() -> list[np.ndarray]:
        return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    values, sums = draw(), draw()
    # Variances must not be negative. Momentums have the gradient's sign, so that rounding cannot decide Lion's sign.
    slots = [[np.abs(each) for each in draw()] for _ in range(SLOTS[rule])]
    dtype = np.dtype(np.float32 if gradients.latest is None else tf.as_dtype(gradients.latest).as_numpy_dtype)
    latest = [np.abs(each).astype(dtype) for each in draw()]
    sums = [np.abs(each) for each in sums]
    scales = rng.uniform(0.1, 1, len(shapes)).astype(np.float32)
    rate, decay, weight = np.float32(0.01), np.float32(0.003), np.float32(3.0)
    flags = [rng.random(shape[0]) < 0.3 for shape in shapes] if gradients.rows else []

    expected: list[list[Expected]] = [[] for _ in range(1 + SLOTS[rule])]
    for i, value in enumerate(values):
        total = np.zeros(value.shape)
        if gradients.accumulated and not gradients.overwrite:
            total = total + sums[i].astype(np.float64)
        if gradients.latest is not None:
            total = total + float(weight) * latest[i].astype(np.float64)
        gradient = float(scales[i]) * total
        if gradients.clip:
            gradient = np.clip(gradient, -gradients.clip, gradients.clip)
        before = [value, *(slot[i] for slot in slots)]
        after = _step(
            rule, [each.astype(np.float64) for each in before], gradient, _rate(rate, gradients), float(decay)
        )
        for k, (old, (new, magnitude)) in enumerate(zip(before, after, strict=True)):
            if not gradients.applies:
                new, magnitude = old, np.abs(old)
            if gradients.rows:
                touched = flags[i].reshape([-1] + [1] * (old.ndim - 1))
                new, magnitude = np.where(touched, new, old), np.where(touched, magnitude, np.abs(old))
            name = f"{('value', 'm', 'v', 'w')[k]}[{i}]"
            expected[k].append(Expected(name, new, ulp(magnitude, np.dtype(np.float32))))

    state = [*values, *itertools.chain(*slots)]
    untouched = [*(sums if gradients.accumulated else []), *flags]
    return Trial(
        variables=[*state, *untouched],
        arguments=[
            [tf.constant(each) for each in latest] if gradients.latest is not None else [],
            *(tf.constant(each) for each in (scales, rate, decay, weight, gradients.overwrite, gradients.applies)),
        ],
        step=partial(_run, rule, gradients, len(shapes)),
        expected=[*itertools.chain(*expected), *(Expected("read only", each) for each in untouched)],
        terms=_ROUNDINGS,
    )


def _rate(rate: np.float32, gradients: _Gradients) -> float:
    """The rate with its corrections. The powers are rounded to float32, as the op's are, since 1 is near them."""
    if gradients.iterations is None:
        return float(rate)
    power_1, power_2 = (
        np.float32(float(np.float32(_SETTINGS[name])) ** (gradients.iterations + 1)) for name in ("beta_1", "beta_2")
    )
    return float(rate) * math.sqrt(1 - float(power_2)) / (1 - float(power_1))


def _step(
    rule: str, before: list[np.ndarray], g: np.ndarray, rate: float, decay: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the value and the slots after the step, each with the magnitude of its terms."""
    b1, b2, epsilon = (float(np.float32(_SETTINGS[name])) for name in ("beta_1", "beta_2", "epsilon"))
    new_1, new_2 = (float(np.float32(1 - _SETTINGS[name])) for name in ("beta_1", "beta_2"))
    x = before[0] - before[0] * decay
    size = np.abs(before[0])
    if rule == "sgd":
        return [(x - rate * g, size + rate * np.abs(g))]
    m = before[1]
    if rule in ("momentum", "nesterov"):
        moved, extent = m * b1 - rate * g, np.abs(m) * b1 + rate * np.abs(g)
        if rule == "momentum":
            return [(x + moved, size + extent), (moved, extent)]
        return [(x + moved * b1 - rate * g, size + extent * b1 + rate * np.abs(g)), (moved, extent)]
    if rule == "lion":
        direction = np.sign(m * b1 + g * new_1)
        return [(x - rate * direction, size + rate), (m * b2 + g * new_2, np.abs(m) * b2 + np.abs(g) * new_2)]
    average, extent = m + (g - m) * new_1, np.abs(m) + (np.abs(g) + np.abs(m)) * new_1
    v = before[2]
    variance = v + (g * g - v) * new_2
    largest = [] if rule == "adam" else [np.maximum(before[3], variance)]
    root = np.sqrt(largest[0] if largest else variance) + epsilon
    return [
        (x - average * rate / root, size + extent * rate / root),
        (average, extent),
        (variance, v + (g * g + v) * new_2),
        *((each, each) for each in largest),
    ]


def _run(
    rule: str,
    gradients: _Gradients,
    count: int,
    implementation: Implementation,
    variables: list[tf.Variable],
    latest: list[tf.Tensor],
    scales: tf.Tensor,
    rate: tf.Tensor,
    decay: tf.Tensor,
    weight: tf.Tensor,
    overwrite: tf.Tensor,
    applies: tf.Tensor,
) -> list[tf.Tensor]:
    lists = [variables[i : i + count] for i in range(0, len(variables), count)]
    beside = lists[1 + SLOTS[rule] :]
    implementation(
        rule,
        lists[0],
        lists[1 : 1 + SLOTS[rule]],
        accumulators=beside[0] if gradients.accumulated else None,
        latest=latest or None,
        scales=scales,
        rate=rate,
        iterations=None if gradients.iterations is None else tf.constant(gradients.iterations, tf.int64),
        decay=decay,
        decays=[True] * count,
        weight=weight,
        overwrite=overwrite,
        applies=applies,
        touched_rows=beside[-1] if gradients.rows else [None] * count,
        clip=gradients.clip,
        **_SETTINGS,
    )
    return []


def _norm_cases(quick: bool) -> Iterator[Case]:
    for i, dtype in enumerate(("float16", "bfloat16", "float32", "float64")):
        modes: Sequence[str] = MODES if i == 2 or not quick else MODES[:1]
        yield Case(dtype, "sizes of all kinds", partial(_norm_trial, dtype), modes)


def _norm_trial(dtype: str, rng: np.random.Generator) -> Trial:
    tensors = [
        rng.standard_normal(shape).astype(tf.as_dtype(dtype).as_numpy_dtype) for shape in [*_SHAPES, (0,), (70001,)]
    ]
    sums = np.array([np.sum(tensor.astype(np.longdouble) ** 2) for tensor in tensors], np.longdouble)
    return Trial(
        variables=[],
        arguments=[[tf.constant(tensor) for tensor in tensors]],
        step=lambda implementation, variables, tensors: [implementation(tensors)],
        expected=[Expected("sums", sums, ulp(sums, np.dtype(np.float64)))],
        terms=max(math.prod(shape) for shape in _SHAPES),
    )


_CLIPPING = {"clip_factor": 0.25, "epsilon": 1e-3}


def _clip_cases(quick: bool) -> Iterator[Case]:
    for share in ("all", "some", "none"):
        modes: Sequence[str] = MODES if share == "some" or not quick else MODES[:1]
        yield Case("float32", f"clips {share} units", partial(_clip_trial, share), modes)


def _clip_trial(share: str, rng: np.random.Generator) -> Trial:
    shapes = [*_SHAPES, (70001,), (300, 17), (3, 3, 8, 16), (2, 1500)]
    gradients, weights = ([rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(2))
    expected = []
    for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        gradient *= np.float32({"all": 100, "some": np.exp(rng.uniform(-4, 2)), "none": 1e-3}[share])
        axes = tuple(range(gradient.ndim - 1)) if gradient.ndim > 1 else None
        exact = gradient.astype(np.longdouble)
        norms = (np.sqrt(np.sum(each.astype(np.longdouble) ** 2, axis=axes, keepdims=True)) for each in (exact, weight))
        size, norm = norms
        limit = _CLIPPING["clip_factor"] * np.maximum(norm, _CLIPPING["epsilon"])
        clipped = np.where(size > limit, exact * (limit / np.where(size > 0, size, 1)), exact)
        expected.append(Expected(f"clipped[{i}]", clipped, ulp(np.abs(clipped), np.dtype(np.float32))))
    return Trial(
        variables=[],
        arguments=[[tf.constant(each) for each in group] for group in (gradients, weights)],
        step=lambda implementation, variables, gradients, weights: implementation(gradients, weights, **_CLIPPING),
        expected=expected,
        terms=max(math.prod(shape) for shape in shapes),
    )


# Lambdas look the ops up at each call, so that a test's replacement of an op is verified instead of the op.
SUBJECTS = (
    Subject(
        "update",
        fused=lambda *args, **kwargs: ops.update(*args, **kwargs),
        reference=reference.update,
        cases=_cases,
    ),
    Subject(
        "squared_norms",
        fused=lambda *args, **kwargs: ops.squared_norms(*args, **kwargs),
        reference=reference.squared_norms,
        cases=_norm_cases,
    ),
    Subject(
        "clip_units",
        fused=lambda *args, **kwargs: ops.clip_units(*args, **kwargs),
        reference=reference.clip_units,
        cases=_clip_cases,
    ),
)
