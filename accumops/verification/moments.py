"""The cases of `accumops.ops.merge_moments`, `accumops.ops.add_to_windows` and `accumops.ops.end_windows`."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.ops import reference
from accumops.verification.case import MODES, Case, Expected, Implementation, Subject, Trial, ulp

_SIZES = (1, 3, 17, 1001)
_STARTS = ("window", "empty window", "no window")
_ENDS = ("open", "full", "closed", "never")
# Roundings in the formulas of one element.
_ROUNDINGS = 16
_MOMENTUM = 0.99


def _cases(quick: bool) -> Iterator[Case]:
    grid = [
        (added, start, end)
        for start in _STARTS
        for end in _ENDS
        for added in ((0,) if end == "closed" else (128, 0, 1))
        if start != "no window" or end == "full"
    ]
    for i, dtype in enumerate(("float32", "float64")):
        for j, (added, start, end) in enumerate(grid):
            for k, channels in enumerate(_SIZES):
                turn = i + j + k
                modes = MODES if turn % 12 == 5 else MODES[:1] if quick else MODES[:2]
                if quick and turn % 2 == 0 and modes != MODES:
                    continue
                name = f"{channels} channels, {added} values to {start}, {end}"
                yield Case(f"{dtype}, moments", name, partial(_trial, dtype, channels, added, start, end), modes)


def _trial(dtype: str, channels: int, added: int, start: str, end: str, rng: np.random.Generator) -> Trial:
    exact, precise = np.dtype(np.float64), np.dtype(dtype)
    values = int(rng.integers(1, 5000)) if start == "window" else 0
    counters = np.array([values, 2, 3 if end == "full" else 9], np.int64)
    held = np.abs(rng.standard_normal((2, channels))) * 50 if values else np.full((2, channels), np.nan)
    moving = [rng.standard_normal(channels).astype(precise), rng.uniform(0.1, 3, channels).astype(precise)]
    mean = (rng.standard_normal(channels) * 3).astype(precise)
    rest = (rng.standard_normal(channels) * np.spacing(np.abs(mean)) / 2).astype(precise)
    variance = rng.uniform(0.1, 3, channels).astype(precise)

    wide_mean, wide_centred = held.astype(np.longdouble) if values else np.zeros((2, channels), np.longdouble)
    total = values + added
    share = np.longdouble(added) / total if total else np.longdouble(0)
    delta = mean.astype(np.longdouble) + rest - wide_mean
    between, within = delta**2 * (values * share), variance.astype(np.longdouble) * added
    merged_mean, merged_centred = wide_mean + delta * share, wide_centred + within + between
    mean_size = np.abs(wide_mean) + np.abs(mean) + np.abs(rest)
    # The distance is a difference: its rounding error is relative to the two means, not to the distance.
    centred_size = wide_centred + within + mean_size**2 * (values * share)

    ends = end in ("full", "closed")
    after = np.array([0, 0, counters[2]] if ends else [total, 3, counters[2]], np.int64)
    # An empty window may hold anything without influence, so the step clears it before the comparison.
    clear = ends or total == 0
    window = [
        Expected("counters", after),
        Expected("moments", np.zeros((2, channels)))
        if clear
        else Expected(
            "moments", np.stack([merged_mean, merged_centred]), ulp(np.stack([mean_size, centred_size]), exact)
        ),
    ]
    size = max(total, 1)
    targets = ((merged_mean, mean_size), (merged_centred / size, centred_size / size))
    moved = [
        Expected(name, old)
        if not ends or total == 0
        else Expected(
            name,
            old.astype(np.longdouble) * np.longdouble(_MOMENTUM) + value * np.longdouble(1 - _MOMENTUM),
            ulp(np.abs(old) + magnitude, precise),
        )
        for name, old, (value, magnitude) in zip(("running mean", "running variance"), moving, targets, strict=True)
    ]
    alone = start == "no window"
    batch = [tf.constant(added, tf.int64), *(tf.constant(each) for each in (mean, rest, variance))]
    return Trial(
        variables=[*([] if alone else [counters, held]), *moving],
        arguments=[[] if end == "closed" else batch],
        step=partial(_step, alone, end == "never", clear),
        expected=[*([] if alone else window), *moved],
        terms=_ROUNDINGS,
    )


def _step(
    alone: bool,
    never: bool,
    clear: bool,
    implementation: Implementation,
    variables: list[tf.Variable],
    batch: list[tf.Tensor],
) -> list[tf.Tensor]:
    window = None if alone else ops.MomentsWindow(*variables[:2])
    moving = None if never else ops.MovingStatistics(variables[-2], variables[-1], _MOMENTUM)
    implementation(ops.BatchMoments(*batch) if batch else None, window=window, moving=moving)
    if window is not None and clear:
        window.moments.assign(tf.zeros_like(window.moments))
    return []


def _add_cases(quick: bool) -> Iterator[Case]:
    for i, windows in enumerate((1, 5) if quick else (1, 5, 60)):
        for j, dtype in enumerate(("float32", "float64")):
            for k, applies in enumerate((True, False)):
                modes = MODES if (i + j + k) % 3 == 0 else MODES[:2]
                name = f"{windows} windows, {'added to' if applies else 'kept'}"
                yield Case(f"{dtype}, many windows", name, partial(_add_trial, windows, dtype, applies), modes)


def _add_trial(count: int, dtype: str, applies: bool, rng: np.random.Generator) -> Trial:
    trials = []
    for i in range(count):
        added = (128, 0, 1)[i % 3] if applies else 0
        start = "empty window" if i % 4 == 3 else "window"
        trials.append(_trial(dtype, _SIZES[i % len(_SIZES)], added, start, "never", rng))
    expected = [each for trial in trials for each in trial.expected[:2]]
    if not applies:
        expected[::2] = [Expected("counters", trial.variables[0]) for trial in trials]
    return Trial(
        variables=[each for trial in trials for each in trial.variables[:2]],
        arguments=[[trial.arguments[0] for trial in trials], tf.constant(applies)],
        step=_add_step,
        expected=expected,
        terms=_ROUNDINGS,
    )


def _add_step(
    implementation: Implementation, variables: list[tf.Variable], batches: list[list[tf.Tensor]], applies: tf.Tensor
) -> list[tf.Tensor]:
    windows = [ops.MomentsWindow(*pair) for pair in zip(variables[::2], variables[1::2], strict=True)]
    implementation([ops.BatchMoments(*each) for each in batches], windows, applies=applies)
    for window in windows:  # an empty window may hold anything without influence
        window.moments.assign(tf.where(window.counters[0] == 0, tf.zeros_like(window.moments), window.moments))
    return []


def _end_cases(quick: bool) -> Iterator[Case]:
    for i, windows in enumerate((1, 5) if quick else (1, 5, 60)):
        for j, moving in enumerate(("float32", "float64", "none")):
            for k, applies in enumerate((True, False)):
                modes = MODES if (i + j + k) % 3 == 0 else MODES[:2]
                name = f"{windows} windows, {'ended' if applies else 'kept'}"
                trial = partial(_end_trial, windows, moving, applies)
                yield Case(f"{moving} statistics, end of windows", name, trial, modes)


def _end_trial(count: int, dtype: str, applies: bool, rng: np.random.Generator) -> Trial:
    windows: list[np.ndarray] = []
    statistics: list[np.ndarray] = []
    kept: list[Expected] = []
    moved: list[Expected] = []
    momenta = rng.uniform(0.5, 1, count)
    for i, momentum in enumerate(momenta):
        channels = _SIZES[i % len(_SIZES)]
        values = 0 if i % 3 == 2 else int(rng.integers(1, 5000))
        counters = np.array([values, 2, 9], np.int64)
        held = np.abs(rng.standard_normal((2, channels))) * 50 if values else np.full((2, channels), np.nan)
        windows += [counters, held]
        after = np.array([0, 0, 9]) if applies else counters
        kept += [Expected("counters", after), Expected("moments", np.nan_to_num(held))]
        if dtype == "none":
            continue
        precise = np.dtype(dtype)
        targets = np.stack([held[0], held[1] / max(values, 1)]).astype(np.longdouble)
        for name, value in zip(("running mean", "running variance"), targets, strict=True):
            old = rng.uniform(0.1, 3, channels).astype(precise)
            statistics.append(old)
            if values == 0 or not applies:
                moved.append(Expected(name, old))
                continue
            new = old.astype(np.longdouble) * np.longdouble(momentum) + value * np.longdouble(1 - momentum)
            moved.append(Expected(name, new, ulp(old + np.abs(value), precise)))
    return Trial(
        variables=[*windows, *statistics],
        arguments=[tf.constant(applies)],
        step=partial(_end_step, count, momenta.tolist()),
        expected=[*kept, *moved],
        terms=_ROUNDINGS,
    )


def _end_step(
    count: int, momenta: list[float], implementation: Implementation, variables: list[tf.Variable], applies: tf.Tensor
) -> list[tf.Tensor]:
    windows = [ops.MomentsWindow(*variables[2 * i : 2 * i + 2]) for i in range(count)]
    statistics = variables[2 * count :]
    pairs = zip(statistics[::2], statistics[1::2], momenta if statistics else (), strict=True)
    moving = [ops.MovingStatistics(*each) for each in pairs] or None
    implementation(windows, moving, applies=applies)
    for window in windows:  # NaN, which an empty window may hold, is equal to nothing
        window.moments.assign(tf.where(tf.math.is_nan(window.moments), tf.zeros_like(window.moments), window.moments))
    return []


# Lambdas look the ops up at each call, so that a test's replacement of an op is verified instead of the op.
SUBJECTS = (
    Subject(
        "merge_moments",
        fused=lambda *args, **kwargs: ops.merge_moments(*args, **kwargs),
        reference=reference.merge_moments,
        cases=_cases,
    ),
    Subject(
        "add_to_windows",
        fused=lambda *args, **kwargs: ops.add_to_windows(*args, **kwargs),
        reference=reference.add_to_windows,
        cases=_add_cases,
    ),
    Subject(
        "end_windows",
        fused=lambda *args, **kwargs: ops.end_windows(*args, **kwargs),
        reference=reference.end_windows,
        cases=_end_cases,
    ),
)
