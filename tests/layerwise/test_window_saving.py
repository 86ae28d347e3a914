"""Models with window statistics that are saved, loaded, copied and taken back, and steps that fail."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from whole_batches import windows_of

import accumops

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(36, 5)).astype("float32"), RNG.normal(size=(36, 2)).astype("float32")


def network():
    keras.utils.set_random_seed(1)
    parts = [L.Dense(6), L.BatchNormalization(), L.Dense(4), L.BatchNormalization()]
    return keras.Sequential([keras.Input((5,)), *parts, L.Dense(2)])


def wrapped(net, run_eagerly=True):
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=run_eagerly, jit_compile=False)
    return model


def fit(model, epochs=1):
    return model.fit(X, Y, batch_size=12, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def check_equal(net, other):
    for mine, its in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, its)


def in_a_file(model, path):
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


def in_weights(model, path):
    model.save_weights(path / "model.weights.h5")
    other = wrapped(windows_of(network(), every=1))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path / "model.weights.h5")
    return other


def in_a_checkpoint(model, path):
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(path / "checkpoint"))
    other = wrapped(windows_of(network(), every=1))
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(saved).assert_existing_objects_matched()
    return other


@pytest.mark.parametrize("saved", [in_a_file, pytest.param(in_weights, marks=pytest.mark.exhaustive), in_a_checkpoint])
@pytest.mark.some_by_default(1)
def test_training_goes_on_where_it_was_saved(saved, tmp_path):
    model = wrapped(windows_of(network(), every=1))
    fit(model)
    other = saved(model, tmp_path)
    assert [(each.statistics, each.every) for each in other.normalizations()] == [("window", 1)] * 2
    check_equal(other.model, model.model)
    assert fit(other) == fit(model)
    check_equal(other.model, model.model)


def test_configs_have_what_the_layer_was_made_with():
    for settings in ({"statistics": "window", "every": 3}, {"statistics": "window", "memory": "1GB"}, {}):
        layer = accumops.AccumBatchNormalization(**settings)
        wanted = {"statistics": "micro_batch", "every": None, "memory": None} | settings
        copy = accumops.AccumBatchNormalization.from_config(layer.get_config())
        assert {name: getattr(copy, name) for name in wanted} == wanted
    old = accumops.AccumBatchNormalization().get_config()
    for name in ("statistics", "every", "memory"):  # a file of an earlier version has none of them
        del old[name]
    assert accumops.AccumBatchNormalization.from_config(old).statistics == "micro_batch"


@pytest.mark.exhaustive
def test_clones_and_copies():
    net = windows_of(network(), every=3)
    for copy in (keras.models.clone_model(net), windows_of(accumops.restore_batchnorm_layers(net), every=3)):
        layers = [each for each in copy.layers if isinstance(each, accumops.AccumBatchNormalization)]
        assert [(each.statistics, each.every) for each in layers] == [("window", 3)] * 2
        copy.set_weights(net.get_weights())
        fit(wrapped(copy))


def test_the_way_back():
    model = wrapped(windows_of(network()))
    fit(model)
    restored = accumops.restore_batchnorm_layers(model.model)
    kinds = [type(each) for each in restored.layers if "normalization" in each.name]
    assert kinds == [keras.layers.BatchNormalization] * 2
    check_equal(restored, model.model)
    np.testing.assert_allclose(restored(X), model(X), rtol=1e-6, atol=1e-6)
    plain = keras.Sequential.from_config(restored.get_config())  # nothing of accumops is in it
    assert [type(each) for each in plain.layers if "normalization" in each.name] == kinds


def test_replaced_layers_of_micro_batches_can_become_those_of_windows():
    """Only Keras's own layers are replaced: the way leads over them."""
    micro = accumops.replace_batchnorm_layers(network())
    kinds = [each.statistics for each in windows_of(micro).layers if hasattr(each, "statistics")]
    assert kinds == ["micro_batch"] * 2
    back = windows_of(accumops.restore_batchnorm_layers(micro))
    assert [each.statistics for each in back.layers if hasattr(each, "statistics")] == ["window"] * 2


@keras.saving.register_keras_serializable(package="tests")
class Fragile(keras.layers.Layer):
    """Fails forward or backward for inputs that are too large, and counts its calls.

    Args:
        backward: Whether it fails in its gradient.
    """

    def __init__(self, backward, **kwargs):
        super().__init__(**kwargs)
        self.backward = backward
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs):
        self.calls.assign_add(1.0)

        def check(x, message):
            with tf.control_dependencies([tf.debugging.assert_less(tf.abs(x), 100.0, message=message)]):
                return tf.identity(x)

        @tf.custom_gradient
        def fragile(x):
            def gradient(upstream):
                with tf.control_dependencies([check(x, "backward")] if self.backward else []):
                    return tf.identity(upstream)

            return (x if self.backward else check(x, "forward")), gradient

        return fragile(inputs)

    def get_config(self):
        return {**super().get_config(), "backward": self.backward}


@pytest.mark.parametrize(
    ("where", "backward", "run_eagerly"),
    [
        ("first", False, True),
        ("last", True, True),
        ("last", False, False),
        pytest.param("last", False, True, marks=pytest.mark.exhaustive),
        pytest.param("last", True, False, marks=pytest.mark.exhaustive),
        pytest.param("first", False, False, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.some_by_default(1)
def test_a_failed_step_leaves_all_as_it_was(backward, where, run_eagerly):
    """In the second of three micro-batches. The next step is as if there had been none."""

    def model():
        keras.utils.set_random_seed(1)
        fragile = Fragile(backward)
        parts = [L.Dense(5), L.BatchNormalization(), L.Dense(5), L.BatchNormalization(), L.Dense(2)]
        parts.insert({"first": 0, "last": 4}[where], fragile)
        return wrapped(windows_of(keras.Sequential([keras.Input((5,)), *parts]), every=1), run_eagerly)

    broken = X[:12].copy()
    broken[7] = 1e6 if where == "first" else 1e30  # normalization takes the scale out of other values
    failed, untouched = model(), model()
    for each in failed, untouched:
        each.train_on_batch(X[:12], Y[:12])
    variables = [*failed.model.variables, *failed.optimizer.inner_optimizer.variables]
    before = [each.numpy() for each in variables]
    with pytest.raises(tf.errors.InvalidArgumentError, match="backward" if backward else "forward"):
        failed.train_on_batch(broken * (1.0 if where == "first" else np.inf), Y[:12])
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    for each in failed, untouched:
        each.train_on_batch(X[12:24], Y[12:24])
    check_equal(failed.model, untouched.model)
