"""`loss_over="window"`: losses that couple the samples of a batch, against one batch of plain Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops

RNG = np.random.default_rng(0)
LEFT, RIGHT, LABELS = RNG.normal(size=(20, 6, 6, 2)), RNG.normal(size=(20, 5)), RNG.integers(0, 4, size=20)


def unit(embeddings):
    return embeddings / tf.sqrt(tf.reduce_sum(embeddings * embeddings, -1, keepdims=True) + 1e-12)


def cross_entropy(logits):
    labels = tf.range(tf.shape(logits)[0])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def clip(labels, left, right):
    logits = tf.matmul(unit(left), unit(right), transpose_b=True) * 10
    return (cross_entropy(logits) + cross_entropy(tf.transpose(logits))) / 2


def siglip(labels, left, right):
    logits = tf.matmul(unit(left), unit(right), transpose_b=True) * 10 - 10
    signs = 2 * tf.eye(tf.shape(logits)[0], dtype=logits.dtype) - 1
    return -tf.reduce_mean(tf.reduce_sum(tf.math.log_sigmoid(signs * logits), -1))


def nt_xent(labels, left, right):
    both = unit(tf.concat([left, right], 0))
    count = tf.shape(both)[0]
    logits = tf.matmul(both, both, transpose_b=True) / 0.5 - 1e9 * tf.eye(count, dtype=both.dtype)
    positives = (tf.range(count) + count // 2) % count
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(positives, logits))


def barlow_twins(labels, left, right):
    left, right = (
        (each - tf.reduce_mean(each, 0)) / tf.sqrt(tf.math.reduce_variance(each, 0) + 1e-5) for each in (left, right)
    )
    correlation = tf.matmul(left, right, transpose_a=True) / tf.cast(tf.shape(left)[0], left.dtype)
    one = tf.eye(correlation.shape[0], dtype=left.dtype)
    return tf.reduce_sum(tf.square(correlation - one) * (one + 0.005 * (1 - one)))


def vicreg(labels, left, right):
    loss = 25 * tf.reduce_mean(tf.square(left - right))
    for each in (left, right):
        loss += 25 * tf.reduce_mean(tf.nn.relu(1 - tf.sqrt(tf.math.reduce_variance(each, 0) + 1e-4)))
        centred = each - tf.reduce_mean(each, 0)
        covariance = tf.matmul(centred, centred, transpose_a=True) / tf.cast(tf.shape(each)[0] - 1, each.dtype)
        off = covariance * (1 - tf.eye(covariance.shape[0], dtype=each.dtype))
        loss += tf.reduce_sum(tf.square(off)) / covariance.shape[0]
    return loss


def hard_triplet(labels, left, right):
    distances = 2 - 2 * tf.matmul(unit(left), unit(left), transpose_b=True)
    same = tf.equal(labels[:, None], labels[None])
    far = tf.reduce_max(tf.where(same, distances, -tf.ones_like(distances)), 1)
    near = tf.reduce_min(tf.where(same, 9 * tf.ones_like(distances), distances), 1)
    return tf.reduce_mean(tf.nn.relu(far - near + 0.2))


def correlation(labels, left, right):
    one, other = left[:, 0] - tf.reduce_mean(left[:, 0]), tf.cast(labels, left.dtype)
    other -= tf.reduce_mean(other)
    return 1 - tf.reduce_sum(one * other) / tf.sqrt(tf.reduce_sum(one * one) * tf.reduce_sum(other * other))


def pairwise_auc(labels, left, right):
    scores, positive = left[:, 0], tf.cast(labels < 2, left.dtype)
    weights = positive[:, None] * (1 - positive)[None]
    return tf.reduce_sum(weights * tf.square(tf.nn.relu(1 - scores[:, None] + scores[None]))) / tf.reduce_sum(weights)


def dice(labels, left, right):
    targets = tf.one_hot(labels, left.shape[-1], dtype=left.dtype)
    return keras.losses.dice(targets, tf.nn.softmax(left))


LOSSES = (clip, siglip, nt_xent, barlow_twins, vicreg, hard_triplet, correlation, pairwise_auc, dice)
DIFFERENCES = (barlow_twins, correlation, pairwise_auc)
"""Losses that are differences of nearly equal sums, which float32 rounds more."""


def of_both(loss):
    """A Keras loss of the stacked outputs of two towers."""

    def function(y_true, y_pred):
        return loss(tf.cast(tf.reshape(y_true, [-1]), tf.int32), y_pred[:, 0], y_pred[:, 1])

    return function


def towers(dtype="float32", stateful=False):
    keras.utils.set_random_seed(1)
    left, right = keras.Input((6, 6, 2), dtype=dtype), keras.Input((5,), dtype=dtype)
    image = keras.layers.Conv2D(6, 3, activation="tanh", dtype=dtype)(left)
    if stateful:
        image = keras.layers.BatchNormalization(dtype=dtype)(image)
        image = keras.layers.Dropout(0.5, seed=1, dtype=dtype)(image)
    image = keras.layers.Dense(4, dtype=dtype)(keras.layers.GlobalAveragePooling2D(dtype=dtype)(image))
    text = keras.layers.Dense(8, activation="tanh", dtype=dtype)(right)
    if stateful:
        text = keras.layers.Dropout(0.5, seed=2, dtype=dtype)(text)
    text = keras.layers.Dense(4, dtype=dtype)(text)
    both = keras.ops.expand_dims(image, 1), keras.ops.expand_dims(text, 1)
    return keras.Model([left, right], keras.layers.Concatenate(axis=1, dtype=dtype)(both))


def window(net, size, **kwargs):
    return accumops.GradientAccumulateModel(net, micro_batch_size=size, loss_over="window", **kwargs)


def moved(model, start):
    return np.concatenate([np.ravel(now - before) for now, before in zip(model.get_weights(), start, strict=True)])


def off(model, truth, start):
    """How far a model's update is from that of another, relative to it."""
    mine, its = moved(model, start), moved(truth, start)
    return np.linalg.norm(mine - its) / np.linalg.norm(its)


