"""Windows that run layer by layer, against plain Keras on whole batches."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from whole_batches import RUNS, check_same, train, windows_of

import accumops

L = keras.layers
SAMPLES, BATCH = 31, 12  # the last batch is smaller, and smaller than some micro-batches
RNG = np.random.default_rng(0)
PICTURES, LABELS = RNG.normal(size=(SAMPLES, 6, 6, 2)), RNG.integers(0, 3, SAMPLES)


@functools.cache
def network(floatx):
    """Normalization as the first layer, twice in a row, in parallel branches, and with skips."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2), dtype=floatx)
    hidden = L.Conv2D(4, 3, kernel_regularizer="l2")(L.BatchNormalization(momentum=0.8)(inputs))
    skip = hidden = L.ReLU()(hidden)
    hidden = L.BatchNormalization(scale=False)(L.DepthwiseConv2D(3, padding="same", use_bias=False)(hidden))
    other = L.BatchNormalization(center=False, gamma_regularizer="l2")(L.Conv2D(4, 1)(skip))
    hidden = L.Activation("tanh")(L.Add()([hidden, skip, other]))
    hidden = L.BatchNormalization()(L.BatchNormalization()(L.GlobalAveragePooling2D()(hidden)))
    return keras.Model(inputs, L.Dense(3)(hidden))


def arguments():
    """Those of `compile`. A loss computes in the precision of its time."""
    return {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}


@functools.cache
def whole():
    return train(network("float64"), {"x": PICTURES, "y": LABELS}, **arguments())


@pytest.mark.parametrize(
    ("run", "micro", "every"),
    cross(
        RUNS,
        [1, 3, 5, 8, 12],
        [1, 2, 3, 100],
        default=lambda *each: each in (("eager", 12, 3), ("graph", 3, 2)),
    ),
)
@pytest.mark.some_by_default(1)
def test_training_is_that_of_the_whole_batch(float64, run, micro, every):
    data = {"x": PICTURES, "y": LABELS}
    trained = train(network("float64"), data, micro=micro, every=every, run=run, **arguments())
    check_same(trained, whole())


@pytest.mark.parametrize(
    ("run", "micro", "every"),
    cross(["eager", "graph"], [3, 5, 12], [1, 100], default=lambda *each: each == ("eager", 5, 1)),
)
def test_the_reference_does_the_same(float64, run, micro, every):
    before = accumops.get_backend()
    accumops.set_backend("reference")
    try:
        data = {"x": PICTURES, "y": LABELS}
        trained = train(network("float64"), data, micro=micro, every=every, run=run, **arguments())
    finally:
        accumops.set_backend(before)
    check_same(trained, whole())


@pytest.mark.parametrize(
    ("run", "batch"), cross(RUNS, [10, 12], default=lambda *each: each in (("graph", 10), ("xla", 12)))
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_datasets_of_unknown_batch_size(float64, run, batch):
    """Micro-batches of 5 divide batches of 10, which the graph does not know."""
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((5,)), L.Dense(4), L.BatchNormalization(), L.ReLU(), L.Dense(2)])
    x, y = RNG.normal(size=(SAMPLES, 5)), RNG.normal(size=(SAMPLES, 2))
    specs = tf.TensorSpec([5], tf.float64), tf.TensorSpec([2], tf.float64)
    data = tf.data.Dataset.from_generator(lambda: iter(zip(x, y, strict=True)), output_signature=specs).batch(batch)
    data = data.apply(tf.data.experimental.assert_cardinality(-(-SAMPLES // batch)))
    assert data.element_spec[0].shape[0] is None
    trained = train(net, {"x": data}, batch=None, micro=5, every=1, run=run, epochs=2)
    check_same(trained, train(net, {"x": data}, batch=None, epochs=2))


def gradients_of_the_whole_batch(net, x, y, loss, losses=True):
    net = accumops.restore_batchnorm_layers(net)
    with tf.GradientTape() as tape:
        value = loss(y, net(x, training=True)) + (tf.add_n(net.losses) if losses and net.losses else 0.0)
    return value, tape.gradient(value, net.trainable_variables)


@pytest.mark.parametrize("micro", [4, 5])
@pytest.mark.some_by_default(1)
def test_gradients_are_those_of_the_whole_batch(float64, micro):
    """A step of SGD with a rate of 1 moves by the gradient."""
    x, y, loss = PICTURES[:BATCH], LABELS[:BATCH], arguments()["loss"]
    wanted_loss, wanted = gradients_of_the_whole_batch(network("float64"), x, y, loss)
    net = windows_of(network("float64"))
    before = [each.numpy() for each in net.trainable_variables]
    model = accumops.GradientAccumulateModel(net, micro_batch_size=micro)
    model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    assert model.train_on_batch(x, y) == pytest.approx(float(wanted_loss), rel=1e-12)
    for variable, old, gradient in zip(net.trainable_variables, before, wanted, strict=True):
        np.testing.assert_allclose(old - variable.numpy(), gradient, rtol=1e-11, atol=1e-12, err_msg=variable.path)


def test_statistics_do_not_drift_where_the_mean_is_far_from_zero():
    """Moments are merged in float64: with a mean of 1000 deviations, float32 sums would lose the variance."""
    x = (1e3 + RNG.normal(size=(24, 3))).astype("float32")
    net = keras.Sequential([keras.Input((3,)), accumops.AccumBatchNormalization(momentum=0.0, statistics="window")])
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5)
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    model.train_on_batch(x, x)
    wide = x.astype("float64")
    np.testing.assert_allclose(net.layers[0].moving_mean, wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(net.layers[0].moving_variance, wide.var(0), rtol=1e-6)


def test_without_accumulation_the_batch_is_the_window(float64):
    """Plain Keras, `accum_steps=1` and loops of one's own: the layer is an ordinary one."""
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((5,)), L.Dense(4), L.BatchNormalization(), L.Dense(2)])
    data = {"x": RNG.normal(size=(BATCH, 5)), "y": RNG.normal(size=(BATCH, 2))}
    wanted = train(net, data)
    plain = windows_of(net)
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    plain.fit(**data, batch_size=BATCH, shuffle=False, verbose=0)
    one = windows_of(net)
    model = accumops.GradientAccumulateModel(one, accum_steps=1)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    model.fit(**data, batch_size=BATCH, shuffle=False, verbose=0)
    looped = windows_of(net)
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), accum_steps=1)
    optimizer.build(looped.trainable_variables)
    with tf.GradientTape() as tape:
        value = tf.reduce_mean((looped(data["x"], training=True) - data["y"]) ** 2)
    optimizer.apply(tape.gradient(value, looped.trainable_variables), looped.trainable_variables)
    for trained in plain, one, looped:
        for mine, its in zip(trained.get_weights(), wanted.net.get_weights(), strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-9)
