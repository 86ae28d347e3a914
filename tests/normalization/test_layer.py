"""AccumBatchNormalization: statistics of windows, however they are run; else it is Keras's layer.

Where a layer is the first of its model its inputs are the data, and what its statistics should be is known exactly.
"""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns
from problems import RUNS

from accumops import (
    AccumBatchNormalization,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    GradientAccumulator,
    PartialWindow,
    set_backend,
)

MOMENTUM = 0.9
BATCH = 24  # of 64 samples: micro-batches of 24, 24 and 16


COMPILED = ["graph-fused", "eager-fused", "xla-fused", "graph-reference", "eager-reference"]


@pytest.fixture(params=COMPILED)
def run(request):
    """Arguments of `compile`; sets the backend."""
    mode, backend = request.param.split("-")
    set_backend(backend)
    yield RUNS[mode]
    set_backend("auto")


@pytest.fixture
def data(rng):
    x = rng.standard_normal((64, 5)) * np.arange(1, 6) + 3
    return x.astype("float32"), rng.standard_normal((64, 3)).astype("float32")


def make(layer=None, **arguments):
    keras.utils.set_random_seed(3)
    layer = AccumBatchNormalization(momentum=MOMENTUM, **arguments) if layer is None else layer
    return keras.Sequential([keras.Input((5,)), layer, keras.layers.Dense(3)])


def compiled(model, **run):
    model.compile(keras.optimizers.SGD(0.01), loss="mse", **run)
    return model


def wrapped(net, run=None, **arguments):
    return compiled(GradientAccumulateModel(net, **arguments), **(run or {}))


def fit(model, x, y, batch_size=BATCH, **arguments):
    return model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, **arguments)


def statistics_of(windows, momentum=MOMENTUM):
    """The moving mean and variance after windows of such values, in float64 by Keras's formula."""
    mean, variance = 0.0, 1.0
    for values in windows:
        values = np.float64(values).reshape(-1, values.shape[-1])
        mean = momentum * mean + (1 - momentum) * values.mean(0)
        variance = momentum * variance + (1 - momentum) * values.var(0)
    return mean, variance


def check(layer, windows, rtol=1e-6, **arguments):
    mean, variance = statistics_of(windows, **arguments)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=rtol)


# Trainers train a network and return the windows' samples.


def by_accum_steps(net, x, y, run):
    fit(wrapped(net, run, accum_steps=2), x, y, epochs=2)
    return [x[:48], x[48:]] * 2


def by_micro_batch_size(net, x, y, run):
    fit(wrapped(net, run, micro_batch_size=BATCH), x, y, batch_size=64)
    fit(wrapped(net, run, micro_batch_size=7), x, y, batch_size=40)
    return [x, x[:40], x[40:]]


def by_parallel_micro_batches(net, x, y, run):
    model = wrapped(net, run, micro_batch_size=BATCH, parallel_micro_batches=2)
    fit(model, x, y, batch_size=64, epochs=2)
    fit(model, x, y, batch_size=50)
    return [x, x, x[:50], x[50:]]


def _by_optimizer(net, optimizer, x, y, run):
    net.compile(optimizer, loss="mse", auto_scale_loss=False, **run)
    fit(net, x, y, epochs=2, callbacks=[PartialWindow("flush")])
    return [x[:48], x[48:]] * 2


def by_optimizer_not_built(net, x, y, run):
    return _by_optimizer(net, GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 2), x, y, run)


def by_optimizer(net, x, y, run):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 2)
    optimizer.build(net.trainable_variables)
    return _by_optimizer(net, optimizer, x, y, run)


def by_optimizer_around_loss_scale(net, x, y, run):
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    optimizer = GradientAccumulateOptimizer(inner, 2)
    optimizer.build(net.trainable_variables)
    return _by_optimizer(net, optimizer, x, y, run)


def by_optimizer_within_loss_scale(net, x, y, run):
    optimizer = keras.optimizers.LossScaleOptimizer(GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 2))
    optimizer.build(net.trainable_variables)
    return _by_optimizer(net, optimizer, x, y, run)


def _function(run):
    return (lambda f: f) if "run_eagerly" in run else tf.function(jit_compile=run.get("jit_compile"))


def _by_loop(net, x, y, run, build):
    variables = net.trainable_variables
    optimizer, accumulator = keras.optimizers.SGD(0.01), GradientAccumulator(2)
    optimizer.build(variables)
    if build:
        accumulator.build(variables)

    @_function(run)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((net(x, training=True) - y) ** 2)
        accumulator.accumulate(tape.gradient(loss, variables), variables)
        if accumulator.ready:
            optimizer.apply(accumulator.close(), variables)

    for part in np.split(np.arange(64), [24, 48]):
        step(tf.constant(x[part]), tf.constant(y[part]))
    accumulator.close()
    for part in np.split(np.arange(64), [16, 40]):
        step(tf.constant(x[part]), tf.constant(y[part]))
    accumulator.reset()
    for part in np.split(np.arange(64), [1, 40, 41]):
        step(tf.constant(x[part]), tf.constant(y[part]))
    return [x[:48], x[48:], x[:40], x[:40], x[40:]]


