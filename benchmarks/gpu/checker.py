"""What the checks of the kernels share: buffers with guarded ends, and a record of failures."""

from typing import Any, TypeVar

import numpy as np
from backend import Host
from kernel_definitions import narrow

T = TypeVar("T")


class Arena:
    """Arrays in one buffer of bytes. All bits between the arrays are set."""

    def __init__(self, arrays: list[np.ndarray], offsets: list[int]) -> None:
        self.spans = []
        end = 0
        for array, offset in zip(arrays, offsets, strict=True):
            begin = -(-end // 16) * 16 + offset * array.itemsize
            end = begin + array.nbytes
            self.spans.append((slice(begin, end), array.dtype))
        self.bytes = np.full(end, 0xFF, np.uint8)
        for view, array in zip(self.views(self.bytes), arrays, strict=True):
            view[:] = array

    def views(self, buffer: Any) -> list[Any]:
        """Returns the arrays within a buffer that has this layout."""
        return [buffer[span].view(dtype) for span, dtype in self.spans]


class Placed:
    """Arrays on a device: each in a buffer of its own, or all together in one."""

    def __init__(self, device: Host, arrays: list[np.ndarray], offsets: list[int], together: bool) -> None:
        self._device = device
        groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(arrays))]
        self._arenas = [Arena(arrays[group], offsets[group]) for group in groups]
        self._buffers = [device.put(arena.bytes) for arena in self._arenas]

    def views(self) -> list[Any]:
        """Returns the arrays."""
        return [view for arena, buffer in zip(self._arenas, self._buffers, strict=True) for view in arena.views(buffer)]

    def hold(self, expected: list[np.ndarray]) -> bool:
        """Returns whether the arrays equal `expected` bit for bit, and nothing beside them was written."""
        views = [view for arena in self._arenas for view in arena.views(arena.bytes)]
        for view, array in zip(views, expected, strict=True):
            view[:] = array
        found = map(self._device.get, self._buffers)
        return all(np.array_equal(f, arena.bytes) for f, arena in zip(found, self._arenas, strict=True))


class Checker:
    """A device, the random numbers of the cases, and a record of failures. `cases` is "all", "few" or
    "fewest": still every kernel, with few blocks.
    """

    def __init__(self, device: Host, *, cases: str = "all") -> None:
        self.device = device
        self.cases = cases
        self.rng = np.random.default_rng(0)
        self.calls = 0
        self.failures: list[str] = []

    def some(self, all_cases: T, few: T, fewest: T) -> T:
        """Returns one of three values, as `cases` says."""
        return {"all": all_cases, "few": few, "fewest": fewest}[self.cases]

    def expect(self, what: str, equal: bool) -> None:
        """Records a failure unless the comparison succeeded."""
        if not equal:
            self.failures.append(what)
            print(f"WRONG: {what}", flush=True)

    def numbers(self, dtype: str, size: int) -> np.ndarray:
        """Returns random numbers, with a negative zero and, but for float64, a subnormal number among them."""
        values = self.rng.standard_normal(size)
        values[1:3] = (-0.0, 1e-40 if dtype in ("float32", "bfloat16") else 6e-8)[: max(0, size - 1)]
        return narrow(values, dtype)
