"""What these scripts share: the compiled kernels, and devices that hold arrays.

Run as a program, it prints the GPU's architecture for CMake, or says why no GPU can be used.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# kernel_definitions.py there defines what the kernels compute, for the tests and for these scripts.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels"))


def load_kernels() -> ModuleType:
    """Loads the pybind11 module from ACCUMOPS_KERNELS_DIR, or the one that `make build` leaves.

    It is loaded by its path, because an import of its package would import TensorFlow.
    """
    in_place = Path(__file__).parents[2] / "accumops" / "ops"
    directory = Path(os.environ.get("ACCUMOPS_KERNELS_DIR") or in_place)
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"_kernels{suffix}"
        if path.is_file():
            loader = importlib.machinery.ExtensionFileLoader("_kernels", str(path))
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_kernels", loader))
            loader.exec_module(module)
            return module
    raise SystemExit(
        f"{directory} holds no _kernels module for this Python; run kernels.sh, or set ACCUMOPS_KERNELS_DIR"
    )


class Host:
    """The CPU: arrays are NumPy's and the CPU's kernels run. It serves to try a script without a GPU."""

    name = "cpu"

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels

    def empty(self, size: int, dtype: Any) -> Any:
        """Returns an array that is not initialized."""
        return np.empty(size, dtype)

    def put(self, array: np.ndarray) -> Any:
        """Returns a copy of an array on the device."""
        return array.copy()

    def get(self, array: Any) -> np.ndarray:
        """Returns a copy of an array on the host."""
        return array.copy()

    def copy(self, to: Any, source: Any) -> None:
        """Copies a contiguous array into another of its size and type."""
        to[...] = source

    def poison(self, array: Any) -> None:
        """Sets all bits of a contiguous array; floats then are NaN."""
        array.view(np.uint8)[...] = 0xFF

    def scalar(self, value: float, dtype: Any) -> Any:
        """Returns a number in the form that the kernels read fastest."""
        return np.dtype(dtype).type(value).item()

    def stream(self) -> int:
        """Returns the stream to run on."""
        return 0


class Cuda(Host):
    """The GPU: arrays are CuPy's, and work goes to CuPy's current stream."""

    name = "cuda"

    def __init__(self, kernels: ModuleType, cupy: Any) -> None:
        super().__init__(kernels)
        status = kernels.cuda_status()
        if status["error"]:
            raise SystemExit(f"the kernels module cannot use the GPU: {status['error']}")
        self.cupy = cupy

    def empty(self, size: int, dtype: Any) -> Any:  # noqa: D102
        return self.cupy.empty(size, dtype)

    def put(self, array: np.ndarray) -> Any:  # noqa: D102
        return self.cupy.asarray(array)

    def get(self, array: Any) -> np.ndarray:  # noqa: D102
        return self.cupy.asnumpy(array)

    def copy(self, to: Any, source: Any) -> None:  # noqa: D102
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(to.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, self.stream())

    def poison(self, array: Any) -> None:  # noqa: D102
        self.cupy.cuda.runtime.memsetAsync(array.data.ptr, 0xFF, array.nbytes, self.stream())

    def scalar(self, value: float, dtype: Any) -> Any:  # noqa: D102
        return self.put(np.array([value], dtype))

    def stream(self) -> int:  # noqa: D102
        return self.cupy.cuda.get_current_stream().ptr


def import_cupy() -> Any:
    """Returns CuPy, if it has a GPU that it can use."""
    try:
        import cupy
    except ImportError as error:
        raise SystemExit(f"CuPy cannot be imported ({error}); install cupy-cuda13x") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise SystemExit(f"there is no GPU that CUDA can use: {error}") from None
    return cupy


def open_device(name: str, seed: int = 0) -> Host:
    """Returns the device called "cuda", "emulated" or "cpu". The seed is for the emulated GPU."""
    if name == "cpu":
        return Host(load_kernels())
    if name == "emulated":
        from emulated import Emulated

        return Emulated(load_kernels(), seed)
    cupy = import_cupy()
    return Cuda(load_kernels(), cupy)


if __name__ == "__main__":
    print(import_cupy().cuda.Device().compute_capability)
