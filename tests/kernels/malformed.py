"""Arrays that a kernel has to reject, and the check that it does."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

LIST = "must be a sequence of arrays, got {}; pass a list, also for one array"
NO_ARRAY = "must be an array, got {}; pass a NumPy array, or an object with __array_interface__"
LAYOUT = "is not C-contiguous, or not aligned to its elements"


def floats(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def flags(size):
    return np.ones(size, np.bool_)


def unaligned(dtype=np.float32, size=3):
    return np.frombuffer(bytearray(size * np.dtype(dtype).itemsize + 1), dtype, size, offset=1)


def read_only(values):
    values = values.copy()
    values.flags.writeable = False
    return values


def cuda_like(address=4096, shape=(3,), typestr="<f4", **entries):
    return SimpleNamespace(
        __cuda_array_interface__={"data": (address, False), "shape": shape, "typestr": typestr, "version": 3, **entries}
    )


def check_raises(call, arrays, error, message):
    """Checks that a call raises this error and writes to none of `arrays`, which are all it could write to."""
    before = [a.copy() for a in arrays]
    with pytest.raises(error, match=re.escape(message)):
        call()
    for now, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(now, then)
