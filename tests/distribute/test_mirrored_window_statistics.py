"""Windows that run layer by layer on replicas: moments and sums are those of all replicas."""

import keras
import numpy as np
import pytest
from replicas import mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")


def network():
    """A normalization that is called twice, and one behind it."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    inputs = keras.Input((6,))
    shared = layers.BatchNormalization()
    hidden = shared(layers.Dense(6)(layers.ReLU()(shared(layers.Dense(6)(inputs)))))
    hidden = layers.BatchNormalization(momentum=0.9)(layers.Dense(5)(layers.ReLU()(hidden)))
    return keras.Model(inputs, layers.Dense(3)(Centred()(hidden)))


class Centred(accumops.layers.CoupledLayer):
    """Subtracts a share of the batch's mean."""

    def totals(self, inputs):
        return keras.ops.cast(keras.ops.shape(inputs)[0], inputs.dtype), keras.ops.sum(inputs, 0)

    def combine(self, inputs, totals):
        return inputs - 0.7 * totals[1] / totals[0]


# Of 13 samples one replica has more than the other, and each a smaller micro-batch at its end.
@pytest.mark.parametrize("samples", [16, 13])
@pytest.mark.some_by_default(1)
def test_replicas_train_as_one_device_on_the_whole_batch(samples, rng):
    x = (rng.standard_normal((samples, 6)) * (1 + np.arange(samples)[:, None] / 3)).astype("float32")
    y = rng.integers(0, 3, samples)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole = network()
    whole.compile(keras.optimizers.SGD(0.05), loss, jit_compile=False)
    with mirrored(2).scope():
        net = accumops.replace_batchnorm_layers(network(), statistics="window")
        model = accumops.GradientAccumulateModel(net, micro_batch_size=3)
        model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=False)
    logs = [each.fit(x, y, batch_size=samples, epochs=4, shuffle=False, verbose=0).history for each in (model, whole)]
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-5)
    for mine, keras_own in zip(net.weights, whole.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), keras_own.numpy(), atol=1e-5, err_msg=mine.path)
