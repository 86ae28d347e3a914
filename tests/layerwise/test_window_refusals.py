"""What window statistics do not go with: each error has its type, the layer's name and a remedy."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from whole_batches import windows_of

import accumops
from accumops import AccumBatchNormalization, GradientAccumulateModel, GradientAccumulateOptimizer, GradientAccumulator

L = keras.layers
X, Y = np.random.default_rng(0).normal(size=(2, 24, 5)).astype("float32")


def norm(**settings):
    return AccumBatchNormalization(statistics="window", name="norm", **settings)


def network(*layers, **settings):
    return keras.Sequential([keras.Input((5,)), *layers, norm(**settings), L.Dense(5)])


def fit(net, *, compile_arguments=None, callbacks=(), **settings):
    model = GradientAccumulateModel(net, **({"micro_batch_size": 4} | settings))
    model.compile("sgd", "mse", run_eagerly=True, **(compile_arguments or {}))
    model.fit(X, Y, batch_size=12, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"accum_steps": 3, "micro_batch_size": None}, r"micro_batch_size=\.\.\."),
        ({"accum_steps": {0: 1, 1: 2}, "micro_batch_size": None}, r"micro_batch_size=\.\.\."),
        ({"accum_steps": lambda step: 2, "micro_batch_size": None}, r"micro_batch_size=\.\.\."),
        ({"micro_batch_size": "auto"}, "give a number of samples"),
        ({"parallel_micro_batches": 2}, "leave out `parallel_micro_batches`"),
        ({"nonfinite": "skip"}, "Use nonfinite='drop'"),
    ],
    ids=["accum_steps", "schedule of epochs", "schedule", "auto", "parallel", "skip"],
)
def test_modes_of_the_model(settings, remedy):
    with pytest.raises(ValueError, match=rf"The layer 'norm' has statistics='window'.*{remedy}"):
        fit(network(), **settings)


@pytest.mark.parametrize("accum_steps", [2, lambda step: 2])
def test_loops_that_accumulate(accum_steps):
    net = network()
    with pytest.raises(ValueError, match=r"The layer 'norm'.*accum_steps=.*Train it with `GradientAccumulateModel"):
        GradientAccumulator(accum_steps=accum_steps).build(net.trainable_variables)
    net = network()
    net.compile(GradientAccumulateOptimizer("sgd", accum_steps=accum_steps), "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"The layer 'norm'.*accum_steps=.*Train it with `GradientAccumulateModel"):
        net.fit(X, Y, verbose=0)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.norm = norm()

    def call(self, inputs, training=None):
        return self.norm(inputs, training=training)


class OwnCall(keras.Model):
    """A functional model with a `call` of its own."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


class Block(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="block")
        self.norm = norm()

    def call(self, inputs, training=None):
        return self.norm(inputs, training=training)


def own_call():
    inputs = keras.Input((5,))
    return OwnCall(inputs, norm()(inputs), name="own_call")


def built(model):
    model(X[:1])
    return model


def within(layer):
    return keras.Sequential([keras.Input((5,)), layer, L.Dense(5)], name="outer")


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: built(Subclassed()), "'subclassed'"),
        (own_call, "'own_call'"),
        (lambda: within(Block()), "'block' within 'outer'"),
        (lambda: within(built(Subclassed())), "'subclassed' within 'outer'"),
        (lambda: within(own_call()), "'own_call' within 'outer'"),
        (lambda: within(accumops.Recompute(keras.Sequential([L.Dense(5), norm()]), name="again")), "'again' within"),
    ],
    ids=["subclassed", "own call", "a layer's code", "nested subclassed", "nested own call", "Recompute"],
)
def test_models_that_cannot_be_cut(make, where):
    """When the model is compiled, before any training."""
    model = GradientAccumulateModel(make(), micro_batch_size=4)
    with pytest.raises(ValueError, match=rf"The layer 'norm'.*{where}.*cannot be cut.*statistics='micro_batch'"):
        model.compile("sgd", "mse")


def test_time_distributed():
    net = keras.Sequential([keras.Input((3, 5)), L.TimeDistributed(norm(), name="steps"), L.Dense(2)])
    model = GradientAccumulateModel(net, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"The layer 'norm'.*'steps' within .*cannot be cut"):
        model.compile("sgd", "mse")


def test_nested_models_that_are_called_with_other_inputs():
    inner = keras.Sequential([keras.Input((3, 5)), norm()], name="inner")
    x = keras.Input((2, 3, 5))
    net = keras.Model(x, L.Dense(1)(inner(x)), name="outer") if _takes(inner, x) else None
    if net is None:
        pytest.skip("Keras itself refuses the call")
    model = GradientAccumulateModel(net, micro_batch_size=4)
    with pytest.raises(ValueError, match="'inner' within 'outer' is called with other inputs"):
        model.compile("sgd", "mse")


def _takes(model, tensor):
    try:
        model(tensor)
    except ValueError:
        return False
    return True


def test_layers_that_cannot_be_run_again():
    class Noisy(keras.layers.Layer):
        def call(self, inputs):
            return inputs + tf.random.normal(tf.shape(inputs))

    with pytest.raises(ValueError, match="The layer 'noisy' draws random numbers from a generator"):
        fit(network(Noisy(name="noisy")))
    with (
        pytest.warns(UserWarning, match="'spectral'"),
        pytest.raises(ValueError, match="The layer 'spectral' assigns its trainable variable"),
    ):
        fit(network(L.SpectralNormalization(L.Dense(5), name="spectral")))


