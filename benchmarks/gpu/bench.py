"""Fills buffers with known numbers, and times calls and copies, on one device."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from backend import Cuda, Host
from kernel_definitions import narrow

ALIGNMENT = 64  # tensors start at multiples of 64 elements; TensorFlow aligns to 64 bytes, CUDA's allocator to 256
PATTERN_SIZE = (1 << 22) - 3  # odd, so that no two tensors begin alike
REPEATS = 30
GRAPH_SECONDS = 2e-3  # the shortest graph: next to it the start of a replay does not count
GRAPH_CALLS = 512  # the most calls in a graph
LARGE_COPY = 1 << 32  # bytes; larger copies are taken to be as fast, and not measured

Calls = list[Callable[[], None]]


class Case(Protocol):
    """Something to time. Its calls must launch the kernel, and copy, allocate and launch nothing else."""

    name: str
    share: float | None  # the share of a copy's speed to reach
    microseconds: float | None  # the time to stay below

    def shrink(self) -> "Case":
        """Returns a small part of the case, to try the script without a GPU."""

    def prepare(self, bench: "Bench") -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""


class WrongResultError(Exception):
    """The result of a kernel differs from NumPy's."""


def lay_out(sizes: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Returns where tensors begin and end in one buffer, and the buffer's size."""
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    return [(int(start), int(start) + size) for start, size in zip(starts, sizes, strict=False)], int(starts[-1])


def shrink_sizes(sizes: list[int]) -> list[int]:
    """Returns a thousandth of each size."""
    return [-(-size // 1000) for size in sizes]


class Pattern:
    """Random numbers that repeat throughout a buffer, so that the host knows every element without a copy."""

    def __init__(self, device: Host, seed: int, dtype: str, positive: bool) -> None:
        numbers = np.random.default_rng(seed).standard_normal(PATTERN_SIZE, np.float32)
        self.host = narrow(np.abs(numbers) if positive else numbers, dtype)
        self._device = device
        self._pattern = device.put(self.host)

    def array(self, size: int) -> Any:
        """Returns a flat array on the device that is filled with the numbers."""
        result = self._device.empty(size, self.host.dtype)
        for begin in range(0, size, PATTERN_SIZE):
            part = result[begin : begin + PATTERN_SIZE]
            self._device.copy(part, self._pattern[: part.size])
        return result

    def at(self, indices: np.ndarray) -> np.ndarray:
        """Returns what such an array holds at these indices."""
        return self.host[indices % PATTERN_SIZE]


def require_same_bits(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Raises WrongResultError unless two float32 arrays are equal bit by bit."""
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
    """Compares the beginning, the middle and the end of up to 200 tensors, and the gaps behind them.

    `before` returns what the array held at some indices, `after` what a tensor must hold there now.
    """
    for k in np.unique(np.linspace(0, len(spans) - 1, 200).astype(int)):
        begin, end = spans[k]
        for at in {begin, max(begin, (begin + end) // 2), max(begin, end - 256)}:
            found = device.get(array[at : at + 300])
            where = np.arange(at, at + found.size)
            inside = where < end
            known = inside | (where < -(-end // ALIGNMENT) * ALIGNMENT)  # the next tensor starts after these
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
        """Returns a pattern, which is made once."""
        key = seed, dtype, positive
        if key not in self._patterns:
            self._patterns[key] = Pattern(self.device, *key)
        return self._patterns[key]

    def sets(self, touched_bytes: int) -> int:
        """Returns how many sets of buffers to rotate over: twice the cache's bytes lie between two uses of a set."""
        return min(1 + math.ceil(2 * self.cache_bytes / touched_bytes), GRAPH_CALLS)

    def free_bytes(self) -> int:
        """Returns the free device memory."""
        gc.collect()
        if not self.cupy:
            return 1 << 30
        self.cupy.get_default_memory_pool().free_all_blocks()
        return self.cupy.cuda.runtime.memGetInfo()[0]

    def require_memory(self, needed: int) -> None:
        """Raises MemoryError unless this many bytes are free, and some to spare."""
        free = self.free_bytes()
        if needed > 0.95 * free:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free")

    def time(self, calls: Calls, estimate: float, *, graph: bool = True) -> list[float]:
        """Returns the seconds of a call in each repeat.

        All calls must have been made once before. Each takes about `estimate` seconds.
        """
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
        """Returns the time of a copy that reads and writes this many bytes in all, by a graph or plain calls."""
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
        """Returns the bytes a second, read and written, of a large copy."""
        total = 1 << 26 if self.small else min(LARGE_COPY, self.free_bytes() // 8)
        return total / self.copy_seconds(total)
