"""`GradientNoiseScale` in `fit`, against the gradients of each micro-batch taken one by one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops

SAMPLES = 48


def new_net():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])


@pytest.fixture
def data(rng):
    x = rng.standard_normal((SAMPLES, 6)).astype("float32")
    return x, (x.sum(1, keepdims=True) + rng.standard_normal((SAMPLES, 1))).astype("float32")


def expected(net, data, batch_size, micro_batch_size, decay, epochs):
    """Noise scale, efficiency and last norm. The weights do not move: the learning rate is 0."""
    trace = square = shares = 0.0
    for _ in range(epochs):
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
            shares = decay * shares + (1 - decay) * b.sum()
    known = 1 - decay ** (epochs * -(-SAMPLES // batch_size))
    scale = trace / square
    return scale, 1 / (1 + scale / (shares / known)), np.sqrt(mean @ mean)


def check(history, wanted, batch_size):
    scale, efficiency, norm = wanted
    assert history["effective_batch_size"][-1] == batch_size
    np.testing.assert_allclose(history["gradient_noise_scale"][-1], scale, rtol=1e-4)
    np.testing.assert_allclose(history["batch_efficiency"][-1], efficiency, rtol=1e-4)
    np.testing.assert_allclose(history["gradient_norm"][-1], norm, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("way", ["micro_batch_size", "ragged", "accum_steps"])
def test_model(data, way, jit_compile):
    net = new_net()
    arguments = {"accum_steps": 3} if way == "accum_steps" else {"micro_batch_size": 8 if way != "ragged" else 7}
    model = accumops.GradientAccumulateModel(net, **arguments)
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=jit_compile)
    batch_size = 8 if way == "accum_steps" else 24
    history = model.fit(
        *data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, callbacks=[accumops.GradientNoiseScale(0.9)]
    )
    wanted = expected(net, data, 24, 7 if way == "ragged" else 8, 0.9, 2)
    check(history.history, wanted, 24)


def test_optimizer_in_plain_compile_and_a_fit_before(data):
    """A step that was traced without is made anew."""
    net = new_net()
    net.compile(accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.0), 3), loss="mse")
    net.fit(*data, batch_size=8, verbose=0)
    callback = accumops.GradientNoiseScale(0.5)
    history = net.fit(*data, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
    check(history.history, expected(net, data, 24, 8, 0.5, 1), 24)


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
