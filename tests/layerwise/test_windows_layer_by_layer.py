"""Windows that run layer by layer: memory goals, frozen layers, masks of dropout, and the end of loops."""

import keras
import numpy as np
import pytest

import accumops

SAMPLES = 13


def residual(dtype="float64"):
    """Residual blocks with branches that have normalizations of their own, and one without a scale."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layers.Conv2D(6, 3, padding="same")(x)))
    for width in (6, 8):
        way = layers.BatchNormalization(scale=False)(layers.Conv2D(width, 3, padding="same", use_bias=False)(x))
        way = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(layers.ReLU()(way)))
        short = x if width == 6 else layers.BatchNormalization(center=False)(layers.Conv2D(width, 1)(x))
        x = layers.ReLU()(layers.Add()([way, short]))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def dense_connections():
    """Tensors that lead across many normalizations, as in DenseNet, and a model within the model."""
    layers = keras.layers
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.BatchNormalization(), layers.ReLU()])
    x = inputs = keras.Input((6,))
    for _ in range(3):
        x = layers.Concatenate()([x, layers.Dense(3)(layers.ReLU()(layers.BatchNormalization()(x)))])
    return keras.Model(inputs, layers.Dense(4)(layers.Add()([inner(layers.Dense(6)(x)), inner(inputs)])))


def exhaustively(*values):
    """Cases that only an exhaustive run has."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


NETS = {"residual": (residual, (8, 8, 3)), "dense": (dense_connections, (6,))}


pytestmark = pytest.mark.usefixtures("float64")


def problem(shape, seed=0):
    """Samples that are far from alike, so that micro-batches have other moments than the batch."""
    random = np.random.RandomState(seed)
    scale = 1 + np.arange(SAMPLES).reshape(-1, *[1] * len(shape))
    return random.randn(SAMPLES, *shape) * scale, random.randint(0, 4, SAMPLES)


def train(model, x, y, optimizer="sgd", updates=3, **arguments):
    optimizer = {"sgd": keras.optimizers.SGD(0.05, momentum=0.9), "adam": keras.optimizers.Adam(1e-3)}[optimizer]
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **{"jit_compile": False, **arguments},
    )
    return model.fit(x, y, batch_size=SAMPLES, epochs=updates, shuffle=False, verbose=0).history


def compare(build, shape, micro_batch_size, *, tolerance=1e-11, optimizer="sgd", every=None, memory=None, **arguments):
    keras.utils.set_random_seed(1)
    net = build()
    x, y = problem(shape)
    ours = accumops.replace_batchnorm_layers(net, statistics="window", every=every, memory=memory)
    model = accumops.GradientAccumulateModel(ours, micro_batch_size=micro_batch_size)
    history = train(model, x, y, optimizer, **arguments)
    expected = train(net, x, y, optimizer)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=0, atol=tolerance, err_msg=name)
    for mine, keras_own in zip(ours.weights, net.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), keras_own.numpy(), rtol=0, atol=tolerance, err_msg=mine.path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["residual", "dense"])
@pytest.mark.parametrize("micro_batch_size", [1, SAMPLES, 5])
def test_equals_the_whole_batch(name, micro_batch_size):
    compare(*NETS[name], micro_batch_size)


@pytest.mark.parametrize("name", exhaustively(*NETS))
def test_under_xla(name):
    compare(*NETS[name], 5, jit_compile=True)


@pytest.mark.exhaustive
def test_with_adam():
    compare(*NETS["residual"], 5, optimizer="adam", tolerance=1e-9)  # it divides by roots of squares


@pytest.mark.exhaustive
def test_for_a_memory_goal():
    compare(*NETS["residual"], 5, memory="1MB")


def test_a_goal_that_nothing_keeps_to():
    net = accumops.replace_batchnorm_layers(residual(), statistics="window", memory="20KB")
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5)
    with pytest.raises(ValueError, match=r"No window of 13 samples .* keeps to memory=.*smallest goal .* is \d"):
        train(model, *problem((8, 8, 3)))


@pytest.mark.exhaustive
def test_micro_batches_by_themselves_differ():
    keras.utils.set_random_seed(1)
    net = residual()
    x, y = problem((8, 8, 3))
    ours = accumops.replace_batchnorm_layers(net)
    train(accumops.GradientAccumulateModel(ours, micro_batch_size=5), x, y)
    train(net, x, y)
    off = [np.abs(a.numpy() - b.numpy()).max() for a, b in zip(ours.weights, net.weights, strict=True)]
    assert max(off) > 1e-3


@pytest.mark.exhaustive
def test_a_frozen_layer_keeps_its_statistics():
    def build():
        net = residual()
        for layer in net.layers:
            if isinstance(layer, keras.layers.BatchNormalization) and layer.name.endswith(net.layers[2].name[-2:]):
                layer.trainable = False
        net.layers[2].trainable = False
        return net

    compare(build, (8, 8, 3), 5)


@pytest.mark.exhaustive
def test_dropout_has_the_same_masks_when_it_runs_again():
    keras.utils.set_random_seed(3)
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=7),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.Dense(4),
        ]
    )
    x, y = problem((5,))

    def trained(micro_batch_size):
        ours = accumops.replace_batchnorm_layers(net, statistics="window")
        history = train(accumops.GradientAccumulateModel(ours, micro_batch_size=micro_batch_size), x, y, updates=3)
        return history["loss"], ours.get_weights()

    # With one micro-batch the masks of Keras on the whole batch are drawn.
    losses, weights = trained(SAMPLES)
    keras_net = keras.models.clone_model(net)
    keras_net.set_weights(net.get_weights())
    for layer, clone in zip(net.layers, keras_net.layers, strict=True):
        if isinstance(layer, layers.Dropout):
            clone.seed_generator.state.assign(layer.seed_generator.state)
    expected = train(keras_net, x, y, updates=3)["loss"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-11)
    for mine, keras_own in zip(weights, keras_net.get_weights(), strict=True):
        np.testing.assert_allclose(mine, keras_own, rtol=0, atol=1e-11)


def test_the_update_waits_for_the_gradient():
    """TensorFlow lets what waits for a loop start early, if nothing uses what the loop returns."""
    net = keras.Sequential(
        [
            keras.Input((1, 1, 6)),
            keras.layers.Conv2D(1280, 1, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(6.0),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ]
    )
    ours = accumops.replace_batchnorm_layers(net, statistics="window")
    model = accumops.GradientAccumulateModel(ours, micro_batch_size=5)
    x, y = problem((1, 1, 6))
    start = ours.get_weights()
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernels = set()
    for _ in range(12):
        ours.set_weights(start)
        model.train_on_batch(x, y)
        kernels.add(ours.get_weights()[0].tobytes())
    assert len(kernels) == 1
