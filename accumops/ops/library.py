"""Finds, checks and loads the compiled ops, and decides between them and the reference.

A "fused" op is a compiled one; its "reference" is the same function in plain TensorFlow. In the default mode ``"auto"``
the fused ops run where they can. Elsewhere the reference runs, and one warning says why.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import types
import warnings
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this

_DIRECTORY = pathlib.Path(__file__).resolve().parent
# The first driver that serves all releases of a CUDA runtime's major version.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {"12": "525", "13": "580"}
_BACKENDS = ("auto", "fused", "reference")

_backend: str | None = None
_warned: set[str] = set()


class LibraryError(RuntimeError):
    """The compiled ops were asked for with ``set_backend("fused")`` and cannot run here."""


def set_backend(backend: str) -> None:
    """Chooses the implementation of accumops' ops, from now on and for the whole process.

    A `tf.function` keeps the backend that was chosen when it was traced.

    Args:
        backend: `"auto"` (the fused ops where they can run, the reference elsewhere), `"fused"` (the fused ops, or an
            error) or `"reference"` (plain TensorFlow). Before the first call, the environment variable
            `ACCUMOPS_BACKEND` decides.

    Raises:
        ValueError: If `backend` is not one of the three.
        LibraryError: If `backend` is `"fused"` and the compiled ops cannot be loaded.

    Example:

    >>> accumops.set_backend("reference")
    >>> accumops.get_backend()
    'reference'
    >>> accumops.set_backend("auto")
    """
    global _backend
    _check_backend(backend, "set_backend")
    if backend == "fused":
        _, problem = load()
        if problem:
            raise LibraryError(f"The fused ops cannot be used: {problem}.")
    _backend = backend


def get_backend() -> str:
    """Returns the chosen backend: `"auto"`, `"fused"` or `"reference"`.

    Example:

    >>> accumops.get_backend()
    'auto'
    """
    if _backend is not None:
        return _backend
    backend = os.environ.get("ACCUMOPS_BACKEND", "auto")
    _check_backend(backend, "ACCUMOPS_BACKEND")
    return backend


def _check_backend(backend: str, source: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"{source}: the backend must be 'auto', 'fused' or 'reference'. Received: {backend!r}")


def build_info() -> dict[str, Any]:
    """Returns what the compiled libraries were built with, and whether they are loaded.

    Returns:
        A dict with `version` (of accumops), `tensorflow` (a list of the versions that there is a library for, one for
        each minor release), `cuda` (the version that the kernels were built for), `cuda_reason` (why there are no CUDA
        kernels; `cuda` is then None), `cuda_architectures` and `instruction_sets` (what the kernels were compiled for),
        `compiler`, `loaded` (bool) and `reason` (why the fused ops are not loaded, or None). In a source tree that was
        not built, all but `loaded` and `reason` are None.

    Example:

    >>> info = accumops.build_info()
    >>> sorted(info)
    ['compiler', 'cuda', 'cuda_architectures', 'cuda_reason', 'instruction_sets', 'loaded', 'reason', 'tensorflow',
     'version']
    """
    ops, problem = load()
    recorded = _recorded_build() or {}
    return {
        "version": recorded.get("version"),
        "tensorflow": _split(recorded.get("tensorflow")),
        "cuda": recorded.get("cuda") or None,
        "cuda_architectures": _split(recorded.get("cuda_architectures")),
        "cuda_reason": recorded.get("cuda_reason") or None,
        "instruction_sets": _split(recorded.get("instruction_sets")),
        "compiler": recorded.get("compiler"),
        "loaded": ops is not None,
        "reason": problem,
    }


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [item for item in text.split(";") if item]


def _recorded_build() -> dict[str, str] | None:
    path = _DIRECTORY / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
def load() -> tuple[types.ModuleType | None, str | None]:
    """Loads the compiled ops, once. Returns their module and None, or None and the reason why they cannot load."""
    versions = _split((_recorded_build() or {}).get("tensorflow")) or []
    paths = {_minor(version): _library_for(version) for version in versions}
    if not any(path.exists() for path in paths.values()):
        return None, "this installation has no compiled ops; `pip install .` in the source tree builds them"
    path = paths.get(_minor(tf.__version__))
    if path is None or not path.exists():
        minors = " and ".join(paths)
        return None, (
            f"they are for TensorFlow {minors} and TensorFlow {tf.__version__} is installed; install TensorFlow "
            f"{list(paths)[-1]}, or a release of accumops that has them for {_minor(tf.__version__)}"
        )
    try:
        return tf.load_op_library(str(path)), None
    except (tf.errors.OpError, OSError) as error:
        return None, (
            f"the dynamic linker refused {path.name}: {str(error).splitlines()[0]}; `pip install --force-reinstall "
            "--no-deps accumops` mends a file that is broken, and otherwise this TensorFlow is not the one of PyPI: "
            "`pip install --no-build-isolation .` in accumops' source tree builds the ops for it"
        )


def _library_for(version: str) -> pathlib.Path:
    return _DIRECTORY / f"_tensorflow_ops_{_minor(version).replace('.', '_')}.so"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@functools.cache
def load_kernels() -> types.ModuleType | None:
    """Imports the kernels' module for arrays, which needs no TensorFlow. Returns None if it was not built."""
    try:
        return importlib.import_module("accumops.ops._kernels")
    except ImportError:
        return None


