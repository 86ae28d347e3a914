"""A wrapped model for inference elsewhere: as a SavedModel, by Keras's `export` and by TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops import GradientAccumulateModel


def functional():
    """Of inputs in a dict, one of them of integers, and outputs in a dict."""
    tokens, extra = keras.Input((6,), dtype="int32", name="tokens"), keras.Input((3,), name="extra")
    words = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(20, 5)(tokens))
    hidden = accumops.AccumBatchNormalization()(keras.layers.Concatenate()([words, extra]))
    outputs = {"a": keras.layers.Dense(3, name="a")(hidden), "b": keras.layers.Dense(1, name="b")(hidden)}
    return keras.Model({"tokens": tokens, "extra": extra}, outputs)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return {"a": self.dense(inputs)}


NETWORKS = {
    "functional": functional,
    "sequential": lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)]),
    "sequential, built by data": lambda: keras.Sequential([keras.layers.Dense(3)]),
    "subclassed": Subclassed,
}


def trained(make, rng):
    model = GradientAccumulateModel(make(), micro_batch_size=4)
    model.compile("adam", "mse")
    extra = rng.standard_normal((16, 3)).astype("float32")
    x = extra
    if make is functional:
        x = {"tokens": rng.integers(0, 20, (16, 6)).astype("int32"), "extra": extra}
    y = tf.nest.map_structure(np.zeros_like, model.predict(x, verbose=0))
    model.fit(x, y, batch_size=8, verbose=0)
    return model, x


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.some_by_default(1)
def test_exported(name, rng, tmp_path):
    model, x = trained(NETWORKS[name], rng)
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    served = loaded.serve(tf.nest.map_structure(lambda each: tf.constant(each[:5]), x))
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b[:5], rtol=1e-6, atol=1e-6), served, model.predict(x, verbose=0)
    )


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_saved_by_tensorflow(name, rng, tmp_path):
    model, x = trained(NETWORKS[name], rng)
    tf.saved_model.save(model, tmp_path / "saved")
    loaded = tf.saved_model.load(tmp_path / "saved")
    served = loaded.signatures["serving_default"]
    _, specs = served.structured_input_signature
    given = {spec.shape.as_list()[1]: name for name, spec in specs.items()}  # by width, as names are TensorFlow's
    results = served(**{given[each.shape[1]]: tf.constant(each[:5]) for each in tf.nest.flatten(x)})
    wanted = tf.nest.flatten(model.predict(x, verbose=0))
    for a, b in zip(tf.nest.flatten(results), wanted, strict=True):
        np.testing.assert_allclose(a, b[:5], rtol=1e-6, atol=1e-6)


def test_export_needs_a_built_model(tmp_path):
    model = GradientAccumulateModel(keras.Sequential([keras.layers.Dense(3)]), accum_steps=2)
    with pytest.raises(ValueError, match="built"):
        model.export(tmp_path / "exported")
