"""The `batch-norm` suite: forward and backward of one layer, and a window of a small network that has several."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from accumops import ops
from accumops.batch_norm import AccumBatchNormalization
from accumops.benchmark.timing import Timing, interleave
from accumops.model import GradientAccumulateModel
from accumops.ops import library
from accumops.replace import replace_batchnorm_layers

WARMUP = 3
SHAPES = ((32, 56, 56, 64), (16, 32, 32, 32), (8, 7, 7, 2048), (4096, 512))
DTYPES = ("float32", "bfloat16")
STEPS, MICRO = 4, 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's result in one case."""

    case: str
    name: str
    milliseconds: float  # median
    spread: float  # quartile distance over median
    bytes_moved: int | None  # at least: x, x, y, and x, dy, x, dy, dx


@dataclasses.dataclass(frozen=True)
class Result:
    """All contenders of all cases; those of one case are interleaved."""

    rows: tuple[Row, ...]


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return (len(SHAPES) * len(DTYPES) + 1) * (rounds + WARMUP)


def run(*, rounds: int = 30, progress: Callable[[], object] = lambda: None) -> Result:
    """Measures on the CPU: Keras's layer, TensorFlow's fused op and ours, each forward and backward in a `tf.function`.

    And a window of 4 micro-batches of 16 through six convolutions with batch normalization and ReLU: Keras's layers and
    Keras's accumulation against `GradientAccumulateModel`, in both of its modes, with the layers replaced.

    Args:
        rounds: Timed runs of each contender.
        progress: Called after each round.

    Raises:
        accumops.LibraryError: If the compiled library is not there.
    """
    _, problem = library.load()
    if problem:
        raise ops.LibraryError(f"There is nothing fused to measure: {problem}.")
    before = ops.get_backend()
    ops.set_backend("fused")
    try:
        with tf.device("CPU:0"):
            return Result(tuple(_measure(rounds, progress)))
    finally:
        ops.set_backend(before)


def _measure(rounds: int, progress: Callable[[], object]) -> Iterator[Row]:
    cases: list[tuple[str, Callable[[], dict[str, Callable[[], object]]], int | None]] = [
        (
            f"{shape} {dtype}",
            lambda shape=shape, dtype=dtype: _layers(shape, tf.as_dtype(dtype)),  # type: ignore[misc]
            8 * math.prod(shape) * tf.as_dtype(dtype).size,
        )
        for shape in SHAPES
        for dtype in DTYPES
    ]
    cases.append((f"window of {STEPS} x {MICRO}", _windows, None))
    for case, make, size in cases:
        times = interleave(make(), rounds=rounds, warmup=WARMUP, progress=progress)
        yield from (_row(case, name, timing, size) for name, timing in times.items())


def _row(case: str, name: str, timing: Timing, size: int | None) -> Row:
    return Row(case, name, 1e3 * timing.median, timing.spread, size)


def _layers(shape: tuple[int, ...], dtype: tf.DType) -> dict[str, Callable[[], object]]:
    x, dy = (tf.cast(tf.random.stateless_normal(shape, [seed, 0]), dtype) for seed in (1, 2))
    policy = "float32" if dtype == tf.float32 else f"mixed_{dtype.name}"

    def layer(kind: type[keras.layers.BatchNormalization]) -> Callable[[], object]:
        layer = kind(dtype=policy)
        layer.build(shape)

        @tf.function
        def step() -> object:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=dy)

        return step

    # TensorFlow's fused op wants images.
    image = shape if len(shape) == 4 else (shape[0], 1, 1, shape[1])
    images, image_gradients = tf.reshape(x, image), tf.reshape(dy, image)
    gamma, beta = tf.Variable(tf.ones(shape[-1:])), tf.Variable(tf.zeros(shape[-1:]))

    @tf.function
    def fused() -> object:
        with tf.GradientTape() as tape:
            tape.watch(images)
            y, _, _ = tf.compat.v1.nn.fused_batch_norm(images, gamma, beta, epsilon=1e-3)
        return y, tape.gradient(y, [images, gamma, beta], output_gradients=image_gradients)

    return {
        "Keras": layer(keras.layers.BatchNormalization),
        "TensorFlow fused": fused,
        "accumops": layer(AccumBatchNormalization),
    }


def _windows() -> dict[str, Callable[[], object]]:
    x = tf.random.stateless_normal((STEPS * MICRO, 32, 32, 3), [1, 0])
    y = tf.random.stateless_uniform((STEPS * MICRO,), [2, 0], maxval=10, dtype=tf.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def calls(model: keras.Model, batch_size: int) -> Callable[[], object]:
        model.make_train_function()
        batches = iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).cache().repeat())

        def window() -> None:
            for _ in range(STEPS * MICRO // batch_size):
                model.train_function(batches)

        return window

    def keras_model(**arguments: Any) -> keras.Model:
        model = convolutional_network()
        model.compile(keras.optimizers.Adam(1e-3, **arguments), loss, jit_compile=False)
        return model

    def ours(batch_size: int, **mode: Any) -> Callable[[], object]:
        model = GradientAccumulateModel(replace_batchnorm_layers(convolutional_network()), **mode)
        model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=False)
        return calls(model, batch_size)

    return {
        "Keras layers and accumulation": calls(keras_model(gradient_accumulation_steps=STEPS), MICRO),
        "Keras layers, one batch": calls(keras_model(), STEPS * MICRO),
        "accumops, accum_steps": ours(MICRO, accum_steps=STEPS),
        "accumops, micro_batch_size": ours(STEPS * MICRO, micro_batch_size=MICRO),
    }


def convolutional_network() -> keras.Model:
    """Six 3x3 convolutions of 32, 64 and 128 channels for images of 32x32, with batch normalization and ReLU."""
    layers: list[keras.layers.Layer] = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        for _ in range(2):
            layers += [
                keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
            ]
        layers.append(keras.layers.MaxPooling2D())
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])
