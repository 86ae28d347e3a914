"""Training with `fit` on two and four replicas, against plain Keras with whole batches on one device."""

import pytest
from replicas import (
    BATCHES,
    MODES,
    check_logs,
    check_replicas_are_equal,
    fit,
    full_batches,
    largest_difference,
    logical_cpus,
    mirrored,
    network,
    optimizer,
)

import accumops


@pytest.fixture(scope="module", autouse=True)
def devices():
    logical_cpus(4)


def train(strategy, mode, name, **compile_arguments):
    with strategy.scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, **MODES[mode])
        model.compile(optimizer(name), loss="mse", metrics=["mae"], **compile_arguments)
    return inner, model, fit(model, BATCHES[mode])


TRAINED = [(2, "SGD"), (2, "Adam"), (2, "AdamW"), (4, "AdamW")]
BOTH = [(replicas, name, mode) for replicas, name in TRAINED for mode in MODES]


@pytest.mark.parametrize(
    ("replicas", "name", "mode"), [*BOTH, (2, "RMSprop", "accum_steps"), (1, "Adam", "micro_batch_size")]
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
