"""Measures passes: in this process on a GPU, in a process of its own on a CPU.

On a GPU an allocation that fails is an error, and TensorFlow's allocator counts. On a CPU a process that takes too much
is killed, and TensorFlow keeps memory that it has used, so that later measurements in the same process see less than
they take. A process of its own starts from nothing, is watched, and may be killed without harm.
"""

import contextlib
import os
import pickle
import tempfile
import threading
from pathlib import Path
from typing import Any, Protocol

import tensorflow as tf

from accumops.memory.device_memory import AllocatorMemory, DeviceMemory, ResidentMemory
from accumops.ops import get_backend
from accumops.planning.child_process import ChildProcess, ChildProcessFailed
from accumops.planning.loaded_pass import LoadedPass, Point
from accumops.planning.traced_pass import TracedPass

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
_EVERY = 0.01  # seconds between two looks at the memory of a process


class CannotMeasure(RuntimeError):
    """A pass cannot run where it was to be measured."""


class Measurer(Protocol):
    """Measures micro-batches of one pass. As a context manager it lets go of what it has loaded."""

    measured_by: str
    """Who counts the memory."""

    def __enter__(self) -> Any:
        """Starts, and returns itself."""

    def __exit__(self, *_: Any) -> None:
        """Lets go of what is loaded."""

    def measure(self, samples: int, allowed: int) -> Point | None:
        """Returns what a micro-batch takes; None if it takes more than is allowed.

        Args:
            samples: Samples a micro-batch.
            allowed: Bytes above variables and accumulators.

        Raises:
            CannotMeasure: If the pass cannot run.
        """


class InThisProcess:
    """Measures in this process.

    Args:
        traced: The pass.
        memory: Counts the memory.
    """

    def __init__(self, traced: TracedPass, memory: DeviceMemory) -> None:
        self.measured_by = memory.name
        self._traced, self._memory = traced, memory
        self._loaded: LoadedPass | None = None

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded = None

    def measure(self, samples: int, allowed: int) -> Point | None:
        """Returns what a micro-batch takes; None if it takes more than is allowed."""
        try:
            if self._loaded is None:
                self._loaded = LoadedPass(self._traced, self._memory)
            point = self._loaded.measure(samples)
        except tf.errors.ResourceExhaustedError:
            return None
        return point if point.peak <= allowed else None


class InAnotherProcess:
    """Measures in a process of its own, which is killed when it takes more than is allowed.

    Args:
        traced: The pass.
    """

    measured_by = ResidentMemory.name

    def __init__(self, traced: TracedPass) -> None:
        self._process: ChildProcess | None = None
        self._traced = traced
        self._at_start = 0

    def __enter__(self) -> "InAnotherProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.__exit__()
            self._process = None

    def measure(self, samples: int, allowed: int) -> Point | None:
        """Returns what a micro-batch takes; None if it takes more than is allowed."""
        if self._process is None:
            self._process = ChildProcess({**_ENVIRONMENT, "ACCUMOPS_BACKEND": get_backend()})
            self._at_start = self._load(self._process)
        watch = _Watch(self._process.pid, self._at_start + allowed)
        try:
            with watch:
                point = Point(*self._process.call(measure_here, samples=samples))
        except ChildProcessFailed as error:
            if watch.has_killed or self._process.was_killed:
                self.__exit__()
                return None
            if "ResourceExhaustedError" in str(error):
                return None
            raise CannotMeasure(str(error)) from error
        return point if point.peak <= allowed else None

    def _load(self, process: ChildProcess) -> int:
        threads = tf.config.threading
        settings = {
            "inter": threads.get_inter_op_parallelism_threads(),
            "intra": threads.get_intra_op_parallelism_threads(),
        }
        handle, path = tempfile.mkstemp(prefix="accumops_pass_")
        try:
            with os.fdopen(handle, "wb") as file:
                pickle.dump(self._traced, file)
            return int(process.call(load_here, path=path, **settings))
        except ChildProcessFailed as error:
            raise CannotMeasure(str(error)) from error
        finally:
            os.unlink(path)


def measurer_of(traced: TracedPass, device: str) -> Measurer:
    """Returns what measures a pass on a device.

    Args:
        traced: The pass.
        device: `"CPU:0"` or the name of a GPU.
    """
    if device != "CPU:0":
        return InThisProcess(traced, AllocatorMemory(device))
    return InThisProcess(traced, ResidentMemory()) if traced.stays_here else InAnotherProcess(traced)


_loaded: list[LoadedPass] = []  # in the process that measures


def load_here(path: str, inter: int, intra: int) -> int:
    """Loads a pass in the process that measures, and returns the bytes of that process.

    Args:
        path: The file of the pass.
        inter: Threads that run operations.
        intra: Threads within an operation.
    """
    # Where memory runs out, Linux kills the process with the highest score.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    tf.config.threading.set_inter_op_parallelism_threads(inter)
    tf.config.threading.set_intra_op_parallelism_threads(intra)
    with open(path, "rb") as file:
        _loaded[:] = [LoadedPass(pickle.load(file), ResidentMemory())]
    return ResidentMemory().now()


def measure_here(samples: int) -> Any:
    """Measures in the process that has loaded a pass.

    Args:
        samples: Samples a micro-batch.
    """
    return list(_loaded[0].measure(samples))


class _Watch:
    """Kills a process that takes more memory than it may, while a block runs.

    Args:
        pid: The process.
        limit: Bytes.
    """

    def __init__(self, pid: int, limit: int) -> None:
        self._memory, self._pid, self._limit = ResidentMemory(pid), pid, limit
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.has_killed = False

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            try:
                now = self._memory.now()
            except (OSError, StopIteration):  # the process has ended
                return
            if now > self._limit:
                self.has_killed = True
                os.kill(self._pid, 9)
                return
