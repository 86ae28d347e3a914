"""Models that recompute: trained, saved and wrapped like any other."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns
from sklearn import datasets
from tensorflow.python.eager import context
from test_recompute import BLOCKS, IMAGES, Assigning, assert_same, model_of, results

import accumops
from accumops.adapters.keras_functional import nodes_of

L = keras.layers
LABELS = np.arange(8) % 2


@pytest.fixture(autouse=True)
def _sums_in_their_order():
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": True})


def operation(rng, seed, one, other, shared):
    """The output of some layer or operation."""
    kinds = (
        lambda: L.Dense(6, activation=(None, "gelu", "relu")[seed % 3])(one),
        lambda: L.BatchNormalization()(one),
        lambda: L.Dropout(0.5, seed=seed)(one),
        lambda: L.Add()([one, other]),
        lambda: shared[int(rng.integers(2))](one),
        lambda: one * 0.5 + keras.ops.sin(other),
        lambda: L.LayerNormalization()(one),
    )
    return kinds[rng.integers(7)]()


def random_graph(seed):
    """A model with skips, shared layers, several inputs and outputs, and operations that are no layers."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    inputs = [keras.Input((6,)) for _ in range(rng.integers(1, 3))]
    tensors = list(inputs)
    shared = [L.Dense(6, activation="tanh"), L.BatchNormalization()]
    for i in range(rng.integers(6, 14)):
        one, other = (tensors[max(0, len(tensors) - 1 - int(rng.geometric(0.4)))] for _ in range(2))
        tensors.append(operation(rng, i, one, other, shared))
    outputs = [tensors[-1], tensors[len(tensors) // 2]]
    return keras.Model(inputs, [L.Dense(2)(L.Concatenate()(tensors[1:] if len(tensors) > 2 else tensors)), *outputs])


CUTS = ["chosen", "count", "cheap"]


@pytest.mark.parametrize(("seed", "how"), cross(range(20), CUTS, default=lambda *each: each in turns(range(3), CUTS)))
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_random_graphs(seed, how):
    rng = np.random.default_rng(seed + 100)
    x = [rng.normal(size=(8, 6)).astype("float32") for _ in random_graph(seed).inputs]
    x = x[0] if len(x) == 1 else x
    want = results(random_graph(seed), x, tf.function)
    model = random_graph(seed)
    if how == "chosen":
        chosen = {node.operation.name for node in nodes_of(model) if rng.random() < 0.4}
        accumops.recompute_layers(model, segments=lambda layer: layer.name in chosen)
    elif how == "count":
        accumops.recompute_layers(model, segments=int(rng.integers(2, 6)))
    else:
        accumops.recompute_layers(model, policy="cheap")
    got = results(model, x, tf.function)
    assert_same(got[:2], want[:2], tolerance=2e-6)
    assert_same(got[2], want[2], tolerance=1e-7)


def fitted(wrap, jit_compile=False, net=None, run_eagerly=False):
    model = wrap(net or model_of(BLOCKS["convolutional"][0], IMAGES, blocks=2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=jit_compile, run_eagerly=run_eagerly)
    model.fit(IMAGES, LABELS, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model, [np.asarray(variable) for variable in model.variables]


WRAPS = {
    "Keras": lambda net: net,
    "accum_steps": lambda net: accumops.GradientAccumulateModel(net, accum_steps=2),
    "micro_batch_size": lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=2),
    "window": lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=2, loss_over="window"),
}


@pytest.mark.parametrize(
    ("kind", "jit_compile", "policy"),
    cross(
        WRAPS,
        [False, True],
        [True, False],
        default=lambda kind, jit, policy: not jit and (kind, policy) == ("accum_steps", False),
    ),
)
def test_fit(kind, jit_compile, policy):
    how = {"policy": "cheap"} if policy else {"segments": 3}
    _, want = fitted(WRAPS[kind], jit_compile)
    _, got = fitted(lambda net: WRAPS[kind](accumops.recompute_layers(net, **how)), jit_compile)
    assert_same(got, want, tolerance=2e-6)


@pytest.mark.exhaustive
def test_fit_with_layers_that_recompute():
    block, x = BLOCKS["convolutional"]
    _, want = fitted(WRAPS["micro_batch_size"])
    _, got = fitted(WRAPS["micro_batch_size"], net=model_of(block, x, accumops.Recompute, blocks=2))
    assert_same(got, want)


@pytest.mark.parametrize("wrapped", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_saved_loaded_cloned_and_exported(wrapped, tmp_path):
    wrap = WRAPS["accum_steps" if wrapped else "Keras"]
    model, _ = fitted(lambda net: wrap(accumops.recompute_layers(net, segments=3)), run_eagerly=True)
    want = model.predict(IMAGES, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), want)
    plain = model_of(BLOCKS["convolutional"][0], IMAGES, blocks=2)
    model.save_weights(tmp_path / "model.weights.h5")
    wrap(plain).load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(plain.predict(IMAGES, verbose=0), want)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(IMAGES), want, rtol=1e-5, atol=1e-6)
    copy = keras.models.clone_model(model)
    assert [weight.shape for weight in copy.weights] == [weight.shape for weight in model.weights]
    assert [type(layer) for layer in model.layers] == [type(layer) for layer in plain.layers]


@pytest.mark.exhaustive
def test_a_layer_that_recomputes_is_saved_and_cloned(tmp_path):
    block, x = BLOCKS["convolutional"]
    model, _ = fitted(lambda net: net, net=model_of(block, x, accumops.Recompute, blocks=1), run_eagerly=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert sum(isinstance(layer, accumops.Recompute) for layer in loaded.layers) == 1
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for other in (loaded, copy):
        np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def deep(blocks=6, width=8):
    keras.utils.set_random_seed(0)
    inputs = hidden = keras.Input((16, 16, width))
    for i in range(blocks):
        skip = hidden
        hidden = L.ReLU()(L.BatchNormalization()(L.Conv2D(width, 3, padding="same", name=f"conv_{i}")(hidden)))
        hidden = L.Add()([hidden, skip])
    return keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling2D()(hidden)))


