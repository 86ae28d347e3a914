"""Replaced models beside the originals: what they compute, hold and are made of; and the way back."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from accumops.normalization.layer import AccumBatchNormalization
from accumops.normalization.replace import replace_batchnorm_layers, restore_batchnorm_layers
from accumops.training.model import GradientAccumulateModel

BatchNormalization = layers.BatchNormalization
SHIFT = 2.0


def double_sigmoid(x):  # known to Keras by no name
    return 2 * ops.sigmoid(x)


def gelu(x):  # nor this, which is not Keras's
    return 3 * x


@keras.saving.register_keras_serializable(package="test_replace")
class Residual(layers.Layer):
    """A layer whose config has the layers within."""

    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.parts = parts

    def call(self, inputs, training=None):
        x = inputs
        for part in self.parts:
            x = part(x, training=training) if part._call_has_training_arg else part(x)
        return inputs + x

    def get_config(self):
        parts = [keras.saving.serialize_keras_object(part) for part in self.parts]
        return {**super().get_config(), "parts": parts}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "parts": keras.saving.deserialize_keras_object(config["parts"])})


class Scaled(layers.Layer):
    """A layer that is not registered, with an initializer that is not either."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.dense = layers.Dense(3, kernel_initializer=Threes())

    def call(self, inputs, factor=1.0):
        return self.dense(inputs["left"]) + self.rate * factor * inputs["right"][0]

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


