"""Training with `fit` on two and four replicas, against plain Keras with whole batches on one device."""

import itertools

import keras
import pytest
from replicas import (
    BATCH,
    BATCHES,
    MODES,
    UPDATES,
    check_logs,
    check_replicas_are_equal,
    data,
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
    (2, "AdamW", "micro_batch_size"),
    (4, "AdamW", "accum_steps"),
]
ALONE = [(2, "RMSprop", "accum_steps"), (1, "Adam", "micro_batch_size")]  # unfused; one replica
TRAINED = [*ALONE, *itertools.product((2, 4), ("SGD", "Adam", "AdamW"), MODES)]


@pytest.mark.parametrize(
    ("replicas", "name", "mode"),
    [pytest.param(*each, marks=() if each in ALONE + EACH else pytest.mark.exhaustive) for each in TRAINED],
)
@pytest.mark.some_by_default(2)
def test_the_model_equals_whole_batches(replicas, name, mode):
    """Ragged batches, empty ones on some replicas, sample weights, a regularizer, clipping."""
    wanted, wanted_logs = full_batches(name)
    inner, model, logs = train(mirrored(replicas), mode, name)
    assert model.optimizer.iterations.numpy() == UPDATES
    assert bool(model.optimizer.fused_update) == (name != "RMSprop")
    assert largest_difference(inner, wanted) <= 1e-5
    check_logs(logs, wanted_logs)
    check_replicas_are_equal(inner.trainable_variables)


@pytest.mark.parametrize("mode", ["micro_batch_size", pytest.param("accum_steps", marks=pytest.mark.exhaustive)])
def test_sums_over_all_replicas(mode):
    """A loss with `reduction="sum"`: the update is that of the sum over the whole batch, whatever each replica got."""

    def train(model, batch_size):
        model.compile(keras.optimizers.SGD(1e-3), keras.losses.MeanSquaredError(reduction="sum"))
        x, y, weights = data()
        model.fit(x, y, sample_weight=weights, batch_size=batch_size, shuffle=False, verbose=0)

    def without_regularizer():
        return keras.models.clone_model(network(), clone_function=_without_regularizer)

    expected = without_regularizer()
    expected.set_weights(network().get_weights())
    train(expected, BATCH)
    with mirrored(2).scope():
        found = without_regularizer()
        found.set_weights(network().get_weights())
        model = accumops.GradientAccumulateModel(found, **MODES[mode])
        train(model, BATCHES[mode])
    assert largest_difference(found, expected) <= 1e-5


def _without_regularizer(layer):
    return type(layer).from_config({**layer.get_config(), "kernel_regularizer": None})
