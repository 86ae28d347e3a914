"""The `plan` suite: whether a planned micro-batch keeps to its memory limit, and how fast it is beside all others."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from accumops.benchmark.recompute import transformer
from accumops.benchmark.result import Result, Row
from accumops.memory.device_memory import ResidentMemory
from accumops.memory.recompute_layers import recompute_layers
from accumops.planning.child_process import ChildProcess, ChildProcessFailed
from accumops.planning.find_micro_batch_size import find_micro_batch_size
from accumops.training.model import GradientAccumulateModel

ROUNDS = 3
LIMITS = (1, 2, 4)  # GiB
APPLICATIONS = ("MobileNetV2", "EfficientNetB0", "ResNet50", "DenseNet121", "Xception", "VGG16")
MODELS = ("transformer", *APPLICATIONS)
IMAGE, EFFECTIVE = 96, 64
SIZES = (1, 4, 16, 64)
RECOMPUTED = (16, 64)
_SEGMENTS = 8


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(MODELS) * (len(LIMITS) + len(SIZES) + len(RECOMPUTED))


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Plans for each limit, and trains with the plan and with micro-batches of many sizes.

    Args:
        device: `"CPU"`; the limits are for the memory of a process.
        rounds: Timed windows, of which the median counts.
        progress: Called after each training.
    """
    rows: list[Row] = []
    found: list[str] = []
    for name in MODELS:
        others = []
        for segments, sizes in ((0, SIZES), (_SEGMENTS, RECOMPUTED)):
            for size in sizes:
                taken, _ = _in_a_process(trained, name=name, size=size, segments=segments, rounds=rounds)
                others.append((size, segments, taken))
                progress()
        for limit in LIMITS:
            case = f"{name}, {limit} GiB"
            fitting = [each for each in others if each[2] and each[2]["peak"] <= limit * 2**30]
            what = "none fits"
            best = min(fitting, key=lambda each: each[2]["ms"], default=None)
            if best is not None:
                what = f"{best[0]} samples" + (f", {best[1]} segments" if best[1] else "")
                rows.append(Row(case, "the fastest of all", best[2]["ms"], best[2]["peak"], floor=True))
            plan, note = _in_a_process(planned, name=name, limit=limit * 2**30, rounds=rounds)
            progress()
            if not plan:
                rows.append(Row(case, "the plan", note=note))
                continue
            rows.append(Row(case, "the plan", plan["ms"], plan["peak"]))
            rows.append(Row(case, "the plan, predicted", plan["expected_ms"], plan["predicted"]))
            found.append(f"{case}: {plan['what']}, found in {plan['search']:.0f} s; the fastest: {what}.")
    return Result(
        "planned micro-batches within a memory limit, time of a sample",
        tuple(rows),
        (
            "The peak is what the operating system counts for the process while `fit` runs, the program included.",
            "'The fastest of all' is of micro-batches of "
            f"{', '.join(map(str, SIZES))} samples, and of {' and '.join(map(str, RECOMPUTED))} with recompute.",
            *found,
        ),
        settings={"image": IMAGE, "effective_batch_size": EFFECTIVE, "segments": _SEGMENTS},
    )


def _in_a_process(function: Callable[..., Any], **arguments: Any) -> tuple[dict[str, Any], str | None]:
    with ChildProcess() as process:
        try:
            return process.call(function, **arguments), None
        except ChildProcessFailed as error:
            return {}, str(error)


def planned(name: str, limit: int, rounds: int) -> dict[str, Any]:
    """Plans and trains a model. Needs a new process.

    Args:
        name: One of `MODELS`.
        limit: Bytes.
        rounds: Timed windows.
    """
    model, data = _compiled(name, 1)
    start = time.perf_counter()
    plan = find_micro_batch_size(model, data, memory_limit=limit, verbose=0)
    seconds = time.perf_counter() - start
    plan.apply(model)
    recomputed = f", {plan.recomputes} recomputed" if plan.recompute else ""
    return {
        **_train(model, data, rounds),
        "what": f"{plan.micro_batch_size} samples{recomputed}",
        "predicted": plan.predicted_peak,
        "expected_ms": 1e3 / plan.samples_per_second,
        "search": seconds,
    }


def trained(name: str, size: int, segments: int, rounds: int) -> dict[str, Any]:
    """Trains a model. Needs a new process.

    Args:
        name: One of `MODELS`.
        size: Samples a micro-batch.
        segments: Segments that are recomputed; 0 for no recompute.
        rounds: Timed windows.
    """
    model, data = _compiled(name, size, segments)
    return _train(model, data, rounds)


def _train(model: keras.Model, data: Any, rounds: int) -> dict[str, Any]:
    """Trains, and returns the peak of the process and the time of a sample."""
    memory = ResidentMemory()
    memory.forget_peak()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model.fit(*data, batch_size=EFFECTIVE, verbose=0)
        seconds.append(time.perf_counter() - start)
    return {"peak": memory.peak(), "ms": 1e3 * float(np.median(seconds[1:])) / EFFECTIVE}


def _compiled(name: str, size: int, segments: int = 0) -> tuple[GradientAccumulateModel, Any]:
    net = NETWORKS[name]()
    if segments:
        recompute_layers(net, segments=segments)
    model = GradientAccumulateModel(net, micro_batch_size=size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=False)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EFFECTIVE, *net.input_shape[1:])).astype("float32")
    return model, (x, generator.integers(0, net.output_shape[-1], EFFECTIVE))


def _application(name: str) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(
        input_shape=(IMAGE, IMAGE, 3), weights=None, classes=10, classifier_activation=None
    )


NETWORKS: Mapping[str, Callable[[], keras.Model]] = {
    "transformer": lambda: transformer()[0],
    **{name: _application(name) for name in APPLICATIONS},
}