class Threes(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.full(shape, 3.0, dtype)


class Coded(layers.Layer):
    """A layer that makes its batch normalization itself."""

    def __init__(self, kind="BatchNormalization", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.norm = BatchNormalization() if kind == "BatchNormalization" else AccumBatchNormalization()

    def call(self, inputs):
        return self.norm(inputs)

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


class Trained(keras.Model):
    """A functional model with a step of its own."""

    def train_step(self, data):
        return {"loss": ops.zeros(())}


class TrainedWith(keras.Model):
    """One with an argument of its own, in its config."""

    def __init__(self, inputs, outputs, rate=1.0, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.rate = rate

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


class Made(keras.Model):
    """A functional model that its constructor makes."""

    def __init__(self, units, **kwargs):
        inputs = keras.Input((3,))
        super().__init__(inputs, BatchNormalization()(layers.Dense(units)(inputs)), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units, "name": self.name}


class MadeAndTrained(Made):
    def train_step(self, data):
        return {"loss": ops.zeros(())}


class Subclassed(keras.Model):
    def __init__(self, normalize=True, **kwargs):
        super().__init__(**kwargs)
        self.normalize = normalize
        self.dense = layers.Dense(3)
        self.norm = BatchNormalization(name="inner") if normalize else layers.LayerNormalization()

    def call(self, inputs):
        return self.norm(self.dense(inputs))

    def get_config(self):
        return {**super().get_config(), "normalize": self.normalize}


def dense_block(units=3, name=None):
    inputs = keras.Input((3,))
    return keras.Model(inputs, BatchNormalization()(layers.Dense(units)(inputs)), name=name)


# Models of one structure each. `data` makes their inputs.


def dict_inputs_and_outputs():
    inputs = {"b": keras.Input((3,), name="b"), "a": keras.Input((3,), name="a")}
    x = BatchNormalization(name="first")(layers.Add()([inputs["b"], layers.Dense(3)(inputs["a"])]))
    return keras.Model(inputs, {"z": BatchNormalization(name="second")(x), "y": (x, layers.Dense(2)(x))})


def list_inputs_and_outputs():
    inputs = [keras.Input((3,)), keras.Input((4,)), keras.Input((5,))]
    x = layers.Concatenate()([BatchNormalization()(each) for each in inputs])
    return keras.Model(inputs, [x, [layers.Dense(1)(x), inputs[1]]])


def optional_input():
    inputs = [keras.Input((3,)), keras.Input((3,), optional=True)]
    return keras.Model(inputs, BatchNormalization()(layers.Dense(3)(inputs[0])) + inputs[1])


def sparse_input():
    inputs = keras.Input((3,), sparse=True)
    return keras.Model(inputs, BatchNormalization()(layers.Dense(3)(inputs)))


def fixed_batch_and_dtype():
    inputs = keras.Input(batch_shape=(4, 3), dtype="int32")
    return keras.Model(inputs, BatchNormalization()(layers.Dense(3)(layers.Rescaling(0.5)(inputs))))


def sequential():
    return keras.Sequential(
        [keras.Input((3,), name="in"), layers.Dense(4), BatchNormalization(), layers.ReLU()], name="net"
    )


def sequential_with_a_layer_twice():
    dense = layers.Dense(3)
    return keras.Sequential([keras.Input((3,)), dense, BatchNormalization(), dense])


def sequential_built_later():
    model = keras.Sequential([layers.Dense(4), BatchNormalization(), keras.Sequential([BatchNormalization()])])
    model.build((None, 3))
    return model


def sequential_of_models():
    return keras.Sequential([dense_block(name="one"), sequential_ending(), dense_block(2, name="two")])


def sequential_ending():
    return keras.Sequential([BatchNormalization(), layers.Dense(3)], name="ending")


def sequential_over_a_structure():
    class Sum(layers.Layer):
        def call(self, inputs):
            return inputs["a"] + inputs["b"]

    model = keras.Sequential([Sum(), layers.Dense(3), BatchNormalization()])
    model({"a": np.zeros((4, 3), "float32"), "b": np.zeros((4, 3), "float32")})
    return model


def nested_models():
    inner = keras.Sequential([keras.Input((3,)), dense_block(name="block"), BatchNormalization()], name="inner")
    middle_input = keras.Input((3,))
    middle = keras.Model(middle_input, BatchNormalization()(inner(middle_input)), name="middle")
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(1)(middle(inputs)))


def shared_nested_model():
    block, inputs = dense_block(name="block"), [keras.Input((3,)), keras.Input((3,))]
    holder_input = keras.Input((3,))
    holder = keras.Model(holder_input, block(holder_input) * 2.0, name="holder")
    return keras.Model(inputs, layers.Subtract()([block(inputs[0]), holder(block(inputs[1]))]))


def layer_shared_with_a_nested_model():
    dense, norm, x, inputs = layers.Dense(3), BatchNormalization(), keras.Input((3,)), keras.Input((3,))
    inner = keras.Model(x, norm(dense(x)))
    return keras.Model(inputs, norm(dense(inner(inputs))))


def nested_model_with_structures():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Model({"a": a, "b": b}, {"sum": BatchNormalization()(a + b), "difference": a - b}, name="inner")
    inputs = keras.Input((3,))
    outputs = inner({"a": inputs, "b": layers.Dense(3)(inputs)})
    return keras.Model(inputs, outputs["sum"] * outputs["difference"])


def shared_batch_normalization():
    norm, inputs = BatchNormalization(), [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, [norm(layers.Dense(3)(norm(inputs[0]))), norm(inputs[1])])


def from_an_intermediate_tensor():
    x = layers.Dense(3)(keras.Input((3,)))
    y = BatchNormalization()(x)
    return keras.Model(x, [layers.Dense(2)(y), y])


def wrapped():
    inputs = keras.Input((5, 3))
    x = layers.TimeDistributed(BatchNormalization(), name="wrapped")(inputs)
    x = layers.TimeDistributed(dense_block(name="wrapped_model"))(x)
    return keras.Model(inputs, layers.Bidirectional(layers.LSTM(2))(x))


def layers_in_a_config():
    inputs = keras.Input((3,))
    parts = [layers.Dense(3), BatchNormalization(), Residual([BatchNormalization()]), dense_block()]
    return keras.Model(inputs, Residual(parts, name="residual")(inputs))


def unregistered_layer():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    x = BatchNormalization()(inputs[0])
    return keras.Model(inputs, Scaled(0.5)({"left": x, "right": [inputs[1], x]}, factor=ops.mean(x)))


def subclassed_model_without_batch_normalization():
    inputs = keras.Input((3,))
    return keras.Model(inputs, BatchNormalization()(Subclassed(normalize=False)(inputs)))


def masks():
    inputs = keras.Input((6,), dtype="int32")
    x = BatchNormalization()(layers.Embedding(7, 4, mask_zero=True)(inputs))
    x = layers.LSTM(3, return_sequences=True)(x)
    x = layers.MultiHeadAttention(2, 3)(query=x, value=x, key=x, use_causal_mask=True)
    return keras.Model(inputs, BatchNormalization()(layers.GlobalAveragePooling1D()(x)))


def operations():
    inputs = keras.Input((4, 3))
    x = BatchNormalization()(inputs)
    x = ops.concatenate([x[:, 1:3], ops.expand_dims(x[:, 0] * np.float32([1, 2, 3]), 1)], axis=1)
    x = ops.where(x > 0, x, 0.1 * x) + ops.sum(x, axis=(1, 2), keepdims=True)
    return keras.Model(inputs, BatchNormalization(axis=1)(ops.transpose(x, (0, 2, 1))))


def functions():
    inputs, factor = keras.Input((3,)), 1.5
    x = layers.Lambda(lambda x, by: factor * SHIFT * x + by, arguments={"by": 1.0}, mask=lambda x, mask: mask)(inputs)
    x = layers.Activation(lambda x: ops.tanh(x) * SHIFT)(BatchNormalization()(x))
    x = layers.Dense(3, activation=double_sigmoid, kernel_initializer=Threes())(x)
    x = layers.Dense(3, activation=gelu)(x)
    return keras.Model(inputs, layers.Lambda(double_sigmoid, output_shape=(3,))(x))


def call_arguments():
    inputs = keras.Input((3,))
    x = BatchNormalization()(layers.Dropout(0.5)(inputs, training=False), training=False)
    return keras.Model(inputs, dense_block()(x, training=False))


def tied_weights():
    inputs, embedding = keras.Input((3,), dtype="int32"), layers.Embedding(5, 4)
    return keras.Model(inputs, ops.matmul(BatchNormalization()(embedding(inputs)), ops.transpose(embedding.embeddings)))


def keras_function():
    tensor = keras.Input((3,))
    function = keras.Function(tensor, ops.relu(tensor) * 2.0, name="function")
    inputs = keras.Input((3,))
    return keras.Model(inputs, BatchNormalization()(function(inputs)))


def configurations():
    inputs = keras.Input((4, 5, 3))
    x = BatchNormalization(axis=1, momentum=0.9, epsilon=0.01, name="axis")(inputs)
    x = BatchNormalization(center=False, gamma_regularizer="l2", gamma_initializer="uniform")(x)
    x = BatchNormalization(scale=False, beta_constraint="non_neg", moving_mean_initializer="ones")(x)
    x = BatchNormalization(synchronized=True, dtype="float64")(x)
    return keras.Model(inputs, BatchNormalization(trainable=False, dtype="mixed_float16")(x))


def frozen():
    inputs = keras.Input((3,))
    blocks = [dense_block(name=f"block{i}") for i in range(3)]
    x = inputs
    for block in blocks:
        x = block(x)
    held = layers.TimeDistributed(BatchNormalization())
    model = keras.Model(inputs, held(layers.Reshape((1, -1))(layers.Dense(4, name="head")(x))))
    blocks[0].trainable = False
    blocks[1].layers[1].trainable = False
    blocks[2].trainable = False
    blocks[2].layers[2].trainable = True
    held.layer.trainable = False
    model.get_layer("head").kernel.trainable = False
    return model


def frozen_whole():
    model = nested_models()
    model.trainable = False
    model.get_layer("middle").get_layer("inner").trainable = True
    return model


def mixed_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return nested_models()
    finally:
        keras.config.set_dtype_policy(policy)


def without_batch_normalization():
    return keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.LayerNormalization()])


