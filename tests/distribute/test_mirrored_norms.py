"""The norm of each variable's gradient on replicas: that of the sums over all of them, against float64 NumPy."""

import event_files
import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

SAMPLES, ROWS, RATE = 40, 1100, 0.1
X = np.random.default_rng(0).integers(0, ROWS, (SAMPLES, 4)).astype("int32")
Y = np.random.default_rng(1).normal(size=(SAMPLES, 3)).astype("float32")
# For each mode the arguments, the batch of `fit`, and the windows that end within the epoch: ragged ones.
MODES = {
    "accum_steps": ({"accum_steps": 2}, 12, [slice(0, 24), slice(24, 40)]),
    "micro_batch_size": ({"micro_batch_size": 5}, 24, [slice(0, 24), slice(24, 40)]),
}


def network():
    """A table whose gradient is sparse, and a layer."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    body = [layers.Embedding(ROWS, 64), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    return keras.Sequential([keras.Input((4,), dtype="int32"), *body])


class Numbers:
    """The same in float64, which learns by SGD."""

    def __init__(self, model):
        self.weights = {each.path: each.numpy().astype("float64") for each in model.trainable_variables}

    def window(self, x, y):
        """Makes an update, and returns the norms of the gradients before it."""
        table, kernel, bias = self.weights.values()
        pooled = table[x].mean(1)
        error = 2 * (pooled @ kernel + bias - y) / y.size
        rows = np.zeros_like(table)
        np.add.at(rows, x, (error @ kernel.T)[:, None, :] / x.shape[1])
        gradients = dict(zip(self.weights, [rows, pooled.T @ error, error.sum(0)], strict=True))
        self.weights = {path: each - RATE * gradients[path] for path, each in self.weights.items()}
        return {path: pytest.approx(np.linalg.norm(each), rel=2e-5) for path, each in gradients.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.some_by_default(1)
def test_fit(mode, tmp_path):
    arguments, batch_size, windows = MODES[mode]
    with mirrored(2).scope():
        net = network()
        model = accumops.GradientAccumulateModel(net, **arguments)
        model.compile(keras.optimizers.SGD(RATE), "mse")
    numbers = Numbers(net)
    logger = accumops.AccumulationLogger(tmp_path, "batch", per_variable_norms=True)
    model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[logger])
    wanted = [numbers.window(X[each], Y[each]) for each in windows]
    found = event_files.scalars(tmp_path)
    for path in wanted[0]:
        assert list(found[f"gradient_norm/{path}"].values()) == [each[path] for each in wanted]
    assert accumops.per_variable_norms(model) == wanted[-1]


def loop(reduce):
    """A loop over two windows of two micro-batches on each of two replicas; returns their gradients as well."""
    strategy = mirrored(2)
    with strategy.scope():
        variables = [tf.Variable(tf.zeros([3, 2]), name="kernel"), tf.Variable(0.0, name="scale")]
        accumulator = accumops.GradientAccumulator(2)
        accumulator.track_norms()
        accumulator.track_noise(0.5)
        accumulator.build(variables)
    given = np.random.default_rng(3).normal(1.0, size=(2, 2, 2, 7)).astype("float32")  # window, micro-batch, replica

    @tf.function
    def add(each):
        def run(each):
            accumulator.accumulate([tf.reshape(each[0, :6], [3, 2]), each[0, 6]])

        strategy.run(run, args=(each,))

    @tf.function
    def close():
        return strategy.run(lambda: accumulator.close(reduce=reduce))

    for window in given:
        for micro_batch in window:
            parts = [tf.constant(each[None]) for each in micro_batch]
            add(strategy.experimental_distribute_values_from_function(
                lambda context, parts=parts: parts[context.replica_id_in_sync_group]
            ))  # fmt: skip
        close()
    return accumulator, given.astype("float64")


def test_a_loop_that_closes_with_the_whole_gradient():
    accumulator, given = loop(reduce=True)
    gradient = given[1].sum(axis=(0, 1)) / 2  # replicas' gradients are summed, and micro-batches averaged
    wanted = {"kernel:0": np.linalg.norm(gradient[:6]), "scale:0": abs(gradient[6])}
    assert accumops.per_variable_norms(accumulator) == {path: pytest.approx(norm) for path, norm in wanted.items()}
    # Without `reduce` no window tells of the noise. Each replica's gradient counts as that of a loss divided by two.
    trace = square = 0.0
    for window in 2 * given.reshape(2, 4, 7):
        mean = window.mean(0)
        one = ((window**2).sum() - 4 * mean @ mean) / 3
        trace, square = trace / 2 + one / 2, square / 2 + (mean @ mean - one / 4) / 2
    scale = max(trace, 0) / square if square > 0 else np.inf
    assert float(accumulator.noise_scale) == pytest.approx(scale, rel=1e-5)


def test_a_part_of_the_gradient_has_no_norm():
    with pytest.raises(ValueError, match=r"tracks the norms of gradients.*use `close\(reduce=True\)`"):
        loop(reduce=False)
