"""The cases of `accumops.ops.batch_norm` and `batch_norm_inference`, and of their gradients.

Errors are counted in a unit: an ulp times sqrt(n + r), where n is the number of values of a channel and r the number of
roundings in the formula itself. Rounding errors mostly cancel, so they grow with the root. Arrays in half precision are
rounded to it at the end: that adds an ulp of half precision to their unit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.ops import reference
from accumops.verification.case import MODES, Case, Expected, Implementation, Subject, Trial, ulp, wider

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_HALF = ("float16", "bfloat16")
# Roundings in the formula of one element: distance, inverse, their products with each other and with parameters, sums.
_ROUNDINGS = 16
# A power of two, so that it is exact in every dtype: an op's attribute is float32.
_EPSILON = 2.0**-10
# The smallest normal number of float16. bfloat16 has smaller ones, which do not matter for these values.
_SMALLEST_HALF = 2.0**-14


@dataclass(frozen=True)
class _Setting:
    """An array to normalize, and the op's arguments."""

    shape: tuple[int, ...]
    axis: int
    mask: float | None = None  # the share of places that are valid
    parameters: bool = True
    mean: float = 0.5  # the mean of the data, whose deviations are around one

    def __str__(self) -> str:
        mask = "" if self.mask is None else f", mask of {self.mask:.0%}"
        parameters = "" if self.parameters else ", no gamma, no beta"
        return f"shape {'x'.join(map(str, self.shape))}, axis {self.axis}, mean {self.mean:g}{mask}{parameters}"

    @property
    def layout(self) -> str:
        return "channels last" if self.axis in (-1, len(self.shape) - 1) else "channels first"

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def values(self) -> int:
        """The number of values of a channel."""
        return math.prod(self.shape) // self.channels


# Numbers of channels around a vector and the kernels' tiles, numbers of rows around the kernels' chunks and tiles.
_SETTINGS = [
    _Setting((129, 17), -1),
    _Setting((2, 3, 16, 43), 1),
    _Setting((4097, 3), 1, mean=100.0),
    _Setting((1, 64), -1),
    _Setting((3, 17, 129), 1, parameters=False),
    _Setting((1025, 64), -1, mask=0.7),
    _Setting((7, 9, 11, 100), 3, mean=-30.0, parameters=False),
    _Setting((5, 513), -1, mask=0.0),
    _Setting((33, 2, 3), 0, mean=100.0),
    _Setting((4097, 1), -1),
    _Setting((300, 1001), -1, mask=1.0),
    _Setting((2, 5, 8200), 1, mean=10.0),
    _Setting((128,), 0),
]


def _cases(inference: bool, quick: bool) -> Iterator[Case]:
    for i, dtype in enumerate(_DTYPES):
        for j, setting in enumerate(_SETTINGS):
            if inference and (setting.mask is not None or (quick and j % 3)):
                continue
            # Compiling takes longest: the full grid compiles one array of each layout, the quick one takes turns.
            compiled = j == i % 2 if quick else j < 2
            modes = MODES if compiled and not (quick and inference) else MODES[:1] if quick else MODES[:2]
            make = partial(_trial, dtype, replace(setting, mask=None) if inference else setting, inference)
            yield Case(f"{dtype}, {setting.layout}", str(setting), make, modes, half=dtype in _HALF)


def _trial(dtype: str, setting: _Setting, inference: bool, rng: np.random.Generator) -> Trial:
    inputs = _Inputs(dtype, setting, inference, rng)
    arguments = [inputs.x, inputs.dy, inputs.gamma, inputs.beta, inputs.mask, inputs.moments]
    return Trial(
        variables=[],
        arguments=[_tensors(argument) for argument in arguments],
        step=partial(_step_inference if inference else _step, setting),
        expected=inputs.expected(),
    )


def _tensors(value: Any) -> Any:
    return None if value is None else tf.nest.map_structure(tf.constant, value)


def _step(
    setting: _Setting,
    implementation: Implementation,
    variables: list[tf.Variable],
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    mask: tf.Tensor | None,
    moments: None,
) -> list[tf.Tensor]:
    sources = [x] if gamma is None else [x, gamma, beta]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        y, (count, mean, rest, variance) = implementation(
            x, gamma, beta, axis=setting.axis, epsilon=_EPSILON, mask=mask
        )
    exact = tf.cast(mean, tf.float64) + tf.cast(rest, tf.float64)
    return [y, *tape.gradient(y, sources, dy), count, exact, variance]


