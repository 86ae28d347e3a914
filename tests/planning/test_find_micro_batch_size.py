"""The micro-batch that fits a memory limit."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops.adapters.keras_functional import graph_of
from accumops.memory.segments import Segment, segments_of
from accumops.planning import find_micro_batch_size as finding
from accumops.planning.loaded_pass import Point
from accumops.planning.micro_batch_plan import MicroBatchPlan
from accumops.planning.plan_cache import store_plan, stored_plan
from accumops.planning.search import sizes_of, window_seconds
from accumops.planning.traced_pass import trace_pass
from accumops.planning.training_memory import bytes_of, missing_variables

MIB = 1 << 20


def network(width=32, depth=4):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, "relu") for _ in range(depth)]
    return keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dropout(0.1), keras.layers.Dense(4)])


def compiled(net=None, **arguments):
    model = accumops.GradientAccumulateModel(net or network(), micro_batch_size=1)
    model.compile(keras.optimizers.Adam(), "mse", **({"jit_compile": False} | arguments))
    return model


def batch(samples=64, width=32):
    return np.ones((samples, width), "float32"), np.ones((samples, 4), "float32")


class Simulated:
    """Stands for the measurement of a pass: what it takes is known."""

    measured_by = "nobody"
    fixed, a_sample, seconds, seconds_a_sample = 10, 5, 0.002, 0.001
    recomputed = (1.0, 1.0)
    """What recompute makes of the bytes of a sample, and of the time."""

    def __init__(self, traced, log):
        self._log = log
        self._memory, self._time = self.recomputed if traced == "recomputed" else (1.0, 1.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, samples, allowed):
        peak = self.fixed + self.a_sample * samples * self._memory
        self._log.append((samples, peak <= allowed))
        seconds = (self.seconds + self.seconds_a_sample * samples) * self._time
        return Point(samples, peak, seconds) if peak <= allowed else None


@pytest.fixture
def simulated(monkeypatch):
    """Has searches measure nothing."""
    log = []
    monkeypatch.setattr(finding, "measurer_of", lambda traced, device: Simulated(traced, log))
    return log


@pytest.mark.parametrize("limit", [10, 100, 1000, 10000])
@pytest.mark.parametrize("effective", [1, 7, 64, 1000])
@pytest.mark.parametrize("overhead", [0.0, 0.001, 0.04])
def test_search_is_near_the_best_and_within_the_limit(limit, effective, overhead):
    from accumops.planning.search import Subject, search

    class Pass(Simulated):
        seconds = overhead

    log = []
    subject = Subject(None, None, None, lambda traced: Pass(traced, log), effective, limit, False, lambda tried: None)
    tries = search(subject).tries
    points = [each.point for each in tries if each.point is not None]
    possible = [
        Point(size, 0, Pass.seconds + Pass.seconds_a_sample * size)
        for size in sizes_of(effective)
        if Pass.fixed + Pass.a_sample * size <= limit
    ]
    assert bool(points) == bool(possible)
    if points:
        best = min(window_seconds(each, Pass.seconds, effective) for each in possible)
        assert min(window_seconds(each, Pass.seconds, effective) for each in points) <= 1.05 * best
    assert sum(not fits for _, fits in log) <= 1 + (not points)
    assert len(log) <= 16


@pytest.mark.parametrize("effective", [1, 2, 7, 64, 100, 1000])
def test_sizes_cover_each_number_of_micro_batches(effective):
    sizes = sizes_of(effective)
    assert {-(-effective // size) for size in sizes} == {-(-effective // size) for size in range(1, effective + 1)}


@pytest.mark.exhaustive
def test_plan_of_a_model():
    model = compiled()
    plan = accumops.find_micro_batch_size(model, batch(), memory_limit="8GiB", verbose=0)
    assert plan.micro_batch_size * plan.accum_steps >= 64
    assert plan.effective_batch_size == 64
    assert plan.predicted_peak <= 0.9 * plan.memory_limit
    assert plan.recompute == ()
    sizes = [each.micro_batch_size for each in plan.measured]
    assert sizes == sorted(sizes)
    assert plan.micro_batch_size in sizes
    plan.apply(model)
    assert model.micro_batch_size == plan.micro_batch_size
    model.fit(*batch(), batch_size=64, verbose=0)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.usefixtures("simulated")
def test_search_prints_and_shows_a_table(capsys, tmp_path):
    plan = accumops.find_micro_batch_size(compiled(), batch(16), memory_limit="8GiB")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(plan.measured)
    assert all(
        re.match(r"micro_batch_size=\d+, recomputing nothing: .*iB, .* samples a second", each) for each in lines
    )
    text = str(plan)
    assert f"micro_batch_size={plan.micro_batch_size}, accum_steps={plan.accum_steps}" in text
    assert text.count("<- the plan") == 1
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_nothing_of_the_model_changes():
    """Weights, slots, seeds and statistics keep their bits, also where the search is interrupted."""
    net = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(32), accumops.AccumBatchNormalization(), keras.layers.Dropout(0.5)]
    )
    model = compiled(keras.Sequential([*net.layers, keras.layers.Dense(4)]))
    model.fit(*batch(), batch_size=64, verbose=0)
    iterator = iter(tf.data.Dataset.range(9))
    next(iterator)

    def everything():
        variables = [*model.variables, *model.optimizer.variables, *(v for m in model.metrics for v in m.variables)]
        return [each.numpy().tobytes() for each in variables]

    before = everything()
    accumops.find_micro_batch_size(model, batch(), memory_limit="8GiB", verbose=0)
    assert everything() == before
    assert int(next(iterator)) == 1


@pytest.mark.parametrize("at", ["trace", "load", "measure", "report"])
def test_interrupted_search_changes_nothing(monkeypatch, at):
    net = network()
    model = compiled(net)
    before = [each.numpy().tobytes() for each in (*model.variables, *model.optimizer.variables)]

    if at == "report":
        monkeypatch.setattr(finding, "measurer_of", lambda traced, device: Simulated(traced, []))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    target = {
        "trace": "accumops.planning.find_micro_batch_size.trace_pass",
        "load": "accumops.planning.measuring.InAnotherProcess._load",
        "measure": "accumops.planning.measuring.ChildProcess.call",
        "report": "accumops.planning.find_micro_batch_size._line_of",
    }[at]
    monkeypatch.setattr(target, interrupt)
    with pytest.raises(KeyboardInterrupt):
        accumops.find_micro_batch_size(model, batch(8), memory_limit="8GiB")
    assert [each.numpy().tobytes() for each in (*model.variables, *model.optimizer.variables)] == before
    assert segments_of(graph_of(net)) == []


def test_recompute_where_only_it_fits(monkeypatch):
    """Only a micro-batch that is recomputed fits: the plan recomputes, and `apply` has the model do it."""

    class Pass(Simulated):
        fixed, a_sample = 0, 100 * MIB
        recomputed = (0.4, 1.2)

    log, traces = [], []

    def traced(model, *_, **__):
        recomputes = bool(segments_of(graph_of(model.model)))
        traces.append(recomputes)
        return Stand("recomputed" if recomputes else "plain")

    class Stand(str):
        fingerprint = ""

        def bytes_of_batch(self, samples):
            return 0

    monkeypatch.setattr(finding, "trace_pass", traced)
    monkeypatch.setattr(finding, "measurer_of", lambda traced, device: Pass(traced, log))
    monkeypatch.setattr(finding, "fixed_memory", lambda *_: 0)
    convolutions = [keras.layers.Conv2D(4, 3, padding="same", activation="relu") for _ in range(6)]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    model = compiled(keras.Sequential([keras.Input((16, 16, 4)), *convolutions, *head]))
    data = np.ones((8, 16, 16, 4), "float32"), np.ones((8, 4), "float32")
    plan = accumops.find_micro_batch_size(model, data, memory_limit=90 * MIB, margin=0.0, verbose=0)
    assert traces == [False, *[True] * (len(traces) - 1)]
    assert plan.recompute
    assert segments_of(graph_of(model.model)) == []
    plan.apply(model)
    assert any(segment.recomputed for segment in segments_of(graph_of(model.model)))
    with pytest.raises(ValueError, match=r"No micro-batch of .* fits"):
        accumops.find_micro_batch_size(model, data, memory_limit=9 * MIB, margin=0.0, verbose=0)


@pytest.mark.usefixtures("simulated")
def test_plan_is_for_the_graph_that_it_was_made_for():
    plan = accumops.find_micro_batch_size(compiled(), batch(8), memory_limit="8GiB", verbose=0)
    other = MicroBatchPlan(**{**vars(plan), "recompute": ((Segment(0, 99, True),),)})
    with pytest.raises(ValueError, match="another graph"):
        other.apply(network())
    with pytest.raises(TypeError, match=r"keras\.Model"):
        plan.apply("model")


@pytest.mark.usefixtures("simulated")
def test_stored_plan_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCUMOPS_CACHE_DIR", str(tmp_path / "cache"))
    plan = accumops.find_micro_batch_size(compiled(), batch(8), memory_limit="8GiB", verbose=0)
    segments = ((Segment(0, 2, True, (1,)),), ())
    plan = MicroBatchPlan(**{**vars(plan), "recompute": segments, "notes": ("a note",)})
    store_plan("key", plan)
    assert stored_plan("key") == plan
    assert stored_plan("another") is None
    (tmp_path / "cache" / "plans.json").write_text("damaged")
    assert stored_plan("key") is None
    store_plan("key", plan)
    assert stored_plan("key") == plan
    monkeypatch.setenv("ACCUMOPS_CACHE_DIR", "")
    assert stored_plan("key") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCUMOPS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be stored"):
        store_plan("key", plan)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adafactor"])
@pytest.mark.some_by_default(1)
def test_variables_to_come(optimizer):
    model = accumops.GradientAccumulateModel(network(), micro_batch_size=8)
    model.compile(optimizer, "mse")
    expected = missing_variables(model)
    model.fit(*batch(8), batch_size=8, verbose=0)
    assert 0 <= bytes_of(model.optimizer.variables) - expected <= 256  # counters, and the learning rate
    assert missing_variables(model) == 0


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Embedding(50, 8), keras.layers.Dense(4)

    def call(self, inputs):
        return self.last(keras.ops.mean(self.first(inputs["tokens"]), axis=1)) + inputs["bias"]


@pytest.mark.usefixtures("simulated")
def test_subclassed_model_with_a_dict_of_inputs_and_sample_weights():
    model = compiled(Subclassed())
    x = {"tokens": np.zeros((10, 6), "int32"), "bias": np.zeros((10, 4), "float32")}
    data = x, np.zeros((10, 4), "float32"), np.ones(10, "float32")
    plan = accumops.find_micro_batch_size(model, data, memory_limit="8GiB", verbose=0)
    assert plan.micro_batch_size * plan.accum_steps >= 10


@pytest.mark.usefixtures("simulated")
def test_dataset_and_other_effective_batch():
    data = tf.data.Dataset.from_tensor_slices(batch(10)).batch(4)
    plan = accumops.find_micro_batch_size(compiled(), data, effective_batch_size=30, memory_limit="8GiB", verbose=0)
    assert plan.effective_batch_size == 30


@pytest.mark.usefixtures("simulated")
def test_plain_keras_model():
    net = network()
    net.compile("adam", "mse", jit_compile=False)
    plan = accumops.find_micro_batch_size(net, batch(8), memory_limit="8GiB", verbose=0)
    assert plan.apply(net) is net


@pytest.mark.exhaustive
def test_xla():
    plan = accumops.find_micro_batch_size(compiled(jit_compile=True), batch(4), memory_limit="8GiB", verbose=0)
    assert plan.measured[0].memory is not None


def test_graph_that_stays_in_this_process():
    """A lookup table exists in one process only."""
    lookup = keras.layers.IntegerLookup(vocabulary=[1, 2, 3])
    net = keras.Sequential([keras.Input((4,), dtype="int64"), lookup, keras.layers.Embedding(8, 4)])
    net.add(keras.layers.Flatten())
    net.add(keras.layers.Dense(4))
    model = compiled(net)
    data = np.zeros((8, 4), "int64"), np.zeros((8, 4), "float32")
    plan = accumops.find_micro_batch_size(model, data, memory_limit="8GiB", verbose=0)
    assert plan.measured[0].memory is not None


def test_fingerprint_is_of_what_is_computed():
    passes = [
        trace_pass(compiled(network(width)), tuple(map(tf.constant, batch(8, width))), jit_compile=False)
        for width in (32, 64)
    ]
    assert passes[0].fingerprint != passes[1].fingerprint


def refusals():
    model = compiled()
    plain = network()
    return [
        ({"model": "model"}, TypeError, "keras.Model"),
        ({"model": plain}, ValueError, "is not compiled"),
        ({"memory_limit": "much"}, ValueError, "`memory_limit` must be"),
        ({"memory_limit": 1.5}, TypeError, "`memory_limit` must be"),
        ({"memory_limit": 0}, ValueError, "`memory_limit` must be at least"),
        ({"memory_limit": "1MiB"}, ValueError, "No micro-batch of"),
        ({"effective_batch_size": 0}, ValueError, "`effective_batch_size`"),
        ({"effective_batch_size": 2.5}, TypeError, "`effective_batch_size`"),
        ({"recompute": True}, ValueError, "`recompute` must be"),
        ({"margin": 1}, ValueError, "`margin` must be"),
        ({"margin": "much"}, TypeError, "`margin` must be"),
        ({"sample_data": (np.ones((4, 32)), np.ones((3, 4)))}, ValueError, "same number of samples"),
        ({"sample_data": (np.ones((0, 32)), np.ones((0, 4)))}, ValueError, "same number of samples"),
        ({"sample_data": object()}, TypeError, "`sample_data` must be a batch"),
        ({"sample_data": tf.data.Dataset.from_tensor_slices(batch(4)).batch(2).take(0)}, ValueError, "without batches"),
    ], model


@pytest.mark.parametrize("i", range(15))
@pytest.mark.some_by_default(8)
def test_refusals(i):
    cases, model = refusals()
    arguments, kind, message = cases[i]
    given = {"model": model, "sample_data": batch(4), "memory_limit": "8GiB", "verbose": 0} | arguments
    with pytest.raises(kind, match=message):
        accumops.find_micro_batch_size(given.pop("model"), given.pop("sample_data"), **given)
