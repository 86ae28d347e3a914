"""Counts what replicas reduce in a window, on logical CPU devices, and compares it with the formula of scaling.py.

The traced graphs show what each all-reduce is given. The profile of a `fit` shows how many all-reduces are executed.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import scaling
import tensorflow as tf
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import accumops
from accumops.cli.info import describe

ACCUM_STEPS = 4
MICRO_BATCH = 8
WINDOWS = 2
WIDTHS = (32, 64, 48, 10)  # inputs, two hidden layers, outputs

Functions = dict[str, list[scaling.Collective]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A small network, and the way to train it."""

    name: str
    training: str = "accum_steps"  # or "micro_batch_size", or "Keras" for training without accumulation
    dtype: str = "float32"
    normalized: bool = False
    synchronized: bool = False

    def network(self) -> keras.Model:
        """Makes dense layers, with or without batch normalization."""
        inputs, *hidden, outputs = WIDTHS
        layers: list[Any] = [keras.Input((inputs,), dtype=self.dtype)]
        for width in hidden:
            layers.append(keras.layers.Dense(width, "relu", dtype=self.dtype))
            if self.normalized:
                layers.append(accumops.AccumBatchNormalization(synchronized=self.synchronized, dtype=self.dtype))
        return keras.Sequential([*layers, keras.layers.Dense(outputs, dtype=self.dtype)])

    def compiled(self) -> keras.Model:
        """Makes the model to train, compiled and built."""
        model = self.network()
        if self.training == "accum_steps":
            model = accumops.GradientAccumulateModel(model, accum_steps=ACCUM_STEPS)
        elif self.training == "micro_batch_size":
            model = accumops.GradientAccumulateModel(model, micro_batch_size=MICRO_BATCH)
        model.compile("adam", loss="mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    @property
    def batches(self) -> int:
        """The number of batches of `fit` in a window."""
        return 1 if self.training == "micro_batch_size" else ACCUM_STEPS

    def data(self, replicas: int, windows: int = WINDOWS) -> tuple[np.ndarray, np.ndarray]:
        """Makes the samples of this many windows."""
        samples = windows * ACCUM_STEPS * MICRO_BATCH * replicas
        return np.ones((samples, WIDTHS[0]), "float32"), np.ones((samples, WIDTHS[-1]), "float32")

    def batch_size(self, replicas: int) -> int:
        """Returns the batch size of `fit`, over all replicas."""
        return ACCUM_STEPS * MICRO_BATCH * replicas // self.batches


CASES = (
    Case("dense layers, without accumulation", training="Keras"),
    Case("dense layers, accum_steps=4"),
    Case("dense layers, micro_batch_size", training="micro_batch_size"),
    Case("the same in bfloat16, without accumulation", training="Keras", dtype="bfloat16"),
    Case("the same in bfloat16, accum_steps=4", dtype="bfloat16"),
    Case("the same in float64, accum_steps=4", dtype="float64"),
    Case("batch normalization, accum_steps=4", normalized=True),
    Case("batch normalization, micro_batch_size", training="micro_batch_size", normalized=True),
    Case("synchronized batch normalization, accum_steps=4", normalized=True, synchronized=True),
)


def predicted(case: Case, replicas: int) -> Functions:
    """Returns the all-reduces that scaling.py predicts, for each function of the training."""
    channels = WIDTHS[1:-1] if case.normalized else ()
    values = sum((before + 1) * after for before, after in itertools.pairwise(WIDTHS)) + 2 * sum(channels)
    if replicas == 1:
        end, each = [], []
    elif case.training == "Keras":
        end = each = [scaling.Collective(case.dtype, values)]
    else:
        wide = case.dtype == "float64"
        each = scaling.of_a_micro_batch(channels) if case.synchronized else []
        end = each + scaling.at_the_end(0 if wide else values, channels, wide=values if wide else 0)
    return {"micro-step": each, "last step": end} if case.training == "accum_steps" else {"step": end}


def traced(case: Case, strategy: tf.distribute.Strategy) -> Functions:
    """Returns the all-reduces of a replica in the traced graphs, for each function of the training."""
    with strategy.scope():
        model = case.compiled()
    replicas = strategy.num_replicas_in_sync
    data = tf.data.Dataset.from_tensor_slices(case.data(replicas, windows=1)).batch(case.batch_size(replicas))
    batch = next(iter(strategy.experimental_distribute_dataset(data)))

    def step(ends: bool | None) -> Callable[[Any], None]:
        def run(batch: Any) -> None:
            if ends is None:
                strategy.run(model.train_step, args=(batch,))
            else:
                with model.window_ends(ends):
                    strategy.run(model.train_step, args=(batch,))

        return run

    steps = {"micro-step": False, "last step": True} if case.training == "accum_steps" else {"step": None}
    return {
        name: _all_reduces(tf.function(step(ends), autograph=False).get_concrete_function(batch))
        for name, ends in steps.items()
    }


def _all_reduces(function: Any) -> list[scaling.Collective]:
    graph = function.graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for called in graph.library.function for node in called.node_def)]
    of_replicas: dict[str, list[scaling.Collective]] = {}
    for node in nodes:
        if node.op.startswith(("Collective", "Nccl")):
            assert node.op.startswith("CollectiveReduceV"), node.op
            (shape,) = node.attr["_output_shapes"].list.shape
            values = int(np.prod([dimension.size for dimension in shape.dim]))
            reduced = scaling.Collective(tf.as_dtype(node.attr["T"].type).name, values)
            of_replicas.setdefault(node.device, []).append(reduced)
    first, *others = of_replicas.values() or [[]]
    assert all(other == first for other in others), of_replicas
    return first