def random_layers():
    inputs = keras.Input((4, 4, 3))
    x = layers.GaussianNoise(0.1, seed=1)(layers.RandomFlip()(inputs))
    return keras.Model(inputs, layers.Dropout(0.5)(BatchNormalization()(x)))


def adapted_layers():
    normalization, buckets = layers.Normalization(), layers.Discretization(num_bins=3, output_mode="one_hot")
    normalization.adapt(np.arange(12.0).reshape(4, 3))
    buckets.adapt(np.arange(12.0))
    inputs = keras.Input((3,))
    x = normalization(layers.Normalization(mean=1.0, variance=2.0)(inputs))
    return keras.Model(inputs, [BatchNormalization()(x), buckets(inputs)])


def vocabularies():
    lookup, text = layers.StringLookup(output_mode="multi_hot"), layers.TextVectorization(output_mode="tf_idf")
    lookup.adapt(["cat", "dog", "cat"])
    text.adapt(["a cat", "the dog", "cat and dog"])
    inputs = keras.Input((1,), dtype="string")
    known = layers.StringLookup(vocabulary=["dog", "cat"])(inputs)
    x = layers.Concatenate()([lookup(inputs), text(inputs[:, 0]), layers.Embedding(4, 2)(known)[:, 0]])
    return keras.Model(inputs, BatchNormalization()(x))


