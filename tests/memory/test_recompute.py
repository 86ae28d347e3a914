"""Recompute: gradients and state of a call whose gradient computes it again are those of the call, to the bit."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops

L = keras.layers
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 6, 6, 4)).astype("float32")
SEQUENCES = RNG.normal(size=(8, 5, 4)).astype("float32")


@pytest.fixture(autouse=True)
def _sums_in_their_order():
    """Has TensorFlow leave sums of gradients as they are: its graph optimizer gives sums of sums another order."""
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": True})


def convolutional(inputs):
    hidden = L.Conv2D(4, 3, padding="same", activity_regularizer="l2")(inputs)
    hidden = L.BatchNormalization()(hidden)
    hidden = L.Dropout(0.5, seed=1)(L.ReLU()(hidden))
    return L.GroupNormalization(2)(L.Add()([hidden, inputs]))


def attention(inputs):
    hidden = L.LayerNormalization()(inputs)
    hidden = L.Add()([L.MultiHeadAttention(2, 2, dropout=0.5, seed=2)(hidden, hidden), inputs])
    return L.Dropout(0.5, seed=3)(L.Dense(4, activation="gelu")(hidden))


def recurrent(inputs):
    return L.LSTM(4, return_sequences=True, dropout=0.5, seed=4)(inputs)


def accumulating(inputs):
    return accumops.AccumBatchNormalization()(L.Conv2D(4, 3, padding="same")(inputs))


BLOCKS = {
    "convolutional": (convolutional, IMAGES),
    "attention": (attention, SEQUENCES),
    "recurrent": (recurrent, SEQUENCES),
    "accumulating": (accumulating, IMAGES),
}


def model_of(block, x, wrap=lambda part: part, blocks=2):
    """Blocks, each a model of its own that may be wrapped, and a head."""
    keras.utils.set_random_seed(0)
    inputs = hidden = keras.Input(x.shape[1:])
    for _ in range(blocks):
        inner = keras.Input(x.shape[1:])
        hidden = wrap(keras.Model(inner, block(inner)))(hidden)
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(hidden)))


def results(model, x, mode=lambda function: function, call=None):
    """The gradients of a training step with respect to inputs and weights, and all variables after it."""
    return training_steps(model, mode, call)(x)


def training_steps(model, mode, call=None):
    """A function that makes a step and returns its `results`. It is traced once."""

    def step(x):
        floats = [each for each in keras.tree.flatten(x) if each.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = keras.tree.flatten((call or model)(x, training=True))
            loss = tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32) ** 2) for output in outputs])
            loss += sum(tf.cast(each, tf.float32) for each in model.losses)
        return loss, tape.gradient(loss, [*floats, *(variable.value for variable in model.trainable_variables)])

    step = mode(step)

    def results(x):
        loss, gradients = step(keras.tree.map_structure(tf.constant, x))
        return loss, gradients, [np.asarray(variable) for variable in model.variables]

    return results


def assert_same(one, other, tolerance=0.0):
    """Compares all tensors, relative to the largest value of all."""
    pairs = list(zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True))
    assert [mine is None for mine, _ in pairs] == [its is None for _, its in pairs]
    pairs = [[np.asarray(tf.convert_to_tensor(each)) for each in pair] for pair in pairs if pair[0] is not None]
    largest = max(np.abs(its).max(initial=0).astype("float64") for _, its in pairs)
    for mine, its in pairs:
        np.testing.assert_allclose(mine, its, rtol=0, atol=tolerance * largest)


WAYS = ["layer", "function", "segments", "cheap"]
# Each kind and each way once. XLA compiles for long.
EAGER = [("attention", "cheap"), ("recurrent", "segments")]
GRAPHS = [("accumulating", "function"), ("convolutional", "layer")]
CASES = cross(
    BLOCKS,
    WAYS,
    ["eager", "graph", "xla"],
    default=lambda kind, how, mode: (kind, how) in {"eager": EAGER, "graph": GRAPHS, "xla": []}[mode],
)


@pytest.mark.parametrize(("kind", "how", "mode"), CASES, indirect=["mode"])
@pytest.mark.some_by_default(1)
def test_gradients_and_state_are_those_without(kind, how, mode):
    block, x = BLOCKS[kind]
    plain = model_of(block, x)
    wrap = accumops.Recompute if how == "layer" else lambda part: part
    model = model_of(block, x, wrap)
    call = None
    if how == "function":
        call = accumops.recompute(model)
    elif how == "segments":
        accumops.recompute_layers(model, segments=lambda layer: isinstance(layer, L.Dropout | L.Conv2D | L.LSTM))
    elif how == "cheap":
        accumops.recompute_layers(model, policy="cheap")
    plain_step, step = training_steps(plain, mode), training_steps(model, mode, call)
    for _ in range(2):  # the state of the first step is where the second starts
        want, got = plain_step(x), step(x)
        in_blocks = how in ("layer", "function")
        # Where a cut is between a tensor and its uses, sums of more than two gradients have another order.
        assert_same(got[:2], want[:2], tolerance=0.0 if in_blocks and mode.name != "xla" else 1e-6)
        assert_same(got[2], want[2], tolerance=2e-7 if mode.name == "xla" else 0.0)
    assert np.abs(want[1][0]).max() > 0


@pytest.mark.parametrize("kind", cross(BLOCKS, default=lambda kind: kind == "convolutional"))
@pytest.mark.exhaustive
def test_as_the_graph_optimizer_leaves_it(kind):
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": True})
    block, x = BLOCKS[kind]
    want = results(model_of(block, x), x, tf.function)
    got = results(model_of(block, x, accumops.Recompute), x, tf.function)
    assert_same(got[:2], want[:2], tolerance=1e-6)
    assert_same(got[2], want[2])


class Block(L.Layer):
    """A layer with arguments of all kinds."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(4, use_bias=False)
        self.dropout = L.Dropout(0.5, seed=1)
        self.norm = L.BatchNormalization()

    def call(self, inputs, other=None, scale=1, flip=False, training=None):
        hidden = self.norm(self.dense(inputs["a"]), training=training)
        if other is not None:
            hidden = hidden + other[0]
        hidden = self.dropout(-hidden if flip else hidden, training=training)
        return {"out": hidden * scale, "nothing": None, "also": (inputs["b"], 3)}


