"""The `accumulate` suite: a micro-step over ResNet-50's variables, compared with TensorFlow and the memory's limit."""

import functools
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.benchmark.bandwidth import Bandwidth
from accumops.benchmark.contender import Contender, in_one_graph, time_contenders
from accumops.benchmark.result import Result

CASE = "micro-step"
ROUNDS = 30
WARMUP = 5
# One scale for each micro-step of a graph: with equal scales TensorFlow would compute `g * s` only once.
SCALES = tuple(0.5 + i / 1024 for i in range(8))


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 214 trainable variables, 25.6 million values."""
    model = keras.applications.ResNet50(weights=None)
    return [tuple(variable.shape) for variable in model.trainable_variables]


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return 1 + WARMUP + rounds


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures the fused op, the reference, hand-written TensorFlow, and the memory's bandwidth.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round.
    """
    shapes = resnet50_shapes()
    values = sum(math.prod(shape) for shape in shapes)
    rng = np.random.default_rng(0)
    accumulators, gradients = (
        [tf.Variable(rng.standard_normal(shape, np.float32)) for shape in shapes] for _ in range(2)
    )

    def fused(read: list[tf.Tensor], scale: float) -> None:
        ops.accumulate(accumulators, read, scale=scale)

    def fused_finite(read: list[tf.Tensor], scale: float) -> None:
        ops.accumulate(accumulators, read, scale=scale, check_finite=True)

    def fused_overwrite(read: list[tf.Tensor], scale: float) -> None:
        ops.accumulate(accumulators, read, scale=scale, overwrite=True)

    def reference(read: list[tf.Tensor], scale: float) -> None:
        ops.reference.accumulate(accumulators, read, scale=scale)

    def assign(read: list[tf.Tensor], scale: float) -> None:
        for accumulator, gradient in zip(accumulators, read, strict=True):
            accumulator.assign(accumulator + gradient * scale)

    def assign_add(read: list[tf.Tensor], scale: float) -> None:
        for accumulator, gradient in zip(accumulators, read, strict=True):
            accumulator.assign_add(gradient * scale)

    bytes_a_value: dict[str, tuple[Callable[[list[tf.Tensor], float], object], int]] = {
        "fused": (fused, 12),
        "fused, check_finite": (fused_finite, 12),
        "fused, overwrite": (fused_overwrite, 8),
        "reference": (reference, 12),
        "acc.assign(acc + g * s)": (assign, 12),
        "acc.assign_add(g * s)": (assign_add, 12),
    }

    def micro_steps(step: Callable[[list[tf.Tensor], float], object]) -> Callable[[], object]:
        def steps() -> list[Callable[[], object]]:
            read = [gradient.read_value() for gradient in gradients]
            return [functools.partial(step, read, scale) for scale in SCALES]

        return in_one_graph(steps)

    bandwidth = Bandwidth(device)
    rows = time_contenders(
        CASE,
        [
            Contender(name, functools.partial(micro_steps, step), bytes_moved=size * values, times=len(SCALES))
            for name, (step, size) in bytes_a_value.items()
        ],
        device=device,
        rounds=rounds,
        warmup=WARMUP,
        progress=bandwidth.before(progress),
    )
    return Result(
        f"accumulate: {values / 1e6:.1f} million float32 values in {len(shapes)} variables",
        (*bandwidth.limits(CASE, 12 * values), *rows),
        ("The limit is 12 bytes a value at the bandwidth of a triad; where a window starts (overwrite), 8 are moved.",),
        settings={"values": values, "variables": len(shapes)},
        bandwidth=bandwidth.best,
    )
