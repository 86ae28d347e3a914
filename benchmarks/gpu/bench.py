"""Buffers of known numbers, and times of calls and of copies, on one device."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from backend import Cuda, Host
from kernel_definitions import narrow

ALIGNMENT = 64  # elements between the starts of tensors: TensorFlow aligns to 64 bytes, CUDA's own allocator to 256
PATTERN_SIZE = (1 << 22) - 3  # odd, so that no two tensors begin alike
REPEATS = 30
GRAPH_SECONDS = 2e-3  # at least, so that starting a replay does not count
GRAPH_CALLS = 512  # at most
LARGE_COPY = 1 << 32  # bytes: larger ones are as fast, and not measured

Calls = list[Callable[[], None]]


class Case(Protocol):
    """Something to time; the calls must copy, allocate and launch nothing but the kernel."""

    name: str
    share: float | None  # of a copy's speed: what to reach
    microseconds: float | None  # what to stay below

    def shrink(self) -> "Case":
        """A small part of it, to try the script without a GPU."""

    def prepare(self, bench: "Bench") -> tuple[Calls, int]:
        """Verified calls, and the bytes that each has to move."""


class WrongResultError(Exception):
    """A kernel computed something else than NumPy."""


def lay_out(sizes: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Where tensors begin and end in one buffer, and its size."""
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    return [(int(start), int(start) + size) for start, size in zip(starts, sizes, strict=False)], int(starts[-1])


def shrink_sizes(sizes: list[int]) -> list[int]:
    """A thousandth of each."""
    return [-(-size // 1000) for size in sizes]


class Pattern:
    """Random numbers that fill buffers over and over, so that the host knows every element without a copy."""

    def __init__(self, device: Host, seed: int, dtype: str, positive: bool) -> None:
        numbers = np.random.default_rng(seed).standard_normal(PATTERN_SIZE, np.float32)
        self.host = narrow(np.abs(numbers) if positive else numbers, dtype)
        self._device = device
        self._pattern = device.put(self.host)

    def array(self, size: int) -> Any:
        """A flat array on the device, filled."""
        result = self._device.empty(size, self.host.dtype)
        for begin in range(0, size, PATTERN_SIZE):
            part = result[begin : begin + PATTERN_SIZE]
            self._device.copy(part, self._pattern[: part.size])
        return result

    def at(self, indices: np.ndarray) -> np.ndarray:
        """What the array holds there."""
        return self.host[indices % PATTERN_SIZE]


def require_same_bits(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Compares arrays of float32."""
    wrong = np.flatnonzero(actual.view(np.uint32) != expected.view(np.uint32))
    if len(wrong):
        found, wanted = actual[wrong[0]], expected[wrong[0]]
        raise WrongResultError(f"{what}: {len(wrong)} of {actual.size} wrong, the first {found} instead of {wanted}")


def verify_tensors(
    device: Host,
    array: Any,
    spans: list[tuple[int, int]],
    before: Callable[[np.ndarray], np.ndarray],
    after: Callable[[int, np.ndarray], np.ndarray],
) -> None:
    """Compares the beginning, the middle and the end of up to 200 tensors, and what lies behind them.

    `before` tells what an array held at some indices, `after` what a tensor has there now.
    """
    for k in np.unique(np.linspace(0, len(spans) - 1, 200).astype(int)):
        begin, end = spans[k]
        for at in {begin, max(begin, (begin + end) // 2), max(begin, end - 256)}:
            found = device.get(array[at : at + 300])
            where = np.arange(at, at + found.size)
            inside = where < end
            known = inside | (where < -(-end // ALIGNMENT) * ALIGNMENT)  # what follows is the next tensor's
            expected = np.where(inside, after(k, where), before(where))
            require_same_bits(f"tensor {k}", found[known], expected[known])


class Bench:
    """Prepares buffers and times calls on one device."""

    def __init__(self, device: Host) -> None:
        self.device = device
        self.small = device.name == "cpu"
        self.cupy = device.cupy if isinstance(device, Cuda) else None
        self.cache_bytes = 1 << 20
        if self.cupy:
            self.cache_bytes = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.Device().id)["l2CacheSize"]
        self._patterns: dict[tuple[int, str, bool], Pattern] = {}
        self._copies: dict[int, float] = {}
        self.launch_seconds = 2e-6
        self.copy_rate = 0.0
        self.copy_rate = self.measure_copy_rate()

    def pattern(self, seed: int, dtype: str, *, positive: bool = False) -> Pattern:
        """Made once."""
        key = seed, dtype, positive
        if key not in self._patterns:
            self._patterns[key] = Pattern(self.device, *key)
        return self._patterns[key]

    def sets(self, touched_bytes: int) -> int:
        """How many sets of buffers to rotate over, that between two uses of one lie twice the cache's bytes."""
        return min(1 + math.ceil(2 * self.cache_bytes / touched_bytes), GRAPH_CALLS)

    def free_bytes(self) -> int:
        """Device memory that can be had."""
        gc.collect()
        if not self.cupy:
            return 1 << 30
        self.cupy.get_default_memory_pool().free_all_blocks()
        return self.cupy.cuda.runtime.memGetInfo()[0]

    def require_memory(self, needed: int) -> None:
        """Raises MemoryError unless there is so much, and some to spare."""
        free = self.free_bytes()
        if needed > 0.95 * free:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free")

    def time(self, calls: Calls, estimate: float, *, graph: bool = True) -> list[float]:
        """Seconds a call, of each repeat. All calls have been made before, and take about `estimate` seconds each."""
        rounds = math.ceil(GRAPH_SECONDS / (len(calls) * estimate))
        calls = calls * max(1, min(rounds, GRAPH_CALLS // len(calls)))

        def run() -> None:
            for call in calls:
                call()

        if not self.cupy:
            clock = time.perf_counter
            starts = [(clock(), run(), clock()) for _ in range(5)]
            return [(end - begin) / len(calls) for begin, _, end in starts]
        cuda = self.cupy.cuda
        stream = cuda.get_current_stream()
        if graph:
            stream.begin_capture()
            try:
                run()
            finally:
                captured = stream.end_capture()
            run = captured.launch
        for _ in range(3):
            run()
        events = [(cuda.Event(), cuda.Event()) for _ in range(REPEATS)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        stream.synchronize()
        return [cuda.get_elapsed_time(begin, end) / 1e3 / len(calls) for begin, end in events]

    def copy_seconds(self, total_bytes: int) -> float:
        """The time of a copy that reads and writes so many bytes together; of a graph and plain calls the better."""
        if self.copy_rate and total_bytes > LARGE_COPY:
            return total_bytes / self.copy_rate
        half = max(1, total_bytes // 2)
        if half not in self._copies:
            count = self.sets(2 * half)
            self.require_memory(2 * half * count)
            buffers = [(self.device.empty(half, np.uint8), self.device.empty(half, np.uint8)) for _ in range(count)]
            for pair in buffers:
                for buffer in pair:
                    self.device.poison(buffer)
            calls = [lambda pair=pair: self.device.copy(*pair) for pair in buffers]
            estimate = 2e-6 + 2 * half / 4e12
            times = [self.time(calls, estimate, graph=graph) for graph in (True, False)]
            self._copies[half] = min(statistics.median(t) for t in times)
        return self._copies[half]

    def measure_copy_rate(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        total = 1 << 26 if self.small else min(LARGE_COPY, self.free_bytes() // 8)
        return total / self.copy_seconds(total)