def _step_inference(
    setting: _Setting,
    implementation: Implementation,
    variables: list[tf.Variable],
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    mask: None,
    moments: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    sources = [x] if gamma is None else [x, gamma, beta]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        y = implementation(x, gamma, beta, *moments, axis=setting.axis, epsilon=_EPSILON)
    return [y, *tape.gradient(y, sources, dy)]


class _Inputs:
    """The arrays of a trial, and the results that the textbook's formulas give for them."""

    def __init__(self, dtype: str, setting: _Setting, inference: bool, rng: np.random.Generator) -> None:
        self._setting = setting
        self._dtype = np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
        self._statistics = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self._deviation = np.ldexp(1.0, rng.integers(-2, 3, setting.channels))
        spread = [-1 if i == setting.axis % len(setting.shape) else 1 for i in range(len(setting.shape))]
        distances = rng.standard_normal(setting.shape) * self._deviation.reshape(spread)
        # Half precision has few numbers near a large mean: many values would be equal, and their rounding errors would
        # not cancel.
        self._mean = min(max(setting.mean, -0.5), 0.5) if dtype in _HALF else setting.mean
        self.x = (self._mean + distances).astype(self._dtype)
        self.dy = rng.standard_normal(setting.shape).astype(self._dtype)
        self.gamma, self.beta = None, None
        if setting.parameters:
            self.gamma = rng.uniform(0.5, 2, setting.channels).astype(self._statistics)
            self.beta = rng.standard_normal(setting.channels).astype(self._statistics)
        self.mask = None if setting.mask is None else rng.random(setting.shape[:-1]) < setting.mask
        self.moments = None
        if inference:
            mean = self._mean + rng.standard_normal(setting.channels)
            self.moments = [each.astype(self._statistics) for each in (mean, self._deviation**2)]

    def expected(self) -> list[Expected]:
        wide = wider(self._statistics)
        x, dy = (self._rows(array).astype(wide) for array in (self.x, self.dy))
        gamma = np.ones(1, wide) if self.gamma is None else self.gamma.astype(wide)
        beta = np.zeros(1, wide) if self.beta is None else self.beta.astype(wide)
        valid = np.ones(len(x), bool) if self.mask is None else self.mask.reshape(-1)
        count, lost, through = int(valid.sum()), np.zeros(1, wide), np.zeros(1, wide)
        if self.moments is None:
            mean = x[valid].sum(0) / max(count, 1)
            variance = ((x[valid] - mean) ** 2).sum(0) / max(count, 1)
            through = valid[:, None] / wide(max(count, 1))  # weight of the gradient through the moments
            # The magnitude that the mean's error is relative to: the terms of its sum. Float32 sums distances from the
            # rounded mean, and `rest` holds what the rounding removed.
            terms = np.abs(x if self._statistics == np.float64 else x - mean)[valid].sum(0) / max(count, 1)
            lost = terms + ulp(np.abs(mean), self._statistics)
        else:
            mean, variance = (each.astype(wide) for each in self.moments)
        inverse = 1 / np.sqrt(variance + wide(_EPSILON))
        normal = (x - mean) * inverse
        size = np.abs(normal) + lost * inverse  # the magnitude of the terms of `normal`
        dgamma, dbeta = (dy * normal).sum(0), dy.sum(0)
        back = through * (dbeta + normal * dgamma)
        products_size = (np.abs(dy) * size).sum(0)
        back_size = through * (np.abs(dy).sum(0) + size * products_size)
        slope = gamma * inverse
        expected = [
            self._array("y", normal * gamma + beta, size * np.abs(gamma) + np.abs(beta)),
            self._array("dx", slope * (dy - back), np.abs(slope) * (np.abs(dy) + back_size)),
        ]
        if self._setting.parameters:
            expected.append(self._channels("dgamma", dgamma, products_size))
            expected.append(self._channels("dbeta", dbeta, np.abs(dy).sum(0)))
        if self.moments is not None:
            return expected
        return [
            *expected,
            Expected("count", np.array(count, np.int64)),
            self._channels("mean + rest", mean, lost),
            self._channels("variance", variance, variance + ulp(np.abs(mean), self._statistics) ** 2),
        ]

    def _rows(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, self._setting.axis, -1).reshape(-1, self._setting.channels)

    def _array(self, name: str, rows: np.ndarray, magnitude: np.ndarray) -> Expected:
        moved = np.moveaxis(self.x, self._setting.axis, -1).shape
        value, magnitude = (np.moveaxis(each.reshape(moved), -1, self._setting.axis) for each in (rows, magnitude))
        unit = self._unit(magnitude)
        if self._dtype.itemsize == 2:
            unit += np.spacing(np.maximum(magnitude, _SMALLEST_HALF).astype(self._dtype)).astype(unit.dtype)
        return Expected(name, value, unit)

    def _channels(self, name: str, value: np.ndarray, magnitude: np.ndarray) -> Expected:
        return Expected(name, value, self._unit(magnitude))

    def _unit(self, magnitude: np.ndarray) -> np.ndarray:
        return ulp(magnitude, self._statistics) * math.sqrt(self._setting.values + _ROUNDINGS)


def _reference_batch_norm(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, ops.BatchMoments]:
    y, *moments = reference.batch_norm(
        x, *_given(x, gamma, beta, axis), axis=axis % x.shape.rank, epsilon=epsilon, mask=mask
    )
    return y, ops.BatchMoments(*moments)


def _reference_inference(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *moments: tf.Tensor, axis: int, epsilon: float
) -> tf.Tensor:
    given = _given(x, gamma, beta, axis)
    return reference.batch_norm_inference(x, *given, *moments, axis=axis % x.shape.rank, epsilon=epsilon)


def _given(x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, axis: int) -> tuple[tf.Tensor, tf.Tensor]:
    ones = tf.ones([x.shape[axis]], reference.statistics_dtype(x.dtype))
    return ones if gamma is None else gamma, tf.zeros_like(ones) if beta is None else beta


# Lambdas look the ops up at each call, so that a test's replacement of an op is verified instead of the op.
SUBJECTS = (
    Subject(
        "batch_norm",
        fused=lambda *args, **kwargs: ops.batch_norm(*args, **kwargs),
        reference=_reference_batch_norm,
        cases=partial(_cases, False),
    ),
    Subject(
        "batch_norm_inference",
        fused=lambda *args, **kwargs: ops.batch_norm_inference(*args, **kwargs),
        reference=_reference_inference,
        cases=partial(_cases, True),
    ),
)
