"""`accumops plan`."""

import json

import keras
import pytest
from click.testing import CliRunner

from accumops.cli import main
from accumops.planning import find_micro_batch_size as finding
from accumops.planning.loaded_pass import Point

L = keras.layers


class Simulated:
    """Stands for the measurement of a pass."""

    measured_by = "nobody"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, samples, allowed):
        peak = samples << 20
        return Point(samples, peak, 0.01 + 0.001 * samples) if peak <= allowed else None


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(finding, "measurer_of", lambda traced, device: Simulated())
    monkeypatch.setattr(finding, "fixed_memory", lambda *_: 10 << 20)
    return lambda *arguments: CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save(tmp_path / "model.keras")
        return tmp_path / "model.keras"

    return save


def test_table_json_and_picture(run, saved, tmp_path):
    net = keras.Sequential([keras.Input((8,)), L.Dense(4)])
    net.compile("adam", "sparse_categorical_crossentropy")
    arguments = ["--effective-batch-size", 64, "--memory-limit", "40MiB", "--margin", 0]
    done = run(saved(net), *arguments, "--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["micro_batch_size"] * plan["accum_steps"] >= 64
    assert plan["predicted_peak"] <= plan["memory_limit"] == 40 << 20
    assert f"micro_batch_size={plan['micro_batch_size']}, accum_steps={plan['accum_steps']}" in done.output
    assert done.output.count("the plan\n") + done.output.count("the plan ") >= 1
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.exhaustive
def test_model_without_a_loss_and_with_an_open_shape(run, saved):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    extra = keras.Input((3,), name="extra")
    pooled = L.GlobalAveragePooling1D()(L.Embedding(10, 4)(tokens))
    path = saved(keras.Model({"tokens": tokens, "extra": extra}, [L.Dense(2)(pooled), L.Dense(1)(extra)]))
    done = run(path, "--effective-batch-size", 8)
    assert done.exit_code == 2
    assert "--input-shape tokens=128" in done.output
    done = run(path, "--effective-batch-size", 8, "--input-shape", "tokens=16", "--memory-limit", "1GiB")
    assert done.exit_code == 0, done.output
    assert "has no loss and no optimizer" in done.output
    for shape, said in (("tokens=a", "is not like"), ("words=3", "are no inputs"), ("extra=4", "has the shape")):
        done = run(path, "--effective-batch-size", 8, "--input-shape", "tokens=16", "--input-shape", shape)
        assert (done.exit_code, said in done.output) == (2, True), done.output


def test_nothing_fits(run, saved):
    net = keras.Sequential([keras.Input((8,)), L.Dense(4)])
    done = run(saved(net), "--effective-batch-size", 8, "--memory-limit", "10MiB")
    assert done.exit_code == 1
    assert "No micro-batch of" in done.output


def test_a_file_that_is_no_model(run, tmp_path):
    (tmp_path / "model.keras").write_text("no model")
    done = run(tmp_path / "model.keras", "--effective-batch-size", 8)
    assert done.exit_code == 1
    assert "cannot be loaded" in done.output
