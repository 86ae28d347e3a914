"""The losses that `fit` logs are the data's, however a batch is cut. Where plain Keras is exact, they equal Keras's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from problems import RUNS

from accumops import GradientAccumulateModel


@pytest.fixture
def x(rng):
    return rng.standard_normal((43, 6)).astype("float32")


@pytest.fixture
def y(rng):
    """Later samples have larger losses, so that a wrong weight of a sample shows."""
    return (rng.standard_normal((43, 1)) * np.arange(1, 44)[:, None]).astype("float32")


ONE_MICRO_BATCH = {"micro_batch_size": 17}


@pytest.mark.parametrize(
    ("mode", "run"),
    cross(
        [{"accum_steps": 2}, {"micro_batch_size": 4}, ONE_MICRO_BATCH],
        RUNS,
        default=lambda mode, run: run == ("eager" if mode == {"micro_batch_size": 4} else "graph"),
    ),
    ids=str,
)
@pytest.mark.some_by_default(1)
def test_losses_of_single_outputs(x, y, mode, run):
    """In batches of 17, 17 and 9."""
    inputs = keras.Input((6,))
    net = keras.Model(inputs, [keras.layers.Dense(1, name=name)(inputs) for name in "ab"])
    a, b = net.predict(x, verbose=0)
    wanted = {"a_loss": np.mean((a - y) ** 2), "b_loss": np.mean(np.abs(b - y))}
    wanted["loss"] = wanted["a_loss"] + wanted["b_loss"]
    model = GradientAccumulateModel(net, **mode)
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mae"], **RUNS[run])
    for _ in range(2):  # the second epoch's metrics start anew
        logs = model.fit(x, [y, y], batch_size=17, verbose=0, shuffle=False).history
        assert set(logs) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(logs[name][0], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("run", cross(RUNS, default=lambda run: run == "graph"))
@pytest.mark.exhaustive
def test_losses_of_single_outputs_in_validation(x, y, run):
    """In batches of 17, 17 and 9, with weights and without, by `evaluate` and by `fit`."""
    inputs = keras.Input((6,))
    net = keras.Model(inputs, {name: keras.layers.Dense(1, name=name)(inputs) for name in "ab"})
    weights = np.arange(43.0) / 43
    predicted = net.predict(x, verbose=0)
    errors = predicted["a"] - y
    wanted = {"a_loss": np.mean(errors**2), "b_loss": np.mean(weights * np.abs(predicted["b"] - y)[:, 0])}
    wanted["loss"] = 0.5 * wanted["a_loss"] + 2 * wanted["b_loss"]
    model = GradientAccumulateModel(net, accum_steps=2)
    targets, all_weights = {"a": y, "b": y}, {"a": np.ones(43), "b": weights}
    model.compile(keras.optimizers.SGD(0.0), {"a": "mse", "b": "mae"}, {"a": 0.5, "b": 2.0}, **RUNS[run])
    data = (x, targets, all_weights)
    logs = model.fit(*data[:2], batch_size=43, verbose=0, validation_data=data, validation_batch_size=17).history
    found = model.evaluate(*data[:2], sample_weight=all_weights, batch_size=17, verbose=0, return_dict=True)
    for name, value in wanted.items():
        np.testing.assert_allclose([found[name], logs[f"val_{name}"][0]], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("run", cross(RUNS, default=lambda run: run == "eager"))
def test_loss_where_everything_is_frozen(x, y, run):
    """Micro-batches of 16, 16 and 11 count by their samples, though nothing is trained."""
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, trainable=False)])
    model = GradientAccumulateModel(net, micro_batch_size=16)
    model.compile("sgd", "mse", **RUNS[run])
    logs = model.fit(x, y, batch_size=43, verbose=0).history
    np.testing.assert_allclose(logs["loss"], [np.mean((net.predict(x, verbose=0) - y) ** 2)], rtol=1e-5)


@pytest.mark.parametrize("run", cross(RUNS, default=lambda run: run == "graph"))
def test_loss_that_divides_by_weights(x, y, run):
    """Micro-batches of 4, 4, 4, 4 and 1, of batches of 17, count by their sums of weights."""
    weights = np.arange(34.0) ** 2
    logs = []
    for wrap in (
        lambda net: net,
        lambda net: GradientAccumulateModel(net, micro_batch_size=4, normalization="weights"),
    ):
        keras.utils.set_random_seed(1)
        model = wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]))
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        accumulates = isinstance(model, GradientAccumulateModel)
        model.compile(keras.optimizers.SGD(0.01), loss, **RUNS[run if accumulates else "eager"])
        history = model.fit(x[:34], y[:34], sample_weight=weights, batch_size=17, epochs=2, verbose=0, shuffle=False)
        logs.append(history.history["loss"])
    np.testing.assert_allclose(*logs, rtol=1e-5)


def test_losses_that_a_step_computes_without_fit(x, y):
    """A loss makes its parts when it is first computed; here that is in a step outside `fit`."""
    inputs = keras.Input((6,))
    net = keras.Model(inputs, [keras.layers.Dense(1, name=name)(inputs) for name in "ab"])
    model = GradientAccumulateModel(net, micro_batch_size=16)
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mae"])
    a, _ = net.predict(x, verbose=0)
    batch = (tf.constant(x), (tf.constant(y), tf.constant(y)))
    step = tf.function(lambda: model.train_step(batch), autograph=False)
    np.testing.assert_allclose(step()["a_loss"], np.mean((a - y) ** 2), rtol=1e-5)
