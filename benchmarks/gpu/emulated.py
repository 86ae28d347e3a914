"""The emulated GPU: arrays are in the CPU's memory, and the CUDA kernels run there, under sanitizers.

`make emulated` builds the kernels for it.
"""

import ctypes
import weakref
from types import ModuleType
from typing import Any

import numpy as np
from backend import Host


class EmulatedArray:
    """An array of the emulated GPU, or a view of one. NumPy cannot read it by mistake."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    dtype = property(lambda self: self.array.dtype)
    shape = property(lambda self: self.array.shape)
    size = property(lambda self: self.array.size)
    nbytes = property(lambda self: self.array.nbytes)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: Any) -> "EmulatedArray":
        return EmulatedArray(self.array[key])

    def view(self, dtype: Any) -> "EmulatedArray":
        """Returns the same bytes as another type."""
        return EmulatedArray(self.array.view(dtype))

    def reshape(self, *shape: Any) -> "EmulatedArray":
        """Returns the same elements in another shape."""
        return EmulatedArray(self.array.reshape(*shape))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.array.shape,
            "typestr": "|V2" if self.array.dtype.kind == "V" else self.array.dtype.str,
            "data": (self.array.ctypes.data, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


class Emulated(Host):
    """The emulated GPU as a device. Kernels run when a result is read, in an order that `seed` chooses."""

    name = "emulated"

    def __init__(self, kernels: ModuleType, seed: int) -> None:
        super().__init__(kernels)
        assert kernels.__spec__ is not None
        self._library = ctypes.CDLL(kernels.__spec__.origin)
        self._library.emulated_cuda_allocate.restype = ctypes.c_void_p
        self._library.emulated_cuda_allocate.argtypes = [ctypes.c_size_t]
        self._library.emulated_cuda_free.argtypes = [ctypes.c_void_p]
        self._library.emulated_cuda_seed(seed)
        # A GPU's allocator returns memory in stream order; here it must stay until the kernels have run.
        self._in_use: list[Any] = []

    def empty(self, size: int, dtype: Any) -> EmulatedArray:  # noqa: D102
        count = np.dtype(dtype).itemsize * size
        address = self._library.emulated_cuda_allocate(count)
        memory = (ctypes.c_char * count).from_address(address)
        weakref.finalize(memory, self._library.emulated_cuda_free, address)
        array = EmulatedArray(np.ndarray(size, dtype, memory))
        self._in_use.append(array)
        return array

    def put(self, array: np.ndarray) -> EmulatedArray:  # noqa: D102
        result = self.empty(array.size, array.dtype).reshape(array.shape)
        result.array[...] = array
        return result

    def get(self, array: EmulatedArray) -> np.ndarray:  # noqa: D102
        self.synchronize()
        return array.array.copy()

    def copy(self, to: EmulatedArray, source: EmulatedArray) -> None:  # noqa: D102
        self.synchronize()
        to.array[...] = source.array

    def poison(self, array: EmulatedArray) -> None:  # noqa: D102
        self.synchronize()
        array.array.view(np.uint8)[...] = 0xFF

    def scalar(self, value: float, dtype: Any) -> EmulatedArray:  # noqa: D102
        return self.put(np.array([value], dtype))

    def synchronize(self) -> None:
        """Runs all that is enqueued."""
        self._library.emulated_cuda_synchronize()
        self._in_use.clear()