def by_loop(net, x, y, run):
    return _by_loop(net, x, y, run, build=True)


def by_loop_not_built(net, x, y, run):
    return _by_loop(net, x, y, run, build=False)


TRAINERS = (by_accum_steps, by_micro_batch_size, by_parallel_micro_batches, by_optimizer, by_loop)
STATISTICS_OF = ["eager-fused", "graph-fused", "eager-fused", "graph-reference", "eager-reference"]


@pytest.mark.parametrize(
    ("trainer", "run"),
    # Each trainer runs once, and a loop twice, in which the layer sees windows that end early.
    cross(
        TRAINERS,
        COMPILED,
        default=lambda *each: each in (*turns(TRAINERS, STATISTICS_OF), (by_loop, "graph-fused")),
    ),
    indirect=["run"],
)
@pytest.mark.some_by_default(2)
def test_statistics_are_those_of_windows(data, run, trainer):
    net = make()
    check(net.layers[0], trainer(net, *data, run))


@pytest.mark.parametrize("trainer", [by_optimizer_around_loss_scale, by_optimizer_within_loss_scale])
@pytest.mark.some_by_default(1)
def test_with_a_loss_scale(data, trainer):
    net = make()
    check(net.layers[0], trainer(net, *data, {}))


@pytest.mark.parametrize(
    ("mode", "trainer"),
    cross(
        ["graph", "xla"],
        [by_optimizer_not_built, by_loop_not_built],
        default=lambda mode, trainer: mode == "graph",
    ),
)
@pytest.mark.some_by_default(1)
def test_what_sums_gradients_is_built_after_the_first_micro_batch(data, mode, trainer):
    net = make()
    check(net.layers[0], trainer(net, *data, RUNS[mode]))


@pytest.mark.parametrize("trainer", [by_optimizer_not_built, by_loop_not_built])
def test_eagerly_it_has_to_be_built_before(data, trainer):
    with pytest.warns(UserWarning, match="Build it first"):
        trainer(make(), *data, RUNS["eager"])


@pytest.mark.parametrize(
    "trainer",
    [by_optimizer_not_built, by_accum_steps, pytest.param(by_micro_batch_size, marks=pytest.mark.exhaustive)],
)
@pytest.mark.some_by_default(1)
def test_a_subclassed_model_built_by_fit(data, trainer):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = AccumBatchNormalization(momentum=MOMENTUM), keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(self.norm(x, training=training))

    net = Net()
    check(net.norm, trainer(net, *data, {}))


def test_alone(data, mode, backend):
    """It counts its own calls; what is open has moved nothing yet."""
    x, _ = data
    layer = AccumBatchNormalization(momentum=MOMENTUM, accum_steps=3)
    layer.build((None, 5))
    call = mode(lambda x: layer(x, training=True))
    parts = np.split(x, [24, 48])
    for part in (*parts, *parts[:2]):
        call(tf.constant(part))
    check(layer, [x])
    layer(x, training=False)
    call(tf.constant(parts[2]))
    check(layer, [x, x])


def test_k_by_epoch(data):
    net = make()
    fit(wrapped(net, accum_steps={0: 1, 1: 3}), *data, epochs=3)
    x, _ = data
    check(net.layers[0], [x[:24], x[24:48], x[48:], x, x])


def test_k_by_a_callable(data):
    net = make()
    fit(wrapped(net, accum_steps=lambda updates: tf.where(updates < 1, 1, 2)), *data)
    check(net.layers[0], [data[0][:24], data[0][24:]])


def test_k_set_by_hand(data):
    """The open window keeps the number that it started with."""
    x, y = data
    net = make()
    model = wrapped(net, accum_steps=2)
    for i in range(8):
        model.train_on_batch(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
        if i == 2:
            model.accum_steps = 4
    check(net.layers[0], [x[:16], x[16:32], x[32:]])


POLICIES = ["flush", "carry", "drop"]


@pytest.mark.parametrize(
    ("policy", "mode"),
    cross(POLICIES, ["graph", "eager"], default=lambda *each: each in turns(POLICIES, ["graph", "eager"])),
)
@pytest.mark.some_by_default(1)
def test_partial_windows(data, policy, mode):
    x, y = data
    net = make()
    model = wrapped(net, RUNS[mode], accum_steps=2, partial_window=policy)
    fit(model, x, y)
    fit(model, x + 1, y)
    windows = {
        "flush": [x[:48], x[48:], x[:48] + 1, x[48:] + 1],
        "carry": [x[:48], np.concatenate([x[48:], x[:24] + 1]), x[24:] + 1],
        "drop": [x[:48], x[:48] + 1],
    }
    check(net.layers[0], windows[policy])


@pytest.mark.parametrize("trainer", [by_accum_steps, by_micro_batch_size, by_optimizer])
@pytest.mark.some_by_default(1)
def test_several_layers_and_a_nested_model(data, trainer):
    inputs = keras.Input((5,))
    first, second, third = (AccumBatchNormalization(momentum=MOMENTUM, name=f"norm_{i}") for i in range(3))
    doubled = keras.layers.Rescaling(2.0)(inputs)
    inner = keras.Sequential([keras.Input((5,)), second])
    outer = keras.Sequential([keras.Input((5,)), keras.layers.Rescaling(2.0), inner])
    branches = [first(inputs), outer(inputs), keras.Sequential([third])(doubled)]
    net = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()(branches)))
    windows = trainer(net, *data, {})
    check(first, windows)
    check(second, [2 * each for each in windows])
    check(third, [2 * each for each in windows])


