"""What Keras, its callbacks and users ask of any optimizer, asked of one that wraps another."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.optimizers.multi_optimizer import MultiOptimizer, OptimizerMap

from accumops import GradientAccumulateOptimizer


def trained(steps, accum_steps=2):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(0.1), accum_steps)
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer.build([variable])
    for step in range(steps):
        optimizer.apply([tf.fill([3], step + 1.0)], [variable])
    return optimizer, variable


def values(optimizer):
    return [variable.numpy() for variable in optimizer.variables]


def test_set_weights_restores_everything():
    source, variable = trained(5)
    target, other = trained(0)
    other.assign(variable)
    target.set_weights(values(source))
    for a, b in zip(values(source), values(target), strict=True):
        np.testing.assert_array_equal(a, b)
    for optimizer, its in ((source, variable), (target, other)):  # the window that was open goes on
        optimizer.apply([tf.ones(3)], [its])
    np.testing.assert_array_equal(variable, other)


def test_set_weights_of_the_wrapped_optimizer_alone():
    source, _ = trained(4)
    target, _ = trained(3)  # one micro-batch into a window
    target.set_weights([variable.numpy() for variable in source.inner_optimizer.variables])
    assert int(target.iterations) == 2
    assert int(target.accumulator.step) == 0


@pytest.mark.parametrize("change", ["number", "shape"])
def test_set_weights_that_do_not_fit_set_nothing(change):
    source, _ = trained(4)
    target, _ = trained(0)
    weights = values(source)
    if change == "number":
        weights = weights[:-1]
    else:
        weights[-1] = np.zeros(4)
    before = values(target)
    message = "11 arrays, or 4" if change == "number" else r"shape \(3,\). Received: \(4,\)"
    with pytest.raises(ValueError, match=message):
        target.set_weights(weights)
    for a, b in zip(before, values(target), strict=True):
        np.testing.assert_array_equal(a, b)


def test_set_weights_before_build():
    with pytest.raises(ValueError, match="built"):
        GradientAccumulateOptimizer("sgd", 2).set_weights([])


def test_config_has_the_learning_rate():
    for inner in (keras.optimizers.SGD(0.25), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.25))):
        optimizer = GradientAccumulateOptimizer(inner, 2)
        config = optimizer.get_config()
        assert config["learning_rate"] == 0.25
        again = GradientAccumulateOptimizer.from_config(config)
        assert float(again.learning_rate) == 0.25
        assert again.get_config() == config


def test_config_has_the_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    config = GradientAccumulateOptimizer(keras.optimizers.SGD(schedule), 2).get_config()
    assert config["learning_rate"]["class_name"] == "ExponentialDecay"
    again = GradientAccumulateOptimizer.from_config(config)
    assert float(again.learning_rate) == pytest.approx(0.1)


def test_callbacks_find_the_optimizers_of_a_multi_optimizer(tmp_path):
    multi = MultiOptimizer(OptimizerMap(keras.optimizers.SGD(0.01), {".*a/.*": keras.optimizers.SGD(0.1)}))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(1, name="b")])
    model.compile(GradientAccumulateOptimizer(multi, accum_steps=2), loss="mse")
    callbacks = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, epochs=2, callbacks=callbacks, verbose=0)
    assert sorted(float(each.learning_rate) for each in multi.optimizers) == pytest.approx([0.0025, 0.025])
    assert not hasattr(GradientAccumulateOptimizer("sgd", 2), "optimizers")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 1),
        lambda optimizer: keras.optimizers.LossScaleOptimizer(GradientAccumulateOptimizer(optimizer, 1)),
    ],
    ids=["alone", "scaled"],
)
def test_averages_are_swapped_in_for_validation(wrap):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    model.compile(wrap(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)), "mse", run_eagerly=True)
    x, y = np.ones((4, 3), "float32"), np.zeros((4, 2), "float32")
    callbacks = [keras.callbacks.SwapEMAWeights()]
    history = model.fit(x, y, batch_size=2, epochs=2, verbose=0, validation_data=(x, y), callbacks=callbacks)
    # The averages are the weights that training ends with.
    assert history.history["val_loss"][-1] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
