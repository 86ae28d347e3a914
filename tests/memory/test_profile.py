"""Where the memory of training goes."""

import allocator
import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from allocator import BATCH, wide
from crosses import cross
from test_recompute_layers import Subclassed, deep, kept_bytes

import accumops
from accumops.memory.cuts import costs_by_region, plan_for, plan_of_count, smallest_goal, taken_by
from accumops.memory.device_memory import AllocatorMemory, ResidentMemory
from accumops.memory.layer_costs import costs_of
from accumops.memory.segments import regions_of
from accumops.memory.training_trace import TrainingTrace

L = keras.layers


def total_bytes(variables):
    return sum(np.asarray(variable).nbytes for variable in variables)


@pytest.fixture(scope="module")
def process():
    """A process in which TensorFlow's allocator counts."""
    with processes.that_counts() as process:
        yield process


@pytest.mark.parametrize("recomputes", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.exhaustive
def test_predicted_and_measured(recomputes, process):
    profile = process.call(allocator.profile, batch_sizes=[BATCH, 2 * BATCH], segments=3 if recomputes else 0)
    assert profile["measured_by"] == "TensorFlow's allocator on CPU:0"
    assert [step["batch_size"] for step in profile["steps"][:: 2 if recomputes else 1]] == [BATCH, 2 * BATCH]
    for step in profile["steps"]:
        assert step["measured"] == pytest.approx(step["predicted"], rel=0.2)
        assert step["inputs"] == step["batch_size"] * 16 * 16 * 16 * 4
    assert not profile["moved"]
    if recomputes:
        for kept, recomputed in zip(profile["steps"][::2], profile["steps"][1::2], strict=True):
            assert (kept["recomputes"], recomputed["recomputes"]) == (False, True)
            assert recomputed["activations"] < kept["activations"] / 2
            assert recomputed["measured"] < kept["measured"]
        assert profile["segments"] == 2


def test_activations_are_what_a_trace_keeps():
    net = deep()
    accumops.recompute_layers(net, segments=4)
    profile = accumops.memory_profile(net, 8, measure=False)
    plain, recomputed = profile.steps
    # The trace counts what each layer keeps beside its outputs, too: statistics, masks.
    assert plain.activations == pytest.approx(kept_bytes(deep(), 8), rel=0.02)
    assert recomputed.activations < plain.activations / 2
    assert sum(layer.all_kept for layer in profile.layers) * 8 == pytest.approx(plain.activations)
    assert sum(layer.as_it_is for layer in profile.layers) * 8 == pytest.approx(recomputed.activations, rel=0.01)
    assert (plain.measured, profile.measured_by) == (None, None)
    assert [layer.name for layer in profile.layers[:2]] == [net.layers[1].name, net.layers[2].name]


def test_variables_of_training():
    model = accumops.GradientAccumulateModel(wide(1), accum_steps=2)
    profile = accumops.memory_profile(model, 2, measure=False)
    assert (profile.accumulators, profile.slots) == (0, 0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(np.zeros((4, 16, 16, 16)), np.zeros(4), batch_size=2, verbose=0)
    profile = accumops.memory_profile(model, 2, measure=False)
    assert profile.weights == profile.accumulators == total_bytes(model.trainable_variables)
    assert profile.state == total_bytes(model.model.non_trainable_variables)
    assert profile.slots == pytest.approx(2 * profile.weights, abs=200)
    assert profile.variables == profile.weights + profile.state + profile.accumulators + profile.slots


def test_table_and_picture(tmp_path, process):
    picture = tmp_path / "memory.png"
    profile = process.call(allocator.profile, batch_sizes=[2, 4], segments=3, blocks=3, picture=str(picture))
    for text in ("weights", "slots", "2 samples, recomputed", "predicted", "measured", "other layers", "allocator"):
        assert text in profile["table"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def nested():
    inputs = keras.Input((16, 16, 8))
    return keras.Model(inputs, L.Dense(2)(L.Dense(4, "gelu")(deep(6)(L.Conv2D(8, 3, padding="same")(inputs)))))


NETS = {"deep": deep, "wide": wide, "nested": nested}


@pytest.mark.parametrize(
    ("net", "policy"),
    cross(NETS, ["plan", "count"], default=lambda net, policy: policy == ("count" if net == "wide" else "plan")),
)
@pytest.mark.some_by_default(2)
def test_what_a_plan_says_is_what_its_segments_take(policy, net):
    net = NETS[net]()
    regions = regions_of(net)
    calls = costs_of(net, regions, 8)
    costs = costs_by_region(regions, calls, [[1.0] * len(each) for each in calls])
    least, most = smallest_goal(costs), taken_by(costs, calls, [[] for _ in regions]).peak
    for part in (0.0, 0.2, 0.6, 1.0):
        goal = least + part * (most - least)
        plan = plan_of_count(costs, 2 + int(4 * part)) if policy == "count" else plan_for(costs, goal)
        taken = taken_by(costs, calls, plan.segments)
        assert taken.seconds == plan.seconds
        if policy == "plan":
            assert taken.peak == plan.peak <= goal
        else:
            assert taken.peak <= plan.peak


def test_gradients_of_weights_count():
    inner = keras.Sequential([keras.Input((256,)), L.Dense(256), L.Dense(256)])
    net = keras.Sequential([keras.Input((256,)), L.Dense(256), inner, L.Dense(256)])
    profile = accumops.memory_profile(net, 2, measure=False)
    activations = 16 * 2 * 256 * 4
    assert profile.weights <= profile.steps[0].predicted <= profile.weights + activations
    net.layers[0].trainable = False
    assert accumops.memory_profile(net, 2, measure=False).steps[0].predicted < profile.weights


def test_frozen_layers_keep_little():
    net = deep(4)
    for layer in net.layers[:-3]:
        layer.trainable = False
    profile = accumops.memory_profile(net, 8, measure=False)
    assert profile.steps[0].activations < accumops.memory_profile(deep(4), 8, measure=False).steps[0].activations / 3


def test_a_result_is_let_go_after_its_last_use():
    inputs = keras.Input((256,))
    hidden = L.Dense(256, use_bias=False)(inputs)
    outputs = L.Dense(256, use_bias=False)(keras.ops.exp(keras.ops.exp(hidden)))
    net = keras.Model(inputs, outputs)
    trace = TrainingTrace(net, regions_of(net), 4)
    size = 4 * 256 * 4
    dense, first, second, last = trace.calls
    for key in (dense, first, second, last):
        assert trace.most_at_a_time(trace.forward_of(key), {}) == size
    # Both exponentials keep their results, and the first product keeps nothing.
    assert [len(trace.kept_by(key)) for key in (dense, first, second)] == [0, 1, 1]
    assert trace.arriving_at()[last] == {}
    assert sum(trace.arriving_at()[first].values()) == size


def test_who_counts(monkeypatch, process):
    size = 8 << 20
    before, held, after, peak = process.call(allocator.counted, size=size)
    assert 0 <= before <= held - size
    assert after < held <= peak
    with pytest.raises(ValueError, match="NO:7"):
        AllocatorMemory("NO:7")
    memory = ResidentMemory()
    memory.forget_peak()
    held = np.ones(1 << 23)
    assert memory.peak() >= memory.now() > held.nbytes

    def does_not_count(device):
        raise ValueError("Allocator stats not available for device")

    monkeypatch.setattr(tf.config.experimental, "get_memory_info", does_not_count)
    assert accumops.memory_profile(wide(1), 2).measured_by == "the operating system"


@pytest.mark.parametrize(
    ("model", "sizes", "error", "match"),
    [
        (lambda: L.Dense(2), 8, TypeError, r"keras\.Model"),
        (Subclassed, 8, ValueError, "no graph"),
        (lambda: keras.Sequential([L.Dense(2)]), 8, ValueError, "not built"),
        (lambda: deep(1), 0, ValueError, "batch_sizes"),
        (lambda: deep(1), [8, 2.5], TypeError, "batch_sizes"),
        (lambda: keras.Sequential([keras.Input((None, 4)), L.Dense(2)]), 8, ValueError, "sizes"),
    ],
)
def test_arguments_are_checked(model, sizes, error, match):
    with pytest.raises(error, match=match):
        accumops.memory_profile(model(), sizes)
