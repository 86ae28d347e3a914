"""Defines in NumPy what the kernels compute, and makes arrays of every type. The scripts in benchmarks/gpu use it."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

SLOTS = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "amsgrad": 3, "lion": 1}
"""The number of slot arrays that each rule of update() keeps for a value."""


def storage(dtype: str) -> type:
    """Returns the NumPy type that stores a dtype. bfloat16 is stored as its bits: NumPy and CuPy lack the type."""
    return {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}[dtype]


@functools.cache
def noise(size: int, seed: int = 0) -> np.ndarray:
    """Returns random numbers, the same each time."""
    return np.random.default_rng([size, seed]).standard_normal(size)


def narrow(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Converts numbers to a type. To bfloat16 they are truncated, not rounded."""
    if dtype == "bfloat16":
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(dtype)


def values(dtype: str, size: int, seed: int = 0) -> np.ndarray:
    """Returns random numbers of a type."""
    return narrow(noise(size, seed), dtype)


def widen(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Converts numbers of any type to a float type."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return array.astype(dtype)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that arrays are equal bit by bit, -0 included. Any NaN equals any other NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    integer = f"u{actual.dtype.itemsize}"
    different = actual.view(integer) != expected.view(integer)
    if actual.dtype.kind == "f":
        different &= ~(np.isnan(actual) & np.isnan(expected))
    assert not different.any(), f"{different.sum()} differ, first at {np.argmax(different)}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all values of an update share."""

    rule: str
    rate: float = 0.01
    iterations: int | None = None
    decay: float = 0.0
    weight: float = 1.0
    overwrite: bool = False
    applies: bool = True
    beta_1: float = 0.9
    beta_2: float = 0.99
    epsilon: float = 1e-7
    clip: float = 0.0

    def keywords(self) -> dict:
        """Returns the settings other than the rule, as update() takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rule"}


def gradient_of(
    settings: Settings,
    accumulator: np.ndarray | None,
    latest: np.ndarray | None,
    scale: float,
    dtype: type = np.float32,
) -> np.ndarray | np.floating:
    """Returns the gradient by which update() makes its step."""
    total = None if accumulator is None or settings.overwrite else accumulator.astype(dtype)
    if latest is not None and settings.weight != 0:  # a weight of 0 counts as no latest gradient
        product = dtype(np.float32(settings.weight)) * widen(latest, dtype)
        total = product if total is None else total + product
    gradient = dtype(np.float32(scale)) * (dtype(0) if total is None else total)
    if settings.clip:
        clip = dtype(np.float32(settings.clip))
        gradient = np.where(gradient > clip, clip, gradient)
        gradient = np.where(gradient < -clip, -clip, gradient)
    return gradient


def step(
    settings: Settings,
    x: np.ndarray,
    g: np.ndarray,
    slots: Sequence[np.ndarray],
    *,
    decays: bool = True,
    dtype: type = np.float32,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the value and the slots after a step by update.h's rules, with each operation rounded to `dtype`."""
    if not settings.applies:
        return x, list(slots)
    rate, b1, b2, epsilon = (
        dtype(np.float32(each)) for each in (settings.rate, settings.beta_1, settings.beta_2, settings.epsilon)
    )
    new_1, new_2 = (dtype(np.float32(1 - beta)) for beta in (settings.beta_1, settings.beta_2))
    if settings.iterations is not None:
        number = np.longdouble(settings.iterations + 1)
        bias_1, bias_2 = (dtype(1) - dtype(np.float32(np.longdouble(np.float32(b)) ** number)) for b in (b1, b2))
        rate = rate * np.sqrt(bias_2) / bias_1
    x, g, slots = x.astype(dtype), dtype(1) * g, [slot.astype(dtype) for slot in slots]
    if decays:
        x = x - x * dtype(np.float32(settings.decay))
    if settings.rule == "sgd":
        return x - rate * g, []
    m = slots[0]
    if settings.rule in ("momentum", "nesterov"):
        m = m * b1 - rate * g
        return x + (m if settings.rule == "momentum" else m * b1 - rate * g), [m]
    if settings.rule == "lion":
        direction = m * b1 + g * new_1
        sign = np.where(direction > 0, dtype(1), np.where(direction < 0, dtype(-1), direction))
        return x - rate * sign, [m * b2 + g * new_2]
    m = m + (g - m) * new_1
    v = slots[1] + (g * g - slots[1]) * new_2
    after = [m, v]
    if settings.rule == "amsgrad":
        w = slots[2]
        after.append(np.where((w > v) | np.isnan(w), w, v))
    return x - m * rate / (np.sqrt(after[-1]) + epsilon), after


def clipped_units(gradient: np.ndarray, weights: np.ndarray, *, clip_factor: float, epsilon: float) -> np.ndarray:
    """The gradient that adaptive gradient clipping makes, of `gradient`'s dtype, computed with more precision."""
    axes = tuple(range(gradient.ndim - 1)) if gradient.ndim > 1 else None
    size, norm = (np.sqrt(np.sum(wide(each) ** 2, axis=axes, keepdims=True)) for each in (gradient, weights))
    limit = clip_factor * np.maximum(norm, epsilon)
    with np.errstate(divide="ignore", invalid="ignore"):
        clips = np.isfinite(size) & np.isfinite(norm) & (size > limit)
        return np.where(clips, wide(gradient) * (limit / size), wide(gradient)).astype(gradient.dtype)


def largest(*arrays: np.ndarray) -> float:
    """Returns the largest magnitude."""
    return float(max(np.abs(array).max(initial=0) for array in arrays))


def wide(array: np.ndarray) -> np.ndarray:
    """Converts an array to more precision than a kernel has for its type."""
    return widen(array, np.dtype(np.longdouble if array.dtype == np.float64 else np.float64))


def channels_last(array: np.ndarray, axis: int) -> np.ndarray:
    """Returns the array as a matrix, with a row for each place and a column for each channel."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


@dataclasses.dataclass
class Expected:
    """An expected value, and the magnitude of the numbers that it was computed from."""

    value: np.ndarray
    magnitude: float


class BatchNorm:
    """Batch normalization and its gradient, as batch_norm.h defines them. With `moments`, those of inference."""

    def __init__(
        self,
        x: np.ndarray,
        gamma: np.ndarray,
        beta: np.ndarray,
        dy: np.ndarray,
        *,
        axis: int = -1,
        epsilon: float = 1e-3,
        mask: np.ndarray | None = None,
        moments: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._shape, self._axis = x.shape, axis
        rows, incoming = wide(channels_last(x, axis)), wide(channels_last(dy, axis))
        gamma, beta = wide(gamma), wide(beta)
        if moments is None:
            weights = np.ones(len(rows), bool) if mask is None else mask.reshape(-1)
            self.count = int(weights.sum())
            mean = rows[weights].sum(0) / max(self.count, 1)
            variance = ((rows[weights] - mean) ** 2).sum(0) / max(self.count, 1)
        else:
            weights, self.count = np.zeros(len(rows), bool), 0
            mean, variance = (wide(each) for each in moments)
        inverse = 1 / np.sqrt(variance + epsilon)
        normal = (rows - mean) * inverse
        dbeta, dgamma = incoming.sum(0), (incoming * normal).sum(0)
        through = (dbeta + normal * dgamma) / max(self.count, 1) * (weights[:, None] & (self.count > 0))
        slope = gamma * inverse
        self.y = self._array(normal * gamma + beta, np.abs(normal * gamma) + np.abs(beta))
        self.mean = Expected(mean, largest(rows))
        self.variance = Expected(variance, largest(variance))
        self.inverse = Expected(inverse, largest(inverse))
        self.dx = self._array(slope * (incoming - through), np.abs(slope * incoming) + np.abs(slope * through))
        self.dgamma = Expected(dgamma, largest(dgamma, incoming * normal))
        self.dbeta = Expected(dbeta, largest(dbeta, incoming))

    def _array(self, rows: np.ndarray, terms: np.ndarray) -> Expected:
        moved = [size for i, size in enumerate(self._shape) if i != self._axis % len(self._shape)]
        array = np.moveaxis(rows.reshape(*moved, self._shape[self._axis]), -1, self._axis)
        return Expected(array, largest(rows, terms))


def half_ulp(value: np.ndarray, dtype: str) -> np.ndarray:
    """Returns half the distance between a type's numbers around a value: the error of rounding a result to it."""
    if dtype in ("float32", "float64"):
        return np.zeros(value.shape)
    least, bits = {"float16": (-14, 10), "bfloat16": (-126, 7)}[dtype]
    _, exponent = np.frexp(np.maximum(np.abs(value).astype(np.float64), 2.0**least))
    return np.ldexp(0.5, exponent - 1 - bits)


def excess(actual: np.ndarray, expected: Expected, dtype: str, *, tolerance: float | None = None) -> float:
    """Returns how far the largest error exceeds its bound.

    The bound is `tolerance` times the magnitude; in half precision half an ulp is added.
    """
    if tolerance is None:
        tolerance = 1e-13 if dtype == "float64" else 1e-5
    if actual.size == 0:
        return 0
    error = np.abs(wide(actual) - expected.value)
    bound = tolerance * expected.magnitude
    if actual.dtype in (np.float16, np.uint16):
        bound = bound + half_ulp(expected.value, dtype)
    return float(np.max(error - bound)) if np.isfinite(error).all() else np.inf
