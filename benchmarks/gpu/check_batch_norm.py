"""Compares batch normalization and the merging of its moments with NumPy, in small, awkward cases."""

from typing import Any

import numpy as np
from checker import Arena, Checker
from kernel_definitions import BatchNorm, excess, narrow

TYPES = ["float16", "bfloat16", "float32", "float64"]
EPSILON = 2.0**-10
# Shape, axis, and whether there is a mask. Together they have packs and single values, few and many columns, and
# several tiles.
LAYOUTS = [
    ((1, 1), -1, False),
    ((127, 3), -1, False),
    ((700, 3), -1, True),
    ((129, 16), -1, True),
    ((1100, 64), -1, False),
    ((65, 1001), -1, True),
    ((3, 5, 100), -1, True),
    ((2, 3, 17), 1, False),
    ((4, 9, 64), 1, False),
    ((2, 5, 40, 31), 1, False),
    ((0, 5), -1, False),
    ((2, 5, 0), 1, False),
]
FEWEST_LAYOUTS = [*LAYOUTS[2:5], ((65, 301), -1, True), *LAYOUTS[6:10]]
CHANNELS = [1, 1024, 1025, 2100]


class Run:
    """Calls on one array. `offset` counts elements from an alignment of 16 bytes."""

    def __init__(self, checker: Checker, name: str, x: np.ndarray, axis: int, offset: int) -> None:
        self.checker, self.device = checker, checker.device
        self.name, self.x, self.axis, self.offset = name, x, axis, offset
        self.statistic = np.float64 if x.dtype == np.float64 else np.float32

    def put(self, array: np.ndarray) -> Any:
        """Copies an array to the device, at the offset."""
        return self.view(*self.guarded(array))

    def guarded(self, array: np.ndarray) -> tuple[Arena, Any]:
        """Copies an array to the device, at the offset, in a buffer of its own."""
        arena = Arena([array.reshape(-1)], [self.offset])
        return arena, self.device.put(arena.bytes)

    def view(self, arena: Arena, buffer: Any) -> Any:
        """Returns the array in a buffer, in the shape of x."""
        return arena.views(buffer)[0].reshape(self.x.shape)

    def channels(self, *names: str) -> dict[str, Any]:
        """Returns arrays for results, with a value for each channel."""
        return {name: self.device.put(np.full(self.x.shape[self.axis], np.nan, self.statistic)) for name in names}

    def options(self) -> dict[str, Any]:
        """Returns the arguments of calls that need a workspace; a third of the calls get none and make their own."""
        self.checker.calls += 1
        needed = self.device.kernels.batch_norm_workspace(self.device.put(self.x), self.axis)
        workspace = self.device.empty(needed, np.uint8) if needed and self.checker.calls % 3 else None
        return {"axis": self.axis, "workspace": workspace, "stream": self.device.stream()}

    def compare(self, arena: Arena, buffer: Any, written: dict[str, Any], name: str, definition: BatchNorm,
                dtype: str) -> None:  # fmt: skip
        """Compares all results, and the bytes beside the large one."""
        bytes_found = self.device.get(buffer)
        inside = arena.spans[0][0]
        guards = np.delete(bytes_found, np.arange(inside.start, inside.stop))
        self.checker.expect(f"{self.name}: {name} beyond its array", bool((guards == 0xFF).all()))
        found = {name: self.view(arena, bytes_found)}
        found |= {each: self.device.get(array) for each, array in written.items()}
        for each, array in found.items():
            above = excess(array, getattr(definition, each), dtype)
            self.checker.expect(f"{self.name}: {each} by {above} above its bound", above <= 0)


