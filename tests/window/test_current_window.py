"""What a layer learns of the window that its micro-batch belongs to."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops


class Notes(keras.layers.Layer):
    """Notes the numbers of the window that a call belongs to, and the samples that it sees."""

    def build(self, input_shape):
        self.noted = self.add_weight(shape=(3,), dtype="float32", trainable=False, initializer="zeros")

    def call(self, inputs, training=False):
        window = accumops.current_window()
        if training and window is not None:
            numbers = [window.batch_size, window.accum_steps, tf.shape(inputs)[0]]
            self.noted.assign(tf.stack([tf.cast(each, tf.float32) for each in numbers]))
        return inputs


WAYS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
BATCHES = {8: [8, 4, 2], 12: [4, 2, 2], 13: [5, 3, 1]}


def trained(samples, batch_size, compiled, layers=(), **mode):
    net = keras.Sequential([keras.Input((4,)), notes := Notes(), *layers, keras.layers.Dense(1)])
    model = accumops.GradientAccumulateModel(net, **mode)
    model.compile("sgd", "mse", **({"jit_compile": False} | WAYS[compiled]))
    model.fit(np.ones((samples, 4), "float32"), np.ones((samples, 1)), batch_size=batch_size, verbose=0)
    return model, list(notes.noted.numpy())


@pytest.mark.parametrize(
    ("samples", "compiled"),
    cross(BATCHES, WAYS, default=lambda *each: each in turns(BATCHES, ["xla", "eager", "graph"])),
)
@pytest.mark.some_by_default(1)
def test_batch_of_fit(compiled, samples):
    """The last batch of an epoch is smaller, and its last micro-batch again."""
    _, noted = trained(samples, 8, compiled, micro_batch_size=2)
    assert noted == BATCHES[samples]


@pytest.mark.parametrize("compiled", cross(WAYS, default=lambda compiled: compiled == "xla"))
def test_passes_that_xla_compiles(compiled):
    """On a CPU XLA compiles the passes of convolutions by themselves."""
    layers = [keras.layers.Reshape((2, 2, 1)), keras.layers.Conv2D(1, 1), keras.layers.Flatten()]
    assert trained(13, 8, compiled, layers, micro_batch_size=2)[1] == [5, 3, 1]


@pytest.mark.parametrize("compiled", cross(WAYS, default=lambda compiled: compiled != "xla"))
def test_micro_batches_of_fit(compiled):
    assert trained(16, 2, compiled, accum_steps=4)[1] == [8, 4, 2]


@pytest.mark.parametrize("compiled", cross(WAYS, default=lambda compiled: compiled != "xla"))
@pytest.mark.some_by_default(1)
def test_number_of_micro_batches_changes(compiled):
    model, noted = trained(16, 2, compiled, accum_steps=lambda updates: 2 + 2 * updates)
    assert noted == [12, 6, 2]  # the third window is open
    assert int(model.optimizer.iterations) == 3  # with the one that the epoch's end has flushed


def test_loss_over_the_window():
    assert trained(8, 8, "graph", micro_batch_size=2, loss_over="window")[1][:2] == [8, 4]


def test_recomputed_layers():
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), notes := Notes(), keras.layers.Dense(1)])
    accumops.recompute_layers(net, segments=2)
    model = accumops.GradientAccumulateModel(net, micro_batch_size=2)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((13, 4), "float32"), np.ones((13, 1)), batch_size=8, verbose=0)
    assert list(notes.noted.numpy()) == [5, 3, 1]


def test_none_outside_of_training():
    model, before = trained(8, 8, "graph", micro_batch_size=2)
    x, y = np.ones((4, 4), "float32"), np.ones((4, 1))
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    model.model(x, training=True)
    assert list(model.model.layers[0].noted.numpy()) == before
    assert accumops.current_window() is None


def test_a_layer_that_divides_by_the_effective_batch_equals_the_large_batch():
    class Divides(keras.layers.Layer):
        def call(self, inputs):
            window = accumops.current_window()
            samples = keras.ops.shape(inputs)[0] if window is None else window.batch_size
            return inputs / keras.ops.cast(samples, inputs.dtype)

    def net():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), Divides(), keras.layers.Dense(1)])

    x, y = np.random.default_rng(0).normal(size=(13, 4)).astype("float32"), np.ones((13, 1), "float32")
    whole, model = net(), accumops.GradientAccumulateModel(net(), micro_batch_size=2)
    for each in (whole, model):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
