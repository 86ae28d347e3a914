"""The `accumulate` suite: one micro-step over ResNet-50's variables, against TensorFlow and the memory."""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.benchmark.timing import interleave
from accumops.ops import library


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's result."""

    name: str
    milliseconds: float  # median
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
        # Variables, which are read at no cost, keep the gradients out of the graph's constants.
        gradients = [tf.Variable(rng.standard_normal(shape, np.float32)) for shape in shapes]
        scale = 0.5

        @tf.function
        def fused() -> None:
            ops.accumulate(accumulators, [g.read_value() for g in gradients], scale=scale)

        @tf.function
        def fused_finite() -> tf.Tensor | None:
            return ops.accumulate(accumulators, [g.read_value() for g in gradients], scale=scale, check_finite=True)

        @tf.function
        def fused_overwrite() -> None:
            ops.accumulate(accumulators, [g.read_value() for g in gradients], scale=scale, overwrite=True)

        @tf.function
        def reference() -> None:
            ops.reference.accumulate(accumulators, [g.read_value() for g in gradients], scale=scale)

        @tf.function
        def assign() -> None:
            for accumulator, gradient in zip(accumulators, gradients, strict=True):
                accumulator.assign(accumulator + gradient * scale)

        @tf.function
        def assign_add() -> None:
            for accumulator, gradient in zip(accumulators, gradients, strict=True):
                accumulator.assign_add(gradient * scale)

    threads = tf.config.threading.get_intra_op_parallelism_threads() or kernels.hardware_threads()
    a, b, c = (rng.standard_normal(values, np.float32) for _ in range(3))

    def triad(streaming: bool) -> Callable[[], object]:
        return lambda: kernels.triad(a, b, c, scale=scale, threads=threads, streaming=streaming)

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "triad, plain stores": (triad(False), 12),
        "triad, non-temporal stores": (triad(True), 12),
        "fused": (fused, 12),
        "fused, check_finite": (fused_finite, 12),
        "fused, overwrite": (fused_overwrite, 8),
        "reference": (reference, 12),
        "acc.assign(acc + g * s)": (assign, 12),
        "acc.assign_add(g * s)": (assign_add, 12),
    }
    before = ops.get_backend()
    ops.set_backend("fused")
    try:
        times = interleave({name: call for name, (call, _) in contenders.items()}, rounds=rounds, progress=progress)
    finally:
        ops.set_backend(before)
    rows = []
    for name, (_, size) in contenders.items():
        median = times[name].median
        rows.append(Row(name, 1e3 * median, times[name].spread, size, size * values / median))
    return Result(values, len(shapes), threads, tuple(rows))
