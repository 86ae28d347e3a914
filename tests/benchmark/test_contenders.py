import numpy as np
import pytest
import tensorflow as tf

from accumops.benchmark import bandwidth, timing
from accumops.benchmark.contender import Contender, in_one_graph, time_contenders
from accumops.benchmark.result import Result, Row
from accumops.planning.child_process import problem_text


def test_contenders_take_turns_in_orders_that_change():
    order, rounds = [], []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleave(
        contenders, sample=timing.stopwatch(), rounds=6, warmup=2, progress=lambda: rounds.append(len(order))
    )
    turns = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 8
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1
    assert rounds == [3 * (i + 1) for i in range(8)]
    assert all(len(samples.values) == 6 for samples in times.values())


def test_one_round_has_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        timing.interleave({}, sample=timing.stopwatch(), rounds=1)


def test_median_and_spread():
    samples = timing.Samples((1.0, 2.0, 3.0, 4.0, 5.0))
    assert samples.median == 3.0
    assert samples.spread == pytest.approx((4.5 - 1.5) / 3)
    assert timing.Samples((0.0, 0.0)).spread == 0.0


def test_work_that_goes_on_is_waited_for():
    calls = []
    sample = timing.stopwatch(lambda: calls.append("finish"))
    assert sample(lambda: calls.append("run")) >= 0
    assert calls == ["run", "finish"]


def test_rows_are_of_one_work_each(monkeypatch):
    monkeypatch.setattr(
        "accumops.benchmark.contender.interleave",
        lambda runs, **settings: {name: timing.Samples((0.008, 0.008)) for name in runs},
    )

    def refuses():
        raise RuntimeError("not today")

    rows = time_contenders(
        "case",
        [
            Contender("once", lambda: lambda: None, bytes_moved=8_000_000, floor=True),
            Contender("never", refuses),
            Contender("four times", lambda: lambda: None, times=4),
            Contender("fails when it runs", lambda: refuses),
        ],
        device="CPU",
        rounds=2,
        warmup=0,
    )
    assert [row.milliseconds for row in rows] == [8.0, None, 2.0, None]
    assert [row.note for row in rows] == [None, "RuntimeError: not today", None, "RuntimeError: not today"]
    result = Result("title", tuple(rows), bandwidth=2e9)
    assert [result.ratio(row) for row in rows] == [1.0, None, 0.25, None]
    assert [result.share(row) for row in rows] == [0.5, None, None, None]


def test_ratio_is_to_the_floor_of_the_same_case():
    rows = (Row("a", "floor", 2.0, floor=True), Row("a", "x", 3.0), Row("b", "x", 3.0))
    result = Result("title", rows, settings={"values": 7})
    assert [result.ratio(row) for row in rows] == [1.0, 1.5, None]
    assert list(result.cases()) == ["a", "b"]
    report = result.as_json()
    assert report["values"] == 7
    assert [row["ratio"] for row in report["rows"]] == [1.0, 1.5, None]


def test_steps_of_one_graph_run_in_order():
    x = tf.Variable(1.0)
    run = in_one_graph(lambda: [lambda: x.assign(x + 1.0), lambda: x.assign(x * 10.0)] * 2)
    run()
    np.testing.assert_equal(x.numpy(), 210.0)


@pytest.mark.parametrize(("device", "kinds"), [("CPU", 2), ("GPU", 1)])
def test_limits_are_by_the_median_bandwidth(monkeypatch, device, kinds):
    """XLA compiles the triad for a GPU; it can compile it for a CPU too, so this needs no GPU."""
    monkeypatch.setattr(bandwidth, "_ARRAY_BYTES", 1 << 16)
    measured = bandwidth.Bandwidth(device)
    turns = []
    for _ in range(3):
        measured.before(lambda: turns.append(1))()
    assert len(turns) == 3
    limits = list(measured.limits("case", 1_000_000))
    assert len(limits) == kinds
    assert sum(row.floor for row in limits) == 1
    [floor] = [row for row in limits if row.floor]
    assert floor.bytes_per_second == pytest.approx(measured.best)
    assert floor.milliseconds == min(row.milliseconds for row in limits)


def test_device_that_works_on_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: waits.append(1))
    for device in ("CPU", "GPU"):
        time_contenders("", [Contender("a", lambda: lambda: None)], device=device, rounds=2, warmup=1)
    assert len(waits) == 3


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError("\n\n  first\nsecond"), "ValueError: first"), (KeyError(), "KeyError")],
    ids=str,
)
def test_problem_text(error, text):
    assert problem_text(error) == text
