"""The cases of `accumops.ops.add_noise_group` and `accumops.ops.end_noise_window`."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.ops import reference
from accumops.verification.case import MODES, Case, Expected, Implementation, Subject, Trial, ulp

_EXACT = np.dtype(np.float64)
# Roundings in the formulas of one number.
_ROUNDINGS = 16


def _add_cases(quick: bool) -> Iterator[Case]:
    for i, gradients in enumerate((1, 20) if quick else (0, 1, 20, 700)):
        for j, share in enumerate((0.7, 0.0)):
            for k, starts in enumerate((True, False)):
                modes = MODES if (i + j + k) % 3 == 0 else MODES[:2]
                name = f"{gradients} gradients, share {share}, {'starts' if starts else 'goes on'}"
                yield Case("float64, micro-batch", name, partial(_add_trial, gradients, share, starts), modes)


def _add_trial(count: int, share: float, starts: bool, rng: np.random.Generator) -> Trial:
    norms = rng.uniform(0, 3, (2, count))
    before = np.full(4, np.nan) if starts else rng.uniform(0, 9, 4)
    before[3] = 5
    gradients, sums = norms.astype(np.longdouble).sum(1)
    if share == 0:
        norms[0] = np.nan
    held = np.where([starts, starts, True, False], 0, before.astype(np.longdouble))
    weight = np.longdouble(share)
    after = held + np.array([gradients * weight, share != 0, sums, weight])
    return Trial(
        variables=[before],
        arguments=[tf.constant(norms), tf.constant(share, tf.float64), tf.constant(starts)],
        step=_add_step,
        expected=[Expected("window", after, ulp(after, _EXACT))],
        terms=max(count, 4),
    )


def _add_step(
    implementation: Implementation,
    variables: list[tf.Variable],
    norms: tf.Tensor,
    share: tf.Tensor,
    starts: tf.Tensor,
) -> list[tf.Tensor]:
    implementation(variables[0], norms, share=share, starts=starts)
    return []


def _end_cases(quick: bool) -> Iterator[Case]:
    for i, count in enumerate((0, 1, 2, 8)):
        for j, applies in enumerate((True, False)):
            for k, scale in enumerate((1.0, 1024.0)):
                modes = MODES if (i + j + k) % 3 == 0 else MODES[:1] if quick else MODES[:2]
                name = f"{count} micro-batches, {'an update' if applies else 'no update'}, scale {scale:g}"
                yield Case("float64, end of window", name, partial(_end_trial, count, applies, scale), modes)


def _end_trial(count: int, applies: bool, scale: float, rng: np.random.Generator) -> Trial:
    wide = np.longdouble
    shares = float(count) * 1.5
    window = np.array([rng.uniform(5, 9) * shares, count, rng.uniform(1, 4) * shares**2, shares])
    window[[0, 2]] *= scale**2
    averages, decay, steps = rng.uniform(1, 3, 3), 0.9, count
    squares, _, sums, _ = window.astype(wide) / [scale**2, 1, scale**2, 1]
    mean = sums / wide(shares) ** 2 if count else wide(0)
    size = squares + shares * mean  # the trace is a difference: its rounding errors are relative to both parts
    trace = (squares - shares * mean) / (count - 1) if count > 1 else wide(0)
    noise = trace / wide(shares) if count else wide(0)
    moved = decay * averages.astype(wide) + (1 - wide(decay)) * np.array([trace, mean - noise, wide(1)])
    magnitude = averages + np.array([size, mean + size, 1], wide)
    tells = applies and count > 1
    norm = np.sqrt(mean)
    return Trial(
        variables=[averages, np.array(0.0), np.array([3, 20])],
        arguments=[tf.constant(window), tf.constant(shares, tf.float64), tf.constant(steps, tf.int64),
                   tf.constant(scale, tf.float64), tf.constant(applies)],
        step=partial(_end_step, decay),
        expected=[
            Expected("averages", moved, ulp(magnitude, _EXACT)) if tells else Expected("averages", averages),
            # NaN is equal to nothing: the step has a number in its place.
            Expected("norm", norm, ulp(norm, _EXACT)) if applies else Expected("norm", np.array(-1.0)),
            Expected("ended", np.array([4, 20 + count])),
        ],
        terms=_ROUNDINGS,
    )  # fmt: skip


def _end_step(
    decay: float,
    implementation: Implementation,
    variables: list[tf.Variable],
    window: tf.Tensor,
    shares: tf.Tensor,
    steps: tf.Tensor,
    scale: tf.Tensor,
    applies: tf.Tensor,
) -> list[tf.Tensor]:
    statistics = ops.NoiseStatistics(*variables)
    implementation(window, statistics, shares=shares, steps=steps, decay=decay, scale=scale, applies=applies)
    norm = statistics.norm
    norm.assign(tf.where(tf.math.is_nan(norm), tf.constant(-1.0, tf.float64), norm))
    return []


# Lambdas, as in `moments.py`.
SUBJECTS = (
    Subject(
        "add_noise_group",
        fused=lambda *args, **kwargs: ops.add_noise_group(*args, **kwargs),
        reference=reference.add_noise_group,
        cases=_add_cases,
    ),
    Subject(
        "end_noise_window",
        fused=lambda *args, **kwargs: ops.end_noise_window(*args, **kwargs),
        reference=reference.end_noise_window,
        cases=_end_cases,
    ),
)