def lora():
    model = dense_block()
    model.layers[1].enable_lora(2)
    return model


def quantized():
    model = dense_block()
    model.layers[1].quantize("int8")
    return model


STRUCTURES = [
    dict_inputs_and_outputs,
    list_inputs_and_outputs,
    optional_input,
    sparse_input,
    fixed_batch_and_dtype,
    sequential,
    sequential_with_a_layer_twice,
    sequential_built_later,
    sequential_of_models,
    sequential_over_a_structure,
    nested_models,
    shared_nested_model,
    layer_shared_with_a_nested_model,
    nested_model_with_structures,
    shared_batch_normalization,
    from_an_intermediate_tensor,
    wrapped,
    layers_in_a_config,
    unregistered_layer,
    subclassed_model_without_batch_normalization,
    masks,
    operations,
    functions,
    call_arguments,
    tied_weights,
    keras_function,
    configurations,
    frozen,
    frozen_whole,
    mixed_precision,
    without_batch_normalization,
    random_layers,
    adapted_layers,
    vocabularies,
    lora,
    quantized,
]
# Models whose config is not the same afterwards, and why.
OTHER_CONFIG = {
    "shared_batch_normalization": "calls of one layer are numbered in another order",
    "adapted_layers": "the shape of the data that a layer was adapted to",
    "keras_function": "Keras has no config of it",
}
NETWORKS = {
    name: lambda name=name: getattr(keras.applications, name)(input_shape=(32, 32, 3), weights=None, classes=5)
    for name in ("MobileNetV2", "ResNet50", "EfficientNetV2B0", "DenseNet121")
}


def data(model, rng):
    """A batch of what the model takes."""
    if isinstance(model, keras.Sequential) and model._functional is None:
        return {"a": rng.normal(size=(4, 3)).astype("float32"), "b": rng.normal(size=(4, 3)).astype("float32")}

    def values(tensor):
        shape = (4, *tensor.shape[1:])
        if tensor.dtype == "string":
            return ops.convert_to_tensor(rng.choice(["cat", "dog", "the cow"], size=shape))
        if tensor.dtype == "int32":
            return rng.integers(0, 5, size=shape).astype("int32")
        values = rng.normal(size=shape).astype("float32")
        if tensor.sparse:
            return tf.sparse.from_dense(np.where(values > 0, values, 0))
        return values

    inputs = model.inputs if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(values, inputs)


def randomise(model, rng):
    """Gives weights values that initializers do not: near one for what scales, small for the others."""
    for weight in model.weights:
        if "float" not in weight.dtype or weight.path.partition("/")[0].startswith("normalization"):
            continue
        noise = rng.uniform(0.5, 1.5, weight.shape) if "variance" in weight.name or "gamma" in weight.name else None
        weight.assign(weight + rng.normal(size=weight.shape) * 0.1 if noise is None else noise)


def states(model):
    return [ops.convert_to_numpy(variable) for variable in model.weights] + [
        ops.convert_to_numpy(seed.state) for layer in model._flatten_layers() for seed in layer._seed_generators
    ]


def flags(model):
    return [layer.trainable for layer in model._flatten_layers()], [weight.trainable for weight in model.weights]


def names(model):
    """The names of operations, of layers and of weights by their paths."""
    operations = [operation.name for operation in getattr(model, "operations", [])]
    return operations, [layer.name for layer in model.layers], [weight.path for weight in model.weights]


def count(model, kind):
    return sum(type(layer) is kind for layer in model._flatten_layers())


def assert_equal(ours, theirs):
    keras.tree.assert_same_structure(ours, theirs)
    for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
        one = ops.convert_to_numpy(one)
        assert one.dtype == ops.convert_to_numpy(other).dtype
        np.testing.assert_array_equal(one, ops.convert_to_numpy(other))