ARGUMENTS = {"none": {}, "plain ones": {"scale": 3, "flip": True}, "tensors": {"other": True}}
IN_TURN = turns(ARGUMENTS, ["eager", "graph"])


@pytest.mark.parametrize(
    ("arguments", "mode"),
    cross(ARGUMENTS, ["eager", "graph", "xla"], default=lambda *each: each in IN_TURN),
    indirect=["mode"],
)
@pytest.mark.some_by_default(1)
def test_functions_with_arguments_of_all_kinds(arguments, mode):
    a, b = tf.constant(SEQUENCES[:, 0]), tf.constant([1, 2])
    arguments = ARGUMENTS[arguments]
    if "other" in arguments:
        arguments = {"other": [tf.constant(SEQUENCES[:, 1])]}

    def run(wrap):
        keras.utils.set_random_seed(0)
        block, factor, plain = Block(), keras.Variable(2.0), tf.Variable(3.0)
        block({"a": a, "b": b})

        def function(inputs, factor, **kwargs):
            outputs = block(inputs, training=True, **kwargs)
            assert outputs["nothing"] is None
            return outputs | {"out": outputs["out"] * factor * plain}

        wrapped = wrap(function)

        def step(a):
            with tf.GradientTape() as tape:
                tape.watch(a)
                outputs = wrapped({"a": a, "b": b}, factor, **arguments)
                loss = tf.reduce_sum(outputs["out"] ** 2)
            assert outputs["nothing"] is None
            assert outputs["also"][1] == 3
            sources = [a, block.dense.trainable_variables[0].value, factor.value, plain]
            return tape.gradient(loss, sources), outputs["also"][0]

        gradients, passed_on = mode(step)(a)
        np.testing.assert_array_equal(passed_on, b)
        return gradients, [np.asarray(variable) for variable in block.variables]

    (want, want_state), (got, state) = run(lambda function: function), run(accumops.recompute)
    assert_same(got, want, tolerance=2e-7 if mode.name == "xla" else 0.0)
    assert_same(state, want_state, tolerance=1e-7 if mode.name == "xla" else 0.0)


