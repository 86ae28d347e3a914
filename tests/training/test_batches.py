"""Batches are what they say: all parts have the same number of samples, but for inputs that are named as whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from accumops import GradientAccumulateModel

SAMPLES = 20


class JoinMean(keras.layers.Layer):
    """Joins each sample with the mean of a support set."""

    def call(self, x, support):
        mean = tf.reduce_mean(support, 0, keepdims=True)
        return tf.concat([x, tf.repeat(mean, tf.shape(x)[0], 0)], 1)

    def compute_output_shape(self, x_shape, support_shape):
        return (x_shape[0], x_shape[1] + support_shape[1])


def plain():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def with_support(names=True):
    keras.utils.set_random_seed(1)
    x, support = keras.Input((4,), name="x"), keras.Input((2,), name="a_support")
    outputs = keras.layers.Dense(1)(JoinMean()(x, support))
    return keras.Model({"a_support": support, "x": x} if names else [support, x], outputs)


@pytest.fixture
def parts(rng):
    return {
        "x": rng.standard_normal((SAMPLES, 4)).astype("float32"),
        "y": rng.standard_normal((SAMPLES, 1)).astype("float32"),
        "support": rng.standard_normal((7, 2)).astype("float32"),
    }


def dataset(*batches, unknown):
    """A dataset whose graph knows the numbers of samples, or does not."""
    specs = tf.nest.map_structure(
        lambda part: tf.TensorSpec([None if unknown else part.shape[0], *part.shape[1:]], tf.float32), batches[0]
    )
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specs)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.some_by_default(2)
def test_parts_of_different_sizes_are_refused(parts, unknown, run_eagerly):
    net = plain()
    model = GradientAccumulateModel(net, micro_batch_size=10)
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    before = net.get_weights()
    more = np.concatenate([parts["y"], parts["y"][:5]])
    kind = tf.errors.InvalidArgumentError if unknown and not run_eagerly else ValueError
    with pytest.raises((kind, tf.errors.InvalidArgumentError), match="must have the same number of samples"):
        model.fit(dataset((parts["x"], more), unknown=unknown), verbose=0)
    for a, b in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("names", "run", "unknown"),
    [
        (True, {"run_eagerly": True}, False),
        (False, {"jit_compile": False}, False),
        (True, {"jit_compile": False}, True),
        pytest.param(True, {"jit_compile": True}, False, marks=pytest.mark.exhaustive),
        (False, {"jit_compile": True}, True),
    ],
)
@pytest.mark.some_by_default(1)
def test_a_whole_input_reaches_each_micro_batch(parts, names, run, unknown):
    x = {"a_support": parts["support"], "x": parts["x"]} if names else (parts["support"], parts["x"])
    batches = dataset((x, parts["y"]), unknown=unknown)

    def train(net, **compiled):
        net.compile(keras.optimizers.SGD(0.1), "mse", **compiled)
        net.fit(batches, epochs=3, verbose=0)
        return net.get_weights()

    wrapped = GradientAccumulateModel(
        with_support(names), micro_batch_size=6, whole_inputs=["a_support"] if names else [0]
    )
    for a, b in zip(train(with_support(names), run_eagerly=True), train(wrapped, **run), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_an_input_that_is_no_batch_is_not_cut_by_itself(parts):
    model = GradientAccumulateModel(with_support(), micro_batch_size=5)
    model.compile("sgd", "mse")
    batch = ({"a_support": parts["support"], "x": parts["x"]}, parts["y"])
    with pytest.raises(ValueError, match=r"in `whole_inputs`. Received: \[7, 20\] samples"):
        model.fit(dataset(batch, unknown=False), verbose=0)


def test_samples_are_those_of_the_targets(parts):
    """With an input that is no batch, micro-batches of 16 and of 4 samples count as such."""
    x, y, support = parts["x"], parts["y"], parts["support"]

    def batches(*bounds):
        return dataset(*(({"a_support": support, "x": x[a:b]}, y[a:b]) for a, b in bounds), unknown=True)

    def train(net, data):
        net.compile(keras.optimizers.SGD(0.1), "mse")
        history = net.fit(data, verbose=0)
        return net.get_weights(), history.history["loss"]

    expected, loss = train(with_support(), batches((0, 20)))
    wrapped = GradientAccumulateModel(with_support(), accum_steps=2)
    found, logged = train(wrapped, batches((0, 16), (16, 20)))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logged, loss, rtol=1e-5)


def test_errors_of_whole_inputs(parts):
    with pytest.raises(TypeError, match="must be a list of keys or positions"):
        GradientAccumulateModel(with_support(), micro_batch_size=5, whole_inputs="a_support")
    with pytest.raises(ValueError, match="needs `micro_batch_size`"):
        GradientAccumulateModel(with_support(), accum_steps=2, whole_inputs=["a_support"])
    model = GradientAccumulateModel(with_support(), micro_batch_size=5, whole_inputs=["adjacency"])
    model.compile("sgd", "mse")
    batch = ({"a_support": parts["support"], "x": parts["x"]}, parts["y"])
    with pytest.raises(ValueError, match="has 'adjacency', and the model's inputs are \\['a_support', 'x'\\]"):
        model.fit(dataset(batch, unknown=False), verbose=0)


def test_whole_inputs_are_saved(parts, tmp_path):
    model = GradientAccumulateModel(plain(), micro_batch_size=5, whole_inputs=[])
    assert GradientAccumulateModel.from_config(model.get_config()).whole_inputs == ()
    config = GradientAccumulateModel(plain(), micro_batch_size=5, whole_inputs=["a", 1]).get_config()
    assert GradientAccumulateModel.from_config(config).whole_inputs == ("a", 1)
