"""Losses that are sums over samples: a window makes the update of the large batch's sum."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops
from accumops import GradientAccumulateModel, GradientAccumulateOptimizer

SAMPLES = 22
MODES = {"accum_steps": ({"accum_steps": 4}, 6), "micro_batch_size": ({"micro_batch_size": 6}, SAMPLES)}


def data(rng):
    return rng.standard_normal((SAMPLES, 3)).astype("float32"), rng.standard_normal((SAMPLES, 1)).astype("float32")


def network(outputs=1, **arguments):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    features = keras.layers.Dense(4, activation="tanh")(inputs)
    heads = [keras.layers.Dense(1, name=f"head_{i}", **arguments)(features) for i in range(outputs)]
    return keras.Model(inputs, heads if outputs > 1 else heads[0])


def squares(**arguments):
    return keras.losses.MeanSquaredError(reduction="sum", **arguments)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "clipped": lambda: keras.optimizers.SGD(0.01, global_clipnorm=0.5),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
}


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    cross(OPTIMIZERS, MODES, default=lambda *each: each in turns(OPTIMIZERS, MODES)),
)
@pytest.mark.some_by_default(1)
def test_the_models_update_is_the_large_batchs(rng, mode, optimizer):
    x, y = data(rng)

    def train(wrap, batch_size):
        net = network()
        model = GradientAccumulateModel(net, **wrap) if wrap else net
        model.compile(OPTIMIZERS[optimizer](), squares(), run_eagerly=not wrap)
        history = model.fit(x, y, batch_size=batch_size, shuffle=False, epochs=5, verbose=0)
        return net.get_weights(), history.history["loss"]

    (expected, losses), (found, logged) = train(None, SAMPLES), train(*MODES[mode])
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6)
    if mode == "micro_batch_size":
        np.testing.assert_allclose(logged, losses, rtol=1e-5)


RUNS = {"eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}


@pytest.mark.parametrize(
    ("mode", "run"), cross(MODES, RUNS, default=lambda *each: each in turns(MODES, ["xla", "eager"]))
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_in_other_runs_and_with_two_outputs(rng, mode, run):
    x, y = data(rng)

    def train(wrap, batch_size, **compiled):
        compiled = compiled or {"run_eagerly": True}
        net = network(outputs=2)
        model = GradientAccumulateModel(net, **wrap) if wrap else net
        model.compile(keras.optimizers.SGD(0.01), [squares(), squares()], loss_weights=[1.0, 0.5], **compiled)
        model.fit(x, [y, -y], batch_size=batch_size, shuffle=False, verbose=0)
        return net.get_weights()

    for a, b in zip(train(None, SAMPLES), train(*MODES[mode], **RUNS[run]), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6)


@pytest.mark.some_by_default(1)
def test_the_optimizer_sums(rng, backend):
    x, y = data(rng)

    def train(wrap, batch_size):
        net = network()
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        if wrap:
            optimizer = GradientAccumulateOptimizer(optimizer, 2, reduction="sum")
        net.compile(optimizer, squares(), run_eagerly=not wrap)
        net.fit(x, y, batch_size=batch_size, shuffle=False, epochs=3, verbose=0)
        return net.get_weights()

    for a, b in zip(train(False, SAMPLES), train(True, SAMPLES // 2), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_accumulator_sums(backend, mode, reduction):
    variable = tf.Variable([0.0, 0.0])
    accumulator = accumops.GradientAccumulator(3, reduction=reduction)
    accumulator.build([variable])
    add = mode(lambda gradient, weight: accumulator.accumulate([gradient], weight=weight))
    for gradient, weight in ((1.0, 2.0), (3.0, 1.0), (5.0, 1.0)):
        add(tf.fill([2], gradient), tf.constant(weight))
    expected = 10.0 if reduction == "sum" else 2.5
    assert accumulator.close()[0].numpy().tolist() == [expected, expected]


def test_reduction_is_saved():
    optimizer = GradientAccumulateOptimizer("sgd", 2, reduction="sum")
    assert GradientAccumulateOptimizer.from_config(optimizer.get_config()).accumulator.reduction == "sum"


@pytest.mark.parametrize("make", [GradientAccumulateOptimizer, lambda *a, **k: accumops.GradientAccumulator(2, **k)])
def test_other_reductions_are_refused(make):
    with pytest.raises(ValueError, match=r"`reduction` must be 'mean' or 'sum'\. Received: 'max'"):
        make("sgd", 2, reduction="max")


def test_a_callable_weight_of_sums_is_refused():
    model = GradientAccumulateModel(network(), accum_steps=2, normalization=lambda x, y, sample_weight: 2.0)
    with pytest.raises(ValueError, match="a callable `normalization` would weigh them"):
        model.compile("sgd", squares())


def test_sums_beside_means_are_refused():
    model = GradientAccumulateModel(network(outputs=2), accum_steps=2)
    with pytest.raises(ValueError, match=r"is a sum over samples .* another one is a mean"):
        model.compile("sgd", [squares(), "mse"])


@pytest.mark.parametrize("mode", MODES)
def test_regularizers_beside_sums_are_refused(rng, mode):
    wrap, batch_size = MODES[mode]
    model = GradientAccumulateModel(network(kernel_regularizer="l2"), **wrap)
    model.compile("sgd", squares())
    with pytest.raises(ValueError, match="regularizers and `add_loss` would count once for each micro-batch"):
        model.fit(*data(rng), batch_size=batch_size, verbose=0)
