"""More of `fit` on replicas, against plain Keras with whole batches on one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from replicas import (
    BATCH,
    MICRO,
    MODES,
    WINDOW,
    check_logs,
    data,
    fit,
    largest_difference,
    mirrored,
    network,
    optimizer,
)

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")


@pytest.mark.exhaustive
def test_run_eagerly():
    few = {"epochs": 1, "samples": 3 * BATCH + 5}
    wanted = network()
    wanted.compile(optimizer("AdamW"), loss="mse", metrics=["mae"])
    wanted_logs = fit(wanted, BATCH, **few)
    with mirrored(2).scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW)
        model.compile(optimizer("AdamW"), loss="mse", metrics=["mae"], run_eagerly=True)
    logs = fit(model, MICRO, **few)
    assert model.optimizer.iterations.numpy() == 4
    assert largest_difference(inner, wanted) <= 1e-5
    check_logs(logs, wanted_logs)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_checked(mode):
    def correlation(y_true, y_pred):
        return 1 - keras.ops.mean(y_true * y_pred) / (keras.ops.std(y_true) * keras.ops.std(y_pred))

    with mirrored(2).scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, **MODES[mode])
        model.compile("sgd", loss=correlation)
    before = inner.get_weights()
    with pytest.raises(ValueError, match=r"'correlation'.* cannot be accumulated .* couples the samples"):
        fit(model, BATCH)
    for a, b in zip(before, inner.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("normalization", ["steps", "weights"])
@pytest.mark.some_by_default(1)
def test_normalizations(normalization):
    """Where micro-batches are equal, "steps" is their mean; "weights" divides by the weights of all replicas."""
    x, y, weights = (each[: BATCH * 3] for each in data())
    loss = "mse"
    if normalization == "weights":
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    plain = network()
    plain.compile(optimizer("SGD"), loss=loss)
    plain.fit(x, y, sample_weight=weights, batch_size=BATCH, shuffle=False, verbose=0)
    with mirrored(2).scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW, normalization=normalization)
        model.compile(optimizer("SGD"), loss=loss)
    model.fit(x, y, sample_weight=weights, batch_size=MICRO, shuffle=False, verbose=0)
    # The regularizer is averaged by the same weights as the rest: one term, whatever they are.
    assert largest_difference(inner, plain) <= 1e-5


def test_a_plain_model_with_the_optimizer():
    """Keras's trainer divides the loss by the number of replicas, and the optimizer sums over them."""
    x, y, _ = (each[: BATCH * 5] for each in data())
    plain = network()
    plain.compile(optimizer("AdamW"), loss="mse")
    plain.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    with mirrored(2).scope():
        model = network()
        model.compile(accumops.GradientAccumulateOptimizer(optimizer("AdamW"), WINDOW), loss="mse")
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)
    assert model.optimizer.iterations.numpy() == 5
    assert largest_difference(model, plain) <= 1e-5


@pytest.mark.exhaustive
def test_adaptive_clipping_and_a_partial_window():
    x, y, _ = (each[: BATCH * 2 + 24] for each in data())

    def train_with(strategy):
        with strategy.scope():
            inner = network()
            clip = accumops.AdaptiveGradientClipping(0.02)
            model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW, gradient_clipping=clip)
            model.compile("adam", loss="mse")
        callbacks = [accumops.EffectiveBatchSize(), accumops.AccumStepsScheduler({0: WINDOW, 1: 2})]
        logs = model.fit(x, y, batch_size=MICRO, epochs=2, shuffle=False, verbose=0, callbacks=callbacks).history
        return inner, logs

    one, one_logs = train_with(tf.distribute.get_strategy())
    two, two_logs = train_with(mirrored(2))
    assert largest_difference(one, two) <= 1e-5
    check_logs(two_logs, one_logs)


def test_a_first_batch_that_one_replica_has_nothing_of():
    x, y, _ = (each[:1] for each in data())
    plain = network()
    plain.compile("sgd", loss="mse")
    plain.fit(x, y, verbose=0)
    for mode in MODES:
        with mirrored(2).scope():
            inner = network()
            model = accumops.GradientAccumulateModel(inner, **MODES[mode])
            model.compile("sgd", loss="mse")
        logs = model.fit(x, y, batch_size=BATCH, verbose=0).history
        assert np.isfinite(logs["loss"]).all()
        assert largest_difference(inner, plain) <= 1e-6