@pytest.mark.parametrize("trainer", [by_accum_steps, by_micro_batch_size, by_optimizer])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_a_shared_layer(data, trainer):
    """All calls count."""
    inputs, layer = keras.Input((5,)), AccumBatchNormalization(momentum=MOMENTUM)
    net = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs) + layer(keras.layers.Rescaling(1.0, 9.0)(inputs))))
    windows = trainer(net, *data, {})
    check(layer, [np.concatenate([each, each + 9]) for each in windows])


@pytest.mark.exhaustive
def test_time_distributed(rng, data):
    x = rng.standard_normal((64, 4, 5)).astype("float32") + np.arange(4, dtype="float32")[:, None]
    layer = AccumBatchNormalization(momentum=MOMENTUM)
    timed, head = keras.layers.TimeDistributed(layer), [keras.layers.Flatten(), keras.layers.Dense(3)]
    net = keras.Sequential([keras.Input((4, 5)), timed, *head])
    check(layer, by_accum_steps(net, x, data[1], {}))


@pytest.mark.some_by_default(2)
def test_masks(rng, data, run):
    x = rng.standard_normal((64, 7, 5)).astype("float32") + 2
    valid = rng.uniform(size=(64, 7)) < 0.6
    valid[:, 0] = True
    x[~valid] = 0
    layer = AccumBatchNormalization(momentum=MOMENTUM)
    head = [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
    net = keras.Sequential([keras.Input((7, 5)), keras.layers.Masking(), layer, *head])
    windows = by_accum_steps(net, x, data[1], run)
    check(layer, [each[np.any(each != 0, -1)] for each in windows])


def test_a_large_mean_costs_no_digits(data):
    x = data[0] + 1e4
    net = make()
    check(net.layers[0], by_accum_steps(net, x, data[1], {}), rtol=2e-6)


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        (2, {"accum_steps": 2}, None),
        (None, {"accum_steps": 2}, None),
        (3, {"accum_steps": 2}, "has accum_steps=3 and is trained with accum_steps=2"),
        (1, {"accum_steps": 2}, "has accum_steps=1"),
        (2, {"accum_steps": lambda updates: 2}, "has accum_steps=2"),
        (2, {"micro_batch_size": 32}, "has accum_steps=2 and is trained with micro_batch_size=32"),
        (1, {"micro_batch_size": 32}, "has accum_steps=1 and is trained with micro_batch_size=32"),
    ],
)
@pytest.mark.some_by_default(1)
def test_accum_steps_of_the_layer_and_of_the_model(data, own, arguments, message):
    net = make(accum_steps=own)
    model = GradientAccumulateModel(net, **arguments)
    if message is None:
        fit(compiled(model), *data)
        return
    with pytest.raises(ValueError, match=message):
        model.compile("sgd", loss="mse")
    if "accum_steps" in arguments:
        optimizer = GradientAccumulateOptimizer("sgd", arguments["accum_steps"])
        with pytest.raises(ValueError, match=message):
            optimizer.build(net.trainable_variables)
        net.compile(GradientAccumulateOptimizer("sgd", arguments["accum_steps"]), loss="mse")
        with pytest.raises(ValueError, match=message):
            fit(net, *data)


