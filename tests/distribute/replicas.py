"""A small model and ragged data for the tests on replicas, and plain Keras on one device to compare with."""

import functools

import keras
import numpy as np
import tensorflow as tf

import accumops

BATCH, MICRO, WINDOW = 64, 16, 4
MOMENTUM = 0.8
SAMPLES = BATCH * 5 + 37  # six batches, and as many windows
UPDATES = 12  # of two epochs
OPTIMIZERS = {
    "SGD": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, **kw),
    "Adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "AdamW": lambda **kw: keras.optimizers.AdamW(0.01, weight_decay=0.1, **kw),
    "RMSprop": lambda **kw: keras.optimizers.RMSprop(0.005, **kw),
}
MODES = {"accum_steps": {"accum_steps": WINDOW}, "micro_batch_size": {"micro_batch_size": 7}}
BATCHES = {"accum_steps": MICRO, "micro_batch_size": BATCH}
CLIPPINGS = {"SGD": {"clipvalue": 0.02}, "Adam": {"global_clipnorm": 0.1}, "AdamW": {"clipnorm": 0.05}, "RMSprop": {}}


def data():
    rng = np.random.default_rng(5)
    return (
        rng.standard_normal((SAMPLES, 5)).astype("float32"),
        rng.standard_normal((SAMPLES, 3)).astype("float32"),
        rng.uniform(0, 2, SAMPLES).astype("float32"),
    )


def network():
    keras.utils.set_random_seed(3)
    regularizer = keras.regularizers.L2(0.05)
    first = keras.layers.Dense(16, "tanh", kernel_regularizer=regularizer)
    return keras.Sequential([keras.Input((5,)), first, keras.layers.Dense(3)])


def normalizing_network(**arguments):
    """Normalizes its inputs, so that the right running statistics do not depend on weights."""
    keras.utils.set_random_seed(3)
    normalization = accumops.AccumBatchNormalization(momentum=MOMENTUM, **arguments)
    return keras.Sequential([keras.Input((5,)), normalization, keras.layers.Dense(3)])


def moved_by(batches, mean=0.0, variance=1.0):
    """Running statistics after windows of these values, in float64."""
    for batch in batches:
        wide = batch.astype(np.float64)
        mean = mean * MOMENTUM + wide.mean(0) * (1 - MOMENTUM)
        variance = variance * MOMENTUM + wide.var(0) * (1 - MOMENTUM)
    return mean, variance


def whole(x):
    """The windows of all samples, one for each large batch."""
    return [x[i : i + BATCH] for i in range(0, len(x), BATCH)]


def optimizer(name):
    return OPTIMIZERS[name](**CLIPPINGS[name])


def fit(model, batch_size, epochs=2, samples=SAMPLES, **arguments):
    """Trains with sample weights and validation; returns the logs."""
    x, y, weights = (each[:samples] for each in data())
    return model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=(x[:33], y[:33]),
        **arguments,
    ).history


@functools.cache
def full_batches(name):
    """The model that plain Keras trains on one device with whole batches for two epochs, and its logs.

    It runs eagerly, because tracing it would take longer than all its steps.
    """
    model = network()
    model.compile(optimizer(name), loss="mse", metrics=["mae"], run_eagerly=True)
    return model, fit(model, BATCH)


def largest_difference(model, other):
    pairs = zip(model.trainable_variables, other.trainable_variables, strict=True)
    return max(np.abs(a.numpy() - b.numpy()).max() for a, b in pairs)


def check_replicas_are_equal(variables):
    for variable in variables:
        first, *others = (each.numpy() for each in variable.value.values)
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=variable.path)


def check_logs(history, wanted):
    assert list(history) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


def count_collectives(concrete):
    """All-reduces in a function that is traced, and in what it calls."""
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return sum(node.op.startswith("CollectiveReduce") for node in nodes)


def mirrored(replicas):
    """A strategy whose collectives have keys of their own, so that none meets another strategy's in this process."""
    tf.distribute.MirroredStrategy._collective_key_base += 1_000
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
