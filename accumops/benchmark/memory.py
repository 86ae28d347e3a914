"""The `memory` suite: the peak memory of training, for several effective batch sizes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from accumops.benchmark import training
from accumops.benchmark.models import PROBLEMS, Problem
from accumops.benchmark.result import Result, Row
from accumops.benchmark.timing import interleave
from accumops.memory.device_memory import AllocatorMemory, ResidentMemory, memory_counter
from accumops.planning.child_process import ChildProcess, ChildProcessFailed
from accumops.training.model import GradientAccumulateModel

ROUNDS = 3
MODEL = "convolutional network"
MICRO = 16
SIZES = (32, 64, 128, 256)
FLOOR = f"a micro-batch of {MICRO}, without accumulation"
_WINDOWS = 3  # the peak is measured over these

Make = Callable[[Problem, int], Callable[[], object]]


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return rounds * (1 + len(CONTENDERS) * len(SIZES))


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures how much the peak memory of some windows exceeds the memory before there was a model.

    Each measurement has a new process. On a CPU it counts resident memory, including all that TensorFlow keeps; on a
    GPU it counts what TensorFlow's allocator has given out.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Processes for each contender.
        progress: Called after each process.
    """
    notes: dict[tuple[str, int], str] = {}

    def sample(key: tuple[str, int]) -> float:
        name, samples = key
        try:
            with ChildProcess() as process:
                return process.call(peak_bytes, problem=MODEL, contender=name, samples=samples, device=device)
        except ChildProcessFailed as error:
            notes[key] = str(error)
            return 0.0
        finally:
            progress()

    keys = [(FLOOR, MICRO)] + [(name, samples) for samples in SIZES for name in CONTENDERS]
    peaks = interleave({key: key for key in keys}, sample=sample, rounds=rounds, warmup=0)

    def row(samples: int, key: tuple[str, int]) -> Row:
        empty = Row(f"{samples} samples", key[0], floor=key[0] == FLOOR, note=notes.get(key))
        if empty.note is not None:
            return empty
        return dataclasses.replace(empty, peak_bytes=round(peaks[key].median), spread=peaks[key].spread)

    return Result(
        f"peak memory of training, {MODEL}",
        tuple(
            row(samples, key)
            for samples in SIZES
            for key in [(FLOOR, MICRO), *((name, samples) for name in CONTENDERS)]
        ),
        (
            "Over the process's memory before it had a model: weights, Adam's slots, accumulators, activations and "
            "what TensorFlow keeps.",
        ),
        settings={"model": MODEL, "micro_batch_size": MICRO},
    )


def peak_bytes(problem: str, contender: str, samples: int, device: str) -> int:
    """Returns the peak while windows run, in bytes above the memory before there was a model. Needs a new process.

    Args:
        problem: The name of one of `PROBLEMS`.
        contender: The name of one of `CONTENDERS`, or `FLOOR`.
        samples: The effective batch size.
        device: `"CPU"` or `"GPU"`.
    """
    make = _at_once if contender == FLOOR else CONTENDERS[contender]
    return peak_of(lambda: make(PROBLEMS[problem], samples), device)


def peak_rows(
    case: str,
    measured: dict[str, Callable[..., int]],
    arguments: dict[str, Any],
    *,
    floor: str,
    processes: int,
    progress: Callable[[], object],
) -> list[Row]:
    """Measures peaks of memory, each in a new process, and returns a row for each contender.

    Args:
        case: The name of the case.
        measured: Functions of a module that return the peak in bytes, by the name of the contender, which is their
            argument `contender`.
        arguments: Their other arguments.
        floor: The contender that the others are compared with.
        processes: Processes for each contender.
        progress: Called after each process.
    """
    notes: dict[str, str] = {}

    def sample(name: str) -> float:
        try:
            with ChildProcess() as process:
                return process.call(measured[name], contender=name, **arguments)
        except ChildProcessFailed as error:
            notes[name] = str(error)
            return 0.0
        finally:
            progress()

    peaks = interleave({name: name for name in measured}, sample=sample, rounds=processes, warmup=0)
    rows = []
    for name in measured:
        row = Row(case, name, floor=name == floor, note=notes.get(name))
        if row.note is None:
            row = dataclasses.replace(row, peak_bytes=round(peaks[name].median), spread=peaks[name].spread)
        rows.append(row)
    return rows


def peak_of(prepare: Callable[[], Callable[[], object]], device: str, *, activations: bool = False) -> int:
    """Returns the peak while windows run, in bytes above the memory before. Needs a new process.

    Args:
        prepare: Makes the model, and returns a function that runs a window.
        device: `"CPU"` or `"GPU"`.
        activations: Whether to count from when the model is made and its function is traced.
    """
    memory = AllocatorMemory("GPU:0") if device == "GPU" else ResidentMemory()
    with tf.device(f"{device}:0"):
        tf.add(1.0, 1.0)  # starts TensorFlow
        before = memory.now()
        window = prepare()
        if activations:
            before = memory.now()
        window()  # traces, if `prepare` has not
        memory.forget_peak()
        for _ in range(_WINDOWS):
            window()
        return memory.peak() - before


def peak_of_later_windows(prepare: Callable[[], Callable[[], object]], device: str) -> int:
    """Returns the peak while windows run, in bytes above the memory between windows. Needs a new process.

    TensorFlow's allocator counts it. Where that does not count, the operating system does, from the moment before the
    first window, because a process keeps memory that TensorFlow has let go: traced functions count then, too.

    Args:
        prepare: Makes the model, and returns a function that runs a window.
        device: `"CPU"` or `"GPU"`.
    """
    with tf.device(f"{device}:0"):
        memory = memory_counter(f"{device}:0")
        window = prepare()
        before = memory.now()
        window()  # traces, and makes variables
        if not isinstance(memory, ResidentMemory):
            before = memory.now()
        memory.forget_peak()
        for _ in range(_WINDOWS):
            window()
        return memory.peak() - before


def _train(model: Any, problem: Problem, samples: int, batch_size: int, **arguments: Any) -> Callable[[], object]:
    adam = keras.optimizers.Adam(training.LEARNING_RATE, **arguments)
    model.compile(adam, training.loss_function(), jit_compile=False)
    return training.train_steps(model, *problem.data(samples), batch_size)


def _at_once(problem: Problem, samples: int) -> Callable[[], object]:
    return _train(problem.build(keras), problem, samples, samples)


def _keras(problem: Problem, samples: int) -> Callable[[], object]:
    model = problem.build(keras)
    return _train(model, problem, samples, MICRO, gradient_accumulation_steps=samples // MICRO)


def _micro_batch_size(problem: Problem, samples: int) -> Callable[[], object]:
    model = GradientAccumulateModel(problem.build(keras), micro_batch_size=MICRO)
    return _train(model, problem, samples, samples)


def _accum_steps(problem: Problem, samples: int) -> Callable[[], object]:
    model = GradientAccumulateModel(problem.build(keras), accum_steps=samples // MICRO)
    return _train(model, problem, samples, MICRO)


CONTENDERS: dict[str, Make] = {
    "the batch at once": _at_once,
    "Keras, gradient_accumulation_steps": _keras,
    "accumops, micro_batch_size": _micro_batch_size,
    "accumops, accum_steps": _accum_steps,
}
