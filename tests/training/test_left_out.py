"""`GradientAccumulateModel(nonfinite=...)`: logs, metrics and running statistics of what is left out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import AccumBatchNormalization, GradientAccumulateModel

MICRO = 4
MODES = {
    "accum_steps": {"accum_steps": 3},
    "micro_batch_size": {"micro_batch_size": MICRO},
    "parallel": {"micro_batch_size": MICRO, "parallel_micro_batches": 2},
}
RUNS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
DEFAULT = [
    ("accum_steps", "drop", "graph"),
    ("micro_batch_size", "drop", "eager"),
    ("parallel", "skip", "graph"),
]
# Micro-batches of a window of three; the last window has two, of which the last is smaller. The first window lacks its
# first micro-batch, the second its last, and the fourth has nothing left.
SAMPLES = 3 * 3 * MICRO + MICRO + 2
BAD = {"x": [1, 23], "y": [37, 41]}


def data():
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((SAMPLES, columns)).astype("float32") for columns in (3, 2))
    x[BAD["x"], 1] = np.nan
    y[BAD["y"], 0] = np.inf
    return x, y


def micro_batches():
    """For each window the slices of its micro-batches, and whether they are finite."""
    x, y = data()
    slices = [slice(i, min(i + MICRO, SAMPLES)) for i in range(0, SAMPLES, MICRO)]
    finite = [bool(np.isfinite(x[each]).all() and np.isfinite(y[each]).all()) for each in slices]
    pairs = list(zip(slices, finite, strict=True))
    return [pairs[i : i + 3] for i in range(0, len(pairs), 3)]


def kept(policy):
    """The samples of each update that a policy makes."""
    windows = []
    for window in micro_batches():
        if policy == "drop" and not all(finite for _, finite in window):
            continue
        samples = [i for each, finite in window if finite for i in range(each.start, each.stop)]
        windows += [samples] if samples else []
    return windows


def network(*layers):
    keras.utils.set_random_seed(5)
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])


def fit(model, mode="accum_steps", samples=slice(None), **arguments):
    x, y = (each[samples] for each in data())
    batch_size = MICRO if mode == "accum_steps" else 3 * MICRO
    return model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, **arguments).history


@pytest.mark.parametrize(
    ("mode", "policy", "run"),
    cross(
        MODES,
        ["skip", "drop"],
        RUNS,
        default=lambda mode, policy, run: (mode, policy, run) in DEFAULT,
    ),
)
@pytest.mark.some_by_default(1)
def test_updates_and_logs_are_those_of_the_finite_micro_batches(mode, policy, run):
    inner, plain = network(), network()
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build(plain.trainable_variables)
    x, y = data()
    for samples in kept(policy):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((plain(x[samples]) - y[samples]) ** 2)
        optimizer.apply(tape.gradient(loss, plain.trainable_variables))
    model = GradientAccumulateModel(inner, nonfinite=policy, **MODES[mode])
    model.compile(keras.optimizers.Adam(0.05), loss="mse", metrics=["mae"], **RUNS[run])
    logs = fit(model, mode)
    for found, wanted in zip(inner.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert int(model.optimizer.iterations) == len(kept(policy))
    count = 4 if policy == "skip" else 3
    assert logs["nonfinite_count"] == [count]
    assert int(model.optimizer.nonfinite_count) == count
    assert np.isfinite(logs["loss"]).all()
    assert np.isfinite(logs["mae"]).all()


def test_the_loss_is_the_mean_over_what_counts():
    """The model does not move, so the mean over the epoch is that of one model."""
    x, y = data()
    for mode in ("accum_steps", "micro_batch_size"):
        model = GradientAccumulateModel(network(), nonfinite="skip", **MODES[mode])
        model.compile(keras.optimizers.SGD(0.0), loss="mse", metrics=["mse"])
        callback = accumops.EffectiveBatchSize()
        logs = fit(model, mode, callbacks=[callback], validation_data=(x[-2:], np.zeros((2, 2))))
        samples = [i for window in kept("skip") for i in window]
        wanted = np.mean((model.predict(x[samples], verbose=0) - y[samples]) ** 2)
        np.testing.assert_allclose([logs["loss"][0], logs["mse"][0]], wanted, rtol=1e-5)
        assert logs["effective_batch_size"] == [len(samples) / 3]


def test_an_epoch_without_anything_finite_has_no_loss():
    """Keras's mean of nothing is 0, which would look like a perfect model. The next epoch goes on."""
    x, y = data()
    model = GradientAccumulateModel(network(), accum_steps=2, nonfinite="skip")
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    before = model.get_weights()
    for validation in ({}, {"validation_data": (x[4:8], y[4:8])}):
        logs = fit(model, samples=slice(36, 42), **validation)
        assert np.isnan(logs["loss"]).all()
    assert logs["nonfinite_count"] == [4]
    assert np.isfinite(logs["val_loss"]).all()
    for found, wanted in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(fit(model, samples=slice(4, 12))["loss"]).all()


