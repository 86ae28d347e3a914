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
    squared_norms: _Array | None = None,
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
def update(
    rule: str,
    values: Sequence[_Array],
    slots: Sequence[Sequence[_Array]] = (),
    *,
    accumulators: Sequence[_Array | None] | None = None,
    latest: Sequence[_Array | None] | None = None,
    scales: SupportsFloat | SupportsIndex | _Array = 1.0,
    rate: SupportsFloat | SupportsIndex | _Array,
    iterations: SupportsFloat | SupportsIndex | _Array | None = None,
    decay: SupportsFloat | SupportsIndex | _Array = 0.0,
    decays: Sequence[bool] | None = None,
    weight: SupportsFloat | SupportsIndex | _Array = 1.0,
    overwrite: bool | _Array = False,
    applies: bool | _Array = True,
    touched_rows: Sequence[_Array | None] | None = None,
    beta_1: SupportsFloat | SupportsIndex = 0.0,
    beta_2: SupportsFloat | SupportsIndex = 0.0,
    epsilon: SupportsFloat | SupportsIndex = 0.0,
    clip: SupportsFloat | SupportsIndex = 0.0,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def squared_norms(
    arrays: Sequence[_Array],
    sums: _Array,
    *,
    workspace: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def squared_norms_workspace(arrays: Sequence[_Array]) -> int: ...
def clip_units(
    gradients: Sequence[_Array],
    weights: Sequence[_Array],
    outputs: Sequence[_Array],
    *,
    clip_factor: SupportsFloat | SupportsIndex,
    epsilon: SupportsFloat | SupportsIndex,
    workspace: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def clip_units_workspace(gradients: Sequence[_Array]) -> int: ...
def batch_norm(
    x: _Array,
    gamma: _Array,
    beta: _Array,
    *,
    y: _Array,
    count: _Array,
    mean: _Array,
    rest: _Array,
    variance: _Array,
    inverse: _Array,
    axis: int = -1,
    epsilon: SupportsFloat | SupportsIndex = 1e-3,
    mask: _Array | None = None,
    workspace: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def batch_norm_gradient(
    x: _Array,
    dy: _Array,
    gamma: _Array,
    *,
    mean: _Array,
    rest: _Array,
    inverse: _Array,
    count: _Array | None,
    dx: _Array,
    dgamma: _Array,
    dbeta: _Array,
    axis: int = -1,
    mask: _Array | None = None,
    workspace: _Array | None = None,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def batch_norm_inference(
    x: _Array,
    gamma: _Array,
    beta: _Array,
    mean: _Array,
    variance: _Array,
    *,
    y: _Array,
    axis: int = -1,
    epsilon: SupportsFloat | SupportsIndex = 1e-3,
    threads: SupportsIndex | None = None,
    stream: int = 0,
) -> None: ...
def batch_norm_workspace(x: _Array, axis: int = -1) -> int: ...
def merge_moments(
    batch: Sequence[_Array] | None,
    *,
    window: Sequence[_Array] | None = None,
    moving: Sequence[_Array] | None = None,
    momentum: SupportsFloat | SupportsIndex = 0.99,
    only_finite: bool = False,
    stream: int = 0,
) -> None: ...
def add_noise_group(
    window: _Array,
    norms: _Array,
    *,
    share: SupportsFloat | SupportsIndex | _Array,
    starts: bool | _Array = False,
    stream: int = 0,
) -> None: ...
def end_noise_window(
    window: _Array,
    statistics: Sequence[_Array],
    *,
    shares: SupportsFloat | SupportsIndex | _Array,
    steps: SupportsIndex,
    decay: SupportsFloat | SupportsIndex,
    scale: SupportsFloat | SupportsIndex | _Array = 1.0,
    applies: bool | _Array = True,
    stream: int = 0,
) -> None: ...
def add_to_windows(
    batches: Sequence[Sequence[_Array]],
    windows: Sequence[Sequence[_Array]],
    *,
    applies: bool | _Array = True,
    stream: int = 0,
) -> None: ...
def end_windows(
    counters: Sequence[_Array],
    moments: Sequence[_Array],
    *,
    moving_means: Sequence[_Array] | None = None,
    moving_variances: Sequence[_Array] | None = None,
    momenta: Sequence[SupportsFloat | SupportsIndex] = (),
    applies: bool | _Array = True,
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
