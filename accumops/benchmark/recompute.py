"""The `recompute` suite: training that computes activations again: its time and its memory."""

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.memory import peak_of, peak_rows
from accumops.benchmark.result import Result
from accumops.memory.recompute_layers import recompute_layers

ROUNDS = 10
CONV_BLOCKS, ATTENTION_BLOCKS = 48, 12
SEGMENTS = (2, 4, 8, 16)
_PROCESSES = 3  # for each peak
_WARMUP = 2

FLOOR = "all activations kept"


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(NETWORKS) * (1 + _WARMUP + rounds + _PROCESSES * len(CONTENDERS))


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures training steps of a residual convolutional network and of a transformer.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round and each process.
    """
    rows = []
    for network in NETWORKS:
        contenders = [
            Contender(name, lambda name=name, network=network: _step(network, name), floor=name == FLOOR)  # type: ignore[misc]
            for name in CONTENDERS
        ]
        rows += time_contenders(
            f"time, {network}", contenders, device=device, rounds=rounds, warmup=_WARMUP, progress=progress
        )
        rows += peak_rows(
            f"memory of activations, {network}",
            dict.fromkeys(CONTENDERS, peak_bytes),
            {"network": network, "device": device},
            floor=FLOOR,
            processes=_PROCESSES,
            progress=progress,
        )
    return Result(
        "training steps that compute activations again",
        tuple(rows),
        ("Memory counts from the moment when the process has made the model and traced the step.",),
        settings={"convolutional_blocks": CONV_BLOCKS, "attention_blocks": ATTENTION_BLOCKS},
    )


def peak_bytes(contender: str, network: str, device: str) -> int:
    """Returns the peak of some steps, in bytes above the memory once the step is traced. Needs a new process.

    Args:
        contender: The name of one of `CONTENDERS`.
        network: The name of one of `NETWORKS`.
        device: `"CPU"` or `"GPU"`.
    """
    return peak_of(lambda: _step(network, contender), device, activations=True)


def convolutional() -> tuple[keras.Model, int]:
    """Residual blocks of a 3x3 convolution, batch normalization and ReLU on 32x32 images, and a batch size."""
    layers = keras.layers
    inputs = hidden = keras.Input((32, 32, 16))
    for _ in range(CONV_BLOCKS):
        skip = hidden
        hidden = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same")(hidden)))
        hidden = layers.Add()([hidden, skip])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(hidden))), 32


def transformer() -> tuple[keras.Model, int]:
    """Blocks of attention and two dense layers on 128 vectors, and a batch size."""
    layers = keras.layers
    inputs = hidden = keras.Input((128, 128))
    for _ in range(ATTENTION_BLOCKS):
        normal = layers.LayerNormalization()(hidden)
        attended = layers.MultiHeadAttention(4, 32)(normal, normal)
        hidden = layers.Add()([hidden, layers.Dropout(0.1)(attended)])
        wide = layers.Activation("gelu")(layers.Dense(512)(layers.LayerNormalization()(hidden)))
        hidden = layers.Add()([hidden, layers.Dropout(0.1)(layers.Dense(128)(wide))])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(hidden))), 16


def _step(network: str, contender: str) -> Callable[[], object]:
    model, batch = NETWORKS[network]()
    return training_step(CONTENDERS[contender](model), batch)


def training_step(model: keras.Model, batch: int) -> Callable[[], object]:
    """Returns a function, traced, that computes the gradients of random samples, and uses all of them.

    Args:
        model: The model.
        batch: How many samples.
    """
    gradients_of = training.gradients_of(model)
    x = tf.random.stateless_normal((batch, *model.input_shape[1:]), [1, 0])
    y = tf.range(batch) % 10

    @tf.function
    def step() -> list[tf.Tensor]:
        loss, gradients = gradients_of(x, y)
        return [loss, *(tf.reduce_sum(gradient) for gradient in gradients)]

    step.get_concrete_function()
    return step


NETWORKS: dict[str, Callable[[], tuple[keras.Model, int]]] = {
    "residual convolutions": convolutional,
    "transformer": transformer,
}
CONTENDERS: dict[str, Callable[[keras.Model], keras.Model]] = {
    FLOOR: lambda model: model,
    **{f"segments={count}": functools.partial(recompute_layers, segments=count) for count in SEGMENTS},
    'policy="cheap"': lambda model: recompute_layers(model, policy="cheap"),
}