@pytest.mark.parametrize(
    ("policy", "mode"),
    cross(
        ["skip", "drop"],
        ["accum_steps", "micro_batch_size"],
        default=lambda policy, mode: (policy == "drop") == (mode == "accum_steps"),
    ),
)
@pytest.mark.some_by_default(1)
def test_running_statistics_are_those_of_the_samples_that_made_updates(policy, mode):
    """Targets that are not finite leave inputs that are: they do not count either."""
    inner = network(AccumBatchNormalization(momentum=0.5))
    model = GradientAccumulateModel(inner, nonfinite=policy, **MODES[mode])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    fit(model, mode)
    x, _ = data()
    mean, variance = np.zeros(3), np.ones(3)
    for samples in kept(policy):
        mean = mean / 2 + x[samples].mean(0) / 2
        variance = variance / 2 + x[samples].var(0) / 2
    layer = inner.layers[0]
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Layers whose state moves with each micro-batch")
def test_keras_batch_normalization_forgets_a_skipped_micro_batch():
    inner = network(keras.layers.BatchNormalization(momentum=0.5))
    model = GradientAccumulateModel(inner, accum_steps=3, nonfinite="skip")
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    fit(model)
    x, _ = data()
    mean = np.zeros(3)
    for each, finite in (each for window in micro_batches() for each in window):
        mean = mean / 2 + x[each].mean(0) / 2 if finite else mean
    np.testing.assert_allclose(inner.layers[0].moving_mean.numpy(), mean, rtol=1e-5, atol=1e-6)


def test_statistics_under_a_wrapped_optimizer_leave_out_moments_that_are_not_finite():
    layer = AccumBatchNormalization(momentum=0.0)
    model = network(layer)
    model.compile(accumops.GradientAccumulateOptimizer("sgd", 3, nonfinite="skip"), loss="mse")
    x, y = data()
    callbacks = [accumops.PartialWindow("flush"), accumops.NonfiniteCount()]
    model.optimizer.build(model.trainable_variables)
    logs = model.fit(x[:12], y[:12], batch_size=4, shuffle=False, verbose=0, callbacks=callbacks).history
    assert logs["nonfinite_count"] == [1]
    np.testing.assert_allclose(layer.moving_mean.numpy(), x[4:12].mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), x[4:12].var(0), rtol=1e-5)


def test_under_mixed_float16_a_skipped_micro_batch_makes_the_scale_back_off():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = GradientAccumulateModel(network(), accum_steps=3, nonfinite="skip")
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        logs = fit(model, samples=slice(0, 12))
    finally:
        keras.config.set_dtype_policy(before)
    assert float(model.optimizer.inner_optimizer.dynamic_scale) == 2.0**14
    assert int(model.optimizer.iterations) == 1
    assert logs["nonfinite_count"] == [1]
    assert all(np.isfinite(each).all() for each in model.get_weights())


@pytest.mark.exhaustive
def test_a_saved_model_goes_on(tmp_path):
    model = GradientAccumulateModel(network(), accum_steps=3, partial_window="carry", nonfinite="drop")
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    fit(model, samples=slice(0, 8))
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert restored.nonfinite == "drop"
    before = restored.get_weights()
    logs = fit(restored, samples=slice(8, 12))
    assert logs["nonfinite_count"] == [1]
    for found, wanted in zip(restored.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_without_a_policy_nothing_is_logged():
    model = GradientAccumulateModel(network(), accum_steps=3)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    logs = fit(model, samples=slice(0, 12), callbacks=[accumops.NonfiniteCount()])
    assert list(logs) == ["loss"]
    assert np.isnan(logs["loss"][0])


def test_another_policy_is_refused():
    with pytest.raises(ValueError, match="`nonfinite` must be 'propagate', 'skip' or 'drop'"):
        GradientAccumulateModel(network(), accum_steps=3, nonfinite=None)
