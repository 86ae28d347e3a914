"""A stretch of a model that runs again gives the same bits, and its state moves once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops.memory.replay import Stretch

X = np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    hidden = keras.layers.Dense(8, activity_regularizer="l2", kernel_regularizer="l2")(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.Dropout(0.5, seed=1)(hidden)
    hidden = keras.layers.MultiHeadAttention(2, 4, dropout=0.5, seed=2)(hidden, hidden)
    hidden = keras.layers.LSTM(4, dropout=0.5, seed=3)(hidden)
    return keras.Model(inputs, keras.layers.GaussianNoise(0.1, seed=4)(hidden))


@pytest.mark.parametrize("mode", cross(["eager", "graph", "xla"], default=lambda mode: mode != "xla"), indirect=True)
def test_a_second_run_has_the_bits_of_the_first(mode):
    model = network()
    stretch = Stretch(model)
    stretch.check(X)

    def twice():
        start = stretch.state()
        return stretch.run(start, X), stretch.run(start, X)

    first, second = mode(twice)()
    keras.tree.map_structure(np.testing.assert_array_equal, first, second)
    assert len(first.losses) == 1


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_run_is_a_call_and_assigns_nothing(jit_compile):
    model, twin = network(), network()
    stretch = Stretch(model)
    stretch.check(X)
    before = [variable.numpy() for variable in model.variables]
    run = tf.function(lambda: stretch.run(stretch.state(), X), jit_compile=jit_compile)()
    keras.tree.map_structure(np.testing.assert_array_equal, before, [variable.numpy() for variable in model.variables])
    want = tf.function(lambda: twin(X, training=True), jit_compile=jit_compile)()
    np.testing.assert_array_equal(run.outputs, want)
    stretch.assign(run.state)
    for mine, its in zip(model.variables, twin.variables, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_the_state_is_what_a_run_assigns():
    model = network()
    model.layers[1].trainable = False
    stretch = Stretch(model)
    stretch.check(X)
    names = [variable.path.rpartition("/")[2] for variable in stretch.variables]
    assert names.count("seed_generator_state") == len(names) - 2
    assert {"moving_mean", "moving_variance"} < set(names)


def test_gradients_of_a_run_are_those_of_a_call():
    model, twin = network(), network()
    stretch = Stretch(model)
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = stretch.run(stretch.state(), x).outputs
    with tf.GradientTape() as its_tape:
        its_tape.watch(x)
        its_outputs = twin(x, training=True)
    mine = tape.gradient(outputs, [x, *model.trainable_variables])
    its = its_tape.gradient(its_outputs, [x, *twin.trainable_variables])
    for one, other in zip(mine, its, strict=True):
        np.testing.assert_array_equal(tf.convert_to_tensor(one), tf.convert_to_tensor(other))


def test_metrics_in_layers_are_state():
    class Counting(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.mean = keras.metrics.Mean()

        def call(self, inputs):
            self.mean.update_state(inputs)
            return inputs

    layer = Counting()
    model = keras.Sequential([keras.Input((6, 8)), layer])
    stretch = Stretch(model)
    run = stretch.run(stretch.state(), X)
    stretch.run(run.state, X)
    assert float(layer.mean.count) == 0
    stretch.assign(run.state)
    assert float(layer.mean.count) == len(X)


def test_windows_of_batch_normalization_collect_where_they_are_told():
    layer = accumops.AccumBatchNormalization()
    model = keras.Sequential([keras.Input((6, 8)), layer])
    accumops.GradientAccumulator(2).build(model.trainable_variables)
    stretch = Stretch(model)
    stretch.check(X)
    run = stretch.run(stretch.state(), X)
    assert layer.windows()[0].saved()[0][0] == 0
    stretch.run(run.state, X, collect_moments=True)
    assert layer.windows()[0].saved()[0][0] == 24
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(8))


def test_batch_normalization_that_nobody_accumulates_for_moves_with_the_state():
    keras.utils.set_random_seed(0)
    layers = accumops.AccumBatchNormalization(), keras.layers.BatchNormalization()
    for layer in layers:
        stretch = Stretch(keras.Sequential([keras.Input((6, 8)), layer]))
        stretch.assign(stretch.run(stretch.state(), X, collect_moments=True).state)
    np.testing.assert_allclose(layers[0].moving_mean, layers[1].moving_mean, atol=1e-7)
    assert np.abs(layers[0].moving_mean).max() > 0


class OfTensorFlow(keras.layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


class OfAGenerator(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = tf.random.Generator.from_seed(1)

    def call(self, inputs):
        return inputs + self.generator.normal(tf.shape(inputs))


class OfTheGlobalSeed(keras.layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs))


class OwnVariable(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = tf.Variable(0.0)

    def call(self, inputs):
        return inputs + self.calls.assign_add(1.0)


class OfPython(keras.layers.Layer):
    def call(self, inputs):
        return tf.ensure_shape(tf.numpy_function(lambda each: each, [inputs], tf.float32), inputs.shape)


class WithinAFunction(keras.layers.Layer):
    def call(self, inputs):
        return tf.map_fn(lambda row: row + tf.random.uniform([]), inputs)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (OfTensorFlow, "draws random numbers from a generator that Keras does not know"),
        (OfAGenerator, "does not know"),
        (WithinAFunction, "draws random numbers"),
        (OfTheGlobalSeed, "the global seed of `keras.random`"),
        (OwnVariable, "assigns a variable that Keras does not know"),
        (OfPython, "calls Python code"),
        (lambda name: keras.layers.SpectralNormalization(keras.layers.Dense(8), name=name), "its trainable variable"),
    ],
)
def test_layers_that_cannot_run_again_are_named(layer, why):
    model = keras.Sequential([keras.Input((6, 8)), keras.layers.Dense(8), layer(name="odd")])
    with pytest.raises(ValueError, match=f"(?s)The layer 'odd.*{why}"):
        Stretch(model).check(X)