def train(model, loss, how, data=None, rate=0.1):
    model.compile(keras.optimizers.SGD(rate), loss=loss, run_eagerly=how == "eager", jit_compile=how == "xla")
    x, y = data or ([LEFT, RIGHT], LABELS)
    return model.train_on_batch(x, y)


@pytest.mark.parametrize(
    ("loss", "size"),
    cross(LOSSES, [5, 8], default=lambda *each: each in turns(LOSSES, [5, 8])),
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.some_by_default(2)
def test_losses_are_those_of_one_batch_in_float64(loss, size):
    net = towers("float64")
    start = net.get_weights()
    truth = towers("float64")
    want = train(truth, of_both(loss), "eager")
    model = window(net, size)
    assert train(model, of_both(loss), "eager") == pytest.approx(want, rel=1e-12)
    assert off(model, truth, start) < 1e-12


@pytest.mark.parametrize(
    ("loss", "how", "size"),
    [
        (clip, "graph", 8),
        (siglip, "xla", 5),
        (nt_xent, "eager", 8),
        (vicreg, "eager", 5),
        (barlow_twins, "eager", 8),
        (correlation, "eager", 5),
        (pairwise_auc, "eager", 8),
        (hard_triplet, "eager", 8),
        *(
            pytest.param(loss, how, size, marks=pytest.mark.exhaustive)
            for loss in LOSSES
            for how in ("eager", "graph", "xla")
            for size in (5, 8)
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.some_by_default(1)
def test_losses_are_those_of_one_batch_in_float32(loss, how, size):
    net = towers()
    start = net.get_weights()
    truth = towers()
    train(truth, of_both(loss), how)
    model = window(net, size)
    train(model, of_both(loss), how)
    assert off(model, truth, start) < (2e-5 if loss in DIFFERENCES else 2e-6)


@pytest.mark.parametrize("how", ["eager", "graph", pytest.param("xla", marks=pytest.mark.exhaustive)])
@pytest.mark.some_by_default(1)
def test_masks_and_statistics_are_those_of_all_micro_batches_under_one_tape(how):
    loss = of_both(clip)
    model, twin = window(towers(stateful=True), 8), towers(stateful=True)
    start = twin.get_weights()

    def one_tape():
        parts = [slice(begin, begin + 8) for begin in range(0, 20, 8)]
        with tf.GradientTape() as tape:
            outputs = [twin([LEFT[part], RIGHT[part]], training=True) for part in parts]
            value = loss(LABELS, tf.concat(outputs, 0))
        return tape.gradient(value, twin.trainable_variables)

    function = one_tape if how == "eager" else tf.function(one_tape, jit_compile=how == "xla")
    keras.optimizers.SGD(0.1).apply(function(), twin.trainable_variables)
    train(model, loss, how)
    assert off(model, twin, start) < 1e-6
    for mine, its in zip(model.non_trainable_variables, twin.non_trainable_variables, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-7)


def test_a_step_has_the_same_bits_when_it_is_repeated():
    weights = []
    for _ in range(2):
        model = window(towers(stateful=True), 8)
        for _ in range(2):
            train(model, of_both(clip), "eager")
        weights.append(model.get_weights())
    keras.tree.map_structure(np.testing.assert_array_equal, *weights)


def test_windows_of_batch_normalization_collect_each_micro_batch_once():
    def net():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(3),
                accumops.AccumBatchNormalization(momentum=0.5),
                keras.layers.Dense(2),
            ]
        )

    models = window(net(), 8), accumops.GradientAccumulateModel(net(), micro_batch_size=8)
    for model in models:
        train(model, "mse", "graph", (RIGHT, RIGHT[:, :2]))
    for mine, its in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-6)


@keras.saving.register_keras_serializable(package="tests")
class MeanOfOutputs(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.some_by_default(1)
def test_regularizers_and_losses_of_layers_count_once(how):
    def net():
        keras.utils.set_random_seed(0)
        layers = [
            keras.Input((5,)),
            keras.layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l1"),
            MeanOfOutputs(),
            keras.layers.Dense(2),
        ]
        return keras.Sequential(layers)

    truth, model = net(), window(net(), 8)
    start = truth.get_weights()
    want = train(truth, "mse", how, (RIGHT, RIGHT[:, :2]))
    assert train(model, "mse", how, (RIGHT, RIGHT[:, :2])) == pytest.approx(want, rel=1e-6)
    assert off(model, truth, start) < 1e-6


@pytest.mark.exhaustive
def test_structures_masks_weights_and_metrics():
    def net():
        keras.utils.set_random_seed(0)
        tokens = keras.Input((5,), dtype="int32", name="tokens")
        hidden = keras.layers.Embedding(7, 4, mask_zero=True)(tokens)
        tags = keras.layers.Dense(3, name="tags")(hidden)
        return keras.Model(
            {"tokens": tokens}, {"tags": tags, "score": keras.layers.Dense(1, name="score")(hidden[:, 0])}
        )

    x = {"tokens": RNG.integers(0, 7, size=(20, 5)) * (np.arange(5) < RNG.integers(1, 6, size=(20, 1)))}
    y = {"tags": RNG.integers(0, 3, size=(20, 5)), "score": RNG.normal(size=(20, 1))}
    weights = {"tags": RNG.random((20, 1)), "score": RNG.random(20)}
    truth, model = net(), window(net(), 8)
    start = truth.get_weights()
    logs = []
    for each in (truth, model):
        each.compile(
            keras.optimizers.SGD(0.1),
            loss={"tags": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "score": "mse"},
            loss_weights={"tags": 0.3, "score": 2.0},
            metrics={"tags": ["accuracy"], "score": ["mae"]},
            weighted_metrics={"score": ["mse"]},
        )
        history = each.fit(x, y, batch_size=20, sample_weight=weights, epochs=2, shuffle=False, verbose=0).history
        logs.append(history)
    assert off(model, truth, start) < 1e-6
    assert logs[0].keys() == logs[1].keys()
    for key, values in logs[0].items():
        np.testing.assert_allclose(logs[1][key], values, rtol=1e-5)


@pytest.mark.exhaustive
def test_lengths_that_the_graph_does_not_know():
    def net():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 2))
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GRU(4, return_sequences=True)(inputs)))

    def batches():
        rng = np.random.default_rng(0)
        for count, length in ((12, 5), (3, 4), (8, 6)):
            yield rng.normal(size=(count, length, 2)).astype("float32"), rng.normal(size=(count, length, 3))

    signature = (tf.TensorSpec((None, None, 2)), tf.TensorSpec((None, None, 3), tf.float64))
    truth, model = net(), window(net(), 4)
    start = truth.get_weights()
    for each in (truth, model):
        each.compile(keras.optimizers.SGD(0.1), loss=keras.losses.CosineSimilarity(axis=0))
        each.fit(tf.data.Dataset.from_generator(batches, output_signature=signature), verbose=0)
    assert off(model, truth, start) < 2e-6


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_mixed_precision_is_as_near_as_one_batch(policy):
    def net(dtype):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(8, "tanh", dtype=dtype), keras.layers.Dense(4, dtype=dtype)]
        )

    def loss(y_true, y_pred):
        return clip(None, tf.cast(y_pred, tf.float32), tf.cast(y_true, tf.float32))

    truth, whole = net("float32"), net(policy)
    start = truth.get_weights()
    keras.config.set_dtype_policy(policy)
    try:
        model = window(net(policy), 8)
    finally:
        keras.config.set_dtype_policy("float32")
    for each in (truth, whole, model):
        train(each, loss, "graph", (RIGHT, RIGHT[:, :4]))
    assert off(model, truth, start) < 2 * off(whole, truth, start)
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.LossScaleOptimizer) is (
        policy == "mixed_float16"
    )


