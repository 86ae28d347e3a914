"""A layer that several models share and that they train in turns: each has a window of its own in it.

The layer is the first of its models, so its inputs are the data, and its statistics are known exactly.
"""

import gc
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from problems import RUNS

from accumops import AccumBatchNormalization, GradientAccumulateModel, GradientAccumulateOptimizer, GradientAccumulator

MOMENTUM = 0.8
EAGER = {"run_eagerly": True}
MODES = {"accum_steps": {"accum_steps": 2}, "micro_batch_size": {"micro_batch_size": 3}}


@pytest.fixture
def x(rng):
    return rng.standard_normal((8, 3)).astype("float32") * [1, 2, 3]


Y = np.zeros((8, 1), "float32")


def shared_by(count, wrap=lambda net, name: net, names=(None, None)):
    """A layer, and models that call it."""
    layer, inputs = AccumBatchNormalization(momentum=MOMENTUM, name="shared"), keras.Input((3,))
    nets = [keras.Model(inputs, keras.layers.Dense(1)(layer(inputs))) for _ in range(count)]
    return layer, [wrap(net, name) for net, name in zip(nets, names, strict=False)]


def wrapped(run=None, **arguments):
    def wrap(net, name=None):
        model = GradientAccumulateModel(net, name=name, **arguments)
        model.compile("sgd", "mse", **(run or {}))
        return model

    return wrap


def check(layer, windows):
    """The windows that have ended, in order, each as the list of its batches."""
    mean, variance = 0.0, 1.0
    for batches in windows:
        values = np.concatenate(batches).astype(np.float64)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * values.mean(0)
        variance = MOMENTUM * variance + (1 - MOMENTUM) * values.var(0)
    np.testing.assert_allclose(layer.moving_mean, np.broadcast_to(mean, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, np.broadcast_to(variance, 3), rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "run"),
    cross(MODES, RUNS, default=lambda mode, run: run == ("graph" if mode == "accum_steps" else "eager")),
)
@pytest.mark.some_by_default(1)
def test_two_models_in_turns(x, mode, run):
    """Their windows overlap; each moves the statistics by its own batches, when it ends."""
    layer, (one, two) = shared_by(2, wrapped(RUNS[run], **MODES[mode]))
    for i, model in enumerate((one, two, one, one, two)):
        model.train_on_batch(x + i, Y)
    parts = [x + i for i in range(5)]
    if mode == "micro_batch_size":
        check(layer, [[part] for part in parts])
    else:
        check(layer, [[parts[0], parts[2]], [parts[1], parts[4]]])


@pytest.mark.parametrize("run", cross(RUNS, default=lambda run: run == "graph"))
def test_a_discriminator_that_is_frozen_in_the_combined_model(x, run):
    """There it normalizes by its statistics: the combined model's windows neither add to its own nor end them."""
    discriminator = keras.Sequential(
        [keras.Input((3,)), AccumBatchNormalization(momentum=MOMENTUM, name="shared"), keras.layers.Dense(1)]
    )
    of_generator = AccumBatchNormalization(momentum=MOMENTUM)
    generator = keras.Sequential([keras.Input((3,)), of_generator, keras.layers.Dense(3)])
    alone = wrapped(RUNS[run], accum_steps=3)(discriminator)
    alone.train_on_batch(x, Y)
    discriminator.trainable = False
    noise = keras.Input((3,))
    combined = wrapped(RUNS[run], accum_steps=1)(keras.Model(noise, discriminator(generator(noise))))
    before = [each.numpy() for each in discriminator.variables]
    for i in range(2):
        combined.train_on_batch(x - 1, Y)
        for a, b in zip(before, discriminator.variables, strict=True):
            np.testing.assert_array_equal(a, b)
        check(of_generator, [[x - 1]] * (i + 1))
        discriminator.trainable = True
        alone.train_on_batch(x + 1 + i, Y)
        discriminator.trainable = False
        before = before if i == 0 else [each.numpy() for each in discriminator.variables]
    check(discriminator.layers[0], [[x, x + 1, x + 2]])


