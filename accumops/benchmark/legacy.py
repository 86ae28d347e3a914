"""The `window` suite's contenders from the package GradientAccumulator, which needs Keras 2 and so another process."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.contender import Contender, repeated
from accumops.benchmark.models import PROBLEMS, Problem
from accumops.planning.child_process import ChildProcess

_PACKAGES = ("gradient_accumulator", "tf_keras")
# Makes `tf.keras`, which GradientAccumulator uses, Keras 2.
_ENVIRONMENT = {"TF_USE_LEGACY_KERAS": "1"}


def missing_package() -> str | None:
    """Returns the name of a needed module that is not installed, or None."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), None)


@contextlib.contextmanager
def contenders(problem: Problem, *, device: str, steps: int, micro_batch: int) -> Iterator[list[Contender]]:
    """Yields GradientAccumulator's two wrappers as contenders, with the process that runs them.

    Args:
        problem: One of `PROBLEMS`.
        device: `"CPU"` or `"GPU"`.
        steps: The number of micro-batches in a window.
        micro_batch: The number of samples in a micro-batch.
    """
    with ChildProcess(_ENVIRONMENT) as process:

        def contender(wrapper: str) -> Contender:
            def prepare() -> Callable[[], object]:
                process.call(
                    prepare_here,
                    wrapper=wrapper,
                    problem=problem.name,
                    device=device,
                    steps=steps,
                    micro_batch=micro_batch,
                )
                return lambda: process.call(run_here, wrapper=wrapper)

            return Contender(f"GradientAccumulator, {wrapper}", prepare, times=problem.windows)

        yield [contender(wrapper) for wrapper in _WRAPPERS]


_prepared: dict[str, Callable[[], object]] = {}
"""The contenders that `prepare_here` has made in this process, by wrapper."""


def prepare_here(wrapper: str, problem: str, device: str, steps: int, micro_batch: int) -> None:
    """Makes the contender that `run_here` runs, in a process whose `tf.keras` is Keras 2."""
    package, library = (importlib.import_module(name) for name in _PACKAGES)
    trained = PROBLEMS[problem]
    with tf.device(f"{device}:0"):
        model = _WRAPPERS[wrapper](package, library, trained.build(library), steps)
        window = training.train_steps(model, *trained.data(steps * micro_batch), micro_batch)
        windows = repeated(window, trained.windows)

    def run() -> None:
        with tf.device(f"{device}:0"):
            windows()
        if device == "GPU":
            tf.test.experimental.sync_devices()

    _prepared[wrapper] = run


def run_here(wrapper: str) -> None:
    """Runs a contender's windows."""
    _prepared[wrapper]()


def _wrapped_model(package: Any, library: Any, model: Any, steps: int) -> Any:
    wrapped = package.GradientAccumulateModel(accum_steps=steps, inputs=model.inputs, outputs=model.outputs)
    wrapped.compile(library.optimizers.Adam(training.LEARNING_RATE), training.loss_function(library))
    return wrapped


def _wrapped_optimizer(package: Any, library: Any, model: Any, steps: int) -> Any:
    # The wrapper works only with the legacy optimizers of Keras 2.
    inner = library.optimizers.legacy.Adam(training.LEARNING_RATE)
    model.compile(package.GradientAccumulateOptimizer(inner, steps), training.loss_function(library))
    return model


_WRAPPERS: dict[str, Callable[[Any, Any, Any, int], Any]] = {"model": _wrapped_model, "optimizer": _wrapped_optimizer}
