"""Training with large batches on small memory in TensorFlow and Keras 3."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from accumops import ops
from accumops.normalization.layer import AccumBatchNormalization
from accumops.normalization.replace import replace_batchnorm_layers, restore_batchnorm_layers
from accumops.ops import LibraryError, build_info, get_backend, set_backend
from accumops.optimizer.clipping import AdaptiveGradientClipping
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.training.callbacks import AccumStepsScheduler, EffectiveBatchSize
from accumops.training.model import GradientAccumulateModel
from accumops.training.partial_window import PartialWindow
from accumops.window.accumulator import GradientAccumulator

try:
    __version__ = _version("accumops")
except _PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AccumBatchNormalization",
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
    "replace_batchnorm_layers",
    "restore_batchnorm_layers",
    "set_backend",
]
