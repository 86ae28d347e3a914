"""Wrapped models are what the wrapped models are: to Keras, to callbacks, to files and to a user's code."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops

X = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 1)).astype("float32")


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(1, name="head"),
        ]
    )


def functional():
    inputs = keras.Input((8, 8, 1), name="image")
    features = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    return keras.Model(inputs, keras.layers.Dense(1, name="head")(features), name="net")


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(4, 3, name="conv")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = keras.layers.Dense(1, name="head")

    def call(self, inputs):
        return self.head(self.pool(self.conv(inputs)))


MODES = ({"accum_steps": 2}, {"micro_batch_size": 4})


NETS = {"sequential": sequential, "functional": functional}
IN_TURN = cross(NETS, MODES, default=lambda *each: each in turns(NETS, MODES))


@pytest.fixture(params=NETS)
def net(request):
    keras.utils.set_random_seed(0)
    return NETS[request.param]()


def wrap(net, mode=MODES[0], *, trained=False):
    model = accumops.GradientAccumulateModel(net, **mode)
    model.compile(keras.optimizers.Adam(0.01), loss=keras.losses.MeanSquaredError(), run_eagerly=True)
    if trained:
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return model


def assert_same_weights(model, other):
    for before, after in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_wrapped_model_has_the_parts_of_the_model(net):
    model = wrap(net)
    assert isinstance(model, accumops.GradientAccumulateModel)
    assert isinstance(model, keras.Function)
    assert type(model).__name__ == "GradientAccumulateModel"
    assert model.model is net
    assert all(mine is its for mine, its in zip(model.inputs + model.outputs, net.inputs + net.outputs, strict=True))
    assert model.layers == net.layers
    assert model.get_layer("conv") is net.get_layer("conv")
    assert model.get_layer(index=-1) is net.layers[-1]
    assert (model.input_shape, model.output_shape) == (net.input_shape, net.output_shape)
    assert model.count_params() == net.count_params()
    assert [variable.path for variable in model.variables] == [variable.path for variable in net.variables]
    with pytest.raises(ValueError, match="No such layer: nothing"):
        model.get_layer("nothing")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing


def test_summaries_name_the_layers(net):
    lines = []
    wrap(net).summary(print_fn=lines.append, expand_nested=True)
    assert all(name in "\n".join(lines) for name in ("conv", "pool", "head"))


def test_freezing_layers_trains_the_others(net):
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=True)
    conv, head = (net.get_layer(name).get_weights()[0] for name in ("conv", "head"))
    model.fit(X, Y, batch_size=8, verbose=0)
    np.testing.assert_array_equal(net.get_layer("conv").get_weights()[0], conv)
    assert np.abs(net.get_layer("head").get_weights()[0] - head).max() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_that_is_frozen_stays_so(frozen):
    net = functional()
    net.trainable = not frozen
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    assert model.trainable is not frozen
    assert len(model.trainable_variables) == len(net.trainable_variables)
    model.trainable = False
    assert net.trainable_variables == []


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.some_by_default(2)
def test_files_of_weights_go_both_ways(net, compiled, tmp_path):
    model = wrap(net, trained=True)
    plain, again = (keras.models.clone_model(net) for _ in range(2))
    if compiled:
        plain.compile(keras.optimizers.Adam(0.01), loss="mse")
        plain.optimizer.build(plain.trainable_variables)
    model.save_weights(tmp_path / "wrapped.weights.h5")
    plain.load_weights(tmp_path / "wrapped.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    wrap(again).load_weights(tmp_path / "plain.weights.h5")
    assert_same_weights(model, plain)
    assert_same_weights(model, again)


def test_tensorflows_checkpoints_of_functional_models_go_both_ways(tmp_path):
    model = wrap(functional(), trained=True)
    plain, again = (keras.models.clone_model(model.model) for _ in range(2))
    tf.train.Checkpoint(model=model).write(str(tmp_path / "wrapped"))
    tf.train.Checkpoint(model=plain).read(str(tmp_path / "wrapped")).expect_partial()
    tf.train.Checkpoint(model=plain).write(str(tmp_path / "plain"))
    tf.train.Checkpoint(model=wrap(again)).read(str(tmp_path / "plain")).expect_partial()
    assert_same_weights(model, plain)
    assert_same_weights(model, again)


@pytest.mark.parametrize(("net", "mode"), IN_TURN, indirect=["net"])
@pytest.mark.some_by_default(1)
def test_saved_models_go_on(net, mode, tmp_path):
    model = wrap(net, mode, trained=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert type(loaded.model) is type(net)
    for each in (model, loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(model)):
        if each is not model:
            each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert_same_weights(model, loaded)


def test_the_legacy_format_keeps_layers_and_weights(net, tmp_path):
    model = wrap(net, trained=True)
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    assert isinstance(loaded, accumops.GradientAccumulateModel)
    assert loaded.accum_steps == 2
    assert_same_weights(model, loaded)
    compiled = keras.models.load_model(tmp_path / "model.h5")
    assert compiled.optimizer.accum_steps == 2
    assert isinstance(compiled.optimizer.inner_optimizer, keras.optimizers.Adam)


@pytest.mark.parametrize(("net", "mode"), IN_TURN, indirect=["net"])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_clones_accumulate(net, mode):
    model = wrap(net, mode)
    clones = [keras.models.clone_model(model)]
    clones.append(
        keras.models.clone_model(model, clone_function=lambda layer: type(layer).from_config(layer.get_config()))
    )
    for clone in clones:
        assert isinstance(clone, accumops.GradientAccumulateModel)
        assert (clone.accum_steps, clone.micro_batch_size) == (model.accum_steps, model.micro_batch_size)
        assert not {id(each) for each in clone.variables} & {id(each) for each in model.variables}
        clone.set_weights(model.get_weights())
        clone.compile(keras.optimizers.Adam(0.01), loss="mse", run_eagerly=True)
        clone.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for clone in clones:
        assert_same_weights(model, clone)


def test_parts_of_a_wrapped_model_make_models(net):
    model = wrap(net, trained=True)
    part = keras.Model(model.inputs, [model.get_layer("conv").output, model.output])
    with tf.GradientTape() as tape:
        features, out = part(X)
    assert tape.gradient(out, features).shape == features.shape
    np.testing.assert_array_equal(out, model(X))
    inputs = keras.Input((8, 8, 1))
    np.testing.assert_allclose(keras.Model(inputs, model(inputs))(X), model(X), rtol=1e-6)


def test_tflite_of_a_wrapped_model_is_that_of_the_model():
    model = wrap(sequential(), trained=True)
    interpreter = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert())
    given, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(given["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], X)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(out["index"]), model(X), atol=1e-6)


def test_structures_of_inputs_and_outputs_and_masks():
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    other = keras.Input((3,), name="other")
    embedded = keras.layers.Embedding(7, 4, mask_zero=True)(tokens)
    net = keras.Model({"tokens": tokens, "other": other}, {"a": embedded, "b": keras.layers.Dense(2, name="b")(other)})
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    data = {"tokens": tf.constant([[1, 2, 0, 0, 0]]), "other": tf.ones([1, 3])}
    assert model.output_names == net.output_names
    assert model.input.keys() == net.input.keys()
    out, its = model(data), net(data)
    assert out.keys() == its.keys()
    np.testing.assert_array_equal(out["a"]._keras_mask, its["a"]._keras_mask)
    assert [spec.shape for spec in keras.tree.flatten(model.input_spec)] == [(None, 3), (None, 5)]


def test_a_policy_of_the_model_is_that_of_its_wrapper():
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="mixed_bfloat16")])
    assert accumops.GradientAccumulateModel(net, accum_steps=2)(tf.ones([1, 3])).dtype == tf.bfloat16
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    finally:
        keras.config.set_dtype_policy("float32")
    assert accumops.GradientAccumulateModel(net, accum_steps=2).dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("change", ["add", "pop"])
def test_layers_that_change_after_wrapping_are_refused(change):
    net = sequential()
    model = wrap(net)
    net.add(keras.layers.Dense(1)) if change == "add" else net.pop()
    with pytest.raises(ValueError, match="changed after it was wrapped"):
        model(X)
    assert wrap(net)(X).shape == net(X).shape


@pytest.mark.parametrize("make", [Subclassed, lambda: keras.Sequential([keras.layers.Dense(2, name="head")])])
def test_errors_of_wrappers_without_graph_name_the_wrapped_model(make):
    model = accumops.GradientAccumulateModel(make(), accum_steps=2)
    assert not isinstance(model, keras.Function)
    with pytest.raises(ValueError, match=r"use `model\.model\.get_layer`"):
        model.get_layer("head")
    with pytest.raises(AttributeError, match=r"'GradientAccumulateModel' object has no attribute 'nothing'$"):
        _ = model.nothing
    assert not hasattr(model, "inputs")
    model.model.tokenizer = "mine"
    with pytest.raises(AttributeError, match=r"use `model\.model\.tokenizer`"):
        _ = model.tokenizer


def test_a_functional_model_with_its_own_call_keeps_it():
    class Doubled(keras.Model):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training=training)

    inputs = keras.Input((3,))
    net = Doubled(inputs, keras.layers.Dense(1)(inputs))
    model = accumops.GradientAccumulateModel(net, accum_steps=2)
    assert not isinstance(model, keras.Function)
    np.testing.assert_array_equal(model(tf.ones([2, 3])), net(tf.ones([2, 3])))


def test_subclasses_of_the_wrapper_wrap_graphs_too(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Mine(accumops.GradientAccumulateModel):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    model = Mine(functional(), accum_steps=2)
    assert isinstance(model, keras.Function)
    model.compile("sgd", loss="mse", run_eagerly=True)
    model.save(tmp_path / "mine.keras")
    assert isinstance(keras.models.load_model(tmp_path / "mine.keras"), Mine)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.some_by_default(1)
def test_a_sequential_that_was_built_after_it_was_wrapped_is_saved_and_loaded(weights_only, tmp_path):
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")

    def wrapped():
        net = keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])
        model = accumops.GradientAccumulateModel(net, accum_steps=2)
        model.compile("adam", "mse")
        return model

    model = wrapped()
    model.fit(x, y, batch_size=4, verbose=0)
    if weights_only:
        model.save_weights(tmp_path / "model.weights.h5")
        again = wrapped()
        again.build((None, 3))
        again.load_weights(tmp_path / "model.weights.h5")
    else:
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert again.get_config().keys() == model.get_config().keys()
        copy = keras.models.clone_model(again)
        assert type(copy) is type(again)
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    if weights_only:
        return
    for each in (model, again):
        each.fit(x, y, batch_size=4, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
