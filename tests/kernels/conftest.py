"""Fixtures of the kernel tests, which need neither TensorFlow nor an installed accumops.

The extension is loaded by its path, because importing accumops would import TensorFlow.
"""

import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def extension_directories() -> Iterator[Path]:
    if given := os.environ.get("ACCUMOPS_KERNELS_DIR"):
        yield Path(given)
        return
    yield Path(__file__).parents[2] / "accumops" / "ops"
    spec = importlib.util.find_spec("accumops")
    for location in spec.submodule_search_locations or () if spec else ():
        yield Path(location) / "ops"


@pytest.fixture(scope="session")
def extension_path() -> str:
    directories = list(extension_directories())
    for directory in directories:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (path := directory / f"_kernels{suffix}").is_file():
                return str(path)
    pytest.fail(
        f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]} is in none of {', '.join(map(str, directories))}; "
        "build it, or set ACCUMOPS_KERNELS_DIR to the directory that holds it"
    )


@pytest.fixture(scope="session")
def kernels(extension_path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_kernels", extension_path)
    spec = importlib.util.spec_from_file_location("_kernels", extension_path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Cpu:
    """A device for a test's arrays and kernels: host memory, and one instruction set of the CPU."""

    name = "cpu"

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.accumulate = kernels.accumulate
        self.accumulate_rows = kernels.accumulate_rows

    def put(self, array: np.ndarray) -> Any:
        return array

    def get(self, array: Any) -> np.ndarray:
        return array


class Cuda(Cpu):
    """The current GPU as a device for a test: arrays are CuPy's."""

    name = "cuda"

    def __init__(self, kernels: ModuleType, cupy: Any) -> None:
        super().__init__(kernels)
        self.cupy = cupy

    def put(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        return self.cupy.asnumpy(array)


@pytest.fixture(scope="session")
def cuda(kernels: ModuleType) -> Cuda:
    status = kernels.cuda_status()
    if not status["built"]:
        pytest.skip("built without CUDA kernels")
    if status["device_count"] == 0:
        pytest.skip(f"no CUDA device: {status['error']}")
    return Cuda(kernels, pytest.importorskip("cupy"))


@pytest.fixture(params=["baseline", "avx2", "avx512", "cuda"])
def device(request: pytest.FixtureRequest, kernels: ModuleType) -> Iterator[Cpu]:
    """Each way to run a kernel: every instruction set of the CPU, and the GPU."""
    if request.param == "cuda":
        yield request.getfixturevalue("cuda")
        return
    if request.param not in kernels.instruction_sets():
        pytest.skip(f"no {request.param} on this processor, or not built for it")
    before = kernels.instruction_set()
    kernels.use_instruction_set(request.param)
    yield Cpu(kernels)
    kernels.use_instruction_set(before)