@pytest.mark.parametrize("run", cross(RUNS, default=lambda run: run == "graph"))
def test_with_a_model_that_accumulates_nothing(x, run):
    """Its batches move the statistics at once, and leave the open window as it is."""
    layer, (plain, model) = shared_by(2)
    plain.compile("sgd", "mse", **RUNS[run])
    model = wrapped(RUNS[run], accum_steps=2)(model)
    for i, each in enumerate((model, plain, plain, model, plain)):
        each.train_on_batch(x + i, Y)
    check(layer, [[x + 1], [x + 2], [x, x + 3], [x + 4]])


def test_with_an_optimizer_that_accumulates(x):
    layer, (plain, model) = shared_by(2)
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.build(plain.trainable_variables)
    plain.compile(optimizer, "mse")
    model = wrapped(accum_steps=2)(model)
    for i, each in enumerate((model, plain, plain, model)):
        each.train_on_batch(x + i, Y)
    check(layer, [[x + 1, x + 2], [x, x + 3]])


def test_a_model_is_compiled_anew_in_mid_window(x):
    """Its own window starts anew, and the other model's goes on."""
    layer, (one, two) = shared_by(2, wrapped(EAGER, accum_steps=2))
    one.train_on_batch(x + 9, Y)
    two.train_on_batch(x, Y)
    one.compile("sgd", "mse", **EAGER)
    assert len(layer.windows()) == 2
    for i, each in enumerate((one, one, two)):
        each.train_on_batch(x + i, Y)
    check(layer, [[x, x + 1], [x, x + 2]])


def test_a_model_that_is_gone_has_no_window():
    layer, models = shared_by(2, wrapped(EAGER, accum_steps=2))
    models.pop()
    gc.collect()
    assert len(layer.windows()) == 1


class TestSaving:
    """Two models with an open window each."""

    def models(self, names=("one", "two"), steps=(2, 3)):
        made = iter(steps)
        return shared_by(len(names), lambda net, name: wrapped(EAGER, accum_steps=next(made))(net, name), names)

    def opened(self, x):
        layer, (one, two) = self.models()
        one.train_on_batch(x, Y)
        two.train_on_batch(x + 1, Y)
        two.train_on_batch(x + 2, Y)
        return layer, one, two

    def test_both_go_on(self, x, tmp_path):
        _, one, two = self.opened(x)
        for model in (one, two):
            model.save_weights(tmp_path / f"{model.name}.weights.h5")
        layer, loaded = self.models()
        for model in loaded:
            model.optimizer.build(model.trainable_variables)
            model.train_on_batch(x * np.nan, Y)
            model.load_weights(tmp_path / f"{model.name}.weights.h5")
        loaded[1].train_on_batch(x + 3, Y)
        check(layer, [[x + 1, x + 2, x + 3]])
        loaded[0].train_on_batch(x + 4, Y)
        check(layer, [[x + 1, x + 2, x + 3], [x, x + 4]])

    def test_one_alone_goes_on(self, x, tmp_path):
        """Its file has the other's window as well."""
        _, _, two = self.opened(x)
        two.save(tmp_path / "two.keras")
        loaded = keras.saving.load_model(tmp_path / "two.keras")
        loaded.train_on_batch(x + 3, Y)
        check(loaded.model.get_layer("shared"), [[x + 1, x + 2, x + 3]])

    def test_the_only_open_window_is_not_given_to_another(self, x, tmp_path):
        _, (one, two) = self.models()
        one.train_on_batch(x, Y)
        two.save(tmp_path / "two.keras")
        loaded = keras.saving.load_model(tmp_path / "two.keras")
        for i in range(3):
            loaded.train_on_batch(x + i, Y)
        check(loaded.model.get_layer("shared"), [[x, x + 1, x + 2]])

    def test_a_single_model_needs_no_name(self, x, tmp_path):
        _, (model,) = self.models(["before"])
        model.train_on_batch(x, Y)
        model.save_weights(tmp_path / "saved.weights.h5")
        layer, (loaded,) = self.models(["after"])
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "saved.weights.h5")
        loaded.train_on_batch(x + 1, Y)
        check(layer, [[x, x + 1]])

    def test_names_that_are_unknown(self, x):
        layer, *_ = self.opened(x)
        store = {}
        layer.save_own_variables(store)
        other, _ = self.models(("three", "four"))
        with pytest.warns(UserWarning, match=r"for the models \['one', 'two'\], and no model of such a name"):
            other.load_own_variables(store)

    def test_models_of_one_name(self, x):
        layer, (one, two) = self.models(("same", "same"))
        one.train_on_batch(x, Y)
        two.train_on_batch(x + 1, Y)
        store = {}
        layer.save_own_variables(store)
        two.train_on_batch(x + 9, Y)
        layer.load_own_variables(store)
        moments = [window.variables.moments.numpy()[0] for window in layer.windows()]
        np.testing.assert_allclose(moments, [x.mean(0), x.mean(0) + 1], rtol=1e-5, atol=1e-6)

    def test_checkpoints(self, x, tmp_path):
        layer, one, two = self.opened(x)
        path = tf.train.Checkpoint(one=one, two=two).save(tmp_path / "checkpoint")
        for model in (one, two, two):
            model.train_on_batch(x * np.nan, Y)
        tf.train.Checkpoint(one=one, two=two).restore(path).assert_consumed()
        one.train_on_batch(x + 4, Y)
        two.train_on_batch(x + 3, Y)
        check(layer, [[x, x + 4], [x + 1, x + 2, x + 3]])