def test_compute_loss_of_a_subclass_sees_the_window():
    seen = []

    class Mine(accumops.GradientAccumulateModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            seen.append(int(tf.shape(y_pred)[0]))
            return tf.reduce_mean(tf.square(y - y_pred)) + super().compute_loss(x, y, y_pred, sample_weight, training)

    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model = Mine(net, micro_batch_size=8, loss_over="window")
    train(model, "mse", "eager", (RIGHT.astype("float32"), RIGHT[:, :2].astype("float32")))
    assert seen == [20]


def test_sums_and_means_of_several_outputs_go_together():
    def net():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        return keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])

    truth, model = net(), window(net(), 8)
    start = truth.get_weights()
    for each in (truth, model):
        train(
            each, [keras.losses.MeanSquaredError("sum"), "mse"], "eager", (RIGHT, [RIGHT[:, :1], RIGHT[:, 1:2]]), 0.01
        )
    assert off(model, truth, start) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"accum_steps": 2}, "needs `micro_batch_size`"),
        ({"micro_batch_size": 2, "parallel_micro_batches": 2}, "leave `parallel_micro_batches` out"),
        ({"micro_batch_size": 2, "normalization": "samples"}, "leave `normalization` out"),
    ],
)
def test_arguments_that_do_not_go_with_the_window_are_refused(arguments, why):
    with pytest.raises(ValueError, match=why):
        accumops.GradientAccumulateModel(towers(), loss_over="window", **arguments)
    with pytest.raises(ValueError, match="must be 'micro_batch' or 'window'"):
        accumops.GradientAccumulateModel(towers(), micro_batch_size=2, loss_over="batch")


