"""Training that XLA compiles: which parts it compiles and which not, and that nothing calls back to the host."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from tensorflow.python.ops import control_flow_util

import accumops
from accumops import GradientAccumulateModel

MODES = {"accum_steps": {"accum_steps": 4}, "micro_batch_size": {"micro_batch_size": 8}}


def dense(inputs):
    return keras.layers.Dense(3)(keras.layers.Dense(16, "tanh")(inputs))


def convolutional(inputs):
    x = keras.layers.Reshape((3, 4, 1))(inputs)
    x = accumops.AccumBatchNormalization(momentum=0.5)(keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(x))
    return keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.ReLU()(x)))


def table(inputs):
    return keras.layers.Dense(3)(keras.layers.Embedding(9, 2)(inputs)[:, 0])


class Untouchable(keras.layers.Layer):
    """A layer that XLA has no kernel for."""

    def __init__(self):
        super().__init__()
        self.supports_jit = False

    def call(self, inputs):
        size = tf.strings.length(tf.strings.as_string(inputs))
        return inputs + tf.cast(size, inputs.dtype) * 0

    def compute_output_shape(self, shape):
        return shape


def make(network, mode, jit_compile=True, **arguments):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12,))
    model = GradientAccumulateModel(keras.Model(inputs, network(inputs)), **MODES[mode])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile, **arguments)
    return model


def data(samples=32 * 5 + 9):
    rng = np.random.default_rng(0)
    return rng.standard_normal((samples, 12)).astype("float32"), rng.standard_normal((samples, 3)).astype("float32")


def fit(model, mode, samples=32 * 5 + 9, **arguments):
    size = 8 if mode == "accum_steps" else 32
    model.fit(*data(samples), batch_size=size, shuffle=False, verbose=0, **arguments)
    return [each.numpy() for each in model.weights]


# test_full_batch.py compiles dense layers.
@pytest.mark.parametrize(
    ("network", "mode"),
    cross([dense, convolutional], MODES, default=lambda *each: each == (convolutional, "micro_batch_size")),
)
def test_equals_training_without(network, mode):
    plain, compiled = fit(make(network, mode, False, run_eagerly=True), mode), fit(make(network, mode), mode)
    for mine, theirs in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "mode", "passes"),
    [
        (dense, "accum_steps", True),
        pytest.param(convolutional, "accum_steps", True, marks=pytest.mark.exhaustive),  # as the one before
        (dense, "micro_batch_size", False),
        (convolutional, "micro_batch_size", not tf.config.list_physical_devices("GPU")),
        pytest.param(table, "micro_batch_size", True, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.some_by_default(1)
def test_what_is_compiled(network, mode, passes):
    """Forward and backward alone where a condition, convolutions in a loop or dense gradients of tables would cost."""
    model = make(network, mode)
    compiled = []
    state = model.optimizer.accumulator.state
    original = state.prepare_slice

    def spy(*arguments):
        compiled.append(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
        return original(*arguments)

    state.prepare_slice = spy
    if network not in (dense, convolutional):
        model.fit(np.zeros((32, 12)), np.zeros((32, 3)), batch_size=32, verbose=0)
    else:
        fit(model, mode, 32)
    assert set(compiled) == {not passes}


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "accum_steps"))
def test_nothing_calls_back_to_the_host(mode):
    """Neither in the passes nor in a whole step: no host callback, no transfer, in what XLA has made."""
    model = make(dense, mode)
    fit(model, mode, 32)
    batch = tuple(tf.constant(each[: 8 if mode == "accum_steps" else 32]) for each in data())
    step = (
        model._untracked.step.compiled_pass
        if mode == "accum_steps"
        else tf.function(model.train_step, jit_compile=True)
    )
    text = step.experimental_get_compiler_ir(batch)(stage="optimized_hlo")
    assert "ENTRY" in text
    for word in ("callback", "infeed", "outfeed", "send(", "recv(", "HostCompute", "TfCallback"):
        assert word not in text


@pytest.mark.parametrize("loss_over", cross(["micro_batch", "window"], default=lambda each: each == "micro_batch"))
def test_no_choice_between_product_and_addition(loss_over):
    """XLA then makes one operation of them on a GPU: nothing chooses whether an accumulator is overwritten."""
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((12,)), keras.layers.Dense(37, "tanh"), keras.layers.Dense(3)])
    model = GradientAccumulateModel(net, micro_batch_size=8, loss_over=loss_over)
    model.compile("sgd", "mse", jit_compile=True)
    fit(model, "micro_batch_size", 32)
    batch = tuple(tf.constant(each[:32]) for each in data())
    program = tf.function(model.train_step, jit_compile=True).experimental_get_compiler_ir(batch)("optimized_hlo")
    of_weights = [line for line in program.splitlines() if "f32[12,37]" in line.split(", metadata")[0]]
    assert any(" add(" in line and "Accumulate" in line for line in of_weights)
    assert not [line for line in of_weights if " select(" in line]


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "micro_batch_size"))
def test_a_layer_that_xla_cannot_compile(mode):
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model = make(lambda x: keras.layers.Dense(3)(Untouchable()(x)), mode)
    assert not model.jit_compile
    fit(model, mode)
    assert model.optimizer.fused_update
    assert int(model.optimizer.iterations) == 6


@pytest.mark.parametrize(
    ("mode", "way"),
    # test_full_batch.py has several steps in one call in a graph.
    cross(MODES, ["several", "one"], default=lambda *each: each == ("micro_batch_size", "one")),
)
@pytest.mark.exhaustive
def test_other_ways_to_run_steps(mode, way):
    """`train_on_batch`, and several steps in one call, which Keras's functions run."""
    wanted = fit(make(dense, mode, False, run_eagerly=True), mode, 32 * 4)
    if way == "several":
        found = fit(make(dense, mode, steps_per_execution=2), mode, 32 * 4)
    else:
        model = make(dense, mode)
        x, y = data(32 * 4)
        size = 8 if mode == "accum_steps" else 32
        for i in range(0, 32 * 4, size):
            model.train_on_batch(x[i : i + size], y[i : i + size])
        found = [each.numpy() for each in model.weights]
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.exhaustive
def test_compiling_again():
    """The passes are those of the new loss."""
    model = make(dense, "accum_steps")
    fit(model, "accum_steps", 32)
    model.compile(keras.optimizers.SGD(0.0), "mae", jit_compile=True)
    logs = model.fit(*data(32), batch_size=8, verbose=0).history
    x, y = data(32)
    np.testing.assert_allclose(logs["loss"][0], np.abs(model.predict(x, verbose=0) - y).mean(), rtol=1e-5)


def test_export(tmp_path):
    """The function of a step's passes, with its metrics, is no part of it."""
    model = GradientAccumulateModel(keras.Sequential([keras.layers.Dense(3)]), accum_steps=4)
    model.compile("sgd", "mse", jit_compile=True)
    fit(model, "accum_steps", 32)
    tf.saved_model.save(model, tmp_path / "saved")
    x, _ = data(4)
    served = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"](tf.constant(x))
    np.testing.assert_allclose(next(iter(served.values())), model.predict(x, verbose=0), rtol=1e-5)


def test_run_eagerly_set_later():
    eager = []

    class Spy(keras.layers.Layer):
        def call(self, inputs):
            eager.append(tf.executing_eagerly())
            return inputs

    model = make(lambda inputs: keras.layers.Dense(3)(Spy()(inputs)), "accum_steps")
    eager.clear()
    model.run_eagerly = True
    fit(model, "accum_steps", 32)
    assert set(eager) == {True}
