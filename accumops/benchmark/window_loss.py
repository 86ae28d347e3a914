"""The `window-loss` suite: a contrastive loss over the whole batch, in micro-batches: its time and its memory."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.memory import peak_of, peak_rows
from accumops.benchmark.result import Result, Row
from accumops.losses.contrastive import CLIPLoss
from accumops.training.model import GradientAccumulateModel

ROUNDS = 10
BATCH, MICRO = 256, 32  # what is timed
SIDE, CHANNELS, WORDS, FEATURES = 32, 32, 48, 32
_PROCESSES = 3  # for each peak
_WARMUP = 2

FLOOR = "the loss of each micro-batch alone (another loss)"


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return 1 + _WARMUP + rounds + _PROCESSES * sum(len(names) for _, _, names in MEMORY_CASES)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures windows of pairs of images and texts with CLIP's loss: 256 pairs, and the memory of 4096.

    Accumulating the loss of each micro-batch alone trains another loss, with fewer negatives. It is the floor, because
    nothing that needs the activations of a micro-batch at a time can be faster, or take less memory.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round and each process.
    """
    contenders = [
        Contender(name, lambda make=make: make(BATCH, MICRO), floor=name == FLOOR)  # type: ignore[misc]
        for name, make in CONTENDERS.items()
    ]
    case = f"time, {BATCH} pairs in micro-batches of {MICRO}"
    rows = time_contenders(case, contenders, device=device, rounds=rounds, warmup=_WARMUP, progress=progress)
    return Result(
        "CLIP's loss of pairs, convolutional and dense towers",
        (*rows, *(row for case in MEMORY_CASES for row in _peaks(*case, device, progress))),
        ("Memory is counted over the process's memory before it had a model, and includes the batch itself.",),
        settings={"batch_size": BATCH, "micro_batch_size": MICRO},
    )


def _peaks(batch: int, micro: int, names: list[str], device: str, progress: Callable[[], object]) -> list[Row]:
    return peak_rows(
        f"memory, {batch} pairs in micro-batches of {micro}",
        dict.fromkeys(names, peak_bytes),
        {"batch": batch, "micro": micro, "device": device},
        floor=FLOOR,
        processes=_PROCESSES,
        progress=progress,
    )


def peak_bytes(contender: str, batch: int, micro: int, device: str) -> int:
    """Returns the peak while windows run, in bytes above the memory before there was a model. Needs a new process.

    Args:
        contender: The name of one of `CONTENDERS`.
        batch: Pairs in a batch.
        micro: Pairs in a micro-batch.
        device: `"CPU"` or `"GPU"`.
    """
    return peak_of(lambda: CONTENDERS[contender](batch, micro), device)


def towers() -> keras.Model:
    """Six 3x3 convolutions for images, two dense layers for texts."""
    image, text = keras.Input((SIDE, SIDE, 3)), keras.Input((WORDS,))
    left = image
    for _ in range(6):
        left = keras.layers.Conv2D(CHANNELS, 3, padding="same", activation="gelu")(left)
    left = keras.layers.Dense(FEATURES)(keras.layers.GlobalAveragePooling2D()(left))
    right = keras.layers.Dense(FEATURES)(keras.layers.Dense(64, activation="gelu")(text))
    shape = (1, FEATURES)
    pair = [keras.layers.Reshape(shape)(left), keras.layers.Reshape(shape)(right)]
    return keras.Model([image, text], keras.layers.Concatenate(axis=1)(pair))


def _train(model: Any, batch: int) -> Callable[[], object]:
    model.compile(keras.optimizers.SGD(training.LEARNING_RATE), CLIPLoss(), jit_compile=False)
    images = tf.random.stateless_normal((batch, SIDE, SIDE, 3), [1, 0])
    texts = tf.random.stateless_normal((batch, WORDS), [2, 0])
    return training.train_steps(model, (images, texts), tf.zeros([batch]), batch)


def _alone(batch: int, micro: int) -> Callable[[], object]:
    return _train(GradientAccumulateModel(towers(), micro_batch_size=micro, check_loss=False), batch)


def _window(batch: int, micro: int) -> Callable[[], object]:
    return _train(GradientAccumulateModel(towers(), micro_batch_size=micro, loss_over="window"), batch)


def _at_once(batch: int, micro: int) -> Callable[[], object]:
    return _train(towers(), batch)


CONTENDERS: dict[str, Callable[[int, int], Callable[[], object]]] = {
    FLOOR: _alone,
    "accumops, loss_over='window'": _window,
    "the batch at once": _at_once,
}
# Batch, micro-batch, contenders. The large batch at once would take some 14 GiB.
MEMORY_CASES = ((256, 16, list(CONTENDERS)), (4096, 32, list(CONTENDERS)[:2]))
