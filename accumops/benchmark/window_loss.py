"""The `window-loss` suite: a contrastive loss over the whole batch, in micro-batches: its time and its memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.child_process import ChildProcess, ChildProcessFailed
from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.memory import peak_of
from accumops.benchmark.result import Result, Row
from accumops.benchmark.timing import interleave
from accumops.losses.contrastive import CLIPLoss
from accumops.training.model import GradientAccumulateModel

ROUNDS = 10
BATCH = 256
MICRO = {"time": 32, "memory": 16}
SIDE, CHANNELS, WORDS, FEATURES = 32, 32, 48, 32
_PROCESSES = 3  # for each peak
_WARMUP = 2

FLOOR = "the loss of each micro-batch alone (another loss)"


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return 1 + _WARMUP + rounds + _PROCESSES * len(CONTENDERS)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures windows of 256 pairs of images and texts with CLIP's loss.

    Accumulating the loss of each micro-batch alone trains another loss, with fewer negatives. It is the floor, because
    nothing that needs the activations of a micro-batch at a time can be faster, or take less memory.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round and each process.
    """
    contenders = [
        Contender(name, lambda make=make: make(MICRO["time"]), floor=name == FLOOR)  # type: ignore[misc]
        for name, make in CONTENDERS.items()
    ]
    case = f"time, micro-batches of {MICRO['time']}"
    rows = time_contenders(case, contenders, device=device, rounds=rounds, warmup=_WARMUP, progress=progress)
    return Result(
        f"CLIP's loss of {BATCH} pairs, convolutional and dense towers",
        (*rows, *_peaks(device, progress)),
        ("Memory is counted over the process's memory before it had a model.",),
        settings={"batch_size": BATCH, "micro_batch_size": MICRO},
    )


def _peaks(device: str, progress: Callable[[], object]) -> list[Row]:
    notes: dict[str, str] = {}

    def sample(name: str) -> float:
        try:
            with ChildProcess() as process:
                return process.call(peak_bytes, contender=name, device=device)
        except ChildProcessFailed as error:
            notes[name] = str(error)
            return 0.0
        finally:
            progress()

    peaks = interleave({name: name for name in CONTENDERS}, sample=sample, rounds=_PROCESSES, warmup=0)
    rows = []
    for name in CONTENDERS:
        row = Row(f"memory, micro-batches of {MICRO['memory']}", name, floor=name == FLOOR, note=notes.get(name))
        if row.note is None:
            row = dataclasses.replace(row, peak_bytes=round(peaks[name].median), spread=peaks[name].spread)
        rows.append(row)
    return rows


def peak_bytes(contender: str, device: str) -> int:
    """Returns the peak while windows run, in bytes above the memory before there was a model. Needs a new process.

    Args:
        contender: The name of one of `CONTENDERS`.
        device: `"CPU"` or `"GPU"`.
    """
    return peak_of(lambda: CONTENDERS[contender](MICRO["memory"]), device)


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


def _train(model: Any) -> Callable[[], object]:
    model.compile(keras.optimizers.SGD(training.LEARNING_RATE), CLIPLoss(), jit_compile=False)
    images = tf.random.stateless_normal((BATCH, SIDE, SIDE, 3), [1, 0])
    texts = tf.random.stateless_normal((BATCH, WORDS), [2, 0])
    return training.train_steps(model, (images, texts), tf.zeros([BATCH]), BATCH)


CONTENDERS: dict[str, Callable[[int], Callable[[], object]]] = {
    FLOOR: lambda micro: _train(GradientAccumulateModel(towers(), micro_batch_size=micro, **_UNCHECKED)),
    "accumops, loss_over='window'": lambda micro: _train(
        GradientAccumulateModel(towers(), micro_batch_size=micro, loss_over="window")
    ),
    "the batch at once": lambda micro: _train(towers()),
}
_UNCHECKED: dict[str, Any] = {"check_loss": False}
