"""Recompute on replicas, against the same replicas without."""

import keras
import numpy as np
import pytest
from replicas import largest_difference, mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")


def network(synchronized):
    keras.utils.set_random_seed(1)
    inputs = hidden = keras.Input((8,))
    for i in range(2):
        skip = hidden
        hidden = keras.layers.BatchNormalization(synchronized=synchronized)(
            keras.layers.Dense(8, activation="tanh")(hidden)
        )
        hidden = keras.layers.Add()([keras.layers.Dropout(0.5, seed=i)(hidden), skip])
    return keras.Model(inputs, keras.layers.Dense(2)(hidden))


def trained(how, mode, replicas=2):
    with mirrored(replicas).scope():
        # Keras's layer cannot synchronize within a loop over micro-batches.
        net = network(synchronized="micro_batch_size" not in (mode or {}))
        if how == "layers":
            inputs = keras.Input((8,))
            model = keras.Model(inputs, accumops.Recompute(net)(inputs))
        else:
            model = net if how is None else accumops.recompute_layers(net, **how)
        model = model if mode is None else accumops.GradientAccumulateModel(model, **mode)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(X, X[:, :2], batch_size=16, epochs=2, shuffle=False, verbose=0)
    return net


@pytest.mark.parametrize(
    "mode", [pytest.param(None, marks=pytest.mark.exhaustive), {"accum_steps": 2}, {"micro_batch_size": 4}]
)
@pytest.mark.parametrize("how", [{"segments": 4}, pytest.param("layers", marks=pytest.mark.exhaustive)])
@pytest.mark.some_by_default(1)
def test_replicas_train_as_without(how, mode):
    assert largest_difference(trained(how, mode), trained(None, mode)) <= 2e-6
