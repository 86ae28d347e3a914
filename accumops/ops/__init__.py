"""The ops, one function each: a fused op where the compiled library runs, plain TensorFlow elsewhere."""

from accumops.ops import reference
from accumops.ops.accumulate import accumulate
from accumops.ops.barrier import barrier
from accumops.ops.batch_norm import batch_norm, batch_norm_inference
from accumops.ops.clip import clip_units
from accumops.ops.finite import all_finite
from accumops.ops.library import LibraryError, build_info, get_backend, set_backend
from accumops.ops.moments import (
    BatchMoments,
    MomentsWindow,
    MovingStatistics,
    add_to_windows,
    end_windows,
    merge_moments,
)
from accumops.ops.noise import NoiseStatistics, add_noise_group, end_noise_window
from accumops.ops.update import squared_norms, update

__all__ = [
    "BatchMoments",
    "LibraryError",
    "MomentsWindow",
    "MovingStatistics",
    "NoiseStatistics",
    "accumulate",
    "add_noise_group",
    "add_to_windows",
    "all_finite",
    "barrier",
    "batch_norm",
    "batch_norm_inference",
    "build_info",
    "clip_units",
    "end_noise_window",
    "end_windows",
    "get_backend",
    "merge_moments",
    "reference",
    "set_backend",
    "squared_norms",
    "update",
]
