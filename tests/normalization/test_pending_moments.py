"""Moments that wait for the end of a pass: one op for all layers, and nothing to be taken back."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops.adapters.tensorflow import operations_within

L = keras.layers
X = np.random.default_rng(0).normal(2, 3, (24, 6)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Conditional(L.Layer):
    """Normalizes within a condition that TensorFlow decides."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs, training=None):
        return tf.cond(tf.shape(inputs)[0] > 0, lambda: self.inner(inputs, training=training), lambda: inputs)


def network(shared=False, conditional=False):
    keras.utils.set_random_seed(1)
    normalize = accumops.AccumBatchNormalization(momentum=0.5)
    inputs = keras.Input((6,))
    hidden = normalize(L.Dense(6)(inputs))
    if shared:
        hidden = normalize(L.Dense(6, "relu")(hidden))
    last = accumops.AccumBatchNormalization(momentum=0.5)
    if conditional:
        last.build((None, 6))
        last = Conditional(last)
    return keras.Model(inputs, L.Dense(2)(last(hidden)))


def trained(net, x, steps, jit_compile=False, **how):
    model = accumops.GradientAccumulateModel(net, **how)
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    model.fit(x, X[: len(x), :2], batch_size=len(x) // steps, shuffle=False, verbose=0)
    return model


def statistics(model):
    return [variable.numpy() for variable in model.non_trainable_variables if "moving" in variable.path]


def added_together(model):
    """The number of windows that each op adds to, in a step."""
    step = model.make_train_function()
    function = tf.function(lambda: step(iter(tf.data.Dataset.from_tensors((X[:8], X[:8, :2])))), autograph=False)
    operations = operations_within(function.get_concrete_function().graph)
    assert not [each for each in operations if each.type == "AccumOps>MergeMoments"]
    return [each.get_attr("batches") for each in operations if each.type == "AccumOps>AddToWindows"]


HOW = {"accum_steps": ({"accum_steps": 3}, 3), "micro_batch_size": ({"micro_batch_size": 8}, 1)}


@pytest.mark.some_by_default(2)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shared", [False, True], ids=["two layers", "one of them called twice"])
def test_as_if_each_layer_added_its_own(how, shared, monkeypatch):
    ways, steps = HOW[how]
    together = statistics(trained(network(shared), X, steps, **ways))
    monkeypatch.setattr("accumops.normalization.layer_window.pending_moments", lambda: None)
    one_by_one = statistics(trained(network(shared), X, steps, **ways))
    assert len(together) == 4
    for found, wanted in zip(together, one_by_one, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert (found != 0).any()


@pytest.mark.skipif(accumops.ops.library.load()[0] is None, reason="the fused ops do not load")
@pytest.mark.parametrize(("shared", "windows"), [(False, [2]), (True, [2, 1])])
def test_one_op_for_all_layers(shared, windows):
    assert added_together(trained(network(shared), X, 3, accum_steps=3)) == windows


@pytest.mark.some_by_default(2)
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("conditional", [False, True], ids=["in the model's graph", "in a condition"])
@pytest.mark.parametrize("how", HOW)
def test_what_is_not_finite_reaches_no_window(how, conditional, jit_compile):
    """Whether the moments wait or, from within a condition, are put back."""
    broken = np.concatenate([X[:8], np.full((8, 6), np.nan, "float32"), X[8:16]])
    ways, _ = HOW[how]
    ways = {**ways, "nonfinite": "skip"}
    with_it, without = (network(conditional=conditional) for _ in range(2))
    found = statistics(trained(with_it, broken, 3 if how == "accum_steps" else 1, jit_compile, **ways))
    if how == "accum_steps":
        ways["accum_steps"] = 2
    wanted = statistics(trained(without, X[:16], 2 if how == "accum_steps" else 1, jit_compile, **ways))
    for each, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each, other, rtol=2e-5, atol=2e-6)
        assert np.isfinite(each).all()