@pytest.mark.parametrize("mode", cross(["eager", "graph", "xla"], default=lambda mode: mode == "graph"), indirect=True)
def test_masks_go_in_and_out(mode):
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0]])

    def model(wrap):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,), dtype="int32")
        embedded = wrap(keras.Sequential([L.Embedding(9, 4, mask_zero=True), L.Dropout(0.5, seed=1)]))(inputs)
        return keras.Model(inputs, L.GlobalAveragePooling1D()(wrap(L.LSTM(3, return_sequences=True))(embedded)))

    def step(model):
        def run(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True) ** 2)
            return loss, tape.gradient(loss, [variable.value for variable in model.trainable_variables])

        return mode(run)(tf.constant(tokens))

    assert_same(step(model(accumops.Recompute)), step(model(lambda layer: layer)), 1e-6 if mode.name == "xla" else 0.0)


def test_sparse_gradients_stay_sparse():
    layer = accumops.Recompute(L.Embedding(9, 4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.constant([1, 2, 2])) ** 2)
    gradient = tape.gradient(loss, layer.layer.embeddings.value)
    assert isinstance(gradient, tf.IndexedSlices)
    np.testing.assert_array_equal(gradient.indices, [1, 2, 2])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.exhaustive)])
def test_mixed_precision(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        block, x = BLOCKS["attention"]
        want = results(model_of(block, x, blocks=1), x, tf.function)
        assert_same(results(model_of(block, x, accumops.Recompute, blocks=1), x, tf.function), want)
        model = accumops.recompute_layers(model_of(block, x, blocks=1), policy="cheap")
        assert_same(results(model, x, tf.function), want, tolerance=2**-8)
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_a_float32_layer_in_a_model_of_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:

        def model(wrap):
            keras.utils.set_random_seed(0)
            inputs = keras.Input((4,))
            inner = keras.Sequential([L.Dense(4), L.BatchNormalization(dtype="float32"), L.Dense(4, dtype="float32")])
            return keras.Model(inputs, L.Dense(2)(wrap(inner)(inputs)))

        plain, wrapped = model(lambda part: part), model(accumops.Recompute)
        for each in (plain, wrapped):
            each.set_weights([weight + 1e-3 for weight in each.get_weights()])  # no values of bfloat16
        cut = accumops.recompute_layers(model(lambda part: part), segments=lambda layer: True)
        cut.set_weights(plain.get_weights())
        x = SEQUENCES[:, 0]
        want = results(plain, x)
        assert_same(results(wrapped, x), want)
        assert_same(results(cut, x), want)
    finally:
        keras.mixed_precision.set_global_policy("float32")


@pytest.mark.parametrize("change", ["freeze", "lora", "unfreeze"])
@pytest.mark.some_by_default(1)
def test_layers_that_change_between_calls(change):
    def changed(model):
        dense = next(layer for layer in model._flatten_layers() if isinstance(layer, L.Dense) and layer.units == 4)
        if change == "lora":
            dense.enable_lora(2)
            for part in (dense.lora_kernel_a, dense.lora_kernel_b):
                part.assign(tf.ones_like(part))
        else:
            dense.trainable = change == "unfreeze"

    block, x = BLOCKS["attention"]
    models = model_of(block, x), model_of(block, x, accumops.Recompute)
    for model in models:
        if change == "unfreeze":
            next(layer for layer in model._flatten_layers() if isinstance(layer, L.Dense)).trainable = False
        model(x, training=True)
        changed(model)
    assert_same(results(models[1], x), results(models[0], x))


def test_gradients_of_second_order(mode):
    dense = L.Dense(3, activation="tanh")
    dense.build((None, 4))
    x = tf.constant(SEQUENCES[:, 0])

    def step(call):
        def run(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = tf.reduce_sum(call(x) ** 2)
                slope = tf.reduce_sum(inner.gradient(y, x) ** 2)
            return outer.gradient(slope, [x, *(variable.value for variable in dense.trainable_variables)])

        return mode(run)(x)

    assert_same(step(accumops.recompute(dense)), step(dense), 1e-6)


def test_within_stateless_call():
    block, x = BLOCKS["convolutional"]
    found = []
    for model in (model_of(block, x), accumops.recompute_layers(model_of(block, x), segments=3)):
        with tf.GradientTape() as tape:
            values = [tf.identity(variable * 2) for variable in model.trainable_variables]
            tape.watch(values)
            state = [tf.identity(variable) for variable in model.non_trainable_variables]
            outputs, state, losses = model.stateless_call(values, state, x, training=True, return_losses=True)
            loss = tf.reduce_sum(outputs**2) + tf.add_n(losses)
        found.append((outputs, state, tape.gradient(loss, values)))
    assert_same(found[1], found[0])


def test_a_persistent_tape_and_two_calls():
    block, x = BLOCKS["convolutional"]
    found = []
    for wrap in (lambda part: part, accumops.Recompute):
        model = model_of(block, x, wrap)
        with tf.GradientTape(persistent=True) as tape:
            one = tf.reduce_sum(model(x, training=True) ** 2)
            two = tf.reduce_sum(model(x, training=True) ** 3)
        weights = [variable.value for variable in model.trainable_variables]
        found.append([tape.gradient(loss, weights) for loss in (two, one, two)])
    assert_same(found[1], found[0])


def products(model, x):
    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    program = step.experimental_get_compiler_ir(tf.constant(x))(stage="optimized_hlo")
    return len(re.findall(r" dot\(", program))


@pytest.mark.parametrize("backend", ["fused", pytest.param("reference", marks=pytest.mark.exhaustive)], indirect=True)
def test_xla_computes_products_again(backend):
    block, x = BLOCKS["attention"]
    once = products(model_of(block, x, blocks=1), x)
    assert products(model_of(block, x, accumops.Recompute, blocks=1), x) > once + 3
    assert products(accumops.recompute_layers(model_of(block, x, blocks=1), policy="cheap"), x) <= once + 1


class Random(L.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


class Assigning(L.Layer):
    def __init__(self, name=None):
        super().__init__(name=name)
        self.count = [tf.Variable(0.0)]

    def call(self, inputs):
        self.count[0].assign_add(1.0)
        return inputs


@pytest.mark.parametrize("layer", [Random(name="noise"), Assigning(name="noise")])
def test_what_cannot_run_twice_is_refused_with_the_layers_name(layer):
    model = keras.Sequential([keras.Input((4,)), L.Dense(4), layer])
    with pytest.raises(ValueError, match=r"'noise'.*cannot be run again"):
        accumops.Recompute(model)(tf.ones([2, 4]))


def test_a_gradient_that_would_be_lost_is_an_error():
    dense = L.Dense(4)
    x = tf.constant(SEQUENCES[:, 0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        other = x * 2
        with pytest.raises(ValueError, match="Pass the tensor as an argument"):
            accumops.recompute(lambda x: dense(x) + other)(x)
    assert other is not None


def test_a_loss_within_a_function_is_an_error():
    dense = L.Dense(4, activity_regularizer="l2")
    with pytest.raises(ValueError, match=r"accumops\.Recompute"):
        accumops.recompute(lambda x: dense(x))(tf.constant(SEQUENCES[:, 0]))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="callable"):
        accumops.recompute(3)
    with pytest.raises(ValueError, match="layer"):
        accumops.Recompute(3)
