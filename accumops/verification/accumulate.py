"""The cases of `accumops.ops.accumulate`: dense gradients and rows."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.ops import reference
from accumops.verification.case import MODES, Case, Expected, Implementation, Subject, Trial, ulp, wider

# Pairs of gradient and accumulator dtype. Each key names a list of tensors that cycles through its pairs.
_DTYPES = {
    "float16": [("float16", "float32")],
    "bfloat16": [("bfloat16", "float32")],
    "float32": [("float32", "float32")],
    "float64": [("float64", "float64")],
    "mixed": [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float64", "float64"),
        ("float32", "float32"),
        ("float32", "float64"),
    ],
}
_HALF = ("float16", "bfloat16")

# Sizes around one, a vector and the kernels' chunks.
_SIZES: list[tuple[int, ...]] = [(), (3,), (17,), (5, 111), (65535,), (65536,), (65537,), (7777, 77)]
_TINY_BESIDE_HUGE: list[tuple[int, ...]] = [(1 + i % 9,) for i in range(60)] + [(7777, 77), (2,), (1,)]


@dataclass(frozen=True)
class _Setting:
    """The op's arguments other than the lists."""

    scale: float = 1.0
    scale_dtype: str | None = None  # the dtype of a scale that is a tensor; None for a Python number
    overwrite: bool = False
    overwrite_tensor: bool = False
    check_finite: bool = False
    planted: float | None = None  # a value to put into one gradient element
    squared_norms: bool = False

    def __str__(self) -> str:
        scale = f"scale {self.scale:.3g}" + (f" as {self.scale_dtype} tensor" if self.scale_dtype else "")
        overwrite = f"overwrite {self.overwrite}" + (" as tensor" if self.overwrite_tensor else "")
        finite = f", check_finite with {self.planted}" if self.planted is not None else ", check_finite"
        norms = ", squared_norms" if self.squared_norms else ""
        return f"{scale}, {overwrite}{finite if self.check_finite else ''}{norms}"

    def scale_for(self, dtype: np.dtype) -> np.floating:
        """The scale as the op converts it for an accumulator of `dtype`."""
        given = np.float64(self.scale)
        return dtype.type(given if self.scale_dtype is None else given.astype(_numpy(self.scale_dtype)))


_SETTINGS = [
    _Setting(),
    _Setting(0.37, overwrite=True, check_finite=True, squared_norms=True),
    _Setting(-1 / 3, "float32", overwrite_tensor=True, check_finite=True, planted=np.inf),
    _Setting(0.37, "float64", overwrite=True, overwrite_tensor=True, check_finite=True, planted=np.nan),
    _Setting(1 / 7, check_finite=True, planted=-np.inf),
    _Setting(1.7, "float32", squared_norms=True),
    _Setting(0.0, overwrite_tensor=True, check_finite=True, planted=np.nan),
    _Setting(1e-3, "float16", overwrite=True, overwrite_tensor=True),
]


def _cases(quick: bool) -> Iterator[Case]:
    yield from _dense_cases(quick)
    yield from _rows_cases(quick)


SUBJECT = Subject(
    "accumulate",
    # The lambda looks the op up at each call, so that a test's replacement of the op is verified instead of the op.
    fused=lambda *args, **kwargs: ops.accumulate(*args, **kwargs),
    reference=reference.accumulate,
    cases=_cases,
)


def _dense_cases(quick: bool) -> Iterator[Case]:
    shape_lists = {f"size {math.prod(shape)}": [shape] for shape in _SIZES}
    shape_lists["all sizes"] = _SIZES
    shape_lists["tiny beside huge"] = _TINY_BESIDE_HUGE
    for i, (dtypes, (name, shapes)) in enumerate(itertools.product(_DTYPES, shape_lists.items())):
        # A list of one shape is repeated until each pair of dtypes has a tensor.
        tensors = shapes * len(_DTYPES[dtypes]) if len(shapes) == 1 else shapes
        items = list(zip(tensors, itertools.cycle(_DTYPES[dtypes])))
        for setting, modes in _settings(i, quick, compiled=i % 7 == 0):
            make = partial(_dense_trial, items, setting)
            yield Case(f"{dtypes}, dense", f"{name}, {setting}", make, modes, half=dtypes in _HALF)


def _rows_cases(quick: bool) -> Iterator[Case]:
    grid = itertools.product(_DTYPES, _INDICES, ("int32", "int64"), (False, True))
    for i, (dtypes, layout, index_dtype, tracked) in enumerate(grid):
        compiled = i % 19 == 0
        if quick and i % 3 and not compiled:
            continue
        name = f"{layout}, {index_dtype}{', touched_rows' if tracked else ''}"
        for setting, modes in _settings(i, quick, compiled):
            make = partial(_rows_trial, _DTYPES[dtypes], layout, index_dtype, tracked, setting)
            yield Case(f"{dtypes}, rows", f"{name}, {setting}", make, modes, half=dtypes in _HALF)


