"""Runs the cases: the fused op and the reference on the same inputs, both compared with NumPy in float64."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from accumops.ops import get_backend, library, set_backend
from accumops.verification import accumulate, batch_norm, moments, noise, update
from accumops.verification.case import Case, Expected, Implementation, Subject, Trial

SUBJECTS: tuple[Subject, ...] = (
    accumulate.SUBJECT,
    *batch_norm.SUBJECTS,
    *moments.SUBJECTS,
    *noise.SUBJECTS,
    *update.SUBJECTS,
)


class NothingToVerify(RuntimeError):
    """There are no fused ops for the device that was asked for."""


@dataclass(frozen=True)
class Result:
    """The result of one case in one mode.

    Errors and bounds are in ulp of `sum(|terms|)`, the magnitude that was summed up, in the accumulator's dtype.
    """

    op: str
    layout: str
    mode: str
    case: str
    fused_vs_reference: float = math.inf
    fused_vs_float64: float = math.inf
    reference_vs_float64: float = math.inf
    fused_vs_reference_bound: float = math.inf
    """Infinite in half precision, where `fused_vs_float64_bound` is the bound."""
    fused_vs_float64_bound: float = math.inf
    """Infinite in full precision, where the other two bounds imply this one."""
    reference_vs_float64_bound: float = math.inf
    where: str = ""
    """The element with the largest error of the fused op."""
    problem: str | None = None
    """An error other than rounding: an exception, or a value that must be exact and is not."""

    @property
    def ok(self) -> bool:
        """Whether all errors are within their bounds."""
        return self.excess <= 1

    @property
    def excess(self) -> float:
        """The largest error as a multiple of its bound."""
        if self.problem is not None:
            return math.inf
        return max(
            self.fused_vs_reference / self.fused_vs_reference_bound,
            self.fused_vs_float64 / self.fused_vs_float64_bound,
            self.reference_vs_float64 / self.reference_vs_float64_bound,
        )


def find_device(device: str = "auto") -> str:
    """Returns the TensorFlow device on which to verify the fused ops.

    Args:
        device: `"cpu"`, `"gpu"`, or `"auto"`: a GPU if the fused ops can use one, else the CPU.

    Raises:
        ValueError: If `device` is none of the three.
        NothingToVerify: If there are no fused ops for it.
    """
    if device not in ("cpu", "gpu", "auto"):
        raise ValueError(f"`device` must be 'cpu', 'gpu' or 'auto'. Received: {device!r}")
    if (problem := fused_problem(device)) is not None:
        raise NothingToVerify(f"There is nothing fused to verify: {problem}.")
    on_gpu = device == "gpu" or (device == "auto" and fused_problem("gpu") is None)
    return "/GPU:0" if on_gpu else "/CPU:0"


def fused_problem(device: str) -> str | None:
    """Returns why the fused ops cannot run on `device`, which may be `"gpu"`, or None if they can."""
    _, problem = library.load()
    if problem is None and device == "gpu":
        problem = library.gpu_problem() if tf.config.list_physical_devices("GPU") else "TensorFlow sees no GPU"
    return problem


def run(
    device: str = "auto",
    quick: bool = False,
    progress: Callable[[int, int, Result], None] | None = None,
    seed: int = 0,
) -> list[Result]:
    """Compares every fused op with its reference, and both with float64, on random inputs.

    The reference runs eagerly, the fused op eagerly, in a `tf.function` and in one that XLA compiles.

    Args:
        device: `"cpu"`, `"gpu"`, or `"auto"`: a GPU if the fused ops can use one, else the CPU.
        quick: Whether to run only a small part of the grid.
        progress: Called after each result with the number of results so far, their total number, and the new result.
        seed: The seed of the random inputs.

    Returns:
        A result for each case and mode.

    Raises:
        NothingToVerify: If there are no fused ops for the device.

    Example:

    >>> from accumops import verification
    >>> results = verification.run(device="cpu", quick=True)  # doctest: +SKIP
    >>> all(result.ok for result in results)  # doctest: +SKIP
    True
    """
    place = find_device(device)
    planned = [(subject, case) for subject in SUBJECTS for case in subject.cases(quick)]
    total = sum(len(case.modes) for _, case in planned)
    results: list[Result] = []
    with backend("fused"), no_retracing_warnings(), tf.device(place), np.errstate(all="ignore"):
        for i, (subject, case) in enumerate(planned):
            for result in _run_case(subject, case, np.random.default_rng([seed, i])):
                results.append(result)
                if progress is not None:
                    progress(len(results), total, result)
    return results


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Sets the backend of accumops' ops within a `with` block, as `set_backend` does for good."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@contextlib.contextmanager
def no_retracing_warnings() -> Iterator[None]:
    """Silences TensorFlow's warning against making many `tf.function`s in a loop, which is intended here."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run_case(subject: Subject, case: Case, rng: np.random.Generator) -> Iterator[Result]:
    trial = case.make(rng)
    reference = _run_trial(trial, subject.reference, "eager")
    for mode in case.modes:
        result = Result(subject.op, case.layout, mode, case.name)
        try:
            fused = _run_trial(trial, subject.fused, mode)
        except Exception as error:  # any exception of a broken op is a result
            yield replace(result, problem=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            yield _judge(result, case, trial, fused, reference)


def _run_trial(trial: Trial, implementation: Implementation, mode: str) -> list[np.ndarray]:
    variables = [tf.Variable(value, trainable=False) for value in trial.variables]

    def step(*arguments: Any) -> list[tf.Tensor]:
        return trial.step(implementation, variables, *arguments)

    call = step if mode == "eager" else tf.function(step, jit_compile=mode == "jit_compile")
    outputs = call(*trial.arguments)
    return [item.numpy() for item in (*variables, *outputs)]


def _judge(result: Result, case: Case, trial: Trial, fused: list[np.ndarray], reference: list[np.ndarray]) -> Result:
    largest = [0.0, 0.0, 0.0]
    where, problem = "", None
    for expected, actual, definition in zip(trial.expected, fused, reference, strict=True):
        if expected.ulp is None:
            problem = problem or _difference(expected, actual, definition)
            continue
        wide = expected.value.dtype
        errors = [
            _errors(actual, definition.astype(wide), expected.ulp),
            _errors(actual, expected.value, expected.ulp),
            _errors(definition, expected.value, expected.ulp),
        ]
        peaks = [float(e.max(initial=0.0)) for e in errors]
        if not where or max(peaks[:2]) > max(largest[:2]):
            where = _describe(expected, actual, definition, errors[0] if peaks[0] > peaks[1] else errors[1])
        largest = [max(pair) for pair in zip(largest, peaks, strict=True)]
    # Rounding errors of half an ulp each mostly cancel: the error of a sum of n terms grows with the root of n. The
    # fused op and the reference may add the terms in different orders.
    spread = math.sqrt(trial.terms)
    slack = 2.0 if result.mode == "jit_compile" else 0.0  # XLA may contract operations to FMAs, and reorder them
    unbounded = math.inf
    return replace(
        result,
        fused_vs_reference=largest[0],
        fused_vs_float64=largest[1],
        reference_vs_float64=largest[2],
        fused_vs_reference_bound=unbounded if case.half else 1 + spread + slack,
        fused_vs_float64_bound=2 * largest[2] + spread + slack if case.half else unbounded,
        reference_vs_float64_bound=1 + spread,
        where=where,
        problem=problem,
    )


def _errors(actual: np.ndarray, expected: np.ndarray, unit: np.ndarray) -> np.ndarray:
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    errors = np.abs(actual.astype(expected.dtype) - expected) / unit
    return np.where(same, 0.0, np.where(np.isnan(errors), np.inf, errors))


def _difference(expected: Expected, fused: np.ndarray, reference: np.ndarray) -> str | None:
    for name, actual in (("fused", fused), ("reference", reference)):
        if not np.array_equal(actual, expected.value):
            at = () if not expected.value.shape else tuple(np.argwhere(actual != expected.value)[0].tolist())
            return f"{expected.name}{list(at) or ''} is {actual[at]} from the {name} op, not {expected.value[at]}"
    return None


def _describe(expected: Expected, fused: np.ndarray, reference: np.ndarray, errors: np.ndarray) -> str:
    if not errors.size:
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape))
    return (
        f"{expected.name}{list(at) or ''}: fused {fused[at]}, reference {reference[at]}, "
        f"float64 {float(expected.value[at])}"
    )