@pytest.mark.exhaustive
def test_epochs_that_end_one_micro_batch_before_their_window():
    """The function that would have ended it does nothing, on replicas as well: metrics and random numbers included."""
    x, y, _ = (each[: 7 * MICRO] for each in data())
    histories = []
    for strategy in (tf.distribute.get_strategy(), mirrored(1), mirrored(2)):
        with strategy.scope():
            keras.utils.set_random_seed(0)
            inner = keras.Sequential(
                [keras.Input(x.shape[1:]), keras.layers.Dropout(0.0, seed=1), keras.layers.Dense(1)]
            )
            model = accumops.GradientAccumulateModel(inner, accum_steps=4)
            model.compile("sgd", loss="mse", metrics=["mae"])
        callbacks = [accumops.EffectiveBatchSize()]
        logs = model.fit(x, y, batch_size=MICRO, epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history
        histories.append(logs)
    for logs in histories[1:]:
        for name, values in histories[0].items():
            np.testing.assert_allclose(logs[name], values, rtol=1e-5)


@pytest.mark.exhaustive
def test_a_metric_whose_result_is_its_variable():
    class Last(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="last")
            self.samples = self.add_variable((), "zeros", name="samples")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.samples.assign_add(1.0)

        def result(self):
            return self.samples

    x, y, _ = (each[:BATCH] for each in data())
    with mirrored(2).scope():
        model = accumops.GradientAccumulateModel(network(), accum_steps=2)
        model.compile("sgd", "mse", metrics=[Last()])
    logs = model.fit(x, y, batch_size=MICRO, verbose=0).history
    assert logs["last"] == [BATCH / MICRO * 2]


class AbsoluteError(keras.losses.Loss):
    """A mean that is NaN without samples; the means in Keras's losses are 0 then."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync  # by which Keras divides
        return tf.reduce_mean(tf.abs(tf.cast(y_true, y_pred.dtype) - y_pred)) / replicas


@pytest.mark.parametrize(
    ("mode", "eager"),
    cross(MODES, [False, True], default=lambda mode, eager: not eager or mode == "accum_steps"),
)
@pytest.mark.some_by_default(1)
def test_losses_of_single_outputs(mode, eager):
    """In training and evaluation: batches have 17, 17 and 1 samples, so one replica gets nothing of the last."""
    x, y, _ = (each[:35] for each in data())
    y = y * np.arange(1, 36, dtype="float32")[:, None]
    with mirrored(2).scope():
        inputs = keras.Input(x.shape[1:])
        net = keras.Model(inputs, [keras.layers.Dense(3, name=name)(inputs) for name in "ab"])
        model = accumops.GradientAccumulateModel(net, **MODES[mode])
        model.compile(keras.optimizers.SGD(0.0), loss=["mse", AbsoluteError()], run_eagerly=eager)
    a, b = (layer(x).numpy() for layer in net.layers[1:])
    wanted = {"a_loss": np.mean((a - y) ** 2), "b_loss": np.mean(np.abs(b - y))}
    wanted["loss"] = wanted["a_loss"] + wanted["b_loss"]
    trained = model.fit(x, [y, y], batch_size=17, shuffle=False, verbose=0).history
    evaluated = model.evaluate(x, [y, y], batch_size=17, verbose=0, return_dict=True)
    for name, value in wanted.items():
        np.testing.assert_allclose([trained[name][0], evaluated[name]], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "run_eagerly"),
    cross(MODES, [False, True], default=lambda mode, run_eagerly: run_eagerly == (mode == "micro_batch_size")),
)
@pytest.mark.some_by_default(1)
def test_metric_functions_of_a_batch(mode, run_eagerly):
    """The part of each replica counts once, as under Keras; a part without samples counts as nothing."""
    x, y = (each[:21] for each in data()[:2])  # the replicas get 5 and 5, 5 and 5, 1 and none

    def mean_square(y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2)

    with mirrored(2).scope():
        net = network()
        model = accumops.GradientAccumulateModel(
            net, **({"micro_batch_size": 3} if mode != "accum_steps" else MODES[mode])
        )
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[mean_square], run_eagerly=run_eagerly)
    logs = model.fit(x, y, batch_size=10, shuffle=False, verbose=0, validation_data=(x, y), validation_batch_size=10)
    errors = (net(x).numpy() - y) ** 2
    wanted = np.mean([errors[i : i + 5].mean() for i in range(0, 21, 5)])
    for name in ("mean_square", "val_mean_square"):
        np.testing.assert_allclose(logs.history[name], [wanted], rtol=1e-5)