def _settings(i: int, quick: bool, compiled: bool) -> Iterator[tuple[_Setting, Sequence[str]]]:
    """Yields settings and modes for the grid's i-th inputs.

    Tracing takes long and compiling longer, so for each inputs `tf.function` runs with two settings and `jit_compile`
    with one. `quick` takes one setting, and runs the slow modes only if `compiled`. No stride has a factor in common
    with the grid's lengths, so every value of each dimension gets its turn.
    """
    if quick:
        yield _SETTINGS[i % len(_SETTINGS)], MODES if compiled else MODES[:1]
        return
    for j, setting in enumerate(_SETTINGS):
        turn = (i + j) % len(_SETTINGS)
        yield setting, MODES if turn == 0 else MODES[:2] if turn == 3 else MODES[:1]


def _dense_trial(
    items: Sequence[tuple[tuple[int, ...], tuple[str, str]]], setting: _Setting, rng: np.random.Generator
) -> Trial:
    gradients = [_random(rng, shape, gradient_dtype) for shape, (gradient_dtype, _) in items]
    _plant(rng, gradients, setting)
    accumulators, expected = [], []
    for i, (gradient, (_, dtype)) in enumerate(zip(gradients, (dtypes for _, dtypes in items), strict=True)):
        accumulator = _initial(rng, gradient.shape, _numpy(dtype), setting)
        accumulators.append(accumulator)
        expected.append(_expect_dense(f"accumulators[{i}]", accumulator, gradient, setting))
    return Trial(
        variables=accumulators,
        arguments=[[tf.constant(gradient) for gradient in gradients], *_arguments(setting)],
        step=partial(_step, len(items), None, setting),
        expected=expected + _expect_reports(gradients, expected, setting),
    )


def _expect_dense(name: str, accumulator: np.ndarray, gradient: np.ndarray, setting: _Setting) -> Expected:
    wide = wider(accumulator.dtype)
    product = _products(gradient, accumulator.dtype, setting)
    start = np.zeros_like(product) if setting.overwrite else accumulator.astype(wide)
    return Expected(name, start + product, ulp(np.abs(start) + np.abs(product), accumulator.dtype))


def _products(values: np.ndarray, dtype: np.dtype, setting: _Setting) -> np.ndarray:
    """Scaled values in more precision than a dtype's; a scale of 0 counts as nothing, whatever the values are."""
    wide, scale = wider(dtype), setting.scale_for(dtype)
    return values.astype(wide) * wide(scale) if scale else np.zeros_like(values, wide)


_ROWS: list[tuple[int, ...]] = [(3000, 33), (70, 2, 3), (97,)]
_DENSE_BESIDE_ROWS = (17,)


