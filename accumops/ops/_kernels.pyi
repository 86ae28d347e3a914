from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

# NumPy arrays, what NumPy can view without a copy, and objects with __cuda_array_interface__.
_Array: TypeAlias = Any

class _MemoryBandwidth(TypedDict):
    best: float
    plain: float
    streaming: float

class _CudaStatus(TypedDict):
    built: bool
    runtime_version: int
    driver_version: int
    device_count: int
    error: str | None

class _BuildInfo(TypedDict):
    compiler: str
    cuda_runtime_version: int | None
    instruction_sets: list[str]

def accumulate(
    accumulators: Sequence[_Array],
    gradients: Sequence[_Array],
    *,
    scale: SupportsFloat | SupportsIndex | _Array = 1.0,
    overwrite: bool | _Array = False,
    all_finite: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def accumulate_rows(
    accumulator: _Array,
    values: _Array,
    indices: _Array,
    *,
    touched_rows: _Array | None = None,
    scale: SupportsFloat | SupportsIndex | _Array = 1.0,
    overwrite: bool | _Array = False,
    all_finite: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def triad(
    a: _Array,
    b: _Array,
    c: _Array,
    *,
    scale: SupportsFloat | SupportsIndex = 1.0,
    threads: SupportsIndex | None = None,
    streaming: bool = False,
) -> None: ...
def memory_bandwidth(
    threads: SupportsIndex | None = None, *, bytes_per_array: int = 268435456, repeats: int = 10
) -> _MemoryBandwidth: ...
def cuda_status() -> _CudaStatus: ...
def build_info() -> _BuildInfo: ...
