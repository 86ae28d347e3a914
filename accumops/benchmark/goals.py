"""The `goals` suite: whether recompute for a memory goal takes what its plan says."""

from collections.abc import Callable

import keras

from accumops.adapters.keras_functional import graph_of
from accumops.benchmark.result import Result, Row
from accumops.memory.profile import memory_of_device, memory_profile, peak_of_step
from accumops.memory.recompute_layers import recompute_layers
from accumops.planning.child_process import ChildProcess

ROUNDS = 3
MODELS = ("ResNet50", "MobileNetV2", "DenseNet121", "EfficientNetB0")
GOALS = 10
FLOOR = "all activations kept"
IMAGE, BATCH = 128, 32


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(MODELS)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures the peak of a training step for goals between what all activations take and the smallest.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Measurements of each peak, of which the median counts.
        progress: Called after each model.
    """
    rows: list[Row] = []
    for name in MODELS:
        with ChildProcess() as process:
            for case, peaks in process.call(points, name=name, rounds=rounds).items():
                for what, peak in peaks.items():
                    rows.append(Row(name, f"{case}{what}", peak_bytes=peak, floor=case + what == FLOOR))
        progress()
    return Result(
        "training steps that recompute for a memory goal",
        tuple(rows),
        ("The batch, activations and gradients, as TensorFlow's allocator counts them. Weights are not in the sizes.",),
        settings={"image": IMAGE, "batch_size": BATCH},
    )


def points(name: str, rounds: int) -> dict[str, dict[str, int]]:
    """Returns the goal, the predicted peak and the measured peak in bytes, for no goal and for each goal.

    Args:
        name: A model of `keras.applications`.
        rounds: Measurements of each peak.
    """
    net, memory = network(name), memory_of_device()

    def peaks() -> dict[str, int]:
        predicted = memory_profile(net, BATCH, measure=False).steps[-1].predicted
        measured = sorted(peak_of_step(graph_of(net), BATCH, memory) for _ in range(rounds))
        return {", predicted": predicted, "": measured[rounds // 2]}

    plain = memory_profile(net, BATCH, measure=False)
    fixed, most = plain.weights + plain.state, plain.steps[0].predicted
    recompute_layers(net, segments=64)
    least = memory_profile(net, BATCH, measure=False).steps[-1].predicted
    found: dict[str, dict[str, int]] = {}
    # From the smallest on: what an earlier step has left in the allocator would be given to smaller tensors.
    for i in range(GOALS, 0, -1):
        goal = round(most - (most - least) * i / (GOALS + 1))
        recompute_layers(net, memory=fixed + goal, batch_size=BATCH)
        found[f"goal {i}"] = {", the goal": goal, **peaks()}
    recompute_layers(net, segments=0)
    found[FLOOR] = peaks()
    return dict(reversed(found.items()))


def network(name: str) -> keras.Model:
    """A model of `keras.applications` for small images."""
    return getattr(keras.applications, name)(input_shape=(IMAGE, IMAGE, 3), weights=None, classes=10)
