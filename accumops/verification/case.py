"""What a verification consists of: subjects (ops), their cases, and for each case a trial: inputs and expectations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

MODES = ("eager", "tf.function", "jit_compile")

Implementation: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Expected:
    """What one array that an op leaves behind ought to be."""

    name: str
    value: np.ndarray
    """Computed in a wider type than the op's."""
    ulp: np.ndarray | None = None
    """The unit errors are counted in, one for each element; None where the op has to return exactly `value`."""


@dataclass(frozen=True)
class Trial:
    """One case's inputs, and what must come out."""

    variables: Sequence[np.ndarray]
    """The initial values of the variables that the op changes."""
    arguments: Sequence[Any]
    """Tensors, which a `tf.function` takes as arguments so that nothing is folded into constants."""
    step: Callable[..., list[tf.Tensor]]
    """`step(implementation, variables, *arguments)` calls the op and returns its outputs."""
    expected: Sequence[Expected]
    """For each of the variables, then for each of the outputs."""
    terms: int = 1
    """How many terms one element sums up at most; rounding errors grow with it."""


@dataclass(frozen=True)
class Case:
    """One set of inputs, to be made and run in each of `modes`."""

    layout: str
    """Dtype and layout, by which results are grouped."""
    name: str
    """What sets it apart from the group's other cases."""
    make: Callable[[np.random.Generator], Trial]
    modes: Sequence[str] = MODES
    half: bool = False
    """Whether inputs are in half precision, whose errors are judged by the reference's own."""


@dataclass(frozen=True)
class Subject:
    """An op to verify: its two implementations, and the grid of its cases."""

    op: str
    fused: Implementation
    reference: Implementation
    cases: Callable[[bool], Iterator[Case]]
    """`cases(quick)` goes through the grid, or a small part of it."""


def ulp(magnitude: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the distance between neighbouring numbers of `dtype` at `magnitude`, in the type of `magnitude`."""
    smallest = np.finfo(dtype).tiny  # below it TensorFlow flushes to zero
    return np.spacing(np.maximum(magnitude, smallest).astype(dtype)).astype(magnitude.dtype)


def wider(dtype: np.dtype) -> type[np.floating]:
    """Returns the type that serves as exact beside `dtype`: float64, and for float64 the widest there is."""
    return np.longdouble if dtype == np.float64 else np.float64