def test_a_mismatch_raises_each_time():
    net = make(accum_steps=3)
    accumulator, variables = GradientAccumulator(2), net.trainable_variables
    for _ in range(2):
        with pytest.raises(ValueError, match="accum_steps=3"):
            accumulator.accumulate([tf.zeros_like(each) for each in variables], variables)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"renorm": True}, ValueError, "renormalization"),
        ({"accum_steps": 0}, ValueError, "at least 1"),
        ({"accum_steps": 2.0}, TypeError, "int"),
        ({"accum_steps": True}, TypeError, "int"),
        ({"accum_steps": lambda updates: 2}, TypeError, "must be an int"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AccumBatchNormalization(**arguments)


def test_positional_arguments():
    layer, of_keras = (kind(1, 0.5, 1e-4) for kind in (AccumBatchNormalization, keras.layers.BatchNormalization))
    wanted, config = of_keras.get_config(), layer.get_config()
    assert {key: config[key] for key in wanted if key != "name"} == {k: v for k, v in wanted.items() if k != "name"}


CASES = {
    "rank 2": ((6, 5), {}),
    "rank 3": ((4, 3, 5), {}),
    "rank 4": ((4, 3, 2, 5), {}),
    "rank 5": ((4, 3, 2, 2, 5), {}),
    "axis 1": ((4, 5, 3, 2), {"axis": 1}),
    "axis 1 of 3": ((4, 5, 3), {"axis": 1}),
    "center off": ((6, 5), {"center": False}),
    "scale off": ((6, 5), {"scale": False}),
    "both off": ((6, 5), {"scale": False, "center": False}),
    "momentum and epsilon": ((6, 5), {"momentum": 0.3, "epsilon": 0.1}),
    "initializers": ((6, 5), {"moving_mean_initializer": "ones", "gamma_initializer": keras.initializers.Constant(3)}),
    "regularizers": ((6, 5), {"beta_regularizer": "l2", "gamma_regularizer": keras.regularizers.L1(0.1)}),
    "constraints": ((6, 5), {"gamma_constraint": "non_neg", "beta_constraint": keras.constraints.MaxNorm(0.1)}),
    "synchronized": ((6, 5), {"synchronized": True}),
    "float64": ((6, 5), {"dtype": "float64"}),
    "mixed_float16": ((6, 5), {"dtype": "mixed_float16"}),
    "mixed_bfloat16": ((4, 3, 2, 5), {"dtype": "mixed_bfloat16"}),
    "float16": ((6, 5), {"dtype": "float16"}),
    "bfloat16": ((6, 5), {"dtype": "bfloat16"}),
}


# By default each case runs in one of the ways, in turn.
ONE_MICRO_BATCH = [("eager", None), ("graph", 1), ("eager", 1), ("graph", None)]


@pytest.mark.parametrize(
    ("case", "mode", "steps"),
    cross(
        CASES,
        ["eager", "graph"],
        [None, 1],
        default=lambda case, *way: (case, way) in turns(CASES, ONE_MICRO_BATCH),
    ),
    indirect=["mode"],
)
@pytest.mark.some_by_default(4)
def test_with_one_micro_batch_it_is_of_keras(rng, mode, case, steps):
    shape, arguments = CASES[case]
    ours = AccumBatchNormalization(accum_steps=steps, name="norm", **arguments)
    of_keras = keras.layers.BatchNormalization(name="norm", **arguments)
    x = (rng.standard_normal((3, *shape)) * 50 + 30).astype("float32")
    outputs, gradients, regularization = [], [], []
    for layer in (ours, of_keras):
        layer.build((None, *shape[1:]))

        def step(x, training=True, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
                loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 3) + sum(layer.losses)
            return y, tape.gradient(loss, [x, *layer.trainable_variables])

        step = mode(step)
        for each in x:
            y, gradient = step(tf.constant(each))
        outputs.append([y, layer(x[0], training=False), layer(x[1])])
        gradients.append(gradient)
        layer.trainable = False
        outputs[-1].append(layer(x[2], training=True))  # in inference
        layer.trainable = True
        regularization.append([float(each) for each in layer.losses])
    assert [each.path for each in ours.weights] == [each.path for each in of_keras.weights]
    assert [each.dtype for each in ours.weights] == [each.dtype for each in of_keras.weights]
    assert [each.path for each in ours.trainable_weights] == [each.path for each in of_keras.trainable_weights]
    assert regularization[0] == regularization[1]
    assert ours.get_config().items() >= of_keras.get_config().items()
    again = AccumBatchNormalization.from_config(ours.get_config())
    assert again.get_config() == ours.get_config()
    for variable, other in zip(ours.weights, of_keras.weights, strict=True):
        value = other.numpy().astype("float64")
        # A last place of the dtype for each of three steps.
        rtol = {"float16": 3e-3, "bfloat16": 2.4e-2}.get(other.dtype, 3e-6)
        np.testing.assert_allclose(variable.numpy().astype("float64"), value, rtol=rtol)
        assert type(variable.constraint) is type(other.constraint)
    low = {"float16": 2e-3, "bfloat16": 1.6e-2}
    for y, other in zip(*outputs, strict=True):
        assert y.dtype == other.dtype == ours.compute_dtype
        tolerance = low.get(ours.compute_dtype, 2e-5)
        np.testing.assert_allclose(np.float64(y), np.float64(other), rtol=tolerance, atol=tolerance)
    for gradient, other in zip(*gradients, strict=True):
        tolerance = 8 * low.get(ours.compute_dtype, 2e-5)
        gradient, other = (np.float64(tf.cast(each, tf.float64)) for each in (gradient, other))
        np.testing.assert_allclose(gradient, other, rtol=tolerance, atol=tolerance * max(1, np.abs(other).max()))


def test_statistics_of_mixed_precision_are_float32(data):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        net = make()
        windows = by_accum_steps(net, *data, {})
    finally:
        keras.config.set_dtype_policy("float32")
    layer = net.layers[0]
    assert {each.dtype for each in layer.weights} == {"float32"}
    check(layer, [np.float16(each) for each in windows])


def test_integers_in_mixed_precision():
    x = np.arange(3000, 3064).reshape(32, 2)
    layer = AccumBatchNormalization(dtype="mixed_float16", momentum=0.0)
    layer(x, training=True)
    check(layer, [x], momentum=0)


def test_where_variables_are_of_half_precision(data):
    """Keras computes these in float32 and then rounds."""
    layers = [
        kind(momentum=0.9, dtype="bfloat16") for kind in (AccumBatchNormalization, keras.layers.BatchNormalization)
    ]
    for layer in layers:
        for _ in range(60):
            layer(data[0], training=True)
    ours, of_keras = (np.float64(tf.cast(layer.moving_variance, tf.float64)) for layer in layers)
    np.testing.assert_allclose(ours, of_keras, rtol=8e-3)


def test_a_variance_near_the_end_of_float16(data):
    layers = [kind(dtype="float16") for kind in (AccumBatchNormalization, keras.layers.BatchNormalization)]
    for layer in layers:
        layer(data[0] * 100, training=True)
    ours, of_keras = (layer.moving_variance.numpy() for layer in layers)
    assert np.isfinite(of_keras).all()
    np.testing.assert_allclose(ours, of_keras, rtol=1e-3)


@pytest.mark.parametrize("kind", [AccumBatchNormalization, keras.layers.BatchNormalization])
@pytest.mark.parametrize("shape", [(64,), (64, 7, 5), (64, 7, 1, 1)])
def test_the_shape_of_a_mask(kind, shape):
    with pytest.raises(ValueError, match="mask provided should be one dimension less"):
        kind()(np.ones((64, 7, 5), "float32"), mask=np.ones(shape, bool), training=True)


def test_a_mask_of_nothing_moves_nothing(data):
    layer = AccumBatchNormalization()
    layer(data[0], mask=np.zeros(64, bool), training=True)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(5))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(5))


