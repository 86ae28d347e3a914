"""Counts what a micro-step and an update do on a GPU, from TensorFlow's profiler: launches, copies and waits.

A micro-step must stay on the device: if it copies to the host, or waits for the stream, the run ends with status 1. A
step of `fit` is listed as well; it may copy its data to the device.
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

import keras
import tensorflow as tf

import accumops
from accumops.benchmark import training
from accumops.benchmark.models import Problem, transformer

STEPS = 20
COPIES = {"MemcpyD2H": "copies to the host", "MemcpyH2D": "copies to the device", "MemcpyD2D": "copies on the device"}
WAITS = ("Synchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2")
"""Parts of the names of CUDA's calls that wait for the device: synchronizing calls, and copies without `Async`."""
FORBIDDEN = ("copies to the host", "waits")
PROBLEM = Problem("transformer", transformer(5_000, 256, 64, 4, 4), (64,), vocabulary=5_000)


@dataclasses.dataclass(frozen=True)
class Event:
    """An event in the profile."""

    plane: str
    name: str
    begin: float  # ns
    end: float


def read_events(directory: str) -> list[Event]:
    """Reads all events of a profile from its directory."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    events = []
    for path in glob.glob(f"{directory}/**/*.xplane.pb", recursive=True):
        space = xplane_pb2.XSpace()
        with open(path, "rb") as file:
            space.ParseFromString(file.read())
        for plane in space.planes:
            for line in plane.lines:
                for event in line.events:
                    begin = line.timestamp_ns + event.offset_ps / 1e3
                    name = plane.event_metadata[event.metadata_id].name
                    events.append(Event(plane.name, name, begin, begin + event.duration_ps / 1e3))
    return events


def count(events: Iterable[Event], mark: str) -> dict[str, float]:
    """Counts what was done from the first to the last event called `mark`, divided by the number of these events."""
    events = list(events)
    marks = [event for event in events if event.name.split("#")[0] == mark]
    if not marks:
        raise ValueError(f"The profile has no event {mark!r}.")
    begin, end = min(each.begin for each in marks), max(each.end for each in marks)
    counts: collections.Counter[str] = collections.Counter(
        {"launches": 0, "waits": 0, **dict.fromkeys(COPIES.values(), 0)}
    )
    for event in events:
        if not begin <= event.begin <= end:
            continue
        if "/device:GPU" in event.plane:
            # TensorFlow may add lines to the plane that repeat its streams' events; these count as well.
            kind = next((COPIES[each] for each in COPIES if each in event.name), None)
            counts["launches" if kind is None else kind] += 1
        elif any(each in event.name for each in WAITS) and "cu" in event.name:
            counts["waits"] += 1
    return {name: number / len(marks) for name, number in counts.items()}


def profile(mark: str, run: Callable[[], object]) -> dict[str, float]:
    """Runs a function `STEPS` times under the profiler, and counts what one run does."""
    for _ in range(3):
        run()
    with tempfile.TemporaryDirectory() as directory:
        tf.test.experimental.sync_devices()
        tf.profiler.experimental.start(directory)
        for _ in range(STEPS):
            with tf.profiler.experimental.Trace(mark):
                run()
        tf.test.experimental.sync_devices()
        tf.profiler.experimental.stop()
        return count(read_events(directory), mark)


def cases() -> dict[str, Callable[[], object]]:
    """Returns the functions to profile, by name."""
    x, y = PROBLEM.data(16)
    model = PROBLEM.build(keras)
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.AdamW(1e-3), accum_steps=1 << 30)
    optimizer.build(model.trainable_variables)
    compute = training.gradients_of(model)
    gradients = compute(x, y)[1]
    accumulate = tf.function(lambda: optimizer.accumulate(gradients), jit_compile=False)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        loss, gradients = compute(x, y)
        optimizer.accumulate(gradients)
        return loss

    @tf.function
    def window() -> None:
        optimizer.accumulate(gradients)
        optimizer.close()

    trained = accumops.GradientAccumulateModel(PROBLEM.build(keras), accum_steps=1 << 30)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.AdamW(1e-3), loss, jit_compile=False)
    return {
        "accumulate": accumulate,
        "forward, backward and accumulate": lambda: step(x, y),
        "accumulate and update": window,
        "step of fit": training.train_steps(trained, x, y, 16),
    }


def main() -> None:
    """Profiles all cases, prints their counts, and fails if one of the first two leaves the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write the counts")
    arguments = parser.parse_args()
    counts = {name: profile(name, run) for name, run in cases().items()}
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(counts, file, indent=2)
    for name, numbers in counts.items():
        print(f"{name}: " + ", ".join(f"{number:g} {what}" for what, number in numbers.items()))
    if not any(numbers["launches"] for numbers in counts.values()):
        sys.exit("Nothing was launched: no GPU was in it, or the profiler sees none.")
    own = ("accumulate", "forward, backward and accumulate")
    bad = [f"{name}: {counts[name][what]:g} {what}" for name in own for what in FORBIDDEN if counts[name][what]]
    sys.exit("A micro-step leaves the device: " + "; ".join(bad) if bad else 0)


if __name__ == "__main__":
    main()