def assert_close(ours, theirs):
    """Equal but for what the fused op rounds in another way than Keras's layer."""
    keras.tree.assert_same_structure(ours, theirs)
    for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
        one, other = ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1, np.abs(other).max(initial=0)))


def assert_same(model, copy, batch):
    """The same computation with the same names, state and flags, and nothing in common."""
    assert model is not copy
    assert type(model) is type(copy)
    assert copy.name == model.name
    assert copy.built == model.built
    assert copy.dtype_policy.name == model.dtype_policy.name
    assert names(model) == names(copy)
    assert flags(model) == flags(copy)
    assert_equal(states(model), states(copy))
    assert not {id(each) for each in model.variables} & {id(each) for each in copy.variables}
    assert not {id(each) for each in model._flatten_layers()} & {id(each) for each in copy._flatten_layers()}
    outputs = copy(batch)
    assert all(np.isfinite(ops.convert_to_numpy(each)).all() for each in keras.tree.flatten(outputs))
    assert_close(outputs, model(batch))


@pytest.fixture(params=[pytest.param(make, id=make.__name__) for make in STRUCTURES])
def structure(request, rng):
    keras.utils.set_random_seed(0)
    model = request.param()
    randomise(model, rng)
    return model


@pytest.mark.some_by_default(8)
def test_same_model(structure, rng, recwarn, request):
    batch = data(structure, rng)
    config = None if request.node.callspec.params["structure"].__name__ in OTHER_CONFIG else structure.get_config()
    normalizations = count(structure, BatchNormalization)
    before = structure.get_weights()
    recwarn.clear()
    replaced = replace_batchnorm_layers(structure, accum_steps=4)
    assert not [str(each.message) for each in recwarn.list]
    assert_same(structure, replaced, batch)
    assert count(replaced, BatchNormalization) == 0
    assert count(replaced, AccumBatchNormalization) == normalizations
    accum_steps = {each.accum_steps for each in replaced._flatten_layers() if isinstance(each, AccumBatchNormalization)}
    assert accum_steps <= {4}

    restored = restore_batchnorm_layers(replaced)
    assert count(restored, AccumBatchNormalization) == 0
    assert_same(structure, restored, batch)
    assert_equal(structure.get_weights(), before)
    if config is not None:
        # Every layer, call and argument.
        assert restored.get_config() == config
        assert structure.get_config() == config


# Their kinds of layers and joins are in `test_same_model`.
@pytest.mark.exhaustive
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in NETWORKS.items()])
def test_same_network(make, rng, tmp_path):
    keras.utils.set_random_seed(0)
    model = make()
    randomise(model, rng)
    for layer in model.layers[:20:3]:
        layer.trainable = False
    batch = rng.uniform(0, 255, size=(2, 32, 32, 3)).astype("float32")
    replaced = replace_batchnorm_layers(model)
    assert_same(model, replaced, batch)
    assert count(replaced, AccumBatchNormalization) == count(model, BatchNormalization) > 30
    assert count(replaced, BatchNormalization) == 0
    restored = restore_batchnorm_layers(replaced)
    assert_same(model, restored, batch)
    assert restored.get_config() == model.get_config()

    replaced.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert count(loaded, AccumBatchNormalization) == count(model, BatchNormalization)
    assert_close(loaded(batch), model(batch))


def test_configuration_of_a_layer():
    model = configurations()
    replaced = replace_batchnorm_layers(model, accum_steps=3)
    own = {"accum_steps": 3, "statistics": "micro_batch", "every": None, "memory": None}
    for layer, accumulating in zip(model.layers[1:], replaced.layers[1:], strict=True):
        assert accumulating.get_config() == {**layer.get_config(), **own}
        assert accumulating.dtype_policy == layer.dtype_policy
        for weight, new in zip(layer.weights, accumulating.weights, strict=True):
            assert (new.regularizer is None) == (weight.regularizer is None)
            assert (new.constraint is None) == (weight.constraint is None)


