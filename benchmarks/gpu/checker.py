"""What the checks of the kernels share: buffers whose ends are guarded, and a record of what went wrong."""

from typing import Any

import numpy as np
from backend import Host
from kernel_definitions import narrow


class Arena:
    """Arrays in one buffer of bytes; all bits between them are set."""

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
        """The arrays within a buffer that is laid out like this one."""
        return [buffer[span].view(dtype) for span, dtype in self.spans]


class Placed:
    """Arrays on a device: each in a buffer of its own, or all together in one."""

    def __init__(self, device: Host, arrays: list[np.ndarray], offsets: list[int], together: bool) -> None:
        self._device = device
        groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(arrays))]
        self._arenas = [Arena(arrays[group], offsets[group]) for group in groups]
        self._buffers = [device.put(arena.bytes) for arena in self._arenas]

    def views(self) -> list[Any]:
        """The arrays."""
        return [view for arena, buffer in zip(self._arenas, self._buffers, strict=True) for view in arena.views(buffer)]

    def hold(self, expected: list[np.ndarray]) -> bool:
        """Whether the arrays are these now, bit for bit, and nothing beside them was written."""
        views = [view for arena in self._arenas for view in arena.views(arena.bytes)]
        for view, array in zip(views, expected, strict=True):
            view[:] = array
        found = map(self._device.get, self._buffers)
        return all(np.array_equal(f, arena.bytes) for f, arena in zip(found, self._arenas, strict=True))


class Checker:
    """Runs cases on a device, and keeps what went wrong."""

    def __init__(self, device: Host) -> None:
        self.device = device
        self.rng = np.random.default_rng(0)
        self.calls = 0
        self.failures: list[str] = []

    def expect(self, what: str, equal: bool) -> None:
        """Notes a failure."""
        if not equal:
            self.failures.append(what)
            print(f"WRONG: {what}", flush=True)

    def numbers(self, dtype: str, size: int) -> np.ndarray:
        """Random numbers, a negative zero and a number that is subnormal in the halves and in float32."""
        values = self.rng.standard_normal(size)
        values[1:3] = (-0.0, 1e-40 if dtype in ("float32", "bfloat16") else 6e-8)[: max(0, size - 1)]
        return narrow(values, dtype)