def test_without_an_accumulator_in_fit(data):
    """Each batch moves the statistics, as with Keras's layer."""
    x, y = data
    net, with_steps = make(), make(accum_steps=3)
    for each in (net, with_steps):
        each.compile("sgd", loss="mse")
        fit(each, x, y)
    check(net.layers[0], [x[:24], x[24:48], x[48:]])
    check(with_steps.layers[0], [x])


class TestRagged:
    # XLA knows no ragged tensors.
    @pytest.mark.parametrize(
        ("backend", "mode", "axis"),
        cross(
            ["fused", "reference"],
            ["eager", "graph"],
            [-1, 2],
            default=lambda backend, mode, axis: mode == "eager" or (backend, axis) == ("fused", 2),
        ),
        indirect=["backend", "mode"],
    )
    @pytest.mark.some_by_default(1)
    def test_as_keras_does(self, backend, mode, rng, axis):
        values = rng.normal(1, 2, (10, 3)).astype("float32")
        x = tf.RaggedTensor.from_row_lengths(values, [3, 0, 7])
        layers = [kind(axis=axis) for kind in (keras.layers.BatchNormalization, AccumBatchNormalization)]
        for layer in layers:
            layer.build((None, None, 3))
        for training in (True, False):
            results = [mode(layer)(x, training=training) for layer in layers]
            assert isinstance(results[1], tf.RaggedTensor)
            np.testing.assert_array_equal(results[1].row_splits, x.row_splits)
            np.testing.assert_allclose(results[1].flat_values, results[0].flat_values, rtol=1e-5, atol=1e-6)
        for a, b in zip(*(layer.get_weights() for layer in layers), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_only_the_last_axis(self, rng):
        x = tf.RaggedTensor.from_row_lengths(rng.normal(size=(10, 4, 3)).astype("float32"), [3, 7])
        layer = AccumBatchNormalization(axis=2)
        with pytest.raises(ValueError, match=r"RaggedTensor along its last axis.*axis=2"):
            layer(x, training=True)


class TestSaving:
    def train(self, model, data, first, last):
        for i in range(first, last):
            model.train_on_batch(*(each[8 * i : 8 * i + 8] for each in data))

    def straight(self, data):
        model = wrapped(make(), accum_steps=3, partial_window="carry")
        self.train(model, data, 0, 8)
        return model

    @pytest.mark.parametrize("how", ["keras", pytest.param("weights", marks=pytest.mark.exhaustive)])
    def test_resumes_in_mid_window(self, data, tmp_path, how):
        """The same bits, after 8 micro-batches in windows of 3."""
        model = wrapped(make(), accum_steps=3, partial_window="carry")
        self.train(model, data, 0, 5)
        if how == "keras":
            model.save(tmp_path / "model.keras")
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        else:
            model.save_weights(tmp_path / "model.weights.h5")
            loaded = wrapped(make(), accum_steps=3, partial_window="carry")
            loaded.optimizer.build(loaded.trainable_variables)
            loaded.load_weights(tmp_path / "model.weights.h5")
        self.train(loaded, data, 5, 8)
        for a, b in zip(self.straight(data).get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        self.train(loaded, data, 0, 1)
        x, _ = data
        check(loaded.model.layers[0], [x[:24], x[24:48], np.concatenate([x[48:], x[:8]])])

    def test_alone_resumes_in_mid_window(self, data, tmp_path):
        x, _ = data
        net = make(accum_steps=3)
        net(x[:24], training=True)
        net.save(tmp_path / "net.keras")
        loaded = keras.saving.load_model(tmp_path / "net.keras")
        for part in (x[24:48], x[48:]):
            loaded(part, training=True)
        check(loaded.layers[0], [x])
        assert loaded.layers[0].accum_steps == 3

    @pytest.mark.exhaustive
    def test_backup_and_restore(self, data, tmp_path):
        """3 micro-batches an epoch and 2 a window."""
        x, y = data
        models = [wrapped(make(), accum_steps=2, partial_window="carry") for _ in range(3)]
        fit(models[0], x, y, epochs=2)
        for model, epochs in zip(models[1:], (1, 2), strict=True):
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
            fit(model, x, y, epochs=epochs, callbacks=[backup])
        for a, b in zip(models[0].get_weights(), models[2].get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        check(models[2].model.layers[0], [x[:48], np.concatenate([x[48:], x[:24]]), x[24:]])

    class Net(keras.Model):
        """Files name its layers by those attributes that come before `layers` in the alphabet."""

        def __init__(self, kind):
            super().__init__()
            self.batch_norm, self.dense = kind(), keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(self.batch_norm(x, training=training))

    def test_weights_of_keras_and_back(self, data, tmp_path):
        x, y = data
        of_keras, ours = self.Net(keras.layers.BatchNormalization), self.Net(AccumBatchNormalization)
        for each in (of_keras, ours):
            each(x)
        of_keras(x, training=True)
        of_keras.save_weights(tmp_path / "keras.weights.h5")
        ours.load_weights(tmp_path / "keras.weights.h5")
        for a, b in zip(of_keras.get_weights(), ours.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        optimizer = GradientAccumulateOptimizer("sgd", 2)
        optimizer.build(ours.trainable_variables)
        ours.compile(optimizer, loss="mse")
        fit(ours, x, y, batch_size=32)
        ours.compile()
        ours.save_weights(tmp_path / "ours.weights.h5")
        of_keras.load_weights(tmp_path / "ours.weights.h5")
        for a, b in zip(of_keras.get_weights(), ours.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_dropped_window_is_not_saved(self, data):
        net = make()
        fit(wrapped(net, accum_steps=2, partial_window="drop"), *data)
        store = {}
        net.layers[0].save_own_variables(store)
        of_keras, wanted = keras.layers.BatchNormalization(), {}
        of_keras.build((None, 5))
        of_keras.save_own_variables(wanted)
        assert list(store) == list(wanted)
        of_keras.load_own_variables(store)

    def test_a_layer_that_was_never_called(self, data, tmp_path):
        for kind in (keras.layers.BatchNormalization, AccumBatchNormalization):
            net = self.Net(kind)
            net.another = kind()
            net(data[0])
            net.save_weights(tmp_path / "net.weights.h5")
            saved = net.get_weights()
            net.set_weights([each + 1 for each in saved])
            net.load_weights(tmp_path / "net.weights.h5")
            for a, b in zip(net.get_weights(), saved, strict=True):
                np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("built", [False, True])
    def test_checkpoint_of_a_window(self, data, tmp_path, built):
        """Restored by a layer that is not built yet, or has a window of its own."""
        x, _ = data
        saved, loaded = (AccumBatchNormalization(momentum=MOMENTUM, accum_steps=3) for _ in range(2))
        saved(x[:24], training=True)
        path = tf.train.Checkpoint(layer=saved).save(tmp_path / "checkpoint")
        if built:
            loaded(x[:7] * np.nan, training=True)
        status = tf.train.Checkpoint(layer=loaded).restore(path)
        for part in (x[24:48], x[48:]):
            loaded(part, training=True)
        status.assert_consumed()
        check(loaded, [x])

    @pytest.mark.parametrize("kind", ["accumulator", "model"])
    @pytest.mark.some_by_default(1)
    @pytest.mark.exhaustive
    def test_checkpoint_of_training(self, data, tmp_path, kind):
        """A restore undoes all steps since the save, between windows and within one."""
        x, y = data
        if kind == "model":
            model = wrapped(make(), accum_steps=2, partial_window="carry")
            model.optimizer.build(model.trainable_variables)
            net, step = model.model, model.train_on_batch
            checkpoint = tf.train.Checkpoint(model=model)
        else:
            net, sgd, accumulator = make(), keras.optimizers.SGD(0.01), GradientAccumulator(2)
            sgd.build(net.trainable_variables)
            accumulator.build(net.trainable_variables)
            checkpoint = tf.train.Checkpoint(net=net, sgd=sgd, accumulator=accumulator)

            @tf.function
            def step(x, y):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((net(x, training=True) - y) ** 2)
                accumulator.accumulate(tape.gradient(loss, net.trainable_variables))
                if accumulator.ready:
                    sgd.apply(accumulator.close(), net.trainable_variables)

        windows = []
        for first in range(0, 64, 16):
            for begin in (first, first + 8):
                path = checkpoint.save(tmp_path / "checkpoint")
                step(x[:8] * np.nan, y[:8])
                checkpoint.restore(path).assert_consumed()
                step(x[begin : begin + 8], y[begin : begin + 8])
            windows.append(x[first : first + 16])
        check(net.layers[0], windows)

    def test_checkpoint_of_keras(self, data, tmp_path):
        x, _ = data
        of_keras, ours = make(keras.layers.BatchNormalization()), make()
        of_keras(x, training=True)
        path = tf.train.Checkpoint(net=of_keras).save(tmp_path / "checkpoint")
        tf.train.Checkpoint(net=ours).restore(path).expect_partial()
        for a, b in zip(of_keras.get_weights(), ours.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_fit_drops_a_window_that_was_loaded(self, data, tmp_path):
        x, y = data
        saved = wrapped(make(), accum_steps=3)
        saved.train_on_batch(x[:8] * 100, y[:8])
        saved.save_weights(tmp_path / "model.weights.h5")
        loaded = wrapped(make(), accum_steps=3)
        loaded.load_weights(tmp_path / "model.weights.h5")
        fit(loaded, x, y)
        check(loaded.model.layers[0], [x])

    @pytest.mark.exhaustive
    def test_export(self, data, tmp_path):
        net = make()
        model = wrapped(net, accum_steps=2)
        fit(model, *data)
        model.export(tmp_path / "exported", verbose=False)
        exported = tf.saved_model.load(tmp_path / "exported")
        np.testing.assert_allclose(exported.serve(data[0]), model.predict(data[0], verbose=0), rtol=1e-6, atol=1e-6)

    def test_cloned(self):
        net = make(accum_steps=2)
        wrapped(net, accum_steps=2)
        clone = keras.models.clone_model(net)
        assert clone.layers[0].get_config() == net.layers[0].get_config()
        clone(np.ones((4, 5)), training=True)
        clone(np.ones((4, 5)), training=True)
        check(clone.layers[0], [np.ones((4, 5))])
        np.testing.assert_array_equal(net.layers[0].moving_mean, np.zeros(5))


@pytest.mark.exhaustive
def test_a_layer_that_is_not_called(data):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = AccumBatchNormalization(momentum=MOMENTUM), AccumBatchNormalization()
            self.dense = keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(self.norm(x, training=training))

    net = Net()
    net(data[0])
    check(net.norm, by_accum_steps(net, *data, {}))


class TestOthersTrainIt:
    """A layer leaves the window of its last trainer and joins the window of the next one."""

    @pytest.mark.exhaustive
    def test_compiled_again(self, data):
        """With another optimizer, in mid-window: the new one starts with a window of its own."""
        x, y = data
        net = make()
        model = wrapped(net, accum_steps=2)
        fit(model, x, y)
        model.train_on_batch(x[:24] + 9, y[:24])
        model.accum_steps = 3
        fit(compiled(model), x, y)
        again = wrapped(net, micro_batch_size=16)
        fit(again, x, y, batch_size=64)
        check(net.layers[0], [x[:48], x[48:], x, x])

    def test_a_model_then_a_loop(self, data):
        x, y = data
        net = make()
        fit(wrapped(net, accum_steps=3), x, y)
        check(net.layers[0], [x, *by_loop(net, x, y, {})])

    def test_a_model_then_keras(self, data):
        """The wrapped model is trained on without accumops."""
        x, y = data
        net = make()
        fit(wrapped(net, accum_steps=3), x, y)
        net.compile("sgd", loss="mse")
        fit(net, x, y)
        check(net.layers[0], [x, x[:24], x[24:48], x[48:]])

    def test_an_optimizer_then_keras(self, data):
        x, y = data
        net = make()
        windows = by_optimizer(net, x, y, {})
        net.layers[0].leave_window()
        net.compile("sgd", loss="mse")
        fit(net, x, y)
        check(net.layers[0], [*windows, x[:24], x[24:48], x[48:]])

    @pytest.mark.parametrize("mode", [pytest.param("graph", marks=pytest.mark.exhaustive), "eager"])
    def test_two_models(self, data, mode):
        x, y = data
        net = make()
        first, second = (wrapped(net, RUNS[mode], accum_steps=steps) for steps in (3, 2))
        fit(first, x, y)
        fit(second, x + 1, y)
        fit(first, x, y)
        check(net.layers[0], [x, x[:48] + 1, x[48:] + 1, x])

    @pytest.mark.parametrize("mode", ["graph", "eager"])
    @pytest.mark.some_by_default(1)
    def test_frozen_in_another_model(self, data, mode):
        x, y = data
        net = make()
        model = wrapped(net, RUNS[mode], accum_steps=3)
        fit(model, x, y)
        net.trainable = False
        wrapped(keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), net]), accum_steps=2)
        net.trainable = True
        fit(model, x, y)
        check(net.layers[0], [x, x])

    def test_traced_before_the_accumulator_is_built(self, data):
        """Such a function does not know that there are windows."""
        x, y = data
        net = make()
        variables, accumulator = net.trainable_variables, GradientAccumulator(2)

        @tf.function
        def gradients(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((net(x, training=True) - y) ** 2)
            return tape.gradient(loss, variables)

        gradients(x[:32], y[:32])  # by itself: a window of one
        with pytest.warns(UserWarning, match="Build it first"):
            accumulator.build(variables)
        for shift in (9, 0, 0):
            accumulator.accumulate(gradients(x[:32] + shift, y[:32]))
            if shift:
                accumulator.reset()
        accumulator.close()
        check(net.layers[0], [x[:32], x[:32]])

    @pytest.mark.exhaustive
    def test_frozen_later(self, data):
        x, y = data
        net = make()
        model = wrapped(net, accum_steps=2)
        fit(model, x, y)
        net.layers[0].trainable = False
        fit(compiled(model), x + 9, y)
        check(net.layers[0], [x[:48], x[48:]])

    def test_frozen_in_mid_window(self, data):
        x, y = data
        net = make()
        model = wrapped(net, accum_steps=2)
        fit(model, x, y)
        model.train_on_batch(x[:24] + 9, y[:24])
        net.layers[0].trainable = False
        fit(compiled(model), x, y)
        check(net.layers[0], [x[:48], x[48:]])

    def test_neither_center_nor_scale(self, data):
        """An optimizer finds a layer by its variables; without them the layer joins the window by hand."""
        net = make(center=False, scale=False)
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 2)
        net.layers[0].join_window(optimizer.accumulator)
        check(net.layers[0], _by_optimizer(net, optimizer, *data, {}))

    def test_neither_center_nor_scale_in_a_model(self, data):
        net = make(center=False, scale=False)
        check(net.layers[0], by_accum_steps(net, *data, {}))

    def test_deleted(self, data):
        """The accumulator outlives the model, and a model that nothing refers to is freed with its accumulator."""
        net = make()
        variables, accumulator = net.trainable_variables, GradientAccumulator(1)
        accumulator.build(variables)
        net(data[0], training=True)
        layer = weakref.ref(net.layers[0])
        del net
        gc.collect()
        for _ in range(2):
            accumulator.accumulate([tf.ones_like(each) for each in variables])
            accumulator.close()
        del accumulator
        gc.collect()
        assert layer() is None

    def test_stateless(self, data):
        """Keras calls the layer this way where its state must not change."""
        layer = AccumBatchNormalization(momentum=MOMENTUM)
        layer.build((None, 5))
        state = layer.trainable_variables, layer.non_trainable_variables
        _, (mean, _) = layer.stateless_call(*state, data[0], training=True)
        np.testing.assert_allclose(mean, statistics_of([data[0]])[0], rtol=1e-6)
        np.testing.assert_array_equal(layer.moving_mean, np.zeros(5))

    def test_stateless_within_a_window(self, data):
        x, y = data
        net = make()
        model = wrapped(net, accum_steps=2)
        model.train_on_batch(x[:32], y[:32])
        layer = net.layers[0]
        layer.stateless_call(layer.trainable_variables, layer.non_trainable_variables, x + 9, training=True)
        model.train_on_batch(x[32:], y[32:])
        check(layer, [x])

    def test_symbolic_calls(self, data):
        """Building graphs, and evaluating, in mid-window."""
        x, y = data
        net = make()
        model = wrapped(net, accum_steps=2)
        model.train_on_batch(x[:32], y[:32])
        layer = net.layers[0]
        keras.Model(inputs := keras.Input((5,)), layer(inputs, training=True))
        layer.compute_output_spec(keras.KerasTensor((2, 5)), training=True)
        model.evaluate(x + 9, y, verbose=0)
        model.predict(x + 9, verbose=0)
        model.train_on_batch(x[32:], y[32:])
        check(layer, [x])


@pytest.mark.parametrize(
    ("arguments", "mode"),
    cross(
        [{"micro_batch_size": 16}, {"accum_steps": 1}],
        ["graph", "xla"],
        default=lambda arguments, mode: mode == "graph" and "micro_batch_size" in arguments,
    ),
    ids=str,
)
def test_a_convolutional_net_is_trained_as_by_keras(rng, mode, arguments):
    """10 updates of one micro-batch each."""
    x = rng.standard_normal((160, 8, 8, 2)).astype("float32")
    y = rng.integers(0, 4, 160)
    nets = []
    for kind in (keras.layers.BatchNormalization, AccumBatchNormalization):
        keras.utils.set_random_seed(1)
        body = [
            each
            for filters in (6, 8)
            for each in (keras.layers.Conv2D(filters, 3, use_bias=False), kind(momentum=0.8), keras.layers.ReLU())
        ]
        head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
        net = keras.Sequential([keras.Input((8, 8, 2)), *body, *head])
        model = net if kind is keras.layers.BatchNormalization else GradientAccumulateModel(net, **arguments)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss=loss, **RUNS[mode])
        fit(model, x, y, batch_size=16)
        assert int(model.optimizer.iterations) == 10
        nets.append(net)
    for a, b in zip(*(net.get_weights() for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "run"),
    cross(
        [{"accum_steps": 4}, {"micro_batch_size": 16}],
        RUNS,
        default=lambda mode, run: run == "graph" or (run == "xla") == ("accum_steps" in mode),
    ),
    ids=str,
)
@pytest.mark.some_by_default(2)
def test_a_layer_that_its_model_makes_late(mode, run, rng):
    """In the first step, and without variables by which an optimizer could find it."""

    class Late(keras.layers.Layer):
        def build(self, shape):
            self.norm = AccumBatchNormalization(momentum=0.5, center=False, scale=False)
            self.norm.build(shape)

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    x = rng.normal(2, 3, (128, 5)).astype("float32")
    late = Late()
    model = GradientAccumulateModel(keras.Sequential([late, keras.layers.Dense(1)]), **mode)
    model.compile("sgd", "mse", **RUNS[run])
    model.fit(x, x[:, :1], batch_size=16 if "accum_steps" in mode else 64, shuffle=False, verbose=0)
    wanted = 0.25 * x[:64].astype(np.float64).mean(0) + 0.5 * x[64:].astype(np.float64).mean(0)
    np.testing.assert_allclose(late.norm.moving_mean, wanted, rtol=1e-5)
