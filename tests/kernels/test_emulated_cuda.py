"""The CUDA kernels on a GPU that is emulated on the CPU, under sanitizers. `make emulated` builds them."""

import re
from pathlib import Path

import pytest
import sanitized

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulated"

pytestmark = pytest.mark.skipif(
    not BUILD.is_dir(), reason="the emulated kernels are not built: `make emulated` builds them, from a checkout"
)

DEFECTS = {
    "no barrier": (1, "thread", "data race"),
    "a barrier that a thread does not reach": (2, "address", r"some threads wait at __syncthreads\(\), others"),
    "a lane that its mask lacks": (3, "address", "a lane calls with a mask that lacks it"),
    "a mask with a lane that has ended": (4, "address", "a lane of a warp operation's mask has ended"),
    "different warp operations": (5, "address", "lanes of one mask call different warp operations"),
    "shared memory, beyond its end": (6, "address", "use-after-poison"),
    "device memory, beyond its end": (7, "address", "heap-buffer-overflow"),
    "device memory, before its begin": (8, "address", "heap-buffer-overflow"),
    "shared memory that nobody has set": (9, "address", "the sum is nan"),
    "two blocks that write the same": (10, "thread", "data race"),
    "a misaligned access": (11, "address", "misaligned address"),
    "device memory that is gone": (12, "address", "heap-use-after-free"),
    "host memory that is gone": (13, "address", "heap-use-after-free"),
    "streams that are not ordered": (14, "address", "heap-use-after-free|the sum is nan"),
}
RUN_BROKEN_KERNEL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.run_broken_kernel.restype = ctypes.c_float
for seed in range(4):
    library.emulated_cuda_seed(seed)
    result = library.run_broken_kernel(int(sys.argv[2]))
    if result != 64:
        raise SystemExit(f"the sum is {result}")
"""


def run(sanitizer, *arguments):
    return sanitized.run(sanitizer, BUILD / sanitizer, *arguments)


@pytest.mark.parametrize("sanitizer", sanitized.LIBRARIES)
def test_a_sound_kernel(sanitizer):
    status, output = run(sanitizer, "-c", RUN_BROKEN_KERNEL, BUILD / sanitizer / "broken_kernels.so", 0)
    assert status == 0, output


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_kernel_is_found(defect):
    number, sanitizer, message = DEFECTS[defect]
    status, output = run(sanitizer, "-c", RUN_BROKEN_KERNEL, BUILD / sanitizer / "broken_kernels.so", number)
    assert status != 0
    assert re.search(message, output), output


@pytest.mark.parametrize(
    ("sanitizer", "seed", "cases"),
    [
        *(("address", seed, "fewest") for seed in (1, 2, 3)),
        ("thread", 1, "fewest"),
        *(pytest.param(sanitizer, 1, "few", marks=pytest.mark.exhaustive) for sanitizer in ("address", "thread")),
    ],
)
def test_the_kernels(sanitizer, seed, cases):
    script = ROOT / "benchmarks" / "gpu" / "sanitize.py"
    status, output = run(sanitizer, script, "--device", "emulated", "--seed", seed, "--cases", cases)
    assert status == 0, output
