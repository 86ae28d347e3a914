"""Metrics that functions make: `fit` logs what plain Keras logs for the same batches, however a batch is cut.

Batches of 17, 17 and 9 samples are cut into micro-batches of 4, 4, 4, 4 and 1, or of 4, 4 and 1.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from problems import RUNS

from accumops import GradientAccumulateModel

MODES = {
    "accum_steps": {"accum_steps": 2},
    "micro_batch_size": {"micro_batch_size": 4},
    "parallel": {"micro_batch_size": 4, "parallel_micro_batches": 2},
}


@keras.saving.register_keras_serializable(package="test_metric_functions")
def mean_square(y_true, y_pred):
    """One value for a batch."""
    return tf.reduce_mean((y_true - y_pred) ** 2)


def mean_of_each(y_true, y_pred):
    """A value for each sample."""
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


def mean_size(y_true, y_pred, power=1.0):
    return keras.ops.mean(keras.ops.abs(y_pred) ** power)


class MeanSize(keras.metrics.MeanMetricWrapper):
    def __init__(self, power=3.0, name="size", dtype=None):
        super().__init__(mean_size, name, dtype, power=power)


class OwnMean(keras.metrics.Mean):
    """Has a state and an `update_state` of its own: each micro-batch updates it."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(tf.reduce_max(tf.abs(y_true - y_pred)))


@pytest.fixture
def data(rng):
    """Later samples have larger errors, so that a wrong weight of a sample or a batch shows."""
    x = rng.standard_normal((43, 6)).astype("float32")
    y = (rng.standard_normal((43, 1)) * np.arange(1, 44)[:, None]).astype("float32")
    return x, y


def network(outputs="a"):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    made = [keras.layers.Dense(1, name=name)(inputs) for name in outputs]
    return keras.Model(inputs, made[0] if len(made) == 1 else made)


def logs_of(model, x, y, batch_size=17, **arguments):
    return model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, **arguments).history


def check_logs(found, wanted, without=()):
    assert set(found) == set(wanted)
    for name in set(wanted) - set(without):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "run"),
    cross(MODES, RUNS, default=lambda *each: each == ("micro_batch_size", "graph")),
)
@pytest.mark.exhaustive
def test_functions_of_several_outputs(data, mode, run):
    """Also losses and Keras's own metrics, some of them weighted, while weights move."""
    x, y = data

    def train(wrap):
        model = wrap(network("ab"))
        metrics = {
            "a": [mean_square, mean_of_each, keras.losses.MeanAbsoluteError(reduction="sum"), "mse"],
            "b": keras.metrics.MeanMetricWrapper(mean_size, "cubes", power=3.0),
        }
        weighted = [[mean_size, MeanSize()], ["mae", keras.metrics.RootMeanSquaredError()]]
        rate = 0.0 if mode == "accum_steps" else 1e-3  # Keras makes an update after each batch
        model.compile(keras.optimizers.SGD(rate), ["mse", "mae"], None, metrics, weighted, **RUNS[run])
        return logs_of(model, x, [y, 2 * y])

    wanted = train(lambda net: net)
    # Keras counts the losses of single outputs in a ragged batch as much as those in a full one.
    check_logs(train(lambda net: GradientAccumulateModel(net, **MODES[mode])), wanted, without=["a_loss", "b_loss"])


def test_a_step_that_xla_compiles(data):
    """Batches of 16 and 4 count once each, and their micro-batches by their samples."""
    x, y = data[0][:20], data[1][:20]
    model = GradientAccumulateModel(network(), micro_batch_size=6)
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[mean_square], jit_compile=True)
    errors = (model.predict(x, verbose=0) - y) ** 2
    history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["mean_square"], [(errors[:16].mean() + errors[16:].mean()) / 2], rtol=1e-6)


@pytest.mark.exhaustive
def test_passes_that_xla_compiles(rng):
    """XLA compiles only the forward and backward pass of each micro-batch, because the network has a convolution."""
    x, y = rng.standard_normal((11, 4, 4, 1)).astype("float32"), np.arange(11.0)[:, None]

    net = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(1, 4), keras.layers.Flatten()])
    model = GradientAccumulateModel(net, micro_batch_size=4)
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[mean_square], jit_compile=True)
    wanted = np.mean((net.predict(x, verbose=0) - y) ** 2)
    history = model.fit(x, y, sample_weight=np.arange(11.0), batch_size=11, verbose=0).history
    np.testing.assert_allclose(history["mean_square"], [wanted], rtol=1e-6)
    assert model.compiles_passes


@pytest.mark.exhaustive
def test_the_same_metric_of_two_outputs(data):
    x, y = data

    def train(wrap):
        model, metric = wrap(network("ab")), keras.metrics.MeanMetricWrapper(mean_square, "both")
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[[metric], [metric]], run_eagerly=True)
        return logs_of(model, x, [y, 2 * y])

    wanted = train(lambda net: net)
    found = train(lambda net: GradientAccumulateModel(net, micro_batch_size=4))
    check_logs(found, wanted, without=["a_loss", "b_loss"])


def test_metrics_with_a_state_see_micro_batches(data):
    x, y = data
    model = GradientAccumulateModel(network(), micro_batch_size=4)
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[OwnMean("largest"), mean_square])
    errors = np.abs(model.predict(x, verbose=0) - y)
    parts = [errors[i : min(i + 4, end)] for begin, end in ((0, 17), (17, 34), (34, 43)) for i in range(begin, end, 4)]
    wanted = np.mean([part.max() for part in parts])
    np.testing.assert_allclose(logs_of(model, x, y)["largest"], wanted, rtol=1e-6)


def test_a_weighted_function_of_a_whole_batch_is_refused_as_by_keras(data):
    x, y = data
    for wrap in (lambda net: net, lambda net: GradientAccumulateModel(net, micro_batch_size=4)):
        model = wrap(network())
        model.compile("sgd", "mse", weighted_metrics=[mean_square], run_eagerly=True)
        with pytest.raises(tf.errors.InvalidArgumentError, match="Rank"):
            logs_of(model, x, y, sample_weight=np.ones(43))


@pytest.mark.exhaustive
def test_steps_without_fit_and_saved_models(data, tmp_path):
    """Metrics are made in the first step, here in a function that AutoGraph converts; a saved model keeps them."""
    x, y = data
    model = GradientAccumulateModel(network(), micro_batch_size=4)
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[mean_square])

    @tf.function
    def step():
        return model.train_step((tf.constant(x), tf.constant(y)))

    wanted = np.mean((model.predict(x, verbose=0) - y) ** 2)
    np.testing.assert_allclose(step()["mean_square"], wanted, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    np.testing.assert_allclose(loaded.train_on_batch(x, y, return_dict=True)["mean_square"], wanted, rtol=1e-6)