def executed(case: Case, strategy: tf.distribute.Strategy) -> float:
    """Returns how many all-reduces a replica makes in a window of `fit`, as TensorFlow's profiler counts them."""
    with strategy.scope():
        model = case.compiled()
    replicas = strategy.num_replicas_in_sync
    arguments = {"batch_size": case.batch_size(replicas), "shuffle": False, "verbose": 0}
    model.fit(*case.data(replicas), **arguments)  # traces
    with tempfile.TemporaryDirectory() as directory:
        with tf.profiler.experimental.Profile(directory, tf.profiler.experimental.ProfilerOptions(2, 0)):
            model.fit(*case.data(replicas), **arguments)
        events = [name for path in Path(directory).rglob("*.xplane.pb") for name in _events(path)]
    return sum(name.endswith(":CollectiveReduceV2") for name in events) / (WINDOWS * replicas)


def _events(profile: Path) -> list[str]:
    planes = xplane_pb2.XSpace.FromString(profile.read_bytes()).planes
    return [
        plane.event_metadata[event.metadata_id].name
        for plane in planes
        for line in plane.lines
        for event in line.events
    ]


def rows_on(replicas: int) -> list[dict[str, Any]]:
    """Measures all cases. The process must not have used TensorFlow before."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)

    def make_strategy() -> tf.distribute.Strategy:
        # With equal keys TensorFlow would take the collective operations for those of the strategy before.
        tf.distribute.MirroredStrategy._collective_key_base += 1_000
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])

    return [row(case, replicas, make_strategy) for case in CASES]


def row(case: Case, replicas: int, make_strategy: Callable[[], tf.distribute.Strategy]) -> dict[str, Any]:
    """Returns the measured and the predicted numbers of a case."""
    functions, wanted = traced(case, make_strategy()), predicted(case, replicas)
    steps, wanted_steps = _steps(case, functions), _steps(case, wanted)
    return {
        "case": case.name,
        "replicas": replicas,
        "functions": {name: [dataclasses.astuple(each) for each in found] for name, found in functions.items()},
        "all_reduces": [len(step) for step in steps],
        "executed": executed(case, make_strategy()),
        "bytes": sum(map(scaling.total_bytes, steps)),
        "predicted_bytes": sum(map(scaling.total_bytes, wanted_steps)),
        "agrees": all(map(same, steps, wanted_steps)),
    }


def same(found: list[scaling.Collective], wanted: list[scaling.Collective]) -> bool:
    """Returns whether these are the same all-reduces, in any order."""
    return collections.Counter(found) == collections.Counter(wanted)


def _steps(case: Case, functions: Functions) -> list[list[scaling.Collective]]:
    """Returns the all-reduces of each step of a window."""
    first, last = next(iter(functions.values())), list(functions.values())[-1]
    return [first] * (case.batches - 1) + [last]


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the findings as Markdown; numbers of replicas with equal findings share a line."""
    columns = ("", "N", "all-reduces of a window's steps", "executed", "bytes a window", "by the formula", "")
    table = Table(*columns, box=MARKDOWN, title="What a replica reduces")
    keys = ("case", "all_reduces", "executed", "bytes", "predicted_bytes", "agrees")
    for (case, steps, count, *found, agrees), same_rows in itertools.groupby(rows, lambda row: [row[k] for k in keys]):
        replicas = ", ".join(str(each["replicas"]) for each in same_rows)
        all_reduces = ", ".join(map(str, steps))
        table.add_row(case, replicas, all_reduces, f"{count:g}", *map(str, found), "" if agrees else "differs")
    Console(width=160).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8], help="logical devices, by turns")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    arguments = parser.parse_args()
    rows = []
    for replicas in arguments.replicas:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            rows += process.apply(rows_on, (replicas,))
    rows.sort(key=lambda each: [case.name for case in CASES].index(each["case"]))
    show(rows)
    if arguments.json is not None:
        result = {"accum_steps": ACCUM_STEPS, "widths": WIDTHS, "rows": rows}
        report = {"accumops": describe(), "suite": "collectives", "device": "CPU", "result": result}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if not all(each["agrees"] and each["executed"] == sum(each["all_reduces"]) for each in rows):
        raise SystemExit("The formula and what was found differ.")


if __name__ == "__main__":
    main()