class TestOptimizers:
    """An optimizer does not know which calls of a layer are its own: the layer follows one at a time."""

    def two(self, run=EAGER):
        layer, nets = shared_by(2)
        optimizers = [GradientAccumulateOptimizer("sgd", 2, name=name) for name in ("one", "two")]
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.compile(optimizer, "mse", **run)
        return layer, nets, optimizers

    def test_in_turns_is_an_error(self, x):
        _, (one, two), _ = self.two()
        with pytest.warns(UserWarning, match="Build it first"):
            one.train_on_batch(x, Y)
        with pytest.warns(UserWarning, match=r"those of one_accumulator until now, and follow those of two_accum"):
            two.train_on_batch(x, Y)
        weights = [each.numpy() for each in one.trainable_variables]
        with pytest.raises(ValueError, match=r"'shared' follows the windows of two_accumulator since .* one_accum"):
            one.train_on_batch(x, Y)
        for a, b in zip(weights, one.trainable_variables, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_in_turns_is_an_error_in_graphs(self, x):
        """Also in a function that was traced before."""
        layer, (one, two), (first, second) = self.two({})
        one.train_on_batch(x, Y)
        with pytest.warns(UserWarning, match="follow those of two_accumulator from now on"):
            two.train_on_batch(x + 1, Y)
        held = [each.numpy() for each in (*first.variables, *one.trainable_variables)]
        with pytest.raises(tf.errors.InvalidArgumentError, match="Layers that followed the windows of one_accumulator"):
            one.train_on_batch(x, Y)
        for a, b in zip(held, (*first.variables, *one.trainable_variables), strict=True):
            np.testing.assert_array_equal(a, b)
        second.accumulator.reset()
        layer.join_window(second.accumulator)
        for i in range(2):
            two.train_on_batch(x + i, Y)
        check(layer, [[x, x + 1]])

    def test_the_layer_is_told_which(self, x):
        layer, (one, two), (first, second) = self.two()
        first.build(one.trainable_variables)
        with pytest.warns(UserWarning, match="wrap each model in a GradientAccumulateModel"):
            second.build(two.trainable_variables)
        layer.join_window(first.accumulator)
        for i, each in enumerate((one, one, two)):
            each.train_on_batch(x + i, Y)
        check(layer, [[x, x + 1]])

    def test_one_after_the_other(self, x):
        """A model that is compiled anew: nothing warns if the old optimizer is gone, also in mid-window."""
        layer, (net,) = shared_by(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i in range(2):
                net.compile(GradientAccumulateOptimizer("sgd", 2), "mse")
                for j in range(3):
                    net.train_on_batch(x + 3 * i + j, Y)
        check(layer, [[x, x + 1], [x + 3, x + 4]])

    def test_gamma_and_beta_apart(self, x):
        """Both accumulators are of one step, and the layer follows the second one."""
        layer, (net,) = shared_by(1)
        accumulators = [GradientAccumulator(2), GradientAccumulator(2)]
        for accumulator, variable in zip(accumulators, (layer.gamma, layer.beta), strict=True):
            accumulator.build([variable])
        for i in range(2):
            net(x + i, training=True)
            for accumulator in accumulators:
                accumulator.accumulate([tf.zeros([3])])
        for accumulator in accumulators:
            accumulator.close()
        check(layer, [[x, x + 1]])