def test_layers_that_cannot_run_again_are_named_before_anything_moves():
    class Noise(keras.layers.Layer):
        def call(self, inputs):
            return inputs + tf.random.normal(tf.shape(inputs))

    model = window(keras.Sequential([keras.Input((5,)), Noise(name="noise"), keras.layers.Dense(2)]), 8)
    start = model.get_weights()
    with pytest.raises(ValueError, match="The layer 'noise' draws random numbers"):
        train(model, "mse", "graph", (RIGHT, RIGHT[:, :2]))
    keras.tree.map_structure(np.testing.assert_array_equal, start, model.get_weights())


def test_the_model_is_saved_with_what_its_loss_sees(tmp_path):
    model = window(keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]), 8)
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").loss_over == "window"


@pytest.mark.parametrize(
    ("activation", "loss", "run_eagerly"),
    [
        ("softmax", "sparse_categorical_crossentropy", False),
        (tf.nn.softmax, "sparse_categorical_crossentropy", False),
        ("sigmoid", "binary_crossentropy", True),
        (tf.nn.sigmoid, "binary_crossentropy", True),
    ],
)
def test_losses_see_the_logits_of_probabilities(activation, loss, run_eagerly):
    """Keras's losses would cut off the logarithms of probabilities below 1e-7.

    They do where TensorFlow's functions are called in eager execution.
    """
    x, units = RNG.standard_normal((32, 6)), 1 if loss == "binary_crossentropy" else 5

    def train(wrap):
        keras.utils.set_random_seed(0)
        large = keras.initializers.RandomNormal(stddev=30.0)
        last = keras.layers.Dense(units, activation, kernel_initializer=large)
        model = wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(16, "tanh"), last]))
        model.compile(keras.optimizers.SGD(0.5), loss, jit_compile=False, run_eagerly=run_eagerly)
        model.fit(x, np.arange(32) % (units + (units == 1)), batch_size=32, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    wanted = train(lambda net: net)
    found = train(lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=12, loss_over="window"))
    for mine, its in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4)


def test_a_model_whose_weights_come_late_is_refused():
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    x, y = RNG.standard_normal((8, 3)), RNG.standard_normal((8, 1))
    late, built = Late(), Late()
    built(x)
    for net in (late, built):
        model = accumops.GradientAccumulateModel(net, micro_batch_size=4, loss_over="window")
        model.compile("sgd", "mse")
        if net is late:
            with pytest.raises(ValueError, match="Call the model that it wraps with a batch"):
                model.fit(x, y, batch_size=8, verbose=0)
        else:
            model.fit(x, y, batch_size=8, verbose=0)
            assert int(model.optimizer.iterations) == 1
