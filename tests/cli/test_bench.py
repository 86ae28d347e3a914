"""`accumops bench`: that it measures and reports; what it measures is no pass or fail."""

import json
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from click.testing import CliRunner
from crosses import cross

import accumops
from accumops import benchmark
from accumops.benchmark import (
    accumulate,
    bandwidth,
    batch_norm,
    contender,
    goals,
    limit,
    memory,
    models,
    plan,
    recompute,
    update,
    window,
    window_loss,
    window_norm,
)
from accumops.benchmark.contender import Contender
from accumops.cli import main
from accumops.cli.bench import SUITES
from accumops.planning import find_micro_batch_size
from accumops.planning.loaded_pass import Point

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results"
VALUES = 300 * 7 + 5 + 64 * 64

CONTENDERS = {
    "accumulate": {"memory's limit, plain stores", "memory's limit, streaming stores", "fused", "fused, overwrite"}
    | {"fused, check_finite", "reference", "acc.assign(acc + g * s)", "acc.assign_add(g * s)"},
    "update": {"memory's limit, plain stores", "memory's limit, streaming stores", "fused", "reference"}
    | {"fused, last gradient folded in", "keras.optimizers.AdamW", "keras.optimizers.AdamW, XLA"}
    | {"ResourceApplyAdam a variable"},
    "batch-norm": {"memory's limit, plain stores", "memory's limit, streaming stores", "Keras, the layer"}
    | {
        "TensorFlow, the fused op",
        "accumops, the layer",
        "accumops, the op",
        "forward and backward",
        "Keras layers and accumulation",
        "Keras layers, one batch",
    }
    | {"accumops, accum_steps", "accumops, micro_batch_size"},
    "window": {"forward and backward", "forward and backward, and the memory's limit", "written by hand"}
    | {"forward and backward, in one call", "Keras", "Keras, XLA", "accumops reference, accum_steps"}
    | {"accumops, accum_steps", "accumops, micro_batch_size", "accumops, optimizer in a custom loop"}
    | {"accumops, accum_steps, XLA", "accumops, micro_batch_size, XLA"}
    | {"accumops, accum_steps, lazy_sparse", "accumops, micro_batch_size, lazy_sparse"},
    "window-loss": {window_loss.FLOOR, "accumops, loss_over='window'", "the batch at once"},
    "window-norm": {window_norm.FLOOR, window_norm.MICRO_BATCHES, "accumops, statistics='window', every=1"},
    "recompute": {recompute.FLOOR, "segments=8", 'policy="cheap"'},
    "goals": {f"{which}{what}" for which in (goals.FLOOR, "goal 1", "goal 2") for what in (", predicted", "")}
    | {"goal 1, the goal", "goal 2, the goal"},
    "limit": {"all activations kept", "2 times the samples, recomputed"},
    "plan": {"the fastest of all", "the plan", "the plan, predicted"},
    "memory": {"a micro-batch of 16, without accumulation", "the batch at once", "accumops, micro_batch_size"}
    | {"Keras, gradient_accumulation_steps", "accumops, accum_steps"},
}


def invoke(*arguments):
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def small_network():
    layers = keras.layers
    body = [layers.Conv2D(2, 3, strides=4), layers.BatchNormalization(), layers.Flatten(), layers.Dense(models.CLASSES)]
    return keras.Sequential([keras.Input((32, 32, 3)), *body])


def deep_network():
    layers = keras.layers
    inputs = hidden = keras.Input((16, 16, 4))
    for _ in range(12):
        hidden = layers.Add()([layers.ReLU()(layers.Conv2D(4, 3, padding="same")(hidden)), hidden])
    return keras.Model(inputs, layers.Dense(models.CLASSES)(layers.GlobalAveragePooling2D()(hidden)))


def small_towers():
    layers = keras.layers
    images = keras.Input((window_loss.SIDE, window_loss.SIDE, 3))
    texts = keras.Input((window_loss.WORDS,))
    pair = [layers.Dense(2)(layers.Flatten()(images)), layers.Dense(2)(texts)]
    return keras.Model([images, texts], layers.Concatenate(axis=1)([layers.Reshape((1, 2))(each) for each in pair]))