def test_statistics_of_the_window():
    model = configurations()
    own = {"accum_steps": None, "statistics": "window", "every": 3, "memory": None}
    replaced = replace_batchnorm_layers(model, statistics="window", every=3)
    for layer, accumulating in zip(model.layers[1:], replaced.layers[1:], strict=True):
        assert accumulating.get_config() == {**layer.get_config(), **own}
    for layer, restored in zip(model.layers, restore_batchnorm_layers(replaced).layers, strict=True):
        assert restored.get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"statistics": "batch"}, ValueError, "'micro_batch' or 'window'"),
        ({"statistics": "window", "every": 0}, ValueError, "`every` must be at least 1"),
        ({"statistics": "window", "every": 1.5}, TypeError, "`every` must be an int"),
        ({"statistics": "window", "memory": "much"}, ValueError, "like '4GB'"),
        ({"statistics": "window", "memory": 1.5}, TypeError, "`memory` must be"),
        ({"statistics": "window", "every": 1, "memory": "1GB"}, ValueError, "`every` or `memory`, not both"),
        ({"every": 1}, ValueError, "`every` is for statistics='window'"),
    ],
)
def test_statistics_that_there_are_not(arguments, error, message):
    with pytest.raises(error, match=message):
        replace_batchnorm_layers(configurations(), **arguments)
    with pytest.raises(error, match=message):
        AccumBatchNormalization(**arguments)


def test_layers_used_several_times_stay_one():
    replaced = replace_batchnorm_layers(layer_shared_with_a_nested_model())
    inner = next(layer for layer in replaced.layers if isinstance(layer, keras.Model))
    assert inner.layers[2] in replaced.layers
    assert isinstance(inner.layers[2], AccumBatchNormalization)


def test_state_of_random_layers(rng):
    model = random_layers()
    batch = rng.normal(size=(4, 4, 4, 3)).astype("float32")
    model(batch, training=True)  # which moves the seeds on
    replaced = replace_batchnorm_layers(model)
    restored = restore_batchnorm_layers(replaced)
    assert_equal(restored(batch, training=True), model(batch, training=True))


def test_what_is_kept():
    class Mine(BatchNormalization):
        pass

    inputs = keras.Input((3,))
    own = AccumBatchNormalization(accum_steps=7, name="own")
    model = keras.Model(inputs, BatchNormalization(name="theirs")(own(Mine(name="mine")(inputs))))
    replaced = replace_batchnorm_layers(model, accum_steps=2)
    assert [type(layer) for layer in replaced.layers[1:]] == [Mine, AccumBatchNormalization, AccumBatchNormalization]
    assert [replaced.get_layer(name).accum_steps for name in ("own", "theirs")] == [7, 2]
    restored = restore_batchnorm_layers(replaced)
    assert [type(layer) for layer in restored.layers[1:]] == [Mine, BatchNormalization, BatchNormalization]


def test_a_compiled_model_comes_out_uncompiled():
    model = dense_block()
    model.compile("adam", loss=lambda y, y_pred: ops.mean(y_pred))
    assert not replace_batchnorm_layers(model).compiled
    assert model.compiled
    inputs = keras.Input((5, 3))
    wrapping = keras.Model(inputs, layers.TimeDistributed(model)(inputs))
    assert count(replace_batchnorm_layers(wrapping), AccumBatchNormalization) == 1


def test_sequential_that_is_not_built(rng):
    model = keras.Sequential([layers.Dense(3), BatchNormalization(), layers.TimeDistributed(BatchNormalization())])
    replaced = replace_batchnorm_layers(model, accum_steps=2)
    assert not replaced.built
    assert not replaced.weights
    assert count(replaced, AccumBatchNormalization) == 2
    replaced(rng.normal(size=(2, 5, 3)))
    assert len(replaced.weights) == 10


def test_rematerialization_is_kept():
    with keras.RematScope(mode="full"):
        model = dense_block()
    replaced = replace_batchnorm_layers(model)
    assert [layer._remat_mode.mode for layer in replaced.layers] == ["full"] * 3