def batch_norm(checker: Checker, name: str, x: np.ndarray, dtype: str, axis: int, mask: np.ndarray | None,
               offset: int) -> None:  # fmt: skip
    """Checks one call of batch_norm() and of its gradient; without a mask also of inference and its gradient."""
    device, rng, kernels = checker.device, checker.rng, checker.device.kernels
    run = Run(checker, name, x, axis, offset)
    channels = x.shape[axis]
    gamma, beta, mean = (rng.uniform(-2, 2, channels).astype(run.statistic) for _ in range(3))
    variance = rng.uniform(0.1, 4, channels).astype(run.statistic)
    dy = narrow(rng.standard_normal(x.shape) + 0.1, dtype)
    definition = BatchNorm(x, gamma, beta, dy, axis=axis, epsilon=EPSILON, mask=mask)
    places = None if mask is None else device.put(mask)
    nothing = narrow(np.full(x.shape, np.nan), dtype)

    statistics = run.channels("mean", "rest", "variance", "inverse")
    count = device.put(np.array([-1]))
    arena, buffer = run.guarded(nothing)
    kernels.batch_norm(
        run.put(x), device.put(gamma), device.put(beta), y=run.view(arena, buffer), count=count, epsilon=EPSILON,
        mask=places, **statistics, **run.options(),
    )  # fmt: skip
    written = {each: statistics[each] for each in ("variance", "inverse")}
    run.compare(arena, buffer, written, "y", definition, dtype)
    checker.expect(f"{name}: count", device.get(count)[0] == definition.count)

    def gradient(statistics: dict[str, Any], count: Any, places: Any, definition: BatchNorm) -> None:
        arena, buffer = run.guarded(nothing)
        parameters = run.channels("dgamma", "dbeta")
        moments = {each: statistics[each] for each in ("mean", "rest", "inverse")}
        kernels.batch_norm_gradient(
            run.put(x), run.put(dy), device.put(gamma), dx=run.view(arena, buffer), count=count, mask=places,
            **moments, **parameters, **run.options(),
        )  # fmt: skip
        run.compare(arena, buffer, parameters, "dx", definition, dtype)

    gradient(statistics, count, places, definition)
    if mask is not None:
        return
    definition = BatchNorm(x, gamma, beta, dy, axis=axis, epsilon=EPSILON, moments=(mean, variance))
    arena, buffer = run.guarded(nothing)
    checker.calls += 1
    kernels.batch_norm_inference(
        run.put(x), *(device.put(each) for each in (gamma, beta, mean, variance)), y=run.view(arena, buffer),
        axis=axis, epsilon=EPSILON, stream=device.stream(),
    )  # fmt: skip
    run.compare(arena, buffer, {}, "y", definition, dtype)
    inverse = (1 / np.sqrt(variance.astype(np.float64) + EPSILON)).astype(run.statistic)
    moments = {"mean": mean, "rest": np.zeros_like(mean), "inverse": inverse}
    gradient({each: device.put(array) for each, array in moments.items()}, None, None, definition)


def merge(checker: Checker, channels: int, dtype: str, moving_dtype: str) -> None:
    """Checks a window of two calls, and a call without a window."""
    device, rng = checker.device, checker.rng
    name = f"merge of {channels} channels, {dtype}, moving {moving_dtype}"
    batches = [rng.normal(i, 1 + i, (size, channels)) for i, size in enumerate((5, 8))]
    window = device.put(np.array([0, 0, 2])), device.put(np.full((2, channels), np.nan))
    moving = [device.put(np.full(channels, each, moving_dtype)) for each in (8, 2)]
    arrays = []
    for batch in batches:
        mean = batch.mean(0).astype(dtype)
        moments = np.array([len(batch)]), mean, (batch.mean(0) - mean).astype(dtype), batch.var(0).astype(dtype)
        arrays.append([device.put(each) for each in moments])
        checker.calls += 1
        device.kernels.merge_moments(arrays[-1], window=window, moving=moving, momentum=0.25, stream=device.stream())
    together = np.concatenate(batches)
    expected = [8 * 0.25 + together.mean(0) * 0.75, 2 * 0.25 + together.var(0) * 0.75]
    checker.expect(f"{name}: counters", device.get(window[0]).tolist() == [0, 0, 2])
    same = all(np.allclose(device.get(a), e, rtol=1e-5, atol=1e-5) for a, e in zip(moving, expected, strict=True))
    checker.expect(f"{name}: moving statistics", same)
    checker.calls += 1
    device.kernels.merge_moments(arrays[0], moving=moving, momentum=0.0, stream=device.stream())
    expected = [batches[0].mean(0), batches[0].var(0)]
    same = all(np.allclose(device.get(a), e, rtol=1e-5, atol=1e-5) for a, e in zip(moving, expected, strict=True))
    checker.expect(f"{name}: moving statistics of a batch", same)


def merge_if_finite(checker: Checker, channels: int, dtype: str) -> None:
    """Checks that a batch with a value that is not finite counts as none."""
    device = checker.device
    name = f"merge of {channels} channels, {dtype}, one of them not finite"
    window = device.put(np.array([0, 0, 9])), device.put(np.full((2, channels), np.nan))
    for i in range(3):  # moments that are finite are in the middle
        values = [np.ones(channels, dtype) for _ in range(3)]
        if i != 1:
            values[i][channels - 1] = np.nan
        batch = [device.put(each) for each in (np.array([7]), *values)]
        checker.calls += 1
        device.kernels.merge_moments(batch, window=window, only_finite=True, stream=device.stream())
        checker.expect(f"{name}: counters", device.get(window[0]).tolist() == [0 if i == 0 else 7, i + 1, 9])
    checker.expect(f"{name}: moments", device.get(window[1]).tolist() == [[2.0] * channels, [7.0] * channels])


