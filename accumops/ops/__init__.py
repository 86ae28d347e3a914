"""The ops: each one function, fused where the compiled library runs and plain TensorFlow elsewhere."""

from accumops.ops import reference
from accumops.ops.accumulate import accumulate
from accumops.ops.library import LibraryError, build_info, get_backend, set_backend

__all__ = ["accumulate", "reference", "set_backend", "get_backend", "build_info", "LibraryError"]
