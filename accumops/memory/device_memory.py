"""The memory that is in use on a device, and the most that was."""

from pathlib import Path
from typing import Protocol

import tensorflow as tf


class DeviceMemory(Protocol):
    """Counts memory in bytes."""

    name: str
    """Who counts."""

    def now(self) -> int:
        """The bytes in use."""

    def forget_peak(self) -> None:
        """Has `peak` start anew."""

    def peak(self) -> int:
        """The most bytes in use since `forget_peak`."""


def memory_counter(device: str) -> DeviceMemory:
    """Returns what counts memory on a device: TensorFlow's allocator, or else the operating system.

    Args:
        device: The device's name, such as `"CPU:0"`.
    """
    try:
        return AllocatorMemory(device)
    except ValueError:  # the allocator does not count
        return ResidentMemory()


class AllocatorMemory:
    """What TensorFlow's allocator has given out: tensors, and what it wastes for them.

    Args:
        device: The device's name, such as `"GPU:0"`.

    Raises:
        ValueError: If the allocator of the device does not count.
    """

    def __init__(self, device: str) -> None:
        self.name = f"TensorFlow's allocator on {device}"
        self._device = device
        tf.config.experimental.get_memory_info(device)

    def now(self) -> int:
        """The bytes in use."""
        return tf.config.experimental.get_memory_info(self._device)["current"]

    def forget_peak(self) -> None:
        """Has `peak` start anew."""
        tf.config.experimental.reset_memory_stats(self._device)

    def peak(self) -> int:
        """The most bytes in use since `forget_peak`."""
        return tf.config.experimental.get_memory_info(self._device)["peak"]


class ResidentMemory:
    """A process's memory, as Linux counts it. It does not shrink when TensorFlow lets go of tensors.

    Args:
        pid: The process; None for this one.
    """

    name = "the operating system"

    def __init__(self, pid: int | None = None) -> None:
        self._folder = Path("/proc") / ("self" if pid is None else str(pid))

    def now(self) -> int:
        """The bytes in use."""
        return self._entry("VmRSS")

    def forget_peak(self) -> None:
        """Has `peak` start anew."""
        (self._folder / "clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes in use since `forget_peak`."""
        # getrusage's ru_maxrss is no use: it starts with the parent's memory at the fork.
        return self._entry("VmHWM")

    def _entry(self, name: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
