"""The `accumulate` suite: one micro-step over ResNet-50's variables, against TensorFlow and the memory."""

import dataclasses
import math
import os
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.benchmark.timing import interleave
from accumops.ops import library

WARMUP = 5
# For the micro-steps of one graph. With one scale TensorFlow would compute `g * s` once for all of them.
SCALES = tuple(0.5 + i / 1024 for i in range(8))


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's result."""

    name: str
    milliseconds: float  # median, of one micro-step
    spread: float  # quartile distance over median
    bytes_per_value: int  # what the operation has to move at least
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Result:
    """All contenders of one interleaved run."""

    values: int
    variables: int
    threads: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 214 trainable variables, 25.6 million values."""
    model = keras.applications.ResNet50(weights=None)
    return [tuple(variable.shape) for variable in model.trainable_variables]


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return rounds + WARMUP


def run(*, rounds: int = 30, progress: Callable[[], object] = lambda: None) -> Result:
    """Measures on the CPU: the fused op and the reference, hand-written TensorFlow, and the memory's bandwidth.

    The yardsticks are a triad `a = b + s * c` over arrays of the same total size with the library's own threads, with
    plain stores (which read each line before they write it) and with non-temporal ones.

    Args:
        rounds: Timed runs of each contender.
        progress: Called after each round.

    Raises:
        accumops.LibraryError: If the compiled libraries are not there.
    """
    kernels = library.load_kernels()
    _, problem = library.load()
    if problem or kernels is None:
        raise ops.LibraryError(f"There is nothing fused to measure: {problem or 'the kernels module was not built'}.")
    with tf.device("CPU:0"):
        shapes = resnet50_shapes()
        values = sum(math.prod(shape) for shape in shapes)
        rng = np.random.default_rng(0)
        accumulators = [tf.Variable(rng.standard_normal(shape, np.float32)) for shape in shapes]
        gradients = [tf.Variable(rng.standard_normal(shape, np.float32)) for shape in shapes]

        def steps(step: Callable[[list[tf.Tensor], float], object]) -> Callable[[], object]:
            """A graph of several micro-steps, since calling one costs about a millisecond however little is in it."""

            @tf.function
            def run() -> None:
                read = [gradient.read_value() for gradient in gradients]

                # One after another: left to itself, TensorFlow takes each variable through all steps, in the cache.
                barrier = tf.no_op()
                for scale in SCALES:
                    before = len(barrier.graph.get_operations())
                    with tf.control_dependencies([barrier]):
                        step(read, scale)
                    barrier = tf.group(*barrier.graph.get_operations()[before:])

            return run

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

    threads = tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))
    a, b, c = (rng.standard_normal(values, np.float32) for _ in range(3))

    def triad(streaming: bool) -> Callable[[], object]:
        def run() -> None:
            for scale in SCALES:
                kernels.triad(a, b, c, scale=scale, threads=threads, streaming=streaming)

        return run

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "triad, plain stores": (triad(False), 12),
        "triad, non-temporal stores": (triad(True), 12),
        "fused": (steps(fused), 12),
        "fused, check_finite": (steps(fused_finite), 12),
        "fused, overwrite": (steps(fused_overwrite), 8),
        "reference": (steps(reference), 12),
        "acc.assign(acc + g * s)": (steps(assign), 12),
        "acc.assign_add(g * s)": (steps(assign_add), 12),
    }
    before = ops.get_backend()
    ops.set_backend("fused")
    try:
        times = interleave(
            {name: call for name, (call, _) in contenders.items()}, rounds=rounds, warmup=WARMUP, progress=progress
        )
    finally:
        ops.set_backend(before)
    rows = []
    for name, (_, size) in contenders.items():
        median = times[name].median / len(SCALES)
        rows.append(Row(name, 1e3 * median, times[name].spread, size, size * values / median))
    return Result(values, len(shapes), threads, tuple(rows))
