"""Every op in plain TensorFlow: these functions define what the kernels compute, and run where the kernels cannot."""

from accumops.ops.reference.accumulate import accumulate, squared_norms
from accumops.ops.reference.barrier import barrier
from accumops.ops.reference.batch_norm import batch_norm, batch_norm_inference, statistics_dtype
from accumops.ops.reference.clip import clip_units
from accumops.ops.reference.moments import add_to_windows, end_windows, merge_moments
from accumops.ops.reference.noise import add_noise_group, end_noise_window
from accumops.ops.reference.update import corrected_rate, step, update

__all__ = [
    "accumulate",
    "add_noise_group",
    "add_to_windows",
    "barrier",
    "batch_norm",
    "batch_norm_inference",
    "clip_units",
    "corrected_rate",
    "end_noise_window",
    "end_windows",
    "merge_moments",
    "squared_norms",
    "statistics_dtype",
    "step",
    "update",
]
