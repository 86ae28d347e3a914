"""Batch normalization on two and four replicas: the running statistics come from whole windows of all replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from replicas import (
    BATCH,
    BATCHES,
    MICRO,
    MODES,
    MOMENTUM,
    WINDOW,
    check_replicas_are_equal,
    count_collectives,
    data,
    largest_difference,
    mirrored,
    moved_by,
    normalizing_network,
    whole,
)

import accumops
from accumops.normalization import replica_moments

pytestmark = pytest.mark.usefixtures("logical_devices")


def check_statistics(layer, batches):
    mean, variance = moved_by(batches)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-6)
    check_replicas_are_equal([layer.moving_mean, layer.moving_variance])


STATISTICS = [("accum_steps", 4, "fused"), ("micro_batch_size", 2, "fused"), ("micro_batch_size", 2, "reference")]


@pytest.mark.parametrize(
    ("mode", "replicas", "backend"),
    cross(MODES, [2, 4], ["fused", "reference"], default=lambda *combination: combination in STATISTICS),
)
@pytest.mark.some_by_default(1)
def test_statistics_of_windows(mode, replicas, backend):
    """Batches are ragged; some replicas get nothing of some."""
    x, y, _ = data()
    accumops.set_backend(backend)
    try:
        with mirrored(replicas).scope():
            inner = normalizing_network()
            model = accumops.GradientAccumulateModel(inner, **MODES[mode])
            model.compile("sgd", loss="mse")
        model.fit(x, y, batch_size=BATCHES[mode], shuffle=False, verbose=0)
    finally:
        accumops.set_backend("auto")
    check_statistics(inner.layers[0], whole(x))


def test_a_plain_model_with_the_optimizer():
    x, y, _ = (each[: BATCH * 3] for each in data())
    with mirrored(2).scope():
        model = normalizing_network()
        model.compile(accumops.GradientAccumulateOptimizer("sgd", WINDOW), loss="mse")
        model.optimizer.build(model.trainable_variables)
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)
    check_statistics(model.layers[0], whole(x))


def test_a_loop_of_ones_own():
    x, y, _ = (each[: BATCH * 2] for each in data())
    strategy = mirrored(2)
    with strategy.scope():
        model = normalizing_network()
        accumulator = accumops.GradientAccumulator(WINDOW)
        accumulator.build(model.trainable_variables)
        optimizer = keras.optimizers.SGD()
        optimizer.build(model.trainable_variables)

    def micro_step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(batch[0], training=True) - batch[1]) ** 2) / 2
        accumulator.accumulate(tape.gradient(loss, model.trainable_variables))

    def update():
        optimizer.apply(accumulator.close(), model.trainable_variables)

    accumulate = tf.function(lambda batch: strategy.run(micro_step, args=(batch,)), autograph=False)
    close = tf.function(lambda: strategy.run(update), autograph=False)
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(MICRO))
    for i, batch in enumerate(dataset):
        accumulate(batch)
        if i % WINDOW == WINDOW - 1:
            close()
    check_statistics(model.layers[0], whole(x))


def test_a_layer_that_nobody_accumulates_for():
    """Its statistics move with each batch, by the samples of all replicas."""
    x, y, _ = data()
    with mirrored(2).scope():
        model = normalizing_network()
        model.compile("sgd", loss="mse")
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    check_statistics(model.layers[0], whole(x))


def test_windows_of_its_own_are_an_error():
    x, y, _ = data()
    with mirrored(2).scope():
        model = normalizing_network(accum_steps=2)
        model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="accum_steps=2, and under MirroredStrategy cannot end windows"):
        model.fit(x, y, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("trainer", ["plain", "accum_steps"])
@pytest.mark.some_by_default(1)
def test_synchronized_equals_the_whole_batch(trainer):
    """With one micro-batch a window, all replicas together normalize the whole batch, gradients included."""
    x, y, _ = (each[: BATCH * 4] for each in data())

    def make(kind, **arguments):
        keras.utils.set_random_seed(3)
        layers = [keras.layers.Dense(16), kind(momentum=MOMENTUM, **arguments), keras.layers.ReLU()]
        return keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(3)])

    wanted = make(keras.layers.BatchNormalization)
    wanted.compile(keras.optimizers.Adam(0.01), loss="mse")
    wanted.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    with mirrored(2).scope():
        model = inner = make(accumops.AccumBatchNormalization, synchronized=True)
        if trainer != "plain":
            model = accumops.GradientAccumulateModel(inner, accum_steps=1)
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    # The bias before it has no gradient but rounding, which Adam makes steps of.
    inner.trainable_variables[1].assign(wanted.trainable_variables[1])
    assert largest_difference(inner, wanted) <= 1e-5
    for name in ("moving_mean", "moving_variance"):
        got, expected = (getattr(each.layers[1], name).numpy() for each in (inner, wanted))
        if name == "moving_variance":  # the mean moves by that bias
            np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_synchronized_micro_batches_of_a_step_are_an_error():
    with mirrored(2).scope():
        model = accumops.GradientAccumulateModel(normalizing_network(synchronized=True), micro_batch_size=7)
        with pytest.raises(ValueError, match="cannot communicate between micro-batches: use `accum_steps`"):
            model.compile("sgd", loss="mse")


@pytest.mark.exhaustive
def test_synchronized_windows_with_empty_replicas():
    x, y, _ = (each[: BATCH + 1] for each in data())
    with mirrored(2).scope():
        inner = normalizing_network(synchronized=True)
        model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW)
        model.compile("sgd", loss="mse")
    logs = model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    check_statistics(inner.layers[0], whole(x))


@pytest.mark.parametrize(
    ("how", "back", "synchronized"),
    cross(
        ["keras", "checkpoint"],
        ["one device", "other replicas"],
        [False, True],
        default=lambda *each: each in (("keras", "other replicas", True), ("checkpoint", "one device", False)),
    ),
)
@pytest.mark.some_by_default(1)
def test_saving_in_mid_window(tmp_path, how, back, synchronized):
    x, y, _ = (each[: BATCH * 2] for each in data())
    half = BATCH + BATCH // 2

    def make(strategy):
        with strategy.scope():
            inner = normalizing_network(synchronized=synchronized)
            model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW, partial_window="carry")
            model.compile("sgd", loss="mse")
        return inner, model

    _, model = make(mirrored(2))
    model.fit(x[:half], y[:half], batch_size=MICRO, shuffle=False, verbose=0)
    strategy = tf.distribute.get_strategy() if back == "one device" else mirrored(4)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        with strategy.scope():
            model = keras.saving.load_model(tmp_path / "model.keras")
    else:
        path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
        _, model = make(strategy)
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        tf.train.Checkpoint(model=model).restore(path)
    model.fit(x[half:], y[half:], batch_size=MICRO, shuffle=False, verbose=0)
    layer = model.model.layers[0]
    mean, variance = moved_by(whole(x))
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-6)


def test_collectives():
    """A micro-step has none. A window's end has two besides the gradients', however many layers there are."""

    def count(layers):
        strategy = mirrored(2)
        with strategy.scope():
            normalizations = [accumops.AccumBatchNormalization() for _ in range(layers)]
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), *normalizations])
            optimizer = accumops.GradientAccumulateOptimizer("adam", None)
            optimizer.build(model.trainable_variables)

        def micro_step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(tf.ones([4, 5]), training=True))
            optimizer.accumulate(tape.gradient(loss, model.trainable_variables))

        steps = (micro_step, lambda: optimizer.close())
        functions = [tf.function(lambda step=step: strategy.run(step), autograph=False) for step in steps]
        return [count_collectives(function.get_concrete_function()) for function in functions]

    without = count(0)
    assert without[0] == 0
    for layers in (1, 3):
        micro_step, close = count(layers)
        assert micro_step == 0
        assert close - without[1] == 2 * 2  # an op for each replica


def test_pooling_is_exact_where_means_are_large():
    rng = np.random.default_rng(1)
    parts = [rng.normal(1e4, 1e-2, (n, 3)) for n in (5, 1000)]
    strategy = mirrored(2)

    def values(context):
        part = parts[context.replica_id_in_sync_group]
        moments = np.array([part.mean(0), part.var(0) * len(part)])
        return tf.constant(len(part), tf.int64), tf.constant(moments)

    held = strategy.experimental_distribute_values_from_function(values)
    pooled = tf.function(
        lambda held: strategy.run(
            lambda held: replica_moments.pool([(held[0], *tf.unstack(held[1]))])[0], args=(held,)
        ),
        autograph=False,
    )(held)
    together = np.concatenate(parts)
    for replica in range(2):
        count, mean, _, variance = (strategy.experimental_local_results(each)[replica] for each in pooled)
        assert count == 1005
        np.testing.assert_allclose(mean, together.mean(0), rtol=1e-14)
        np.testing.assert_allclose(variance, together.var(0), rtol=1e-10)


class Late(keras.layers.Layer):
    """Makes its batch normalization when it is built, which is after the model is compiled."""

    def build(self, shape):
        self.norm = accumops.AccumBatchNormalization(momentum=MOMENTUM)
        self.norm.build(shape)

    def call(self, inputs, training=None):
        return self.norm(inputs, training=training)


@pytest.mark.parametrize("late", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_two_models_share_a_layer_in_turns(late):
    """Each has a window of its own on each replica."""
    x, y = (each[:16] for each in data()[:2])
    with mirrored(2).scope():
        layer = Late() if late else accumops.AccumBatchNormalization(momentum=MOMENTUM)
        nets = [keras.Sequential([layer, keras.layers.Dense(3)]) for _ in range(2)]
        one, two = (accumops.GradientAccumulateModel(net, accum_steps=2) for net in nets)
        for model in (one, two):
            model.compile("sgd", loss="mse")
    for i, model in enumerate((one, two, one, two)):
        model.train_on_batch(x + i, y)
    mean, variance = moved_by([np.concatenate([x, x + 2]), np.concatenate([x + 1, x + 3])])
    layer = layer.norm if late else layer
    np.testing.assert_allclose(layer.moving_mean, mean, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
