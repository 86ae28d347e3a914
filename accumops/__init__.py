"""Training with large batches on small memory in TensorFlow and Keras 3."""

import importlib
from typing import TYPE_CHECKING, Any

from accumops.registration import register

if TYPE_CHECKING:
    from accumops import layers, losses, ops
    from accumops.memory.profile import memory_profile
    from accumops.memory.recompute import recompute
    from accumops.memory.recompute_layer import Recompute
    from accumops.memory.recompute_layers import recompute_layers
    from accumops.memory.window_gradients import window_gradients
    from accumops.normalization.layer import AccumBatchNormalization
    from accumops.normalization.replace import replace_batchnorm_layers, restore_batchnorm_layers
    from accumops.ops import LibraryError, build_info, get_backend, set_backend
    from accumops.optimizer.clipping import AdaptiveGradientClipping
    from accumops.optimizer.optimizer import GradientAccumulateOptimizer
    from accumops.planning.find_micro_batch_size import find_micro_batch_size
    from accumops.planning.micro_batch_plan import MicroBatchPlan
    from accumops.training.accumulation_logger import AccumulationLogger
    from accumops.training.backup import BackupAndRestore
    from accumops.training.callbacks import AccumStepsScheduler, EffectiveBatchSize, NonfiniteCount
    from accumops.training.model import GradientAccumulateModel
    from accumops.training.noise_scale import GradientNoiseScale
    from accumops.training.partial_window import PartialWindow
    from accumops.training.per_variable_norms import per_variable_norms
    from accumops.window.accumulator import GradientAccumulator
    from accumops.window.current_window import current_window
    from accumops.window.noise_schedule import NoiseScaleSchedule

    __version__: str

__all__ = [
    "AccumBatchNormalization",
    "AccumStepsScheduler",
    "AccumulationLogger",
    "AdaptiveGradientClipping",
    "BackupAndRestore",
    "EffectiveBatchSize",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
    "GradientAccumulator",
    "GradientNoiseScale",
    "LibraryError",
    "MicroBatchPlan",
    "NoiseScaleSchedule",
    "NonfiniteCount",
    "PartialWindow",
    "Recompute",
    "build_info",
    "current_window",
    "find_micro_batch_size",
    "get_backend",
    "layers",
    "losses",
    "memory_profile",
    "ops",
    "per_variable_norms",
    "recompute",
    "recompute_layers",
    "replace_batchnorm_layers",
    "restore_batchnorm_layers",
    "set_backend",
    "window_gradients",
]

# Importing TensorFlow takes seconds, so each name is imported when it is first used. The imports above say the same to
# type checkers.
_MODULES = {
    "AccumBatchNormalization": "accumops.normalization.layer",
    "AccumStepsScheduler": "accumops.training.callbacks",
    "AccumulationLogger": "accumops.training.accumulation_logger",
    "AdaptiveGradientClipping": "accumops.optimizer.clipping",
    "BackupAndRestore": "accumops.training.backup",
    "EffectiveBatchSize": "accumops.training.callbacks",
    "GradientAccumulateModel": "accumops.training.model",
    "GradientAccumulateOptimizer": "accumops.optimizer.optimizer",
    "GradientAccumulator": "accumops.window.accumulator",
    "GradientNoiseScale": "accumops.training.noise_scale",
    "LibraryError": "accumops.ops",
    "MicroBatchPlan": "accumops.planning.micro_batch_plan",
    "NoiseScaleSchedule": "accumops.window.noise_schedule",
    "NonfiniteCount": "accumops.training.callbacks",
    "PartialWindow": "accumops.training.partial_window",
    "Recompute": "accumops.memory.recompute_layer",
    "build_info": "accumops.ops",
    "current_window": "accumops.window.current_window",
    "find_micro_batch_size": "accumops.planning.find_micro_batch_size",
    "get_backend": "accumops.ops",
    "memory_profile": "accumops.memory.profile",
    "per_variable_norms": "accumops.training.per_variable_norms",
    "recompute": "accumops.memory.recompute",
    "recompute_layers": "accumops.memory.recompute_layers",
    "replace_batchnorm_layers": "accumops.normalization.replace",
    "restore_batchnorm_layers": "accumops.normalization.replace",
    "set_backend": "accumops.ops",
    "window_gradients": "accumops.memory.window_gradients",
}
_SUBMODULES = (
    "adapters",
    "arguments",
    "layers",
    "losses",
    "memory",
    "normalization",
    "ops",
    "optimizer",
    "planning",
    "training",
    "window",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(_import(_MODULES[name]), name)
    elif name in _SUBMODULES:
        value = _import(f"accumops.{name}")
    elif name == "__version__":
        value = _version()
    else:
        from accumops.renamed import missing_name

        raise missing_name(__name__, name)
    globals()[name] = value
    return value


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "tensorflow":
            raise
        raise ModuleNotFoundError(
            "accumops needs TensorFlow, and does not choose one for you: `pip install tensorflow`, `pip install "
            "tensorflow[and-cuda]` for NVIDIA GPUs, or `pip install tensorflow-cpu`.",
            name="tensorflow",
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBMODULES, "__version__"})


def _version() -> str:
    from importlib import metadata  # some 25 ms

    try:
        return metadata.version("accumops")
    except metadata.PackageNotFoundError:  # imported from a source tree that is not installed
        return "0+unknown"


register(sorted({*_MODULES.values(), "accumops.layers", "accumops.losses"}))
