"""Training with large batches on small memory in TensorFlow and Keras 3."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from accumops import ops
from accumops.accumulator import GradientAccumulator
from accumops.callbacks import AccumStepsScheduler, EffectiveBatchSize, PartialWindow
from accumops.clipping import AdaptiveGradientClipping
from accumops.model import GradientAccumulateModel
from accumops.ops import LibraryError, build_info, get_backend, set_backend
from accumops.optimizer import GradientAccumulateOptimizer

try:
    __version__ = _version("accumops")
except _PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AccumStepsScheduler",
    "AdaptiveGradientClipping",
    "EffectiveBatchSize",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
    "GradientAccumulator",
    "LibraryError",
    "PartialWindow",
    "build_info",
    "get_backend",
    "ops",
    "set_backend",
]