class InThisProcess:
    """In place of a process for each peak: the samples of a batch in MiB."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, *, samples=1, **arguments):
        assert function in [each.peak_bytes for each in (memory, window_loss, window_norm, recompute)]
        return samples << 20


class Direct(InThisProcess):
    """In place of a process: a call."""

    def call(self, function, **arguments):
        return function(**arguments)


class Measured:
    """In place of the measurement of a pass."""

    measured_by = "nobody"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, samples, allowed):
        return Point(samples, samples, 0.1 + samples)


@pytest.fixture
def small(monkeypatch):
    """Small inputs in place of those of all suites."""
    monkeypatch.setattr(bandwidth, "_ARRAY_BYTES", 1 << 20)
    for suite in (accumulate, update):
        monkeypatch.setattr(suite, "resnet50_shapes", lambda: [(300, 7), (5,), (64, 64)])
    for suite in (accumulate, update, batch_norm):
        monkeypatch.setattr(suite, "WARMUP", 1)
    monkeypatch.setattr(batch_norm, "LAYER_WARMUP", 1)
    for suite in (batch_norm, window):
        monkeypatch.setattr(suite, "MICRO", 2)
    monkeypatch.setattr(batch_norm, "SHAPES", ((2, 4, 4, 3), (8, 5)))
    monkeypatch.setattr(batch_norm, "DTYPES", ("bfloat16",))
    monkeypatch.setattr(batch_norm, "convolutional_network", small_network)
    monkeypatch.setattr(window.legacy, "missing_package", lambda: "gradient_accumulator")
    monkeypatch.setattr(window.jax_scan, "missing_package", lambda: "jax")
    # A problem with a large table has all contenders.
    words = models.bag_of_words(7, 3, 4)
    problem = models.Problem("small table", words, (4,), vocabulary=7, large_table=True, windows=2, warmup=1)
    monkeypatch.setitem(models.PROBLEMS, problem.name, problem)
    monkeypatch.setattr(window, "MODELS", (problem.name,))
    monkeypatch.setattr(memory, "ChildProcess", InThisProcess)
    for name in ("CONV_BLOCKS", "ATTENTION_BLOCKS"):
        monkeypatch.setattr(recompute, name, 1)
    for name, value in (("BATCH", 8), ("MICRO", 4), ("SIDE", 4), ("towers", small_towers)):
        monkeypatch.setattr(window_loss, name, value)
    monkeypatch.setattr(window_norm, "BATCH", 4)
    monkeypatch.setattr(window_norm, "NETWORKS", {"small": window_norm.Network(small_network, 2, (1,))})
    monkeypatch.setattr(memory, "SIZES", (32, 64))
    monkeypatch.setattr(goals, "ChildProcess", Direct)
    for name, value in (("MODELS", ("small",)), ("GOALS", 2), ("BATCH", 64)):
        monkeypatch.setattr(goals, name, value)
    monkeypatch.setattr(goals, "network", lambda name: deep_network())
    for count in (2, 4, 16):
        monkeypatch.delitem(recompute.CONTENDERS, f"segments={count}")
    for name, value in (("SMALL", (4,)), ("FACTORS", (2,))):
        monkeypatch.setattr(limit, name, value)
    monkeypatch.setattr(limit, "NETWORKS", {"small": deep_network})
    monkeypatch.setattr(plan, "ChildProcess", Direct)
    monkeypatch.setattr(plan, "NETWORKS", {"small": deep_network})
    for name, value in (("MODELS", ("small",)), ("LIMITS", (64,)), ("EFFECTIVE", 4), ("SIZES", (4,))):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "RECOMPUTED", ())
    monkeypatch.setattr(find_micro_batch_size, "measurer_of", lambda traced, device: Measured())


# The contenders of the suite "window" take longest to be made; test_window_suite.py makes them, too. Tests below run
# three other suites. "batch-norm" takes long as well.
ELSEWHERE = ("window", "accumulate", "update", "memory", "batch-norm")


@pytest.mark.parametrize("suite", cross(SUITES, default=lambda suite: suite not in ELSEWHERE))
@pytest.mark.usefixtures("small")
@pytest.mark.some_by_default(1)
def test_suites(suite, tmp_path):
    numbers, picture = tmp_path / "results.json", tmp_path / "results.png"
    result = invoke(suite, "--rounds", 2, "--json", numbers, "--plot", picture)
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text())
    assert (report["suite"], report["device"], report["rounds"]) == (suite, "CPU", 2)
    assert report["accumops"]["versions"]["tensorflow"] == tf.__version__
    rows = report["result"]["rows"]
    assert {row["name"] for row in rows} == CONTENDERS[suite]
    for row in rows:
        assert row["note"] is None
        assert row["name"] in result.stdout
        assert row["case"] in result.stdout or len({each["case"] for each in rows}) == 1
        value = "peak_bytes" if suite in ("memory", "goals") or row["case"].startswith("memory") else "milliseconds"
        assert row[value] > 0
        floors = [each[value] for each in rows if each["case"] == row["case"] and each["floor"]]
        assert len(floors) == 1
        assert row["ratio"] == pytest.approx(row[value] / floors[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Picture saved to {picture}" in result.stdout
    assert accumops.get_backend() == "auto"


@pytest.mark.gpu
@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "memory"])
@pytest.mark.usefixtures("small")
def test_suites_on_a_gpu(suite, tmp_path):
    result = invoke(suite, "--device", "GPU", "--rounds", 2, "--json", tmp_path / "results.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["result"]["rows"]
    assert [row["note"] for row in rows] == [None] * len(rows)


@pytest.mark.parametrize(("suite", "folded"), [("accumulate", None), ("update", "fused, last gradient folded in")])
@pytest.mark.usefixtures("small")
@pytest.mark.some_by_default(1)
def test_bytes_are_those_of_the_values(suite, folded, tmp_path):
    invoke(suite, "--rounds", 2, "--json", tmp_path / "results.json")
    result = json.loads((tmp_path / "results.json").read_text())["result"]
    assert result["values"] == VALUES
    a_value = {row["name"]: row["bytes_moved"] / VALUES for row in result["rows"]}
    wanted = {"accumulate": 12, "update": 28}[suite]
    assert a_value.pop("fused, overwrite", 8) == 8
    assert a_value.pop(folded, 32) == 32
    assert set(a_value.values()) == {wanted}
    limits = [row for row in result["rows"] if row["name"].startswith("memory's limit")]
    assert max(row["bytes_per_second"] for row in limits) == pytest.approx(result["bandwidth"])
    assert [row["floor"] for row in sorted(limits, key=lambda row: row["milliseconds"])] == [True, False]


@pytest.mark.usefixtures("small")
def test_memory_is_by_the_effective_batch_size(tmp_path):
    invoke("memory", "--json", tmp_path / "results.json")
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rounds"] == memory.ROUNDS
    peaks = {(row["case"], row["name"]): row["peak_bytes"] for row in report["result"]["rows"]}
    assert peaks["64 samples", "the batch at once"] == 64 << 20
    assert peaks["64 samples", memory.FLOOR] == peaks["32 samples", memory.FLOOR] == 16 << 20


@pytest.mark.usefixtures("small")
def test_contender_that_raises_has_a_note(monkeypatch, tmp_path):
    def refuses():
        raise ValueError("\nno [steps] today\nand more")

    made = [Contender("idle", lambda: lambda: None, floor=True), Contender("busy", refuses)]
    monkeypatch.setattr(window, "contenders", lambda problem, device, steps, micro: made)
    numbers, picture = tmp_path / "results.json", tmp_path / "results.svg"
    result = invoke("window", "--rounds", 2, "--json", numbers, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "ValueError: no [steps] today" in result.stdout
    rows = json.loads(numbers.read_text())["result"]["rows"]
    noted = [row for row in rows if row["note"] is not None]
    assert [row["name"] for row in noted] == ["busy"]
    assert all(row["milliseconds"] is row["ratio"] is None for row in noted)
    assert {row["name"] for row in rows} == {"idle", "busy", f"{window.FLOOR}, and the memory's limit"}


OF_SCRIPTS = ("collectives-cpu.json", "harden-cpu.json", "noise-schedule-cpu.json", "window-statistics-cpu.json")


def test_recorded_results_have_the_rows_of_today():
    keys = set(benchmark.Result("", (benchmark.Row("", ""),)).as_json()["rows"][0])
    for path in RECORDED.glob("*.json"):
        report = json.loads(path.read_text())
        if path.name in OF_SCRIPTS:
            continue
        assert report["suite"] in SUITES
        assert report["device"] in ("CPU", "GPU")
        assert all(set(row) == keys for row in report["result"]["rows"]), path


def test_suites_are_those_of_the_package():
    assert tuple(benchmark.SUITES) == SUITES


@pytest.mark.parametrize("suite", SUITES)
def test_nothing_fused(monkeypatch, suite):
    monkeypatch.setattr("accumops.ops.library.load", lambda: (None, "there is no library"))
    result = invoke(suite)
    assert result.exit_code == 3
    assert result.stderr == "There is nothing fused to measure: there is no library.\n"


def test_no_module_of_the_kernels(monkeypatch):
    monkeypatch.setattr("accumops.ops.library.load_kernels", lambda: None)
    monkeypatch.setattr(accumulate, "resnet50_shapes", lambda: [(3,)])
    result = invoke("accumulate")
    assert result.exit_code == 3
    assert "bandwidth cannot be measured" in result.stderr


@pytest.mark.parametrize("device", ["GPU", "gpu"])
def test_no_gpu(monkeypatch, device):
    devices = tf.config.list_physical_devices
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [] if kind == "GPU" else devices(kind))
    result = invoke("window", "--device", device)
    assert result.exit_code == 3
    assert result.stderr == "There is nothing fused to measure: TensorFlow sees no GPU.\n"


def test_work_is_placed_on_the_device(monkeypatch):
    placed = []

    def run(*, device, rounds, progress):
        placed.append((device, tf.constant(1.0).device))
        return benchmark.Result("", (benchmark.Row("", "a", 1.0),))

    monkeypatch.setattr(accumulate, "run", run)
    assert invoke("accumulate", "--device", "cpu").exit_code == 0
    [(device, place)] = placed
    assert device == "CPU"
    assert place.endswith("/device:CPU:0")


def test_missing_matplotlib_is_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(contender, "interleave", lambda *arguments, **keywords: pytest.fail("it was measured"))
    result = invoke("accumulate", "--plot", tmp_path / "bars.png")
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["everything"],
        ["accumulate", "--device", "TPU"],
        ["accumulate", "--rounds", "1"],
        ["accumulate", "--plot", "bars.txt"],
        ["accumulate", "--plot", "no/such/directory/bars.png"],
        ["accumulate", "--json", "no/such/directory/results.json"],
    ],
    ids=str,
)
def test_bad_values_are_usage_errors(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
