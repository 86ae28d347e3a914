"""Runs each fused op a hundred times on the same inputs, and compares all results bit by bit."""

import os
import sys
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

import tensorflow as tf

from accumops import ops

RUNS = 100
SHAPES = [(300, 7), (5,), (1024, 1024), (64, 3, 3, 64), (1,), (4096,)]
ROWS = (5_000, 96)


def random(shape: tuple[int, ...], seed: int, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Returns random values, the same for each call."""
    return tf.cast(tf.random.stateless_normal(shape, [seed, 1]), dtype)


def variables(seed: int) -> list[tf.Variable]:
    """Makes variables of all shapes, with values that are not negative."""
    return [tf.Variable(tf.abs(random(shape, seed))) for shape in SHAPES]


def accumulate() -> list[tf.Tensor]:
    """Accumulates dense gradients of several types, and rows with many duplicates."""
    sums = [*variables(1), tf.Variable(random(ROWS, 2))]
    dtypes = [tf.float32, tf.bfloat16, tf.float16] * 2
    gradients = [random(shape, 3, dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    indices = tf.random.stateless_uniform([20_000], [4, 1], maxval=50, dtype=tf.int32)
    rows = tf.IndexedSlices(random((20_000, ROWS[1]), 5), indices)
    finite = ops.accumulate(sums, [*gradients, rows], scale=0.3, check_finite=True)
    return [*map(tf.convert_to_tensor, sums), finite]


def update() -> list[tf.Tensor]:
    """Makes a step of AdamW, with the last gradients folded in."""
    held, values, momentums, velocities = (variables(seed) for seed in (6, 7, 8, 9))
    settings = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "rate": tf.constant(1e-2), "decay": tf.constant(1e-3)}
    ops.update(
        "adam",
        values,
        [momentums, velocities],
        accumulators=held,
        latest=[random(shape, 10) for shape in SHAPES],
        scales=tf.constant(0.5),
        decays=[True] * len(SHAPES),
        weight=tf.constant(2.0),
        **settings,
    )
    return [tf.convert_to_tensor(each) for each in (*values, *momentums, *velocities)]


def norms() -> list[tf.Tensor]:
    """Computes the squared norms of arrays of all shapes."""
    return [ops.squared_norms([random(shape, 11) for shape in (*SHAPES, (3_000_001,))])]


def batch_norm() -> list[tf.Tensor]:
    """Runs batch normalization forward and backward, with channels last and first."""
    results = []
    for axis, shape in ((-1, (32, 28, 28, 64)), (1, (32, 64, 28, 28)), (-1, (500, 2048))):
        x, dy = random(shape, 12), random(shape, 13)
        gamma, beta = random((shape[axis],), 14), random((shape[axis],), 15)
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, *moments = ops.batch_norm(x, gamma, beta, axis=axis)
        results += [y, *tf.nest.flatten(moments), *tape.gradient(y, [x, gamma, beta], output_gradients=dy)]
    return results


SUBJECTS: dict[str, Callable[[], list[tf.Tensor]]] = {
    "accumulate": accumulate,
    "update": update,
    "squared norms": norms,
    "batch normalization": batch_norm,
}


def main() -> None:
    """Runs all subjects, and exits with status 1 if any bit differs between runs."""
    failed = False
    for name, run in SUBJECTS.items():
        first = [each.numpy().tobytes() for each in run()]
        different = sum([each.numpy().tobytes() for each in run()] != first for _ in range(RUNS - 1))
        print(f"{name}: {RUNS} runs, {different} unlike the first, on {run()[0].device}")
        failed |= different > 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
