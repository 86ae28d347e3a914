"""What AccumulationLogger writes of training on replicas, against plain Keras on one device."""

import event_files
import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

X = np.random.default_rng(0).normal(size=(80, 5)).astype("float32")
Y = X[:, :3] ** 2
# For each mode the batch of `fit`, the windows, and the micro-batches of a replica in each.
MODES = {
    "accum_steps": ({"accum_steps": 4}, 16, [slice(0, 64), slice(64, 80)], None),
    "micro_batch_size": ({"micro_batch_size": 8}, 32, [slice(0, 32), slice(32, 64), slice(64, 80)], [2, 2, 1]),
}


def network():
    keras.utils.set_random_seed(7)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)])


def norms_by_hand(windows):
    model, optimizer, norms = network(), keras.optimizers.SGD(0.1), []
    optimizer.build(model.trainable_variables)
    for window in windows:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X[window]) - Y[window]) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        norms.append(float(tf.linalg.global_norm(gradients)))
        optimizer.apply(gradients, model.trainable_variables)
    return norms


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.some_by_default(1)
def test_norms_and_samples_are_those_of_all_replicas(mode, tmp_path):
    arguments, batch_size, windows, micro_batches = MODES[mode]
    with mirrored(2).scope():
        model = accumops.GradientAccumulateModel(network(), **arguments)
        model.compile(keras.optimizers.SGD(0.1), "mse")
    callbacks = [accumops.AccumulationLogger(tmp_path, "batch")]
    model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=callbacks)
    found = {tag: list(steps.values()) for tag, steps in event_files.scalars(tmp_path).items()}
    norms = norms_by_hand(windows)
    if micro_batches is None:  # the epoch's end flushes the second window after the last write
        norms, samples, micro_batches = norms[:1], [64], [4] * 5
    else:
        samples = [window.stop - window.start for window in windows]
    assert found["accumulation/gradient_norm"] == pytest.approx(norms, rel=1e-5)
    assert found["accumulation/effective_batch_size"] == samples
    assert found["accumulation/accum_steps"] == micro_batches
