"""The parts of a verification: a subject is an op, a case one set of its inputs, a trial these inputs and results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

MODES = ("eager", "tf.function", "jit_compile")

Implementation: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Expected:
    """The expected content of one array: a variable after the op, or one of the op's outputs."""

    name: str
    value: np.ndarray
    """Computed in a wider type than the op's."""
    ulp: np.ndarray | None = None
    """The unit in which errors are counted, for each element. None if the op must return exactly `value`."""


@dataclass(frozen=True)
class Trial:
    """The inputs of one case, and the expected results."""

    variables: Sequence[np.ndarray]
    """The initial values of the variables that the op changes."""
    arguments: Sequence[Any]
    """Tensors. A `tf.function` takes them as arguments, so that TensorFlow does not fold them into constants."""
    step: Callable[..., list[tf.Tensor]]
    """`step(implementation, variables, *arguments)` calls the op and returns its outputs."""
    expected: Sequence[Expected]
    """One item for each variable, then one for each output."""
    terms: int = 1
    """The largest number of terms that one element sums up; rounding errors grow with it."""


@dataclass(frozen=True)
class Case:
    """One set of inputs, which `make` creates and each of `modes` runs."""

    layout: str
    """Dtype and layout; results are grouped by them."""
    name: str
    """The name within the group."""
    make: Callable[[np.random.Generator], Trial]
    modes: Sequence[str] = MODES
    half: bool = False
    """Whether inputs are in half precision. The fused op's error bound then follows from the reference's own errors."""


@dataclass(frozen=True)
class Subject:
    """An op to verify: its two implementations, and the grid of its cases."""

    op: str
    fused: Implementation
    reference: Implementation
    cases: Callable[[bool], Iterator[Case]]
    """`cases(quick)` yields the cases of the grid, or a small part of them."""


def ulp(magnitude: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the distance between neighbouring numbers of `dtype` at `magnitude`, in the type of `magnitude`."""
    smallest = np.finfo(dtype).tiny  # TensorFlow flushes smaller numbers to zero
    return np.spacing(np.maximum(magnitude, smallest).astype(dtype)).astype(magnitude.dtype)


def wider(dtype: np.dtype) -> type[np.floating]:
    """Returns the type in which expected values of `dtype` are computed: float64; for float64, NumPy's longdouble."""
    return np.longdouble if dtype == np.float64 else np.float64
