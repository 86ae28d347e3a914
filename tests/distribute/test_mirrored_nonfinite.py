"""`nonfinite` on replicas: each skips micro-batches for itself, and all drop a window together."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from replicas import check_replicas_are_equal, mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

# Two replicas get 4 samples each of a batch, and two batches make a window. The first window lacks 4 samples; the
# second has nothing left; the third is whole.
SAMPLES, BATCH, WINDOW = 48, 8, 16
BAD = [13, *range(16, 32)]
KEPT = {"skip": [[*range(12)], [*range(32, 48)]], "drop": [[*range(32, 48)]]}
COUNT = {"skip": 5, "drop": 2}


def data():
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((SAMPLES, 3)).astype("float32"), rng.standard_normal((SAMPLES, 1)).astype("float32")
    x[BAD, 0] = np.inf
    return x, y


def network(*layers):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])


def expected(optimizer, policy):
    model = network()
    optimizer.build(model.trainable_variables)
    x, y = data()
    for samples in KEPT[policy]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[samples]) - y[samples]) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
    return model.get_weights()


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.05),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.05),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.2),
}


@pytest.mark.parametrize(
    ("policy", "mode", "name"),
    cross(
        ["skip", "drop"],
        ["accum_steps", "micro_batch_size"],
        OPTIMIZERS,
        default=lambda *values: values in [("skip", "accum_steps", "Adam"), ("drop", "micro_batch_size", "RMSprop")],
    ),
)
@pytest.mark.some_by_default(1)
def test_updates_are_those_of_what_is_left(policy, mode, name):
    x, y = data()
    with mirrored(2).scope():
        inner = network()
        settings = {"accum_steps": 2} if mode == "accum_steps" else {"micro_batch_size": 4}
        model = accumops.GradientAccumulateModel(inner, nonfinite=policy, **settings)
        model.compile(OPTIMIZERS[name](), loss="mse", metrics=["mae"])
    # A batch of a window is split over the replicas before its micro-batches: in another order, the same samples.
    order = np.arange(SAMPLES).reshape(3, 2, 2, 4).transpose(0, 2, 1, 3).ravel()
    x, y = (x, y) if mode == "accum_steps" else (x[order], y[order])
    batch_size = BATCH if mode == "accum_steps" else WINDOW
    logs = model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0).history
    for found, wanted in zip(inner.get_weights(), expected(OPTIMIZERS[name](), policy), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert int(model.optimizer.iterations.numpy()) == len(KEPT[policy])
    assert logs["nonfinite_count"] == [COUNT[policy]]
    assert np.isfinite([*logs["loss"], *logs["mae"]]).all()
    check_replicas_are_equal(model.optimizer.inner_optimizer.variables)


def test_running_statistics_are_those_of_what_is_left():
    x, y = data()
    with mirrored(2).scope():
        inner = network(accumops.AccumBatchNormalization(momentum=0.5))
        model = accumops.GradientAccumulateModel(inner, accum_steps=2, nonfinite="skip")
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0), loss="mse")
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    mean = np.zeros(3)
    for samples in KEPT["skip"]:
        mean = mean / 2 + x[samples].mean(0) / 2
    np.testing.assert_allclose(inner.layers[0].moving_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(weights).all() for weights in inner.get_weights())
    assert float(model.optimizer.inner_optimizer.dynamic_scale.numpy()) == 2.0  # two of three windows lack something


def test_an_accumulator_on_replicas():
    strategy = mirrored(2)
    with strategy.scope():
        variable = tf.Variable([0.0])
        accumulator = accumops.GradientAccumulator(2, nonfinite="skip")
        accumulator.build([variable])
        dropping = accumops.GradientAccumulator(2, nonfinite="drop")
        dropping.build([variable])

    def gradient(step):
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
        # Each replica skips one of its micro-batches.
        return [tf.where(tf.equal(replica, step), np.nan, [2.0 + 4.0 * step]) / 2]

    accumulate = tf.function(lambda step: strategy.run(lambda: accumulator.accumulate(gradient(step))))
    for step in (0.0, 1.0):
        accumulate(tf.constant(step))
    close = tf.function(lambda: strategy.run(lambda: accumulator.close(reduce=True)[0]))
    for found in strategy.experimental_local_results(close()):
        assert found.numpy().tolist() == [4.0]
    assert int(accumulator.nonfinite_count.numpy()) == 2
    with pytest.raises(
        ValueError, match="nonfinite='drop', and under MirroredStrategy a replica knows only of its own"
    ):
        strategy.run(lambda: dropping.accumulate([tf.constant([1.0])]))
