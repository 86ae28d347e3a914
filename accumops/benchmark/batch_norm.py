"""The `batch-norm` suite: forward and backward of one layer, and a window of a small network with six layers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops import ops
from accumops.benchmark import training
from accumops.benchmark.bandwidth import Bandwidth
from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.models import PROBLEMS, convolutional_network
from accumops.benchmark.result import Result, Row
from accumops.normalization.layer import AccumBatchNormalization
from accumops.normalization.replace import replace_batchnorm_layers
from accumops.training.model import GradientAccumulateModel

ROUNDS = 30
WARMUP = 3
LAYER_ROUNDS = 5  # rounds of a layer for each round of the window, which takes a hundred times as long
LAYER_WARMUP = 100  # after these TensorFlow knows which operations are quick, see Problem.warmup
SHAPES = ((32, 56, 56, 64), (16, 32, 32, 32), (8, 7, 7, 2048), (4096, 512))
DTYPES = ("float32", "bfloat16")
STEPS, MICRO = 4, 16
_PASSES = 8  # the fewest passes over arrays of the input's size: x, x, y forward and x, dy, x, dy, dx backward
_BANDWIDTH_SAMPLES = 5  # taken before each layer


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(SHAPES) * len(DTYPES) * (1 + LAYER_WARMUP + LAYER_ROUNDS * rounds) + 1 + WARMUP + rounds


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures one layer and a window of a network.

    For one layer it times forward and backward in a `tf.function`: Keras's layer, TensorFlow's fused op, and accumops'
    layer and op. The window is 4 micro-batches of 16 through six convolutions with batch normalization and ReLU. There
    it times Keras's layers with Keras's accumulation, and `GradientAccumulateModel` in both modes with replaced layers.
    The window's floor is forward and backward with replaced layers.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender of the window. A layer's contenders run five times as often.
        progress: Called after each round.
    """
    measure = functools.partial(time_contenders, device=device, progress=progress)
    bandwidth = Bandwidth(device)
    rows: list[Row] = []
    for shape in SHAPES:
        for dtype in map(tf.as_dtype, DTYPES):
            for _ in range(_BANDWIDTH_SAMPLES):
                bandwidth.sample()
            size = _PASSES * math.prod(shape) * dtype.size
            case = f"{shape} {dtype.name}"
            layers = measure(case, _layers(shape, dtype, size), rounds=LAYER_ROUNDS * rounds, warmup=LAYER_WARMUP)
            rows += [*bandwidth.limits(case, size), *layers]
    rows += measure(f"window of {STEPS} x {MICRO}", _windows(device), rounds=rounds, warmup=WARMUP)
    return Result(
        "batch normalization: forward and backward, and a window of a network with six of them",
        tuple(rows),
        (
            f"The limit counts the bytes that {_PASSES} passes move; in small layers caches beat the memory.",
            f"A layer is measured {LAYER_ROUNDS} times as often as the window.",
            "A layer maintains running statistics as well, which an op leaves to others.",
            "The window's floor is forward and backward alone, with accumops' layers.",
        ),
        bandwidth=bandwidth.best,
    )


def _layers(shape: tuple[int, ...], dtype: tf.DType, size: int) -> list[Contender]:
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

    def op(image: tuple[int, ...], normalize: Callable[..., tf.Tensor]) -> Callable[[], object]:
        images, image_gradients = tf.reshape(x, image), tf.reshape(dy, image)
        gamma, beta = tf.Variable(tf.ones(shape[-1:])), tf.Variable(tf.zeros(shape[-1:]))

        @tf.function
        def step() -> object:
            with tf.GradientTape() as tape:
                tape.watch(images)
                y = normalize(images, gamma, beta, epsilon=1e-3)[0]
            return y, tape.gradient(y, [images, gamma, beta], output_gradients=image_gradients)

        return step

    # TensorFlow's fused op takes images only.
    image = shape if len(shape) == 4 else (shape[0], 1, 1, shape[1])
    contenders = {
        "Keras, the layer": lambda: layer(keras.layers.BatchNormalization),
        "TensorFlow, the fused op": lambda: op(image, tf.compat.v1.nn.fused_batch_norm),
        "accumops, the layer": lambda: layer(AccumBatchNormalization),
        "accumops, the op": lambda: op(shape, ops.batch_norm),
    }
    return [Contender(name, make, bytes_moved=size) for name, make in contenders.items()]


def _windows(device: str) -> list[Contender]:
    x, y = PROBLEMS["convolutional network"].data(STEPS * MICRO)

    def floor() -> Callable[[], object]:
        model = replace_batchnorm_layers(convolutional_network())
        step = training.forward_and_backward(model, drop=device == "CPU")
        return training.each_micro_batch(step, training.split(x, y, MICRO))

    def keras_model(batch_size: int, **arguments: Any) -> Callable[[], object]:
        model = convolutional_network()
        adam = keras.optimizers.Adam(training.LEARNING_RATE, **arguments)
        model.compile(adam, training.loss_function(), jit_compile=False)
        return training.train_steps(model, x, y, batch_size)

    def ours(batch_size: int, **mode: Any) -> Callable[[], object]:
        model = GradientAccumulateModel(replace_batchnorm_layers(convolutional_network()), **mode)
        model.compile(keras.optimizers.Adam(training.LEARNING_RATE), training.loss_function(), jit_compile=False)
        return training.train_steps(model, x, y, batch_size)

    return [
        Contender("forward and backward", floor, floor=True),
        Contender("Keras layers and accumulation", lambda: keras_model(MICRO, gradient_accumulation_steps=STEPS)),
        Contender("Keras layers, one batch", lambda: keras_model(STEPS * MICRO)),
        Contender("accumops, accum_steps", lambda: ours(MICRO, accum_steps=STEPS)),
        Contender("accumops, micro_batch_size", lambda: ours(STEPS * MICRO, micro_batch_size=MICRO)),
    ]
