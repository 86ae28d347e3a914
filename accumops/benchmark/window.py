"""The `window` suite: a window of micro-batches and its update, in several models, compared with the passes alone."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.benchmark import jax_scan, legacy, training
from accumops.benchmark.bandwidth import Bandwidth
from accumops.benchmark.contender import Contender, repeated, time_contenders
from accumops.benchmark.models import PROBLEMS, Problem
from accumops.benchmark.result import Result, Row
from accumops.normalization.replace import replace_batchnorm_layers
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.training.model import GradientAccumulateModel
from accumops.verification import backend

ROUNDS = 30
STEPS, MICRO = 4, 16
TOGETHER = 8  # windows in one call, of small models
MODELS = tuple(PROBLEMS)
FLOOR = "forward and backward"
_BANDWIDTH_SAMPLES = 5  # taken before each model


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return sum(1 + PROBLEMS[name].warmup + rounds for name in MODELS)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures windows of 4 micro-batches of 16 with Adam, in each of the models.

    The floor is forward and backward of the micro-batches, with the gradients dropped. The memory's limit is the floor
    plus the time that the memory needs to move the bytes of accumulation and update.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round.
    """
    bandwidth = Bandwidth(device)
    others = {legacy: legacy.missing_package(), jax_scan: jax_scan.missing_package()}
    rows: list[Row] = []
    for problem in (PROBLEMS[name] for name in MODELS):
        for _ in range(_BANDWIDTH_SAMPLES):
            bandwidth.sample()
        with contextlib.ExitStack() as processes:
            own = contenders(problem, device, steps=STEPS, micro=MICRO)
            for other in (each for each, missing in others.items() if missing is None):
                own += processes.enter_context(other.contenders(problem, device=device, steps=STEPS, micro_batch=MICRO))
            timed = time_contenders(
                problem.name, own, device=device, rounds=rounds, warmup=problem.warmup, progress=progress
            )
        floor = next(row.milliseconds for row in timed if row.floor)
        if floor is not None:
            limit = floor + 1e3 * bytes_to_move(problem) / bandwidth.best
            timed.insert(1, Row(problem.name, f"{FLOOR}, and the memory's limit", limit))
        rows += timed
    footnotes = (
        "The floor is called once a micro-batch, as most contenders are; micro_batch_size is called once a window.",
        "Datasets have batches of one size, which the functions know, as the floor's does (drop_remainder=True).",
        f"The memory's limit is that of moving what accumulation and Adam have to, at {bandwidth.best / 1e9:.1f} GB/s.",
        "GradientAccumulator runs on Keras 2 and its layers, in a process of its own, which takes turns with this one."
        if others[legacy] is None
        else f"GradientAccumulator is left out: there is no module {others[legacy]!r} here.",
        "JAX trains Keras's layers with optax's Adam, all of a window in one call, in a process of its own."
        if others[jax_scan] is None
        else f"JAX is left out: there is no module {others[jax_scan]!r} here.",
    )
    return Result(
        f"windows of {STEPS} micro-batches of {MICRO} and their update",
        tuple(rows),
        footnotes,
        settings={"accum_steps": STEPS, "micro_batch_size": MICRO},
        bandwidth=bandwidth.best,
    )


