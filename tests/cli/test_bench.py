"""`accumops bench`: that it measures and reports; what it measures is no pass or fail."""

import json

import pytest
from click.testing import CliRunner

import accumops
from accumops.benchmark import accumulate, batch_norm, timing
from accumops.cli import main


@pytest.fixture
def small(monkeypatch):
    """A few variables in place of ResNet-50's."""
    monkeypatch.setattr(accumulate, "resnet50_shapes", lambda: [(300, 7), (5,), (64, 64)])
    monkeypatch.setattr(accumulate, "WARMUP", 1)


@pytest.mark.usefixtures("small")
def test_accumulate(tmp_path):
    path = tmp_path / "results.json"
    result = CliRunner().invoke(main, ["bench", "accumulate", "--rounds", "3", "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["result"]["rows"]}
    assert {"fused", "reference", "triad, plain stores", "acc.assign_add(g * s)"} <= set(rows)
    for name, row in rows.items():
        assert name in result.output
        values = row["bytes_per_second"] * row["milliseconds"] / 1e3 / row["bytes_per_value"]
        assert values == pytest.approx(300 * 7 + 5 + 64 * 64)
    assert report["accumops"]["versions"]["tensorflow"]
    assert accumops.get_backend() == "auto"


def test_batch_norm(monkeypatch, tmp_path):
    monkeypatch.setattr(batch_norm, "SHAPES", ((2, 4, 4, 3), (8, 5)))
    monkeypatch.setattr(batch_norm, "WARMUP", 1)
    monkeypatch.setattr(batch_norm, "MICRO", 2)
    path = tmp_path / "results.json"
    result = CliRunner().invoke(main, ["bench", "batch-norm", "--rounds", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["result"]["rows"]
    assert len(rows) == 2 * 2 * 3 + 4
    assert all(row["milliseconds"] > 0 for row in rows)
    assert {row["name"] for row in rows} >= {"Keras", "TensorFlow fused", "accumops", "accumops, micro_batch_size"}
    assert "window of 4 x 2" in result.output
    assert accumops.get_backend() == "auto"


@pytest.mark.parametrize("suite", ["accumulate", "batch-norm"])
@pytest.mark.usefixtures("small")
def test_nothing_fused(monkeypatch, suite):
    monkeypatch.setattr("accumops.ops.library.load", lambda: (None, "there is no library"))
    result = CliRunner().invoke(main, ["bench", suite])
    assert result.exit_code == 3
    assert "there is no library" in result.output


def test_directory_that_does_not_exist(tmp_path):
    result = CliRunner().invoke(main, ["bench", "accumulate", "--json", str(tmp_path / "missing" / "results.json")])
    assert result.exit_code == 2
    assert "there is no directory" in result.output


def test_contenders_take_turns():
    order = []
    times = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert all(len(timed.seconds) == 3 for timed in times.values())
    with pytest.raises(ValueError, match="at least 2"):
        timing.interleave({}, rounds=1)
