"""`GradientNoiseScale` in `fit`, against the gradients of each micro-batch taken one by one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops.training import noise_scale

SAMPLES = 48


def new_net():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])


@pytest.fixture
def data(rng):
    x = rng.standard_normal((SAMPLES, 6)).astype("float32")
    return x, (x.sum(1, keepdims=True) + rng.standard_normal((SAMPLES, 1))).astype("float32")


def expected(net, data, batch_sizes, micro_batch_size, decay):
    """Noise scale, efficiency and last norm; the effective batch of each epoch. The learning rate is 0."""
    trace = square = 0.0
    for batch_size in batch_sizes:
        for start in range(0, SAMPLES, batch_size):
            gradients, sizes = [], []
            for first in range(start, min(start + batch_size, SAMPLES), micro_batch_size):
                part = slice(first, min(first + micro_batch_size, start + batch_size, SAMPLES))
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((net(data[0][part]) - data[1][part]) ** 2)
                found = tape.gradient(loss, net.trainable_variables)
                gradients.append(np.concatenate([np.ravel(each) for each in found]).astype(np.float64))
                sizes.append(len(data[0][part]))
            b, flat = np.array(sizes, float), np.array(gradients)
            mean = b @ flat / b.sum()
            one = (b @ (flat**2).sum(1) - b.sum() * mean @ mean) / (len(b) - 1)
            trace = decay * trace + (1 - decay) * one
            square = decay * square + (1 - decay) * (mean @ mean - one / b.sum())
    scale = trace / square
    return scale, 1 / (1 + scale / batch_sizes[-1]), np.sqrt(mean @ mean)


def check(history, wanted, batch_size, steps=3):
    scale, efficiency, norm = wanted
    assert history["accum_steps"][-1] == steps
    assert history["effective_batch_size"][-1] == batch_size
    np.testing.assert_allclose(history["gradient_noise_scale"][-1], scale, rtol=1e-4)
    np.testing.assert_allclose(history["batch_efficiency"][-1], efficiency, rtol=1e-4)
    np.testing.assert_allclose(history["gradient_norm"][-1], norm, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("way", ["micro_batch_size", "ragged", "accum_steps"])
@pytest.mark.some_by_default(1)
def test_model(data, way, jit_compile):
    net = new_net()
    arguments = {"accum_steps": 3} if way == "accum_steps" else {"micro_batch_size": 8 if way != "ragged" else 7}
    model = accumops.GradientAccumulateModel(net, **arguments)
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=jit_compile)
    batch_size = 8 if way == "accum_steps" else 24
    history = model.fit(
        *data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, callbacks=[accumops.GradientNoiseScale(0.9)]
    )
    wanted = expected(net, data, [24, 24], 7 if way == "ragged" else 8, 0.9)
    check(history.history, wanted, 24, steps=4 if way == "ragged" else 3)


def test_optimizer_in_plain_compile_and_a_fit_before(data):
    """A step that was traced without is made anew."""
    net = new_net()
    net.compile(accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.0), 3), loss="mse")
    net.fit(*data, batch_size=8, verbose=0)
    callback = accumops.GradientNoiseScale(0.5)
    history = net.fit(*data, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
    check(history.history, expected(net, data, [24], 8, 0.5), 24)


def test_windows_that_grow(data):
    """The noise scale is in samples, whatever windows there were before."""
    net = new_net()
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)
    callbacks = [accumops.AccumStepsScheduler({0: 2, 1: 6}), accumops.GradientNoiseScale(0.9)]
    history = model.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=callbacks).history
    check(history, expected(net, data, [8, 24], 4, 0.9), 24, steps=6)


def test_trains_as_without(data):
    weights = []
    for callbacks in ([], [accumops.GradientNoiseScale()]):
        net = new_net()
        model = accumops.GradientAccumulateModel(net, accum_steps=3)
        model.compile(keras.optimizers.Adam(0.01), loss="mse", jit_compile=False)
        model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(net.get_weights())
    for without, with_callback in zip(*weights, strict=True):
        np.testing.assert_allclose(without, with_callback, rtol=1e-5, atol=1e-7)


def lines_of(callback, monkeypatch, tmp_path):
    """The lines of the picture by their labels, and its axes from top to bottom."""
    figures = []
    figure_of = noise_scale.figure_of

    def noted(*size):
        figures.append(figure_of(*size))
        return figures[-1]

    monkeypatch.setattr(noise_scale, "figure_of", noted)
    callback.plot(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 1000
    above, below = figures[-1].axes
    found = {line.get_label(): line.get_xydata() for line in above.get_lines()}
    return {**found, "K": below.get_lines()[0].get_xydata()}, (above, below)


@pytest.mark.exhaustive
def test_picture(data, monkeypatch, tmp_path):
    """Of a K that changes, and of a second `fit` that goes on after the first; the unknown is left out."""
    pytest.importorskip("matplotlib")
    net = new_net()
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.0), 1)
    net.compile(optimizer, loss="mse")
    callback = accumops.GradientNoiseScale(0.0)
    scheduler = accumops.AccumStepsScheduler({0: 1, 1: 3, 2: 6})
    logs = []
    for initial, epochs in ((0, 3), (2, 4)):
        callbacks = [scheduler, callback]
        arguments = {"initial_epoch": initial, "epochs": epochs, "shuffle": False, "verbose": 0}
        logs.append(net.fit(*data, batch_size=4, callbacks=callbacks, **arguments).history)
    lines, axes = lines_of(callback, monkeypatch, tmp_path)
    np.testing.assert_array_equal(lines["K"], [[1, 1], [2, 3], [3, 6], [4, 6]])
    batches = lines["effective batch, shaded from half to twice of it"]
    np.testing.assert_array_equal(batches, [[1, 4], [2, 12], [3, 24], [4, 24]])
    scales = lines["gradient noise scale"]
    wanted = [*logs[0]["gradient_noise_scale"][:2], *logs[1]["gradient_noise_scale"]]
    assert np.isnan(wanted[0])  # windows of one micro-batch tell nothing
    np.testing.assert_array_equal(scales[:, 1], [each if np.isfinite(each) else np.nan for each in wanted])
    assert np.isfinite(scales[:, 1]).any()
    assert [each.get_yscale() for each in axes] == ["log", "log"]


def test_picture_of_gradients_that_are_all_noise(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    net = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    callback = accumops.GradientNoiseScale()
    y = np.array([[1.0], [-1.0]] * 4, "float32")
    history = model.fit(np.ones_like(y), y, batch_size=1, shuffle=False, verbose=0, callbacks=[callback]).history
    assert history["gradient_noise_scale"] == [np.inf]
    lines, _ = lines_of(callback, monkeypatch, tmp_path)
    assert np.isnan(lines["gradient noise scale"][0, 1])


def test_a_schedule_is_not_traced_again_for_the_callback(data):
    """It keeps its own decay, and tracks the noise anyway."""
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x * 1.0

    net = new_net()
    net.add(Counted())
    schedule = accumops.NoiseScaleSchedule(2, 4, learning_rate="none", decay=0.5)
    model = accumops.GradientAccumulateModel(net, accum_steps=schedule)
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)
    model.fit(*data, batch_size=8, verbose=0)
    before = len(traces)
    model.fit(*data, batch_size=8, verbose=0, callbacks=[accumops.GradientNoiseScale()])
    assert len(traces) == before


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot before an epoch has ended"):
        accumops.GradientNoiseScale().plot(tmp_path / "noise.png")


def test_what_is_wrong(data):
    with pytest.raises(ValueError, match="`decay` must be at least 0"):
        accumops.GradientNoiseScale(-0.1)
    with pytest.raises(TypeError, match="`decay` must be a number"):
        accumops.GradientNoiseScale(None)
    net = new_net()
    net.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="GradientNoiseScale needs a model"):
        net.fit(*data, verbose=0, callbacks=[accumops.GradientNoiseScale()])
    model = accumops.GradientAccumulateModel(new_net(), accum_steps=2)
    model.compile("sgd", loss=keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(ValueError, match="has reduction='sum'"):
        model.fit(*data, verbose=0, callbacks=[accumops.GradientNoiseScale()])