def kept_bytes(model, batch_size):
    """What a training step keeps from the forward pass for the gradient, in the graph of a `tf.function`."""
    from accumops.memory.training_trace import root, size

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
        forward = len(tf.compat.v1.get_default_graph().get_operations())
        upstream = tf.raw_ops.Placeholder(dtype=outputs.dtype, shape=outputs.shape)
        step.marks = forward, upstream.op.name
        weights = [variable.value for variable in model.trainable_variables]
        return tape.gradient(outputs, weights, output_gradients=upstream)

    operations = step.get_concrete_function(
        tf.TensorSpec((batch_size, *model.inputs[0].shape[1:]))
    ).graph.get_operations()
    forward, upstream = step.marks
    names = [operation.name for operation in operations[:forward]]
    behind, kept = {upstream}, {}
    for operation in operations[forward:]:
        before = (*(tensor.op for tensor in operation.inputs), *operation.control_inputs)
        if any(each.name in behind for each in before):
            behind.add(operation.name)
            kept.update({root(each).name: root(each) for each in operation.inputs if each.op.name not in behind})
    assert names
    return sum(size(each) for each in kept.values() if each.op.type not in ("Const", "Placeholder", "ReadVariableOp"))


def convolutions(model):
    """How many convolutions a training step runs, its gradients' own ones apart, as TensorFlow optimizes the graph."""
    return run_by(model, ("Conv2D", "_FusedConv2D"))


def run_by(model, kinds):
    """How many operations of some kinds a training step runs, as TensorFlow optimizes the graph."""

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
        return outputs, tape.gradient(outputs, [variable.value for variable in model.trainable_variables])

    context.context().enable_graph_collection()
    try:
        step(tf.ones((8, *model.inputs[0].shape[1:])))
        graphs = context.context().export_run_metadata().function_graphs
    finally:
        context.context().disable_graph_collection()
    nodes = [node for graph in graphs for node in graph.post_optimization_graph.node]
    return sum(node.op in kinds for node in nodes)


