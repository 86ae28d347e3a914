"""`window_gradients` in loops written by hand, against one tape over the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops

RNG = np.random.default_rng(0)
PAIRS = RNG.normal(size=(14, 2, 5)).astype("float32")


def encoder(seed=0, rate=0.0):
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(6, "tanh", kernel_regularizer="l2", activity_regularizer="l2")
    return keras.Sequential([keras.Input((2, 5)), hidden, keras.layers.Dropout(rate, seed=1), keras.layers.Dense(3)])


def clip(embeddings):
    return accumops.losses.CLIPLoss(0.5)(tf.zeros(tf.shape(embeddings)[0]), embeddings)


def one_tape(model, inputs, loss):
    with tf.GradientTape() as tape:
        value = loss(model(inputs, training=True))
        value += tf.add_n(model.losses) if model.losses else 0.0
    return value, tape.gradient(value, model.trainable_variables)


def assert_close(gradients, wanted):
    for mine, its in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "size"),
    cross(
        ["eager", "graph", "xla"],
        [4, 7, 14, 20],
        default=lambda mode, size: mode == "eager" or (mode, size) in (("graph", 7), ("xla", 4)),
    ),
    indirect=["mode"],
)
@pytest.mark.some_by_default(3)
def test_gradients_are_those_of_the_whole_batch(mode, size):
    model = encoder()
    value, gradients = mode(lambda: accumops.window_gradients(model, PAIRS, clip, size))()
    want, wanted = one_tape(model, PAIRS, clip)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert_close(gradients, wanted)


def test_several_towers_with_inputs_of_several_kinds():
    keras.utils.set_random_seed(0)
    image, tokens = keras.Input((4, 4, 1), name="image"), keras.Input((3,), dtype="int32", name="tokens")
    left = keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Conv2D(2, 2)(image)))
    right = keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Embedding(5, 3)(tokens)))
    model = keras.Model({"image": image, "tokens": tokens}, [left, right])
    inputs = {
        "image": tf.constant(RNG.normal(size=(9, 4, 4, 1)), tf.float32),
        "tokens": tf.constant(RNG.integers(0, 5, size=(9, 3))),
    }

    def loss(outputs):
        return clip(tf.stack(outputs, 1))

    value, gradients = accumops.window_gradients(model, inputs, loss, 4)
    want, wanted = one_tape(model, inputs, loss)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert_close(gradients, [tf.convert_to_tensor(each) for each in wanted])


def test_a_momentum_encoder_and_a_queue_come_from_the_surroundings():
    model, momentum_encoder = encoder(), encoder(1)
    queue = tf.constant(RNG.normal(size=(20, 3)), tf.float32)
    keys = momentum_encoder(PAIRS)[:, 1]

    def loss(outputs):
        logits = tf.concat(
            [tf.reduce_sum(outputs[:, 0] * keys, -1, keepdims=True), outputs[:, 0] @ tf.transpose(queue)], 1
        )
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.zeros(14, tf.int32), logits))

    _, gradients = accumops.window_gradients(model, PAIRS, loss, 4)
    assert_close(gradients, one_tape(model, PAIRS, loss)[1])


def test_masks_of_dropout_are_drawn_once():
    model, twin = encoder(rate=0.5), encoder(rate=0.5)
    _, gradients = accumops.window_gradients(model, PAIRS, clip, 4)
    with tf.GradientTape() as tape:
        outputs = [twin(PAIRS[begin : begin + 4], training=True) for begin in range(0, 14, 4)]
        value = clip(tf.concat(outputs, 0))
    # Without the regularizers, whose gradients dropout does not touch.
    penalty = encoder(rate=0.5)
    _, of_penalty = one_tape(penalty, PAIRS, lambda outputs: 0.0 * tf.reduce_sum(outputs))
    wanted = [
        one + other for one, other in zip(tape.gradient(value, twin.trainable_variables), of_penalty, strict=True)
    ]
    assert_close(gradients, wanted)
    for mine, its in zip(model.non_trainable_variables, twin.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_variables_that_the_loss_does_not_reach_have_no_gradient():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)])
    _, gradients = accumops.window_gradients(model, PAIRS[:, 0], lambda outputs: tf.reduce_sum(outputs[0]), 4)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]


def test_bad_arguments_are_named():
    model = encoder()
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        accumops.window_gradients(lambda x: x, PAIRS, clip, 4)
    with pytest.raises(TypeError, match="`loss` must be a function"):
        accumops.window_gradients(model, PAIRS, 1.0, 4)
    with pytest.raises(ValueError, match="`micro_batch_size` must be at least 1"):
        accumops.window_gradients(model, PAIRS, clip, 0)
    with pytest.raises(ValueError, match="is not built"):
        accumops.window_gradients(keras.Sequential([keras.layers.Dense(2)]), PAIRS, clip, 4)
    with pytest.raises(ValueError, match="must return a scalar"):
        accumops.window_gradients(model, PAIRS, lambda outputs: outputs, 4)
    total = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(lambda x: tf.reduce_sum(x), output_shape=())])
    with pytest.raises(ValueError, match="a row for each sample"):
        accumops.window_gradients(total, PAIRS[:, 0], lambda outputs: outputs, 4)