class TestClassesOfModels:
    def test_with_the_constructor_of_a_functional_model(self):
        inputs = keras.Input((3,))
        replaced = replace_batchnorm_layers(Trained(inputs, BatchNormalization()(inputs), name="mine"))
        assert type(replaced) is Trained
        assert replaced.name == "mine"
        assert count(replaced, AccumBatchNormalization) == 1

    def test_with_arguments_in_the_config(self):
        inputs = keras.Input((3,))
        replaced = replace_batchnorm_layers(TrainedWith(inputs, BatchNormalization()(inputs), rate=0.5))
        assert type(replaced) is TrainedWith
        assert replaced.rate == 0.5

    def test_sequential(self):
        class Mine(keras.Sequential):
            pass

        replaced = replace_batchnorm_layers(Mine([keras.Input((3,)), BatchNormalization()]))
        assert type(replaced) is Mine
        assert count(replaced, AccumBatchNormalization) == 1

    def test_with_another_constructor(self, rng):
        model, x = Made(4), rng.normal(size=(2, 3)).astype("float32")
        replaced = replace_batchnorm_layers(model)
        assert type(replaced) is type(dense_block())
        assert_equal(replaced(x), model(x))
        with pytest.raises(ValueError, match=r"would lose `train_step` of MadeAndTrained.*`inputs`, `outputs`"):
            replace_batchnorm_layers(MadeAndTrained(4))


def with_a_layer_outside():
    model = dense_block()
    model.extra = layers.Dense(3, name="extra")
    return model


def with_an_own_weight():
    model = dense_block()
    model.own = model.add_weight(shape=(2,), name="own")
    return model


def with_nested(make):
    def nest():
        inputs = keras.Input((3,))
        return keras.Model(inputs, make()(inputs))

    return nest


def with_shared_in_a_wrapper():
    dense, inputs = layers.Dense(3, name="dense"), keras.Input((3,))
    x = layers.TimeDistributed(dense, name="wrapper")(layers.Reshape((1, 3))(dense(inputs)))
    return keras.Model(inputs, x)


def with_a_free_variable():
    inputs, variable = keras.Input((3,)), keras.Variable(np.ones((3, 3)), name="free")
    return keras.Model(inputs, ops.matmul(inputs, variable))


def with_a_layer_without_config():
    class Opaque(layers.Layer):
        def __init__(self, table, **kwargs):
            super().__init__(**kwargs)
            self.table = table

        def call(self, inputs):
            return inputs * 2

    inputs = keras.Input((3,))
    return keras.Model(inputs, Opaque(object(), name="opaque")(inputs))


@pytest.mark.parametrize("convert", [replace_batchnorm_layers, restore_batchnorm_layers])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Dense(3), TypeError, "must be a functional or Sequential keras.Model. Received: <Dense"),
        (lambda: Subclassed(name="mine"), ValueError, "'mine' is a subclassed model.* code of Subclassed knows"),
        (lambda: GradientAccumulateModel(dense_block(), accum_steps=2), ValueError, "model that it wraps, its `model`"),
        (with_a_layer_outside, ValueError, "has the layer 'extra' outside its graph"),
        (with_an_own_weight, ValueError, "has 7 weights, and its copy 6"),
        (with_shared_in_a_wrapper, ValueError, "'dense' is used in several places, one of them within 'wrapper'"),
        (with_a_free_variable, ValueError, "variable 'free' is an operation's argument"),
        (with_a_layer_without_config, ValueError, r"layer 'opaque' \(Opaque\) cannot be made again from its config"),
    ],
)
def test_errors(convert, make, error, message):
    with pytest.raises(error, match=message):
        convert(make())


@pytest.mark.parametrize(
    ("convert", "make", "message"),
    [
        (
            replace_batchnorm_layers,
            lambda: Coded(name="block"),
            "'block' makes its BatchNormalization '.*' in the code of Coded: there, use AccumBatchNormalization",
        ),
        (
            replace_batchnorm_layers,
            lambda: Subclassed(name="model"),
            "'model' makes its BatchNormalization 'inner' in the code of Subclassed: there, use Accum",
        ),
        (
            restore_batchnorm_layers,
            lambda: Coded("accumulating", name="block"),
            "'block' makes its AccumBatchNormalization '.*' in the code of Coded: there, use BatchNormalization",
        ),
    ],
)
def test_batch_normalization_in_code(convert, make, message):
    with pytest.raises(ValueError, match=message):
        convert(with_nested(make)())


@pytest.mark.parametrize(("accum_steps", "error"), [(0, ValueError), (1.5, TypeError)])
def test_wrong_accum_steps(accum_steps, error):
    with pytest.raises(error, match="accum_steps"):
        replace_batchnorm_layers(without_batch_normalization(), accum_steps)