def _duplicates(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(0, rows, 2 * rows)


def _hot_row(rng: np.random.Generator, rows: int) -> np.ndarray:
    indices = rng.integers(0, rows, rows)
    indices[rng.random(rows) < 0.5] = rows // 3
    return indices


def _distinct(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.permutation(rows)[: rows // 2]


def _none(rng: np.random.Generator, rows: int) -> np.ndarray:
    return np.zeros([0], np.int64)


_INDICES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "duplicates": _duplicates,
    "hot row": _hot_row,
    "distinct rows": _distinct,
    "no rows": _none,
}


def _rows_trial(
    dtypes: Sequence[tuple[str, str]],
    layout: str,
    index_dtype: str,
    tracked: bool,
    setting: _Setting,
    rng: np.random.Generator,
) -> Trial:
    """Rows of several shapes and one dense gradient; if `tracked`, all rows but the last have `touched_rows`."""
    shapes = [_ROWS[0], _DENSE_BESIDE_ROWS, *_ROWS[1:]]
    has_flags = [tracked and i not in (1, len(shapes) - 1) for i in range(len(shapes))]
    all_indices = [None if i == 1 else _INDICES[layout](rng, shape[0]) for i, shape in enumerate(shapes)]
    pairs = list(itertools.islice(itertools.cycle(dtypes), len(shapes)))
    gradients = [
        _random(rng, shape if indices is None else (len(indices), *shape[1:]), gradient_dtype)
        for shape, indices, (gradient_dtype, _) in zip(shapes, all_indices, pairs, strict=True)
    ]
    _plant(rng, gradients, setting)

    accumulators, flag_lists, expected, expected_flags = [], [], [], []
    for i, (shape, indices, gradient) in enumerate(zip(shapes, all_indices, gradients, strict=True)):
        accumulator = _initial(rng, shape, _numpy(pairs[i][1]), setting)
        accumulators.append(accumulator)
        if indices is None:
            expected.append(_expect_dense(f"accumulators[{i}]", accumulator, gradient, setting))
            continue
        if has_flags[i]:
            flags = rng.random(shape[0]) < 0.3
            accumulator[~flags] = 0  # the op relies on zeros in rows without a flag
            flag_lists.append(flags)
            after = np.zeros_like(flags) if setting.overwrite else flags.copy()
            after[indices] |= setting.scale != 0
            expected_flags.append(Expected(f"touched_rows[{i}]", after))
        expected.append(_expect_rows(f"accumulators[{i}]", accumulator, gradient, indices, setting))

    slices = [
        tf.constant(gradient)
        if indices is None
        else tf.IndexedSlices(tf.constant(gradient), tf.constant(indices, index_dtype))
        for gradient, indices in zip(gradients, all_indices, strict=True)
    ]
    most = max(np.bincount(indices).max(initial=1) for indices in all_indices if indices is not None)
    return Trial(
        variables=accumulators + flag_lists,
        arguments=[slices, *_arguments(setting)],
        step=partial(_step, len(shapes), has_flags if tracked else None, setting),
        expected=expected
        + expected_flags
        + _expect_reports(gradients, expected, setting, [indices is not None for indices in all_indices]),
        terms=int(most),
    )


def _expect_rows(
    name: str, accumulator: np.ndarray, values: np.ndarray, indices: np.ndarray, setting: _Setting
) -> Expected:
    wide = wider(accumulator.dtype)
    products = _products(values, accumulator.dtype, setting)
    total = np.zeros_like(accumulator, wide) if setting.overwrite else accumulator.astype(wide)
    magnitude = np.abs(total)
    np.add.at(total, indices, products)
    np.add.at(magnitude, indices, np.abs(products))
    return Expected(name, total, ulp(magnitude, accumulator.dtype))


def _step(
    count: int,
    has_flags: Sequence[bool] | None,
    setting: _Setting,
    implementation: Implementation,
    variables: list[tf.Variable],
    gradients: list[tf.Tensor | tf.IndexedSlices],
    scale: tf.Tensor | None = None,
    overwrite: tf.Tensor | None = None,
) -> list[tf.Tensor]:
    flags = iter(variables[count:])
    reports = implementation(
        variables[:count],
        gradients,
        # TensorFlow would make a Python float float32, which is not exact enough for float64 accumulators.
        scale=np.float64(setting.scale) if scale is None else scale,
        overwrite=setting.overwrite if overwrite is None else overwrite,
        touched_rows=None if has_flags is None else [next(flags) if has else None for has in has_flags],
        check_finite=setting.check_finite,
        squared_norms=setting.squared_norms,
    )
    return [] if reports is None else list(reports) if isinstance(reports, tuple) else [reports]


def _arguments(setting: _Setting) -> list[Any]:
    return [
        None if setting.scale_dtype is None else tf.constant(setting.scale, setting.scale_dtype),
        tf.constant(setting.overwrite) if setting.overwrite_tensor else None,
    ]


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Returns numbers of many magnitudes, also some that are subnormal in float16."""
    values = np.ldexp(rng.standard_normal(shape, np.float32), rng.integers(-14, 12, shape, np.int32))
    return np.asarray(values).astype(_numpy(dtype))


def _initial(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, setting: _Setting) -> np.ndarray:
    values = np.array(rng.standard_normal(shape), dtype)
    if setting.overwrite:
        values.reshape(-1)[::7] = np.nan  # the op must not read the accumulator
    return values


def _plant(rng: np.random.Generator, gradients: Sequence[np.ndarray], setting: _Setting) -> None:
    candidates = [gradient for gradient in gradients if gradient.size]
    if setting.planted is None or not candidates:
        return
    flat = candidates[rng.integers(len(candidates))].reshape(-1)
    flat[rng.choice([0, flat.size - 1, int(rng.integers(flat.size))])] = setting.planted


def _expect_reports(
    gradients: Sequence[np.ndarray],
    accumulators: Sequence[Expected],
    setting: _Setting,
    sparse: Sequence[bool] | None = None,
) -> list[Expected]:
    """What the op returns, in its order. `sparse` says which gradients are `tf.IndexedSlices`."""
    reports = []
    if setting.check_finite:
        reports.append(Expected("check_finite's answer", np.array(all(np.isfinite(g).all() for g in gradients))))
    if setting.squared_norms:
        of_gradients = [np.sum(gradient.astype(np.float64) ** 2) for gradient in gradients]
        of_accumulators = [np.sum(each.value.astype(np.float64) ** 2) for each in accumulators]
        norms = np.array([of_gradients, of_accumulators])
        units = 16 * ulp(norms, np.dtype(np.float32))  # squares, and sums of a few of them, are float32
        # An accumulator is rounded before it is squared.
        units[1] += [np.sum(2 * np.abs(each.value) * each.ulp).astype(np.float64) for each in accumulators]
        norms[:, [i for i, each in enumerate(sparse or []) if each]] = np.nan
        reports.append(Expected("squared_norms", norms, units))
    return reports


def _numpy(dtype: str) -> np.dtype:
    return np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
