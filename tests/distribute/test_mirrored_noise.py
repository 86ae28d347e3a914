"""The noise scale on replicas: the micro-batches of each replica are groups of their own."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

SAMPLES, REPLICAS = 48, 2


def expected(model, x, y, window, size, decay):
    """Windows of so many samples, in groups of one size, with weights that do not move."""
    trace = square = 0.0
    for start in range(0, SAMPLES, window):
        flat = []
        for first in range(start, start + window, size):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x[first : first + size]) - y[first : first + size]) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            flat.append(np.concatenate([np.ravel(each) for each in gradients]).astype(np.float64))
        flat = np.array(flat)
        mean = flat.mean(0)
        one = (size * (flat**2).sum() - window * mean @ mean) / (len(flat) - 1)
        trace = decay * trace + (1 - decay) * one
        square = decay * square + (1 - decay) * (mean @ mean - one / window)
    return trace / square, np.sqrt(mean @ mean)


@pytest.mark.parametrize("mode", ["accum_steps", "micro_batch_size"])
@pytest.mark.some_by_default(1)
def test_replicas_are_further_groups(mode, rng):
    x = rng.standard_normal((SAMPLES, 3)).astype("float32")
    y = (x.sum(1, keepdims=True) + rng.standard_normal((SAMPLES, 1))).astype("float32")
    # A window has 16 samples, in four groups of 4: two micro-batches on each of two replicas.
    arguments, batch = ({"accum_steps": 2}, 8) if mode == "accum_steps" else ({"micro_batch_size": 4}, 16)
    with mirrored(REPLICAS).scope():
        keras.utils.set_random_seed(3)
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
        model = accumops.GradientAccumulateModel(net, **arguments)
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
    callback = accumops.GradientNoiseScale(0.5)
    history = model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=[callback]).history
    scale, norm = expected(net, x, y, 16, 4, 0.5)
    np.testing.assert_allclose(history["gradient_noise_scale"], [scale], rtol=1e-4)
    np.testing.assert_allclose(history["batch_efficiency"], [1 / (1 + scale / 16)], rtol=1e-4)
    np.testing.assert_allclose(history["gradient_norm"], [norm], rtol=1e-5)