def contenders(problem: Problem, device: str, *, steps: int, micro: int) -> list[Contender]:
    """Returns the contenders for a problem. Each has its own model, and all start from the same weights.

    Args:
        problem: The model to train and its data.
        device: `"CPU"` or `"GPU"`.
        steps: The number of micro-batches in a window.
        micro: The number of samples in a micro-batch.
    """
    x, y = problem.data(steps * micro)
    parts = training.split(x, y, micro)
    weights = problem.build(keras).get_weights()

    def new_model() -> Any:
        model = problem.build(keras)
        model.set_weights(weights)
        return model

    def adam(**arguments: Any) -> keras.optimizers.Optimizer:
        return keras.optimizers.Adam(training.LEARNING_RATE, **arguments)

    def floor() -> Callable[[], object]:
        step = training.forward_and_backward(new_model(), drop=device == "CPU")
        return training.each_micro_batch(step, parts)

    def floor_in_one_call() -> Callable[[], object]:
        return training.forward_and_backward_in_one_call(new_model(), x, y, micro)

    def hand_written() -> Callable[[], object]:
        return training.hand_written(new_model(), adam(), parts)

    def built_in(jit_compile: bool) -> Callable[[], object]:
        model = new_model()
        model.compile(adam(gradient_accumulation_steps=steps), training.loss_function(), jit_compile=jit_compile)
        return training.train_steps(model, x, y, micro)

    def ours(
        batch_size: int,
        jit_compile: bool = False,
        noise: bool = False,
        replaced: bool = False,
        together: int = 1,
        **arguments: Any,
    ) -> Callable[[], object]:
        net = replace_batchnorm_layers(new_model()) if replaced else new_model()
        model = GradientAccumulateModel(net, **arguments)
        in_one_call = together * (steps * micro // batch_size) if together > 1 else 1
        model.compile(adam(), training.loss_function(), jit_compile=jit_compile, steps_per_execution=in_one_call)
        if noise:
            model.optimizer.accumulator.track_noise()
        return training.train_steps(model, x, y, batch_size)

    accum_steps = functools.partial(ours, micro, accum_steps=steps)
    micro_batch_size = functools.partial(ours, steps * micro, micro_batch_size=micro)

    def optimizer_in_fit() -> Callable[[], object]:
        model = new_model()
        wrapped = GradientAccumulateOptimizer(adam(), steps)
        model.compile(wrapped, training.loss_function(), jit_compile=False)
        return training.train_steps(model, x, y, micro)

    def reference() -> Callable[[], object]:
        window = accum_steps()
        with backend("reference"):
            window()  # traces, so that the function keeps this backend
        return window

    def custom_loop() -> Callable[[], object]:
        model = new_model()
        optimizer = GradientAccumulateOptimizer(adam(), steps)
        optimizer.build(model.trainable_variables)
        compute = training.gradients_of(model)

        @tf.function
        def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            value, gradients = compute(x, y)
            optimizer.apply(gradients, model.trainable_variables)
            return value

        return training.each_micro_batch(step, parts)

    def contender(name: str, prepare: Callable[[], Callable[[], object]], *, floor: bool = False) -> Contender:
        return Contender(name, lambda: repeated(prepare(), problem.windows), floor=floor, times=problem.windows)

    made = [contender(FLOOR, floor, floor=True)]
    if device == "CPU":
        made.append(contender(f"{FLOOR}, in one call", floor_in_one_call))
    made += [
        contender("written by hand", hand_written),
        contender("Keras", lambda: built_in(jit_compile=False)),
        contender("Keras, XLA", lambda: built_in(jit_compile=True)),
        contender("accumops reference, accum_steps", reference),
        contender("accumops, accum_steps", accum_steps),
        contender("accumops, micro_batch_size", micro_batch_size),
        contender("accumops, accum_steps, XLA", functools.partial(accum_steps, jit_compile=True)),
        contender("accumops, micro_batch_size, XLA", functools.partial(micro_batch_size, jit_compile=True)),
        contender("accumops, accum_steps, noise scale", functools.partial(accum_steps, noise=True)),
        contender("accumops, micro_batch_size, noise scale", functools.partial(micro_batch_size, noise=True)),
        contender("accumops, optimizer in Keras's fit", optimizer_in_fit),
        contender("accumops, optimizer in a custom loop", custom_loop),
    ]
    if problem.windows > 1:  # a small model
        for name, way in (("accum_steps", accum_steps), ("micro_batch_size", micro_batch_size)):
            together = functools.partial(way, together=TOGETHER)
            made.append(Contender(f"accumops, {name}, {TOGETHER} windows a call", together, times=TOGETHER))
    if problem.large_table:
        made += [
            contender("accumops, accum_steps, lazy_sparse", functools.partial(accum_steps, lazy_sparse=True)),
            contender("accumops, micro_batch_size, lazy_sparse", functools.partial(micro_batch_size, lazy_sparse=True)),
        ]
    if problem.normalizes:
        made += [
            contender(f"accumops, {name}, replaced normalization", functools.partial(way, replaced=True))
            for name, way in (("accum_steps", accum_steps), ("micro_batch_size", micro_batch_size))
        ]
    return made


def bytes_to_move(problem: Problem) -> int:
    """Returns the bytes that accumulation and Adam's update have to read and write in a window, in float32.

    The gradients of the first micro-batch overwrite the accumulators, those of the micro-batches between are added, and
    the update reads those of the last one.
    """
    model = problem.build(keras)
    _, gradients = training.gradients_of(model)(*problem.data(MICRO))
    total = 0
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        given = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        total += (8 + 12 * (STEPS - 2) + 4) * int(tf.size(given)) + 28 * math.prod(variable.shape)
    return total
