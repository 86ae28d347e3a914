"""Loops of one's own on replicas, what they communicate, and errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from replicas import (
    MICRO,
    UPDATES,
    WINDOW,
    check_replicas_are_equal,
    count_collectives,
    data,
    full_batches,
    largest_difference,
    mirrored,
    network,
    optimizer,
)

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")


def batches(strategy):
    return strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(data()).batch(MICRO))


def gradients_of(model, x, y, weights):
    """Gradients of a replica's mean loss, divided by the number of replicas as tf.distribute asks; and its samples."""
    samples = tf.cast(tf.shape(x)[0], tf.float32)
    with tf.GradientTape() as tape:
        errors = tf.reduce_mean((model(x, training=True) - y) ** 2, axis=-1)
        loss = tf.reduce_sum(errors * weights) / samples + tf.add_n(model.losses)
        loss /= tf.distribute.get_strategy().num_replicas_in_sync
    return tape.gradient(loss, model.trainable_variables), samples


@pytest.mark.parametrize(
    ("scaling", "backend"),
    cross(
        ["plain", "LossScaleOptimizer"],
        ["fused", "reference"],
        default=lambda scaling, backend: (scaling, backend) != ("LossScaleOptimizer", "reference"),
    ),
)
@pytest.mark.some_by_default(1)
def test_the_optimizer_in_a_loop(backend, scaling):
    wanted, _ = full_batches("AdamW")
    accumops.set_backend(backend)
    strategy = mirrored(2)
    with strategy.scope():
        model, inner = network(), optimizer("AdamW")
        if scaling != "plain":
            inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0, dynamic_growth_steps=100)
        accumulating = accumops.GradientAccumulateOptimizer(inner, WINDOW)
        accumulating.build(model.trainable_variables)
    assert bool(accumulating.fused_update) == (backend == "fused")

    def micro_step(*batch):
        gradients, samples = gradients_of(model, *batch)
        accumulating.apply(gradients, model.trainable_variables, weight=samples)

    step = tf.function(lambda batch: strategy.run(micro_step, args=batch))
    for _ in range(2):
        for batch in batches(strategy):
            step(batch)
        tf.function(accumulating.flush)()
    accumops.set_backend("auto")
    assert accumulating.iterations.numpy() == UPDATES
    assert largest_difference(model, wanted) <= 1e-5
    check_replicas_are_equal(accumulating.inner_optimizer.variables)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.some_by_default(1)
def test_the_accumulator_in_a_loop(reduce):
    """Keras's optimizer sums the gradient over replicas; with `reduce` it is that sum already."""
    x, y, weights = data()
    plain = network()
    plain.compile(keras.optimizers.SGD(0.1), loss="mse")
    plain.fit(x, y, sample_weight=weights, batch_size=64, shuffle=False, verbose=0)
    strategy = mirrored(2)
    with strategy.scope():
        model, sgd = network(), keras.optimizers.SGD(0.1)
        sgd.build(model.trainable_variables)
        accumulator = accumops.GradientAccumulator(WINDOW)
        accumulator.build(model.trainable_variables)

    def micro_step(*batch):
        gradients, samples = gradients_of(model, *batch)
        accumulator.accumulate(gradients, weight=samples)

    def update():
        gradients = accumulator.close(reduce=reduce)
        if not reduce:
            sgd.apply(gradients, model.trainable_variables)
            return
        for gradient, variable in zip(gradients, model.trainable_variables, strict=True):
            variable.assign(variable - 0.1 * gradient)

    step = tf.function(lambda batch: strategy.run(micro_step, args=batch))
    end = tf.function(lambda: strategy.run(update))
    for batch in batches(strategy):
        step(batch)
        if bool(accumulator.ready):
            end()
    if bool(accumulator.open):
        end()
    assert largest_difference(model, plain) <= 1e-5


def test_gradients_are_reduced_once_a_window():
    strategy = mirrored(2)
    with strategy.scope():
        model = network()
        accumulating = accumops.GradientAccumulateOptimizer("adam", WINDOW)
        accumulating.build(model.trainable_variables)

    def traced(way):
        def step(*batch):
            gradients, samples = gradients_of(model, *batch)
            way(gradients, model.trainable_variables, weight=samples)

        batch = next(iter(batches(strategy)))
        return tf.function(lambda batch: strategy.run(step, args=batch)).get_concrete_function(batch)

    assert count_collectives(traced(accumulating.accumulate)) == 0
    # One on each replica, of all gradients and the weight together.
    assert count_collectives(traced(accumulating.close)) == 2
    assert count_collectives(traced(accumulating.apply)) == 2


def test_the_model_communicates_where_windows_end():
    strategy = mirrored(2)
    with strategy.scope():
        model = accumops.GradientAccumulateModel(network(), accum_steps=WINDOW)
        model.compile("adam", loss="mse")
        model.optimizer.build(model.trainable_variables)
    batch = next(iter(batches(strategy)))

    def traced(ends):
        def step(batch):
            with model.window_ends(ends):
                strategy.run(model.train_step, args=(batch,))

        return tf.function(step, autograph=False).get_concrete_function(batch)

    assert [count_collectives(traced(ends)) for ends in (False, True)] == [0, 2]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_an_overflow_on_one_replica_drops_the_window_on_all(backend):
    accumops.set_backend(backend)
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable([1.0, 2.0])
        scaling = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
        accumulating = accumops.GradientAccumulateOptimizer(scaling, 2)
        accumulating.build([variable])

    def step(value):
        accumulating.apply([tf.fill([2], value)], [variable])

    def give(*values):
        per_replica = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(values[context.replica_id_in_sync_group])
        )
        tf.function(lambda value: strategy.run(step, args=(value,)))(per_replica)

    give(1.0, 1.0)
    give(1.0, np.inf)
    accumops.set_backend("auto")
    for each in variable.value.values:
        np.testing.assert_array_equal(each, [1.0, 2.0])
    assert scaling.dynamic_scale.numpy() == 4.0
    assert scaling.inner_optimizer.iterations.numpy() == 0


