"""GradientAccumulateModel in each of its modes against one large batch in plain Keras, without accumops."""

import functools
import zlib

import keras
import numpy as np
import pytest
from crosses import cross, turns
from problems import BATCH, FEATURES, MICRO, MODES, OPTIMIZERS, RUNS, UPDATES, largest_difference, train

from accumops import GradientAccumulateModel


def problem_of(feature):
    return FEATURES[feature](np.random.default_rng(zlib.crc32(feature.encode())))


@functools.cache
def large_batch(feature, optimizer):
    """The model that plain Keras trains with the large batch, and its logs. Eagerly: tracing would take longer."""
    problem = problem_of(feature)
    model = problem.model()
    plain = problem.plain(OPTIMIZERS[optimizer](**problem.optimizer_arguments))
    return model, train(problem, plain, model, BATCH, run_eagerly=True)


def check(feature, optimizer, mode, **run):
    """Trains the same in windows: weights, metrics and the number of updates have to agree."""
    problem = problem_of(feature)
    full, wanted = large_batch(feature, optimizer)
    inner = problem.model()
    model = GradientAccumulateModel(inner, **MODES[mode], **problem.model_arguments)
    batch_size = MICRO if mode == "accum_steps" else BATCH
    history = train(problem, OPTIMIZERS[optimizer](**problem.optimizer_arguments), model, batch_size, **run)
    assert int(model.optimizer.iterations) == UPDATES
    assert largest_difference(full, inner) <= 1e-5
    assert list(history) == list(wanted)
    for name, values in wanted.items():
        if feature in ("Masked", "WeightedMean", "WeightedMeanInAList") and name == "loss":
            continue  # Keras averages the batches' losses by samples, also where a loss divides by weights
        if feature in ("TwoInputsAndOutputs", "ListOutputs") and name.endswith("_loss"):
            continue  # Keras averages the losses of single outputs over batches, whatever the sizes of these
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


# The third mode, "parallel", runs the micro-batches of "micro_batch_size" in another order.
ONE_AFTER_ANOTHER = ["accum_steps", "micro_batch_size"]
SELECTED = ["Masked", "Regularized", "ListOutputs", "TinyLastBatch", "Embedding"]
# Arguments that take turns; test_everything_with_everything has all combinations. Each optimizer and each feature has
# one way to be trained. XLA compiles whole windows for longest, and a graph takes longer to be traced than a few steps.
OPTIMIZER_WAYS = [
    ("eager", "micro_batch_size"),
    ("graph", "accum_steps"),
    ("eager", "micro_batch_size"),
    ("eager", "accum_steps"),
    ("graph", "micro_batch_size"),
    ("xla", "accum_steps"),
]
FEATURE_WAYS = [
    ("graph", "fused", "micro_batch_size"),
    ("eager", "fused", "accum_steps"),
    ("eager", "reference", "micro_batch_size"),
    ("graph", "fused", "accum_steps"),
    ("eager", "fused", "micro_batch_size"),
    ("eager", "reference", "accum_steps"),
]


@pytest.mark.parametrize(
    ("optimizer", "run", "mode"), [(optimizer, *way) for optimizer, way in turns(OPTIMIZERS, OPTIMIZER_WAYS)]
)
@pytest.mark.some_by_default(1)
def test_every_optimizer(optimizer, run, mode):
    check("SampleWeights", optimizer, mode, **RUNS[run])


@pytest.mark.parametrize(
    ("feature", "run", "backend", "mode"),
    [
        # Other ways to clip are in test_fused_update.py.
        pytest.param(feature, *way, marks=pytest.mark.exhaustive if feature in ("ClipValue", "GlobalClipNorm") else ())
        for feature, way in turns(FEATURES, FEATURE_WAYS)
    ],
    indirect=["backend"],
)
@pytest.mark.some_by_default(4)
def test_every_feature(backend, feature, run, mode):
    check(feature, "AdamW", mode, **RUNS[run])


@pytest.mark.parametrize("feature", cross(SELECTED, default=lambda feature: feature == "Masked"))
def test_features_side_by_side(feature):
    check(feature, "AdamW", "parallel")


@pytest.mark.parametrize(
    ("feature", "mode"),
    cross(
        SELECTED,
        ONE_AFTER_ANOTHER,
        default=lambda *each: each == ("Regularized", "accum_steps"),
    ),
)
@pytest.mark.exhaustive
def test_features_compiled(feature, mode):
    check(feature, "AdamW", mode, jit_compile=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("feature", list(FEATURES))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("run", list(RUNS))
def test_everything_with_everything(backend, feature, optimizer, mode, run):
    check(feature, optimizer, mode, **RUNS[run])


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "accum_steps"))
def test_schedules_advance_once_a_window(monkeypatch, mode):
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.8)
    monkeypatch.setitem(OPTIMIZERS, "scheduled", lambda: keras.optimizers.SGD(decay))
    check("Problem", "scheduled", mode)


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "accum_steps"))
def test_steps_per_execution(mode):
    check("Problem", "Adam", mode, steps_per_execution=3)
