"""The `memory-goals` suite: whether recompute for a memory goal takes what its plan says."""

from collections.abc import Callable

import keras

from accumops.benchmark.child_process import ChildProcess
from accumops.benchmark.result import Result, Row
from accumops.memory.profile import memory_profile
from accumops.memory.recompute_layers import recompute_layers

ROUNDS = 3  # measurements of each peak, of which the median counts
MODELS = ("ResNet50", "MobileNetV2", "DenseNet121", "EfficientNetB0")
GOALS = 10
_IMAGE, _BATCH = 128, 32


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(MODELS)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures the peak of a training step for goals between the smallest and what training takes without recompute.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Measurements of each peak.
        progress: Called after each model.
    """
    rows: list[Row] = []
    for name in MODELS:
        with ChildProcess() as process:
            rows += [Row(**row) for row in process.call(points, name=name, rounds=rounds)]
        progress()
    return Result(
        "peaks of training steps that keep to memory goals",
        tuple(rows),
        ("Above the weights: the batch, activations and gradients, as TensorFlow's allocator counts them.",),
        settings={"image": _IMAGE, "batch_size": _BATCH},
    )


def points(name: str, rounds: int) -> list[dict[str, object]]:
    """Returns the rows of a model, as dicts.

    Args:
        name: A model of `keras.applications`.
        rounds: Measurements of each peak.
    """
    net = getattr(keras.applications, name)(input_shape=(_IMAGE, _IMAGE, 3), weights=None, classes=10)

    def row(goal: str) -> dict[str, object]:
        steps = [memory_profile(net, _BATCH).steps[-1] for _ in range(rounds)]
        measured = sorted(step.measured or 0 for step in steps)[rounds // 2]
        what = f"{goal}, predicted {steps[0].predicted / 2**20:.0f} MiB"
        return {"case": name, "name": what, "peak_bytes": measured, "floor": goal == "all activations kept"}

    rows = [row("all activations kept")]
    profile = memory_profile(net, _BATCH, measure=False)
    fixed = profile.weights + profile.state
    most = fixed + profile.steps[0].predicted
    recompute_layers(net, segments=64)
    least = fixed + memory_profile(net, _BATCH, measure=False).steps[-1].predicted
    for i in range(GOALS):
        goal = round(most - (most - least) * (i + 1) / (GOALS + 1))
        recompute_layers(net, memory=goal, batch_size=_BATCH)
        rows.append(row(f"goal {(goal - fixed) / 2**20:.0f} MiB"))
    return rows
