"""Compares add_noise_group() and end_noise_window() with NumPy."""

import numpy as np
from checker import Checker

COUNTS = [0, 1, 31, 32, 127, 128, 129, 700]
TOLERANCE = 1e-14


def add(checker: Checker, count: int, share: float, *, starts: bool, placed: bool) -> None:
    """Checks a micro-batch; `placed` says whether scalars are device memory."""
    device, rng = checker.device, checker.rng
    norms = rng.uniform(0, 2, (2, count))
    held = np.full(4, np.nan) if starts else rng.uniform(0, 9, 4)
    held[3] = 5
    gradients, sums = norms.sum(1)
    if share == 0:
        norms[0] = np.nan
        gradients = 0
    group = np.array([gradients * share, share != 0, sums, share])
    expected = np.where([starts, starts, True, False], 0, held) + group
    window = device.put(held)
    given = {"share": share, "starts": starts}
    if placed:
        given = {"share": device.scalar(share, np.float32), "starts": device.scalar(starts, np.bool_)}
    checker.calls += 1
    device.kernels.add_noise_group(window, device.put(norms), **given, stream=device.stream())
    name = f"noise of {count} gradients, share {share}, starts {starts}"
    checker.expect(name, np.allclose(device.get(window), expected, rtol=TOLERANCE, atol=0))


def end(checker: Checker, window: list[float], *, applies: bool, placed: bool) -> None:
    """Checks the end of a window."""
    device = checker.device
    shares, scale, decay = 4.0, 2.0, 0.75
    before = np.array([1.0, 2.0, 3.0])
    arrays = [device.put(each) for each in (before, np.zeros(1), np.array([3, 20]))]
    given = {"shares": shares, "scale": scale, "applies": applies}
    if placed:
        given = {
            "shares": device.scalar(shares, np.float32),
            "scale": device.scalar(scale, np.float64),
            "applies": device.scalar(applies, np.bool_),
        }
    checker.calls += 1
    device.kernels.end_noise_window(
        device.put(np.array(window)), arrays, steps=5, decay=decay, **given, stream=device.stream()
    )
    averages, norm, ended = (device.get(each) for each in arrays)
    squares, count, sums, _ = window
    mean = sums / scale**2 / shares**2
    trace = (squares / scale**2 - shares * mean) / (count - 1) if count != 1 else 0
    tells = applies and np.isfinite(mean) and np.isfinite(trace) and count > 1
    found = np.array([trace, mean - trace / shares, 1])
    moved = decay * before + (1 - decay) * found if tells else before
    wanted = np.sqrt(mean) if applies and np.isfinite(mean) else np.nan
    name = f"end of a noise window {window}, applies {applies}"
    checker.expect(f"{name}: averages", np.allclose(averages, moved, rtol=TOLERANCE, atol=0))
    checker.expect(f"{name}: norm", np.allclose(norm, wanted, rtol=TOLERANCE, atol=0, equal_nan=True))
    checker.expect(f"{name}: ended", ended.tolist() == [4, 25])


def check(checker: Checker) -> None:
    """Runs all checks of this file."""
    for i, count in enumerate(checker.some(COUNTS, COUNTS, [0, 129])):
        for share, placed in ((0.5, True), (0.7, False), (0.0, False)):
            add(checker, count, share, starts=bool(i % 2), placed=placed)
    for window in ([90.0, 2.0, 80.0, 7.0], [90.0, 1.0, 80.0, 7.0], [np.inf, 3.0, 80.0, 7.0], [90.0, 3.0, np.nan, 7.0]):
        for applies in (True, False):
            end(checker, window, applies=applies, placed=applies)