def test_embeddings_and_moving_averages():
    """Sparse gradients become dense; averages overwrite the variables on all replicas."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2000, (192, 3)), rng.standard_normal((192, 40)).astype("float32")

    def train(strategy, name):
        with strategy.scope():
            keras.utils.set_random_seed(0)
            inner = keras.Sequential([keras.layers.Embedding(2000, 40), keras.layers.GlobalAveragePooling1D()])
            inner.build((None, 3))
            model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW)
            made = getattr(keras.optimizers, name)(0.1, use_ema=True, ema_overwrite_frequency=2)
            model.compile(made, loss="mse")
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        return inner

    for name in ("Adam", "Adamax"):  # fused and not
        assert largest_difference(train(tf.distribute.get_strategy(), name), train(mirrored(2), name)) <= 1e-5


class Member:
    """Knows where it was told that a window ends."""

    def __init__(self):
        self.told = []

    @classmethod
    def close_windows(cls, members):
        context = tf.distribute.get_replica_context()
        context.all_reduce("sum", tf.constant(1.0))
        for member in members:
            member.told.append(int(tf.get_static_value(context.replica_id_in_sync_group)))

    @classmethod
    def drop_windows(cls, members, unless=None):
        pass


@pytest.mark.parametrize("way", ["apply", "close"])
def test_members_are_told_on_each_replica(way):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(1.0)
        accumulating = accumops.GradientAccumulateOptimizer("sgd", 1)
        accumulating.build([variable])
    members = [Member(), Member()]
    for member in members:
        accumulating.accumulator.state.members.add(member)
    step = tf.function(lambda: strategy.run(lambda: getattr(accumulating, way)([tf.constant(1.0)], [variable])))
    step()
    assert [member.told for member in members] == [[0, 1], [0, 1]]


def errors():
    strategy = mirrored(2)
    with strategy.scope():
        inside = keras.Variable([1.0], name="inside")
        built = accumops.GradientAccumulateOptimizer("sgd", 2)
        built.build([inside])
        unbuilt = accumops.GradientAccumulateOptimizer("sgd", 2)
        lazy = accumops.GradientAccumulateOptimizer("adam", 2, lazy_sparse=True)
        scaled = accumops.GradientAccumulateOptimizer("sgd", 2)
        keras.optimizers.LossScaleOptimizer(scaled)
        model = accumops.GradientAccumulateModel(network(), accum_steps=2)
    outside = keras.Variable([1.0], name="outside")
    elsewhere = accumops.GradientAccumulateOptimizer("sgd", 2)
    ones = [tf.ones([1])]

    def under(other):
        with other.scope():
            accumops.GradientAccumulator(2).build([outside])

    def within():
        with strategy.scope():
            accumops.GradientAccumulator(2).build([outside])

    def several_steps():
        with strategy.scope():
            model.compile("sgd", "mse", steps_per_execution=2)
        model.fit(np.ones((8, 5)), np.ones((8, 3)), verbose=0)

    def noise_eagerly():
        with strategy.scope():
            eager = accumops.GradientAccumulateModel(network(), accum_steps=1)
            eager.compile("sgd", "mse", run_eagerly=True)
        eager.optimizer.accumulator.track_noise()
        eager.fit(np.ones((8, 5)), np.ones((8, 3)), verbose=0)

    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    return {
        "CentralStorageStrategy": (lambda: under(central), "does not work under CentralStorage"),
        "variable": (within, "'outside' is not a variable of the MirroredStrategy"),
        "optimizer": (lambda: elsewhere.build([inside]), "created outside of the MirroredStrategy"),
        "lazy_sparse": (lambda: lazy.build([inside]), "`lazy_sparse=True` does not work under MirroredStrategy"),
        "LossScaleOptimizer": (lambda: scaled.build([inside]), "Put it inside"),
        "unbuilt": (lambda: strategy.run(lambda: unbuilt.apply(ones, [inside])), "is not built, and cannot be"),
        "outside": (lambda: built.apply(ones, [inside]), "call it in a function that `strategy.run` calls"),
        "close": (built.accumulator.close, "call it in a function that `strategy.run` calls"),
        "keep_sparse": (
            lambda: strategy.run(lambda: built.accumulator.close(keep_sparse=True)),
            "`keep_sparse=True` needs one device",
        ),
        "jit_compile": (lambda: model.compile("sgd", "mse", jit_compile=True), "`jit_compile=True` does not work"),
        "steps_per_execution": (several_steps, "`steps_per_execution` must be 1"),
        "run_eagerly": (noise_eagerly, "notes the noise of gradients, or has `nonfinite`, ends in graphs only"),
        "micro_batch_size": (
            lambda: model_of(strategy, micro_batch_size=17).fit(np.ones((32, 5)), np.ones((32, 3)), batch_size=32),
            "micro_batch_size=17 is larger than what each of 2 replicas gets of 32 samples, 16",
        ),
    }


def model_of(strategy, **arguments):
    with strategy.scope():
        model = accumops.GradientAccumulateModel(network(), **arguments)
        model.compile("sgd", "mse")
    return model


NAMES = """CentralStorageStrategy variable optimizer lazy_sparse LossScaleOptimizer unbuilt outside close keep_sparse
jit_compile steps_per_execution run_eagerly micro_batch_size"""


@pytest.mark.parametrize("name", NAMES.split())
def test_errors(name):
    action, message = errors()[name]
    with pytest.raises(ValueError) as raised:
        action()
    assert message in str(raised.value)
