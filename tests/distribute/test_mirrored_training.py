"""Training with `fit` on two and four replicas, against plain Keras with whole batches on one device."""

import itertools

import pytest
from replicas import (
    BATCHES,
    MODES,
    check_logs,
    check_replicas_are_equal,
    fit,
    full_batches,
    largest_difference,
    mirrored,
    network,
    optimizer,
)

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")


def train(strategy, mode, name, **compile_arguments):
    with strategy.scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, **MODES[mode])
        model.compile(optimizer(name), loss="mse", metrics=["mae"], **compile_arguments)
    return inner, model, fit(model, BATCHES[mode])


EACH = [
    (2, "SGD", "accum_steps"),
    (2, "Adam", "micro_batch_size"),
    (2, "AdamW", "accum_steps"),
    (2, "AdamW", "micro_batch_size"),
    (4, "AdamW", "accum_steps"),
]
ALONE = [(2, "RMSprop", "accum_steps"), (1, "Adam", "micro_batch_size")]  # unfused; one replica
TRAINED = [*ALONE, *itertools.product((2, 4), ("SGD", "Adam", "AdamW"), MODES)]


@pytest.mark.parametrize(
    ("replicas", "name", "mode"),
    [pytest.param(*each, marks=() if each in ALONE + EACH else pytest.mark.exhaustive) for each in TRAINED],
)
def test_the_model_equals_whole_batches(replicas, name, mode):
    """Ragged batches, empty ones on some replicas, sample weights, a regularizer, clipping."""
    wanted, wanted_logs = full_batches(name)
    inner, model, logs = train(mirrored(replicas), mode, name)
    assert model.optimizer.iterations.numpy() == 20
    assert bool(model.optimizer.fused_update) == (name != "RMSprop")
    assert largest_difference(inner, wanted) <= 1e-5
    check_logs(logs, wanted_logs)
    check_replicas_are_equal(inner.trainable_variables)
