"""Contrastive losses in tiles, against their formulas on the whole matrix in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops

EMBEDDINGS = np.random.default_rng(0).normal(size=(11, 2, 5))


def similarities(embeddings, temperature):
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return unit[:, 0] @ unit[:, 1].T / temperature


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def info_nce(embeddings, temperature):
    return -np.diag(log_softmax(similarities(embeddings, temperature)))


def clip(embeddings, temperature):
    return (info_nce(embeddings, temperature) + info_nce(embeddings[:, ::-1], temperature)) / 2


def nt_xent(embeddings, temperature):
    both = np.concatenate([embeddings[:, 0], embeddings[:, 1]])
    logits = similarities(np.stack([both, both], 1), temperature)
    np.fill_diagonal(logits, -np.inf)
    n = len(embeddings)
    rows = np.arange(2 * n)
    return -log_softmax(logits)[rows, (rows + n) % (2 * n)].reshape(2, n).mean(0)


def siglip(embeddings, temperature, bias=-10.0):
    signs = 2 * np.eye(len(embeddings)) - 1
    return np.log1p(np.exp(-signs * (similarities(embeddings, temperature) + bias))).sum(-1)


LOSSES = {
    accumops.losses.InfoNCE: info_nce,
    accumops.losses.CLIPLoss: clip,
    accumops.losses.NTXent: nt_xent,
    accumops.losses.SigLIPLoss: siglip,
}


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize("tile", [1, 4, 11, 256])
def test_values_are_those_of_the_formula(kind, tile):
    loss = kind(temperature=0.3, tile=tile, reduction=None, dtype="float64")
    np.testing.assert_allclose(loss(np.zeros(11), EMBEDDINGS), LOSSES[kind](EMBEDDINGS, 0.3), rtol=1e-12)


def gradient(loss, weights, wrap=lambda function: function):
    def run():
        embeddings = tf.constant(EMBEDDINGS)
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            value = loss(tf.zeros(11), embeddings, sample_weight=weights)
        return tape.gradient(value, embeddings)

    return wrap(run)()


# Eagerly all run. A graph takes long to be traced, and longer to be compiled.
TRACED = [("graph", 3), ("xla", 4), ("graph", 4), ("xla", 3)]


@pytest.mark.parametrize(
    ("kind", "mode", "tile"),
    cross(
        LOSSES,
        ["eager", "graph", "xla"],
        [3, 4],
        default=lambda kind, mode, tile: mode == "eager" or (kind, (mode, tile)) in turns(LOSSES, TRACED),
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
    indirect=["kind", "mode"],
)
@pytest.mark.some_by_default(6)
def test_gradients_do_not_depend_on_the_tile(kind, mode, tile):
    weights = np.linspace(0, 2, 11)
    whole = gradient(kind(tile=11, dtype="float64"), weights)
    tiled = gradient(kind(tile=tile, dtype="float64"), weights, mode)
    np.testing.assert_allclose(tiled, whole, rtol=1e-10, atol=1e-14)


def test_gradients_are_those_of_differences(kind):
    loss, direction = kind(temperature=0.5, tile=4, dtype="float64"), np.random.default_rng(1).normal(size=(11, 2, 5))
    up, down = (float(loss(np.zeros(11), EMBEDDINGS + step * direction)) for step in (1e-6, -1e-6))
    slope = np.sum(gradient(loss, None) * direction)
    assert slope == pytest.approx((up - down) / 2e-6, rel=1e-6)


def test_a_learned_temperature_gives_the_logits(kind):
    bias = -3.0 if kind is accumops.losses.SigLIPLoss else None
    layer = accumops.losses.LearnedTemperature(0.3, bias=bias, dtype="float64")
    loss = kind(temperature=None, **({"bias": 0.0} if bias else {}), dtype="float64")
    arguments = {"temperature": 0.3, **({"bias": bias} if bias else {})}
    want = kind(**arguments, dtype="float64")(np.zeros(11), EMBEDDINGS)
    assert float(loss(np.zeros(11), layer(EMBEDDINGS))) == pytest.approx(float(want), rel=1e-6)
    with tf.GradientTape() as tape:
        value = loss(np.zeros(11), layer(EMBEDDINGS))
    assert all(abs(float(each)) > 1e-4 for each in tape.gradient(value, layer.trainable_variables))


def test_a_temperature_does_not_fall_below_its_minimum():
    layer = accumops.losses.LearnedTemperature(0.001, minimum=0.25)
    np.testing.assert_allclose(np.linalg.norm(layer(EMBEDDINGS), axis=-1), 2, rtol=1e-6)


def test_losses_and_layers_are_made_again_from_their_configs(kind):
    loss = kind(temperature=0.2, tile=7, reduction="sum")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert again.get_config() == loss.get_config()
    layer = accumops.losses.LearnedTemperature(0.2, bias=1.0)
    assert accumops.losses.LearnedTemperature.from_config(layer.get_config()).get_config() == layer.get_config()


def test_bad_arguments_are_named(kind):
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        kind(temperature=0)
    with pytest.raises(ValueError, match="`tile` must be an int of at least 1"):
        kind(tile=0)
    with pytest.raises(ValueError, match=r"two embeddings a sample, of shape \(batch, 2, features\)"):
        kind()(np.zeros(3), np.zeros([3, 4]))
    with pytest.raises(ValueError, match="`minimum` must be positive"):
        accumops.losses.LearnedTemperature(minimum=-1)


@pytest.mark.parametrize(
    ("kind", "size"), cross(LOSSES, [5, 4], default=lambda *each: each in turns(LOSSES, [5, 4])), indirect=["kind"]
)
@pytest.mark.some_by_default(2)
def test_windows_train_as_one_batch(kind, size):
    def net():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((2, 5), dtype="float64")
        hidden = keras.layers.Dense(4, dtype="float64")(inputs)
        outputs = accumops.losses.LearnedTemperature(0.3, bias=-1.0, dtype="float64")(hidden)
        return keras.Model(inputs, outputs)

    weights = []
    for model in (net(), accumops.GradientAccumulateModel(net(), micro_batch_size=size, loss_over="window")):
        model.compile(keras.optimizers.SGD(0.1), kind(temperature=None, tile=4), run_eagerly=True)
        model.train_on_batch(EMBEDDINGS, np.zeros(11))
        weights.append(model.get_weights())
    for mine, its in zip(*weights, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-8)
