"""Layers that carry something from one sample, or one call, to another."""

import warnings

import keras
import numpy as np
import pytest

from accumops import GradientAccumulateModel, replace_batchnorm_layers


def recurrent(layer, batch=4):
    inputs = keras.Input((5, 2), batch_size=batch)
    return keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))


class Nested(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="nested")
        self.inner = keras.layers.GRU(3, stateful=True, name="inside")

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: keras.layers.LSTM(3, stateful=True, name="chunks"), "chunks"),
        (lambda: keras.layers.SimpleRNN(3, stateful=True, name="chunks"), "chunks"),
        (lambda: keras.layers.RNN(keras.layers.GRUCell(3), stateful=True, name="chunks"), "chunks"),
        (lambda: keras.layers.Bidirectional(keras.layers.LSTM(3, stateful=True), name="both"), "both"),
        (Nested, "inside"),
        (lambda: keras.Sequential([keras.layers.LSTM(3, stateful=True, name="deep")]), "deep"),
    ],
)
def test_stateful_layers_are_refused_by_name_where_batches_are_split(make, name):
    model = GradientAccumulateModel(recurrent(make()), micro_batch_size=2)
    with pytest.raises(ValueError, match=f"`micro_batch_size`: .*'{name}'.* Use `accum_steps`"):
        model.compile("sgd", "mse")
    GradientAccumulateModel(recurrent(make()), accum_steps=2).compile("sgd", "mse")


def test_stateful_layers_keep_each_samples_state_with_accum_steps(rng):
    x, y = rng.standard_normal((16, 5, 2)), rng.standard_normal((16, 1))

    def states(wrap):
        keras.utils.set_random_seed(0)
        net = recurrent(keras.layers.LSTM(3, stateful=True, name="chunks"))
        model = GradientAccumulateModel(net, accum_steps=2) if wrap else net
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        return [np.array(state) for state in net.get_layer("chunks").states]

    for a, b in zip(states(False), states(True), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-7)


def normalized(*layers):
    return keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])


@pytest.mark.parametrize("mode", [{"accum_steps": 2}, {"micro_batch_size": 2}])
def test_layers_that_move_with_each_call_are_named_in_one_warning(mode):
    net = normalized(
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.SpectralNormalization(keras.layers.Dense(4), name="spectral"),
        keras.layers.BatchNormalization(name="norm_2"),
    )
    model = GradientAccumulateModel(net, **mode)
    with pytest.warns(UserWarning, match="'norm', 'spectral', 'norm_2'.*replace_batchnorm_layers") as caught:
        model.compile("sgd", "mse")
    assert len(caught) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: normalized(keras.layers.LayerNormalization(), keras.layers.Dropout(0.5)),
        lambda: replace_batchnorm_layers(normalized(keras.layers.BatchNormalization())),
        lambda: normalized(keras.layers.BatchNormalization(trainable=False)),
        lambda: normalized(keras.layers.Normalization(mean=0.0, variance=1.0)),
    ],
)
def test_other_layers_are_not(make):
    model = GradientAccumulateModel(make(), accum_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile("sgd", "mse")


def test_one_micro_batch_a_window_is_the_large_batch():
    model = GradientAccumulateModel(normalized(keras.layers.BatchNormalization()), accum_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile("sgd", "mse")