def windows_of(checker: Checker) -> tuple[int, int]:
    """How many windows to take, more than one launch does, and how many channels each has more than the one before."""
    return checker.some((50, 37), (50, 37), (38, 2))


def add(checker: Checker, dtype: str, *, flag: bool | None) -> None:
    """Checks that many windows get the bits of one merge after another. Every fourth batch has no values."""
    device, rng = checker.device, checker.rng
    count, more = windows_of(checker)
    name = f"{count} windows, {dtype}, applies {flag}"
    lists: list[list[list[Any]]] = [[], []]
    batches = []
    for i in range(count):
        channels = 1 + more * i
        moments = [rng.normal(0, 1, channels).astype(dtype) for _ in range(3)]
        moments[2] = np.abs(moments[2]) if i % 4 else np.full(channels, np.nan, dtype)
        batches.append([device.put(each) for each in (np.array([7 * (i % 4)]), *moments)])
        held = rng.normal(0, 1, (2, channels))
        for windows in lists:
            windows.append([device.put(np.array([10 * (i % 3), 2, 9])), device.put(held)])
    if flag is not False:
        for batch, window in zip(batches, lists[0], strict=True):
            device.kernels.merge_moments(batch, window=window, stream=device.stream())
    applies = True if flag is None else device.put(np.array([flag]))
    checker.calls += 1
    device.kernels.add_to_windows(batches, lists[1], applies=applies, stream=device.stream())
    for i, windows in enumerate(zip(*lists, strict=True)):
        (counters, moments), (found, added) = ([device.get(each) for each in window] for window in windows)
        checker.expect(f"{name}: counters of window {i}", np.array_equal(counters, found))
        checker.expect(f"{name}: moments of window {i}", np.array_equal(moments, added))


def end(checker: Checker, dtype: str, *, moves: bool, flag: bool | None) -> None:
    """Checks windows of many sizes that end together; every third one is empty."""
    device = checker.device
    count, more = windows_of(checker)
    name = f"end of {count} windows, moving {dtype if moves else 'nothing'}, applies {flag}"
    values = [10 * (i % 3) for i in range(count)]
    counters = [device.put(np.array([each, 2, 9])) for each in values]
    moments = [device.put(np.full((2, 1 + more * i), float(i) if i % 3 else np.nan)) for i in range(count)]
    moving = [[device.put(np.full(1 + more * i, old, dtype)) for i in range(count)] for old in (8, 2)]
    momenta = [i / count for i in range(count)]
    settings = {"moving_means": moving[0], "moving_variances": moving[1], "momenta": momenta} if moves else {}
    applies = True if flag is None else device.put(np.array([flag]))
    checker.calls += 1
    device.kernels.end_windows(counters, moments, **settings, applies=applies, stream=device.stream())
    ended = flag is not False
    expected = [[0, 0, 9] if ended else [each, 2, 9] for each in values]
    checker.expect(f"{name}: counters", [device.get(each).tolist() for each in counters] == expected)
    for old, arrays, targets in zip(
        (8, 2), moving, (range(count), [i / (each or 1) for i, each in enumerate(values)]), strict=True
    ):
        for i, (array, target) in enumerate(zip(arrays, targets, strict=True)):
            share = 1 - momenta[i] if moves and ended and values[i] else 0
            same = np.allclose(device.get(array), old + (target - old) * share, rtol=1e-6)
            checker.expect(f"{name}: statistics of window {i}", same)


def check(checker: Checker) -> None:
    """Runs all checks of this file."""
    rng = checker.rng
    for dtype in checker.some(TYPES, TYPES, ["float16", "float32"]):
        for i, (shape, axis, masked) in enumerate(checker.some(LAYOUTS, LAYOUTS, FEWEST_LAYOUTS)):
            x = narrow(rng.normal(0.5, 2.0, shape), dtype)
            mask = rng.random(shape[:-1]) < 0.7 if masked else None
            name = f"batch norm, {shape} axis {axis}{', masked' * masked}, {dtype}"
            batch_norm(checker, name, x, dtype, axis, mask, offset=i % 2)
    for channels in checker.some(CHANNELS, CHANNELS, CHANNELS[2:3]):
        for dtype in TYPES[2:]:
            for moving_dtype in TYPES[2:]:
                merge(checker, channels, dtype, moving_dtype)
            merge_if_finite(checker, channels, dtype)
    ends = [(dtype, flag) for dtype in TYPES[2:] for flag in (None, True, False)]
    for dtype, flag in checker.some(ends, ends, [("float32", True)]):
        add(checker, dtype, flag=flag)
    for dtype, flag in checker.some(ends, ends, [("float64", None)]):
        end(checker, dtype, moves=True, flag=flag)
    end(checker, TYPES[2], moves=False, flag=checker.some(True, True, False))