def test_less_is_kept_and_no_product_computed_again():
    plain, cheap, cut = deep(), accumops.recompute_layers(deep(), policy="cheap"), deep()
    accumops.recompute_layers(cut, segments=4)
    assert convolutions(cheap) == convolutions(plain) == 6
    assert convolutions(cut) > 6
    all_of_it = kept_bytes(plain, 8)
    assert kept_bytes(cut, 8) < all_of_it / 2.5
    assert kept_bytes(cheap, 8) < all_of_it / 1.5


class OwnDense(L.Dense):
    """Not known to apply its activation last."""


PRODUCTS = ("Conv2D", "Conv2DBackpropInput", "DepthwiseConv2dNative", "Einsum", "MatMul")
PRODUCTS += tuple(f"_Fused{kind}" for kind in PRODUCTS)
WITH_ACTIVATION = {
    "dense": ((48,), lambda: L.Dense(48, "gelu")),
    "einsum": ((6, 8), lambda: L.EinsumDense("abc,cd->abd", (6, 8), activation="silu")),
    "convolution": ((6, 6, 8), lambda: L.Conv2D(8, 3, padding="same", activation="gelu")),
    "transposed": ((6, 6, 8), lambda: L.Conv2DTranspose(8, 3, padding="same", activation="silu")),
    "depthwise": ((6, 6, 8), lambda: L.DepthwiseConv2D(3, padding="same", activation="gelu")),
}


def stack(shape, layer, blocks=4):
    """Blocks of a layer, normalization and dropout, the first of which is called twice."""
    keras.utils.set_random_seed(0)
    first = layer()
    x = inputs = keras.Input(shape)
    for each in (first, first, *(layer() for _ in range(blocks - 2))):
        x = L.Dropout(0.1, seed=3)(L.LayerNormalization()(each(x)))
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(x)))


@pytest.mark.parametrize("kind", cross(WITH_ACTIVATION, default=lambda kind: kind in ("dense", "convolution")))
def test_activations_within_layers_are_computed_again_without_their_products(kind):
    shape, layer = WITH_ACTIVATION[kind]
    plain, cheap = stack(shape, layer), accumops.recompute_layers(stack(shape, layer), policy="cheap")
    assert kept_bytes(cheap, 8) < kept_bytes(plain, 8) / 1.6
    assert run_by(cheap, PRODUCTS) == run_by(plain, PRODUCTS)
    x = np.random.default_rng(0).standard_normal((4, *shape)).astype("float32")
    assert_same(results(cheap, x, tf.function), results(plain, x, tf.function))
    activations = [[getattr(each, "activation", None) for each in model.layers] for model in (cheap, plain)]
    assert activations[0] == activations[1]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: OwnDense(48, "gelu"),
        lambda: L.Dense(48, activation=L.PReLU()),
        lambda: keras.Sequential([L.Reshape((8, 6)), L.GRU(48)]),
    ],
    ids=["a class of one's own", "an activation with weights", "a loop"],
)
def test_activations_that_stay_with_their_product(layer):
    plain, cheap = stack((48,), layer, 2), accumops.recompute_layers(stack((48,), layer, 2), policy="cheap")
    assert run_by(cheap, (*PRODUCTS, "While")) == run_by(plain, (*PRODUCTS, "While"))
    x = np.random.default_rng(0).standard_normal((4, 48)).astype("float32")
    assert_same(results(cheap, x, tf.function), results(plain, x, tf.function))


@pytest.mark.parametrize(
    ("how", "activation"), [("segments", "softmax"), ("layer", "softmax"), ("segments", tf.nn.softmax)]
)
def test_losses_see_the_logits_of_probabilities(how, activation):
    """Keras's losses would cut off the logarithms of probabilities below 1e-7."""

    def train(how=None):
        keras.utils.set_random_seed(0)
        last = L.Dense(5, activation, kernel_initializer=keras.initializers.RandomNormal(stddev=30.0))
        last = accumops.Recompute(last) if how == "layer" else last
        net = keras.Sequential([keras.Input((6,)), L.Dense(16, "gelu"), last, L.Activation("linear")])
        if how == "segments":
            accumops.recompute_layers(net, segments=lambda layer: True)
        net.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", jit_compile=False)
        x = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
        net.fit(x, np.arange(32) % 5, batch_size=16, shuffle=False, verbose=0)
        return [each.numpy() for each in net.trainable_variables]

    assert_same(train(how), train(), tolerance=1e-6)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_masks_go_through_products_that_are_kept(activation):
    def network():
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((7, 6))
        x = L.LayerNormalization()(L.Masking()(x))
        for units in (64, 32):
            x = L.LayerNormalization()(L.Activation("gelu")(L.Dense(units, activation)(x)))
        return keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling1D()(x)))

    x = np.random.default_rng(0).standard_normal((16, 7, 6)).astype("float32")
    x[::2, 3:] = 0
    cheap = accumops.recompute_layers(network(), policy="cheap")
    assert_same(results(cheap, x, tf.function), results(network(), x, tf.function))


