"""The `window-norm` suite: batch normalization over the whole window, in micro-batches: its time and its memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.memory import peak_of_later_windows, peak_rows
from accumops.benchmark.models import CLASSES
from accumops.benchmark.result import Result
from accumops.memory.device_memory import memory_counter
from accumops.normalization.replace import replace_batchnorm_layers
from accumops.training.model import GradientAccumulateModel

ROUNDS = 5
BATCH = 256
BLOCKS, CHANNELS = 8, 32  # of the residual network
_PROCESSES = 2  # for each peak: what TensorFlow's allocator counts is nearly the same each time
_WARMUP = 1

FLOOR = "Keras, the whole batch"
MICRO_BATCHES = "accumops, statistics='micro_batch'"


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, and how its windows run."""

    build: Callable[[], keras.Model]
    micro_batch_size: int
    every: tuple[int, ...]
    """The layers from one kept tensor to the next, a contender for each."""


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return sum(1 + _WARMUP + rounds + _PROCESSES * len(contenders(name)) for name in NETWORKS)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures windows of 256 samples, in a residual network and in MobileNetV2.

    The floor is plain Keras on the whole batch. Batch normalization over the window has the same result. Micro-batches
    with statistics of their own have another one: they show what accumulation takes that runs each layer once.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round and each process.
    """
    counter = memory_counter(f"{device}:0")
    rows = []
    for name, network in NETWORKS.items():
        windows = f"{name}, micro-batches of {network.micro_batch_size}"
        timed = [
            Contender(each, functools.partial(window, name, each), floor=each == FLOOR) for each in contenders(name)
        ]
        rows += time_contenders(
            f"time, {windows}", timed, device=device, rounds=rounds, warmup=_WARMUP, progress=progress
        )
        rows += peak_rows(
            f"memory, {windows}",
            dict.fromkeys(contenders(name), peak_bytes),
            {"network": name, "device": device},
            floor=FLOOR,
            processes=_PROCESSES,
            progress=progress,
        )
    return Result(
        f"windows of {BATCH} samples, with batch normalization over the window",
        tuple(rows),
        (
            f"Memory is over that between windows, with weights, accumulators and the batch; {counter.name} counts it.",
            "Keras's layers are not fused on a CPU, those of accumops are, as in the row statistics='micro_batch'.",
        ),
        settings={
            "batch_size": BATCH,
            "memory_counted_by": counter.name,
            "micro_batch_sizes": {name: network.micro_batch_size for name, network in NETWORKS.items()},
        },
    )


def peak_bytes(contender: str, network: str, device: str) -> int:
    """Returns the peak while windows run, in bytes above the memory between windows. Needs a new process.

    Args:
        contender: The name of one of `contenders`.
        network: The name of one of `NETWORKS`.
        device: `"CPU"` or `"GPU"`.
    """
    return peak_of_later_windows(lambda: window(network, contender), device)


def contenders(network: str) -> dict[str, dict[str, Any] | None]:
    """The contenders for one of `NETWORKS`: by name, what `replace_batchnorm_layers` gets, or None for plain Keras."""
    over_window = {
        f"accumops, statistics='window', every={every}": {"statistics": "window", "every": every}
        for every in NETWORKS[network].every
    }
    return {FLOOR: None, MICRO_BATCHES: {"statistics": "micro_batch"}, **over_window}


def window(network: str, contender: str) -> Callable[[], object]:
    """Returns a function that trains a new model with a window.

    Args:
        network: The name of one of `NETWORKS`.
        contender: The name of one of `contenders`.
    """
    chosen, statistics = NETWORKS[network], contenders(network)[contender]
    model = chosen.build()
    shape = model.input_shape[1:]
    if statistics is not None:
        replaced = replace_batchnorm_layers(model, **statistics)
        model = GradientAccumulateModel(replaced, micro_batch_size=chosen.micro_batch_size)
    model.compile(keras.optimizers.SGD(training.LEARNING_RATE), training.loss_function(), jit_compile=False)
    x = tf.random.stateless_normal((BATCH, *shape), [1, 0])
    y = tf.random.stateless_uniform((BATCH,), [2, 0], maxval=CLASSES, dtype=tf.int32)
    return training.train_steps(model, x, y, BATCH)


def residual() -> keras.Model:
    """Residual blocks of two 3x3 convolutions with normalization and ReLU, for images of 32x32."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    hidden = layers.Conv2D(CHANNELS, 3, padding="same")(inputs)
    for _ in range(BLOCKS):
        skip = hidden
        hidden = layers.BatchNormalization()(layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False)(hidden))
        hidden = layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False)(layers.ReLU()(hidden))
        hidden = layers.ReLU()(layers.Add()([layers.BatchNormalization()(hidden), skip]))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(hidden)))


def mobile_net() -> keras.Model:
    """MobileNetV2 for images of 96x96."""
    return keras.applications.MobileNetV2(
        input_shape=(96, 96, 3), weights=None, classes=CLASSES, classifier_activation=None
    )


NETWORKS = {
    "residual network": Network(residual, 8, (1, 2, 3)),
    "MobileNetV2": Network(mobile_net, 16, (1, 2, 3, 4)),
}
