"""GradientAccumulateModel in each of its modes against one large batch in plain Keras, without accumops."""

import functools
import zlib

import keras
import numpy as np
import pytest
from problems import BATCH, FEATURES, MICRO, MODES, OPTIMIZERS, RUNS, UPDATES, largest_difference, train

from accumops import GradientAccumulateModel


def problem_of(feature):
    return FEATURES[feature](np.random.default_rng(zlib.crc32(feature.encode())))


@functools.cache
def large_batch(feature, optimizer):
    """The model that plain Keras trains with the large batch, and its logs."""
    problem = problem_of(feature)
    model = problem.model()
    plain = problem.plain(OPTIMIZERS[optimizer](**problem.optimizer_arguments))
    return model, train(problem, plain, model, BATCH)


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
            continue  # Keras averages the batches' losses by samples, whatever these divide by
        if feature in ("TwoInputsAndOutputs", "ListOutputs") and name.endswith("_loss"):
            continue  # and those of single outputs with equal weights, whatever the sizes of the batches
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


# Micro-batches side by side are those of "micro_batch_size" in another order of execution.
ONE_AFTER_ANOTHER = ["accum_steps", "micro_batch_size"]


@pytest.mark.parametrize("mode", ONE_AFTER_ANOTHER)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("run", list(RUNS))
def test_every_optimizer(optimizer, mode, run):
    check("SampleWeights", optimizer, mode, **RUNS[run])


@pytest.mark.parametrize(
    ("backend", "mode"),
    [*(("fused", mode) for mode in ONE_AFTER_ANOTHER), ("reference", "micro_batch_size")],
    indirect=["backend"],
)
@pytest.mark.parametrize("feature", list(FEATURES))
def test_every_feature(backend, feature, mode):
    check(feature, "AdamW", mode)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ONE_AFTER_ANOTHER])
@pytest.mark.parametrize("feature", ["Masked", "Regularized", "ListOutputs", "TinyLastBatch", "Embedding"])
def test_features_side_by_side(feature, mode):
    check(feature, "AdamW", mode)


@pytest.mark.parametrize("mode", ONE_AFTER_ANOTHER)
@pytest.mark.parametrize("feature", ["Masked", "Regularized", "ListOutputs", "TinyLastBatch", "Embedding"])
@pytest.mark.parametrize("run", ["eager", "xla"])
def test_features_in_other_runs(feature, mode, run):
    check(feature, "Adam", mode, **RUNS[run])


@pytest.mark.exhaustive
@pytest.mark.parametrize("feature", list(FEATURES))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("run", list(RUNS))
def test_everything_with_everything(backend, feature, optimizer, mode, run):
    check(feature, optimizer, mode, **RUNS[run])


@pytest.mark.parametrize("mode", list(MODES))
def test_schedules_advance_once_a_window(monkeypatch, mode):
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.8)
    monkeypatch.setitem(OPTIMIZERS, "scheduled", lambda: keras.optimizers.SGD(decay))
    check("Problem", "scheduled", mode)


@pytest.mark.parametrize("mode", list(MODES))
def test_steps_per_execution(mode):
    check("Problem", "Adam", mode, steps_per_execution=3)