def test_weights_do_not_hide_activations():
    """Gradients of weights take as much wherever the model is cut."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((256,)), *(L.Dense(256, "gelu") for _ in range(12))])
    all_of_it = kept_bytes(net, 4)
    assert kept_bytes(accumops.recompute_layers(net, segments=4), 4) < all_of_it / 2.5


@pytest.mark.parametrize("kind", ["accum_steps", pytest.param("micro_batch_size", marks=pytest.mark.exhaustive)])
def test_a_wrapped_model_recomputes(kind):
    most = kept_bytes(deep(), 8) / 2.5
    assert kept_bytes(WRAPS[kind](accumops.recompute_layers(deep(), segments=4)), 8) < most


def test_memory_goals():
    sizes = []
    for goal in ("3MB", "1.2MB", 1_000_000):
        sizes.append(kept_bytes(accumops.recompute_layers(deep(), memory=goal, batch_size=8), 8))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert sizes[0] == kept_bytes(deep(), 8)  # everything
    with pytest.raises(ValueError, match=r"smallest goal that one keeps to is \d+\.\dMiB"):
        accumops.recompute_layers(deep(), memory="100KB", batch_size=8)


@pytest.mark.exhaustive
def test_a_lower_goal_never_takes_more():
    net = deep(4)
    profile = accumops.memory_profile(net, 8, measure=False)
    fixed, most = profile.weights + profile.state, profile.steps[0].predicted
    accumops.recompute_layers(net, segments=32)
    least = accumops.memory_profile(net, 8, measure=False).steps[-1].predicted
    peaks = [most]
    for i in range(1, 6):
        goal = most - (most - least) * i // 6
        accumops.recompute_layers(net, memory=fixed + goal, batch_size=8)
        peaks.append(accumops.memory_profile(net, 8, measure=False).steps[-1].predicted)
        assert peaks[-1] <= goal
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) > 3


@pytest.mark.parametrize(
    "how",
    [
        {"policy": "cheap"},
        pytest.param({"segments": 4}, marks=pytest.mark.exhaustive),
        pytest.param({"segments": ["conv_1", "conv_2"]}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.exhaustive
def test_graphs_within_graphs(how):
    def model():
        base = deep(4)
        inputs = keras.Input((16, 16, 8))
        hidden = base(L.Dropout(0.5, seed=1)(inputs))
        return keras.Model(inputs, L.Dense(2)(L.Dense(4, activation="gelu")(hidden)))

    x = np.random.default_rng(0).normal(size=(4, 16, 16, 8)).astype("float32")
    want = results(model(), x, tf.function)
    recomputed = accumops.recompute_layers(model(), **how)
    got = results(recomputed, x, tf.function)
    assert_same(got[:2], want[:2], tolerance=2e-6)
    assert_same(got[2], want[2], tolerance=1e-7)
    assert kept_bytes(recomputed, 4) < kept_bytes(model(), 4)


def test_ends_with_zero_segments():
    model = accumops.recompute_layers(deep(), segments=4)
    assert kept_bytes(accumops.recompute_layers(model, segments=0), 8) == kept_bytes(deep(), 8)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(0)
        self.blocks = [
            keras.Sequential([L.Dense(4, "tanh"), L.BatchNormalization(), L.Dropout(0.5, seed=i)]) for i in range(3)
        ]

    def call(self, inputs, training=None):
        for block in self.blocks:
            inputs = block(inputs, training=training)
        return inputs


def test_a_subclassed_model_recomputes_its_layers():
    x = IMAGES[:, 0, 0]
    models = Subclassed(), Subclassed()
    for model in models:
        model(x)
    accumops.recompute_layers(models[1], segments=lambda layer: True)
    assert_same(results(models[1], x, tf.function), results(models[0], x, tf.function))
    for arguments in ({"policy": "cheap"}, {"segments": 3}, {"memory": "1GB", "batch_size": 2}):
        with pytest.raises(ValueError, match="subclassed model"):
            accumops.recompute_layers(models[0], **arguments)


@pytest.mark.exhaustive
def test_with_accumulating_batch_normalization_in_other_layers():
    def net():
        return accumops.replace_batchnorm_layers(deep(3))

    x = np.random.default_rng(0).normal(size=(8, 16, 16, 8)).astype("float32")
    found = []
    for how in (None, "cheap"):
        model = net() if how is None else accumops.recompute_layers(net(), policy=how)
        model = accumops.GradientAccumulateModel(model, micro_batch_size=2)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, LABELS, batch_size=8, epochs=2, verbose=0)
        found.append([np.asarray(variable) for variable in model.variables])
    assert_same(found[1], found[0], tolerance=2e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "Give one of"),
        ({"policy": "cheap", "segments": 2}, ValueError, "policy"),
        ({"policy": "full"}, ValueError, "'cheap'"),
        ({"memory": "much", "batch_size": 2}, ValueError, "4GB"),
        ({"memory": "4GB"}, ValueError, "batch_size"),
        ({"memory": 1.5, "batch_size": 2}, TypeError, "memory"),
        ({"segments": -1}, ValueError, "segments"),
        ({"segments": "conv_1"}, TypeError, "segments"),
        ({"segments": ["no_layer"]}, ValueError, "no_layer"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        accumops.recompute_layers(deep(2), **arguments)


def test_models_are_checked():
    with pytest.raises(TypeError, match=r"keras\.Model"):
        accumops.recompute_layers(L.Dense(2), policy="cheap")
    with pytest.raises(ValueError, match="before it is wrapped"):
        accumops.recompute_layers(accumops.GradientAccumulateModel(deep(2), accum_steps=2), policy="cheap")
    with pytest.raises(ValueError, match="not built"):
        accumops.recompute_layers(keras.Sequential([L.Dense(2)]), policy="cheap")
    inputs = keras.Input((None, 4))
    with pytest.raises(ValueError, match="sizes"):
        accumops.recompute_layers(keras.Model(inputs, L.Dense(2)(L.Dense(4)(inputs))), policy="cheap")
    model = keras.Sequential([keras.Input((4,)), L.Dense(4), Assigning(name="noise"), L.Dense(4)])
    accumops.recompute_layers(model, segments=["noise"])
    with pytest.raises(ValueError, match="'noise'"):
        model(tf.ones([2, 4]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50"])
def test_everything_together_on_digits(name, tmp_path):
    """Replaced batch normalization, recompute, accumulation; trained, saved, loaded, trained on."""
    digits = datasets.load_digits()
    x = np.repeat(np.repeat(digits.images[:24, ..., None].astype("float32") / 16, 4, axis=1), 4, axis=2)
    x, y = np.repeat(x, 3, axis=3), digits.target[:24]

    def network():
        keras.utils.set_random_seed(0)
        return getattr(keras.applications, name)(input_shape=(32, 32, 3), weights=None, classes=10)

    def train(model, epochs):
        model.fit(x, y, batch_size=12, epochs=epochs, shuffle=False, verbose=0)
        return [np.asarray(variable) for variable in model.variables if "seed" not in variable.path]

    def compiled(net):
        model = accumops.GradientAccumulateModel(net, micro_batch_size=4)
        model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "sparse_categorical_crossentropy", jit_compile=False)
        return model

    want = train(compiled(accumops.replace_batchnorm_layers(network())), 2)
    net = accumops.recompute_layers(accumops.replace_batchnorm_layers(network()), policy="cheap")
    model = compiled(net)
    train(model, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    accumops.recompute_layers(loaded.model, segments=6)
    got = train(loaded, 1)
    assert_same(got, want, tolerance=1e-4)