@functools.cache
def gpu_problem() -> str | None:
    """Returns why the CUDA kernels cannot run on the GPUs that TensorFlow sees, or None if they can."""
    recorded = _recorded_build() or {}
    kernels = load_kernels()
    if not recorded.get("cuda") or kernels is None:
        return f"they were built without CUDA kernels ({recorded.get('cuda_reason') or 'no build found'})"
    status = kernels.cuda_status()
    if status["error"]:
        serves = cuda_version(status["driver_version"])
        return (
            f"they were built with CUDA {recorded['cuda']}, which needs an NVIDIA driver of version "
            f"{_OLDEST_DRIVER.get(recorded['cuda'].split('.')[0], 'its own')} or newer, and this machine's driver "
            f"{f'serves CUDA {serves}' if serves else 'was not found'} ({status['error']}); update the driver"
        )
    built = _split(recorded["cuda_architectures"]) or []
    for device in tf.config.list_physical_devices("GPU"):
        capability = tf.config.experimental.get_device_details(device).get("compute_capability")
        if capability is not None and not _runs_on(built, *capability):
            major, minor = capability
            return f"{device.name} has compute capability {major}.{minor} and they are for {', '.join(built)}"
    return None


def cuda_version(number: int) -> str | None:
    """Turns CUDA's number, 1000 * major + 10 * minor, into text. CUDA gives 0 if there is no driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _runs_on(architectures: list[str], major: int, minor: int) -> bool:
    """Returns whether code for these architectures runs on a GPU of this compute capability.

    Machine code runs on GPUs of its own major version, from its minor version on. PTX runs on every GPU that is not
    older.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)(\d)[af]?(-real|-virtual)?", architecture)
        if match is None:
            return True  # "native" or "all": the build does not record which architectures these were
        built = int(match[1]), int(match[2])
        if built <= (major, minor) and (built[0] == major or match[3] != "-real"):
            return True
    return False


def _may_be_on_gpu(operand: tf.Variable | tf.Tensor) -> bool:
    # TensorFlow places the tensors of a graph later: until then any GPU is possible.
    return "GPU" in operand.device if operand.device else bool(tf.config.list_physical_devices("GPU"))


def fused_ops(operands: Iterable[tf.Variable | tf.Tensor]) -> types.ModuleType | None:
    """Returns the module of the fused ops if they are to work on these operands, or None for the reference.

    If `"auto"` falls back to the reference, a warning says why, once for each reason.

    Raises:
        LibraryError: If the backend is `"fused"` and the fused ops cannot work on these operands.
    """
    backend = get_backend()
    if backend == "reference":
        return None
    ops, problem = load()
    if ops is not None:
        # What XLA compiles has a lowering of its own, which needs no CUDA kernels.
        needs_kernels = not xla_compiles_this(unknown=False) and any(_may_be_on_gpu(operand) for operand in operands)
        problem = gpu_problem() if needs_kernels else None
        if problem is None:
            return ops
    if backend == "fused":
        raise LibraryError(f"The fused ops cannot be used: {problem}.")
    if problem not in _warned:
        _warned.add(str(problem))
        warnings.warn(
            f"accumops runs in plain TensorFlow, slower and with the same results: its fused ops cannot be used, as "
            f"{problem}. Silence this with accumops.set_backend('reference').",
            RuntimeWarning,
            stacklevel=3,
        )
    return None
