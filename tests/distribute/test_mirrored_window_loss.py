"""A loss over the window of all replicas, against one device with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import check_replicas_are_equal, largest_difference, mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

PAIRS = np.random.default_rng(0).normal(size=(50, 2, 5)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class MeanOfOutputs(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def towers():
    keras.utils.set_random_seed(2)
    hidden = keras.layers.Dense(8, "tanh", kernel_regularizer="l2")
    return keras.Sequential([keras.Input((2, 5)), hidden, MeanOfOutputs(), keras.layers.Dense(4)])


def train(model, weights):
    """Three windows, the last of which leaves some replicas with fewer samples, or none."""
    history = model.fit(PAIRS, np.zeros(50), batch_size=24, sample_weight=weights, shuffle=False, verbose=0).history
    return history["loss"]


@pytest.mark.parametrize(
    ("replicas", "weighted"),
    [(4, True), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in [(2, True), (4, False)])],
)
def test_replicas_see_the_outputs_of_all(replicas, weighted):
    weights = np.linspace(0.5, 1.5, 50) if weighted else None
    plain = towers()
    plain.compile(keras.optimizers.SGD(0.1), accumops.losses.CLIPLoss(0.5))
    wanted = train(plain, weights)
    with mirrored(replicas).scope():
        inner = towers()
        model = accumops.GradientAccumulateModel(inner, micro_batch_size=4, loss_over="window")
        model.compile(keras.optimizers.SGD(0.1), accumops.losses.CLIPLoss(0.5))
    got = train(model, weights)
    assert largest_difference(inner, plain) <= 2e-6
    np.testing.assert_allclose(got, wanted, rtol=1e-3)
    check_replicas_are_equal(inner.trainable_variables)
    assert tf.distribute.get_strategy() is not model.distribute_strategy


def test_losses_see_the_logits_of_the_probabilities_of_all_replicas():
    x, labels = np.random.default_rng(0).normal(size=(24, 6)).astype("float32"), np.arange(24) % 5

    def train(wrap):
        keras.utils.set_random_seed(0)
        large = keras.initializers.RandomNormal(stddev=30.0)
        model = wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "softmax", kernel_initializer=large)]))
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        model.fit(x, labels, batch_size=24, shuffle=False, verbose=0)
        return model.get_weights()

    with mirrored(2).scope():
        found = train(lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=4, loss_over="window"))
    for mine, its in zip(found, train(lambda net: net), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4)
