"""The layer that refuses batches that are too large."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops.layers import BatchSizeLimit

L = keras.layers
LIMIT = "at most 4 samples|takes_at_most_4_samples"
MATCH = r"'limit' takes batches of at most 4 samples.*Received: (more|5).*micro_batch_size=4"


def network(**arguments):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,), **arguments), BatchSizeLimit(4, name="limit"), L.Dense(1)])


def wrapped(micro_batch_size):
    return accumops.GradientAccumulateModel(network(), micro_batch_size=micro_batch_size)


def data(samples):
    return np.ones((samples, 3), "float32"), np.zeros((samples, 1), "float32")


def test_calls(mode):
    layer = BatchSizeLimit(4, name="limit")
    for samples in (1, 4):
        x = tf.random.normal([samples, 3])
        np.testing.assert_array_equal(mode(layer)(x), x)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=MATCH):
        mode(layer)(tf.zeros([5, 3]))


def test_a_size_that_only_the_run_knows():
    layer = BatchSizeLimit(4, name="limit")
    function = tf.function(layer, input_signature=[tf.TensorSpec([None, 3])])
    assert function(tf.zeros([4, 3])).shape == (4, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 4 samples"):
        function(tf.zeros([5, 3]))
    any_rank = tf.function(layer, input_signature=[tf.TensorSpec(None)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 4 samples"):
        any_rank(tf.zeros([5, 3]))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
@pytest.mark.some_by_default(2)
def test_training_evaluation_and_prediction(verb, jit_compile):
    model = network()
    model.compile("sgd", "mse", jit_compile=jit_compile)
    x, y = data(8)
    call = getattr(model, verb)
    arguments = (x,) if verb == "predict" else (x, y)
    call(*arguments, batch_size=4, verbose=0)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=LIMIT):
        call(*arguments, batch_size=5, verbose=0)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_under_accumulation_it_sees_micro_batches(jit_compile):
    model = wrapped(4)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    model.fit(*data(10), batch_size=10, verbose=0)
    model = wrapped(5)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=LIMIT):
        model.fit(*data(10), batch_size=10, verbose=0)


def test_structures_masks_and_dtypes():
    layer = BatchSizeLimit(4, name="limit")
    inputs = {"a": tf.constant([1, 2]), "b": [tf.constant([[0.5]], tf.float64), tf.constant(7.0)]}
    outputs = layer(inputs)
    assert [each.dtype for each in keras.tree.flatten(outputs)] == [tf.int32, tf.float64, tf.float32]
    with pytest.raises(ValueError, match=MATCH):
        layer({"a": tf.zeros([2, 3]), "b": [tf.zeros([5, 1])]})
    tokens = keras.Input((6,), dtype="int32")
    hidden = BatchSizeLimit(4)(L.Embedding(5, 2, mask_zero=True)(tokens))
    assert hidden._keras_mask is not None


def test_saved_and_cloned(tmp_path):
    model = network()
    model.save(tmp_path / "model.keras")
    for other in (keras.saving.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)):
        assert other.layers[0].max_batch_size == 4
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    assert exported.serve(tf.zeros([4, 3])).shape == (4, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 4 samples"):
        exported.serve(tf.zeros([5, 3]))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="max_batch_size"):
        BatchSizeLimit(2.5)
    with pytest.raises(ValueError, match="max_batch_size"):
        BatchSizeLimit(0)
    with pytest.raises(ValueError, match=MATCH):
        network(batch_size=5)
