"""The `window` suite's contender in JAX: a scan over the micro-batches, compiled with its update, as written by hand.

Keras takes one backend for a process, so this one runs in another process.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from accumops.benchmark import training
from accumops.benchmark.contender import Contender, repeated
from accumops.benchmark.models import PROBLEMS, Problem
from accumops.planning.child_process import ChildProcess

_PACKAGES = ("jax", "optax")


def missing_package() -> str | None:
    """Returns the name of a needed module that is not installed, or None."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), None)


@contextlib.contextmanager
def contenders(problem: Problem, *, device: str, steps: int, micro_batch: int) -> Iterator[list[Contender]]:
    """Yields JAX's contender, with the process that runs it.

    Args:
        problem: One of `PROBLEMS`.
        device: `"CPU"` or `"GPU"`.
        steps: The number of micro-batches in a window.
        micro_batch: The number of samples in a micro-batch.
    """
    platform = {"CPU": "cpu", "GPU": "cuda"}[device]
    with ChildProcess({"KERAS_BACKEND": "jax", "JAX_PLATFORMS": platform}) as process:

        def prepare() -> Callable[[], object]:
            process.call(prepare_here, problem=problem.name, steps=steps, micro_batch=micro_batch)
            return lambda: process.call(run_here)

        yield [Contender("JAX, a scan by hand", prepare, times=problem.windows)]


_prepared: list[Callable[[], object]] = []
"""What `run_here` runs."""


def prepare_here(problem: str, steps: int, micro_batch: int) -> None:
    """Makes the contender that `run_here` runs, in a process whose Keras runs on JAX."""
    import keras

    trained = PROBLEMS[problem]
    x, y = (each.numpy() for each in trained.data(steps * micro_batch))
    _prepared[:] = [repeated(windows_of(trained.build(keras), x, y, micro_batch), trained.windows)]


def run_here() -> None:
    """Runs the contender's windows."""
    _prepared[0]()


def windows_of(model: Any, x: np.ndarray, y: np.ndarray, micro_batch: int) -> Callable[[], list[Any]]:
    """Returns a function that trains on one window with optax's Adam, and returns the weights when it is done.

    Args:
        model: A model of a Keras that runs on JAX. It keeps its weights.
        x: The inputs of a window.
        y: Its labels.
        micro_batch: The number of samples in a micro-batch.
    """
    jax, optax = (importlib.import_module(name) for name in _PACKAGES)
    steps = len(y) // micro_batch
    batch = [jax.numpy.asarray(each.reshape(steps, micro_batch, *each.shape[1:])) for each in (x, y)]
    adam = optax.adam(training.LEARNING_RATE, eps=1e-7)  # Keras's epsilon

    def loss_of(weights: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        logits, state = model.stateless_call(weights, state, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    def window(weights: Any, state: Any, slots: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        def add(carried: Any, micro_batch: Any) -> tuple[Any, None]:
            sums, state = carried
            gradients, state = jax.grad(loss_of, has_aux=True)(weights, state, *micro_batch)
            return (jax.tree.map(jax.numpy.add, sums, gradients), state), None

        zeros = jax.tree.map(jax.numpy.zeros_like, weights)
        (sums, state), _ = jax.lax.scan(add, (zeros, state), (x, y))
        updates, slots = adam.update(jax.tree.map(lambda each: each / steps, sums), slots)
        return optax.apply_updates(weights, updates), state, slots

    train = jax.jit(window, donate_argnums=(0, 1, 2))
    weights, state = (
        [jax.numpy.copy(each.value) for each in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    trained: Any = (weights, state, adam.init(weights))

    def run() -> list[Any]:
        nonlocal trained
        trained = jax.block_until_ready(train(*trained, *batch))
        weights: list[Any] = trained[0]
        return weights

    return run