@pytest.mark.parametrize("by", ["callback", "track_noise"])
def test_the_noise_of_gradients(by):
    """Gradients of micro-batches depend on each other, so that the noise scale would mean nothing."""
    message = r"The layer 'norm' has statistics='window'.*noise.*statistics='micro_batch'"
    model = GradientAccumulateModel(network(), micro_batch_size=4)
    model.compile("sgd", "mse", run_eagerly=True)
    before = [each.numpy() for each in model.weights]
    callbacks = [accumops.GradientNoiseScale()] if by == "callback" else []
    if by == "track_noise":
        model.optimizer.accumulator.state.notes.track_noise(0.9)
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, batch_size=12, verbose=0, callbacks=callbacks)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    if by == "callback":
        model.fit(X, Y, batch_size=12, verbose=0)  # without the callback nothing is left of it


def test_the_noise_of_gradients_of_other_models_is_told():
    net = accumops.restore_batchnorm_layers(network())
    fit(accumops.replace_batchnorm_layers(net), callbacks=[accumops.GradientNoiseScale()])


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize("loss_over", ["micro_batch", "window"])
def test_sums_with_losses_of_layers(where, loss_over):
    """A sum over the window is exact; micro-batches' sums would count the losses of layers several times."""
    regularized = L.Dense(5, activity_regularizer="l2")
    layers = [regularized, norm(), L.Dense(5)] if where == "early" else [L.Dense(5), norm(), regularized]
    net = keras.Sequential([keras.Input((5,)), *layers])
    model = GradientAccumulateModel(net, micro_batch_size=4, loss_over=loss_over)
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"), run_eagerly=True)
    if loss_over == "window":
        model.train_on_batch(X[:12], Y[:12])
        assert all(np.isfinite(each).all() for each in net.get_weights())
    else:
        with pytest.raises(ValueError, match="would count once for each micro-batch"):
            model.train_on_batch(X[:12], Y[:12])


def test_outputs_of_a_loss_over_the_window():
    total = L.Lambda(lambda x: tf.reduce_sum(x), output_shape=())
    net = keras.Sequential([keras.Input((5,)), norm(), total])
    model = GradientAccumulateModel(net, micro_batch_size=4, loss_over="window")
    model.compile("sgd", lambda y, outputs: outputs)
    with pytest.raises(ValueError, match="a row for each sample"):
        model.train_on_batch(X[:12], Y[:12])


def test_models_without_trainable_weights():
    net = network(scale=False, center=False)
    net.layers[-1].trainable = False
    with pytest.raises(ValueError, match=r"The layer 'norm'.*no trainable weights.*in plain Keras"):
        fit(net)


ARGUMENTS = [
    ({"statistics": "batch"}, ValueError, "`statistics` must be 'micro_batch' or 'window'. Received: 'batch'"),
    ({"statistics": None}, ValueError, "`statistics` must be 'micro_batch' or 'window'. Received: None"),
    ({"every": 0}, ValueError, "`every` must be at least 1. Received: 0"),
    ({"every": -1}, ValueError, "`every` must be at least 1. Received: -1"),
    ({"every": 1.5}, TypeError, "`every` must be an int, a number of layers. Received: 1.5"),
    ({"every": "2"}, TypeError, "`every` must be an int, a number of layers. Received: '2'"),
    ({"every": True}, TypeError, "`every` must be an int, a number of layers. Received: True"),
    ({"every": 2, "memory": "1GB"}, ValueError, "`every` or `memory`, not both"),
    ({"memory": "much"}, ValueError, "`memory`"),
    ({"memory": 1.5}, TypeError, "`memory`"),
    ({"statistics": "micro_batch", "every": 1}, ValueError, "`every` is for statistics='window'"),
    ({"statistics": "micro_batch", "memory": "1GB"}, ValueError, "`memory` is for statistics='window'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_arguments(arguments, error, message):
    arguments = {"statistics": "window"} | arguments
    with pytest.raises(error, match=re.escape(message)):
        AccumBatchNormalization(**arguments)
    plain = keras.Sequential([keras.Input((5,)), L.BatchNormalization()])
    with pytest.raises(error, match=re.escape(message)):
        accumops.replace_batchnorm_layers(plain, **arguments)


@pytest.mark.parametrize(("name", "values"), [("every", (1, 2)), ("memory", ("1GB", "2GB"))])
def test_layers_that_do_not_agree(name, values):
    one, other = (AccumBatchNormalization(statistics="window", **{name: value}) for value in values)
    with pytest.raises(ValueError, match=f"must have the same `{name}`"):
        fit(keras.Sequential([keras.Input((5,)), one, other, L.Dense(5)]))


def test_a_layer_with_accum_steps_of_its_own():
    with pytest.raises(ValueError, match="The layer 'norm' has accum_steps=3 and is trained with micro_batch_size=4"):
        fit(network(accum_steps=3))


def test_memory_of_batches_whose_size_is_not_known():
    model = GradientAccumulateModel(network(memory="1GB"), micro_batch_size=4)
    model.compile("sgd", "mse", jit_compile=False)
    specs = (tf.TensorSpec([5], tf.float32),) * 2
    data = tf.data.Dataset.from_generator(lambda: iter(zip(X, Y, strict=True)), output_signature=specs).batch(12)
    with pytest.raises(ValueError, match="drop_remainder=True"):
        model.fit(data, verbose=0)


def test_no_layer_that_follows_the_window_is_left_in_a_frozen_model():
    """Frozen layers normalize by their moving statistics, whatever else the model cannot do."""
    net = network()
    net.get_layer("norm").trainable = False
    before = net.get_layer("norm").get_weights()
    fit(net, nonfinite="skip")
    for mine, its in zip(net.get_layer("norm").get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert windows_of(accumops.restore_batchnorm_layers(net)).get_layer("norm").statistics == "window"
