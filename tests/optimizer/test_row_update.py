"""Updates of touched rows only: against Keras's own optimizer on a variable that has just these rows."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

from accumops import AdaptiveGradientClipping, GradientAccumulateOptimizer

ROWS, WIDTH = 1500, 48  # more than 1024 rows and 65,536 values: a table
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01),
    "centered": lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "clipvalue": lambda: keras.optimizers.Adam(0.01, clipvalue=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.5),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
}


def slots(optimizer, rows):
    """The optimizer's variables that have this many rows."""
    return [v for v in optimizer.variables if len(v.shape) == 2 and v.shape[0] == rows]


class Oracle:
    """A table and its momentums in NumPy, whose touched rows a Keras optimizer updates as a variable of their own."""

    def __init__(self, make_optimizer, table):
        self.make_optimizer, self.table, self.steps = make_optimizer, table.copy(), 0
        self.slots = None

    def update(self, rows, gradient):
        variable = keras.Variable(self.table[rows])
        optimizer = self.make_optimizer()
        optimizer.build([variable])
        optimizer.iterations.assign(self.steps)
        mine = slots(optimizer, len(rows))
        if self.slots is None:
            self.slots = [np.full(self.table.shape, float(np.ravel(s.numpy())[0]), "float32") for s in mine]
        for slot, values in zip(mine, self.slots, strict=True):
            slot.assign(values[rows])
        optimizer.apply([tf.constant(gradient)], [variable])
        for slot, values in zip(mine, self.slots, strict=True):
            values[rows] = slot.numpy()
        self.table[rows] = variable.numpy()
        self.steps += 1


def windows(rng, count=4, micro_batches=3):
    """Micro-batches of rows, some twice and some in several micro-batches, and their gradients."""
    for _ in range(count):
        yield [
            (rng.integers(0, ROWS, 20) // rng.integers(1, 50), rng.standard_normal((20, WIDTH)).astype("float32"))
            for _ in range(micro_batches)
        ]


def mean_gradient(window):
    total = np.zeros((ROWS, WIDTH))
    for indices, values in window:
        np.add.at(total, indices, values)
    rows = np.unique(np.concatenate([indices for indices, _ in window]))
    return rows, (total[rows] / len(window)).astype("float32")


def apply_windows(optimizer, variable, mode, all_windows):
    @mode
    def micro_step(indices, values):
        optimizer.apply([tf.IndexedSlices(values, indices)], [variable])

    for window in all_windows:
        for indices, values in window:
            micro_step(tf.constant(indices), tf.constant(values))


# Eagerly all run. A graph takes long to be traced, and longer to be compiled: there, a plain step, slots, a rule of
# rows alone and a norm, and traced a schedule, too.
COMPILED = ("nesterov", "amsgrad", "centered", "global_clipnorm")


@pytest.mark.parametrize(
    ("backend", "mode", "name"),
    cross(
        ["fused", "reference"],
        ["eager", "graph", "xla"],
        OPTIMIZERS,
        default=lambda backend, mode, name: (
            name in COMPILED or mode == "eager" or (backend, mode, name) == ("fused", "graph", "schedule")
        ),
    ),
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(8)
def test_lazy_sparse(backend, mode, rng, name):
    start = rng.standard_normal((ROWS, WIDTH)).astype("float32")
    variable = keras.Variable(start, name="table")
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](), accum_steps=3, lazy_sparse=True)
    optimizer.build([variable])
    all_windows = list(windows(rng))
    apply_windows(optimizer, variable, mode, all_windows)
    oracle = Oracle(OPTIMIZERS[name], start)
    for window in all_windows:
        oracle.update(*mean_gradient(window))
    assert int(optimizer.iterations) == 4
    np.testing.assert_allclose(variable.numpy(), oracle.table, rtol=1e-5, atol=1e-6)
    for slot, values in zip(slots(optimizer.inner_optimizer, ROWS), oracle.slots, strict=True):
        np.testing.assert_allclose(slot.numpy(), values, rtol=1e-5, atol=1e-6)
    untouched = np.setdiff1d(np.arange(ROWS), np.concatenate([mean_gradient(window)[0] for window in all_windows]))
    np.testing.assert_array_equal(variable.numpy()[untouched], start[untouched])


@pytest.mark.parametrize(
    ("backend", "mode", "name"),
    cross(
        ["fused", "reference"],
        ["eager", "graph", "xla"],
        ["SGD", "Adagrad", "clipnorm"],
        default=lambda backend, mode, name: (backend, mode) != ("reference", "xla") or name == "clipnorm",
    ),
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(6)
def test_rows_suffice_without_lazy_sparse(backend, mode, rng, name):
    """For these the dense update leaves the other rows alone."""
    start = rng.standard_normal((ROWS, WIDTH)).astype("float32")
    variable, dense = keras.Variable(start), keras.Variable(start)
    optimizer, plain = GradientAccumulateOptimizer(OPTIMIZERS[name](), accum_steps=3), OPTIMIZERS[name]()
    optimizer.build([variable])
    all_windows = list(windows(rng))
    apply_windows(optimizer, variable, mode, all_windows)
    for window in all_windows:
        gradient = np.zeros((ROWS, WIDTH), "float32")
        rows, values = mean_gradient(window)
        gradient[rows] = values
        plain.apply([tf.constant(gradient)], [dense])
    np.testing.assert_allclose(variable.numpy(), dense.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "lazy", "as_large_as_the_table"),
    [
        ("SGD", False, False),
        ("Adagrad", False, False),
        ("AdamW", True, False),
        ("AdamW", False, False),
        ("RMSprop", False, True),
    ],
)
def test_tensors_of_the_size_of_the_table(name, lazy, as_large_as_the_table):
    """A micro-step and an update compute one only where neither the fused op nor the rows alone will do."""
    variable = keras.Variable(np.zeros((ROWS, WIDTH), "float32"))
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](), accum_steps=3, lazy_sparse=lazy)
    optimizer.build([variable])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, WIDTH])])
    def window(indices, values):
        optimizer.accumulate([tf.IndexedSlices(values, indices)], [variable])
        optimizer.close()

    graph = window.get_concrete_function().graph
    large = [t.op for op in graph.get_operations() for t in op.outputs if t.shape.rank == 2 and t.shape[0] == ROWS]
    assert bool(large) == as_large_as_the_table, large


def test_small_tables_are_lazy_too(mode):
    variable = keras.Variable(np.ones((6, 2), "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5), 2, lazy_sparse=True)
    optimizer.build([variable])

    @mode
    def micro_step(rows):
        optimizer.apply([tf.IndexedSlices(tf.ones([1, 2]), rows)], [variable])

    for row in (1, 4):
        micro_step(tf.constant([row]))
    moved = np.flatnonzero(np.any(variable.numpy() != 1, axis=1))
    np.testing.assert_array_equal(moved, [1, 4])


def test_a_dense_gradient_updates_all_rows(backend):
    variable = keras.Variable(np.ones((6, 2), "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2, lazy_sparse=True)
    optimizer.apply([tf.IndexedSlices(tf.ones([1, 2]), tf.constant([3]))], [variable])
    optimizer.apply([tf.ones([6, 2])], [variable])
    np.testing.assert_array_equal(variable.numpy(), np.where(np.arange(6)[:, None] == 3, 0.0, 0.5) * np.ones((1, 2)))


@pytest.mark.parametrize(
    ("backend", "mode"),
    cross(
        ["fused", "reference"],
        ["eager", "graph", "xla"],
        default=lambda backend, mode: mode != "xla",
    ),
    indirect=["backend", "mode"],
)
def test_adaptive_clipping_of_sparse_gradients(backend, mode, rng):
    """Norms are taken over the whole table, and the gradient stays sparse."""
    start = rng.standard_normal((ROWS, WIDTH)).astype("float32")
    variable = keras.Variable(start)
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(1.0), 3, gradient_clipping=AdaptiveGradientClipping(0.001), lazy_sparse=True
    )
    optimizer.build([variable])
    window = next(windows(rng))
    apply_windows(optimizer, variable, mode, [window])
    rows, gradient = mean_gradient(window)
    limit = 0.001 * np.linalg.norm(start.astype("float64"), axis=0)
    norm = np.linalg.norm(gradient.astype("float64"), axis=0)
    assert (norm > limit).any()
    start[rows] -= gradient * np.minimum(1, limit / norm)
    np.testing.assert_allclose(variable.numpy(), start, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_loss_scaling_and_lazy_sparse(backend, scaled):
    """Around a LossScaleOptimizer: rows are scaled back, and a window with a NaN changes nothing."""
    variable = keras.Variable(np.ones((6, 2), "float32"))
    inner = keras.optimizers.SGD(1.0)
    wrapped = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scaled else inner
    optimizer = GradientAccumulateOptimizer(wrapped, 1, lazy_sparse=True)
    factor = 8.0 if scaled else 1.0
    optimizer.apply([tf.IndexedSlices(tf.ones([1, 2]) * factor, tf.constant([3]))], [variable])
    np.testing.assert_array_equal(variable.numpy()[:, 0], [1, 1, 1, 0, 1, 1])
    if scaled:
        optimizer.apply([tf.IndexedSlices(tf.constant([[np.nan, 1.0]]), tf.constant([2]))], [variable])
        np.testing.assert_array_equal(variable.numpy()[:, 0], [1, 1, 1, 0, 1, 1])
        assert int(inner.iterations) == 1


@pytest.mark.parametrize("name", ["Adagrad", "AdamW"])
def test_threads_that_trace_at_once(name):
    """An optimizer is changed while its update is traced."""
    variable = keras.Variable(np.zeros((6, 2), "float32"))
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](), 1, lazy_sparse=True)
    optimizer.build([variable])

    def trace(row):
        step = tf.function(lambda: optimizer.accumulate([tf.IndexedSlices(tf.ones([1, 2]), [row])], [variable]))
        flush = tf.function(optimizer.flush)
        step.get_concrete_function()
        flush.get_concrete_function()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(trace, range(4)))
    assert not {"update_step", "_backend_update_step"}.intersection(vars(optimizer.inner_optimizer))


class TestErrors:
    def test_clipping_that_moves_rows(self):
        def backwards(gradients, variables):
            return [tf.IndexedSlices(g.values[::-1], g.indices[::-1]) for g in gradients]

        variable = keras.Variable(np.zeros((6, 2), "float32"))
        optimizer = GradientAccumulateOptimizer("sgd", 1, gradient_clipping=backwards, lazy_sparse=True)
        with pytest.raises(ValueError, match="keep the indices"):
            optimizer.apply([tf.IndexedSlices(tf.ones([2, 2]), [0, 1])], [variable])

    def test_unknown_optimizer(self):
        with pytest.raises(ValueError, match=r"Adagrad, Adam, AdamW, Lion, RMSprop, SGD. Received: Adafactor"):
            GradientAccumulateOptimizer(keras.optimizers.Adafactor(), 2, lazy_sparse=True)

    def test_a_subclass_with_its_own_update(self):
        class Mine(keras.optimizers.SGD):
            def update_step(self, gradient, variable, learning_rate):
                self.assign_sub(variable, gradient)

        with pytest.raises(ValueError, match="Received: Mine"):
            GradientAccumulateOptimizer(Mine(), 2, lazy_sparse=True)

    def test_moving_averages(self):
        with pytest.raises(ValueError, match="use_ema"):
            GradientAccumulateOptimizer(keras.optimizers.SGD(use_ema=True), 2, lazy_sparse=True)

    def test_loss_scale_factor(self):
        with pytest.raises(ValueError, match="LossScaleOptimizer"):
            GradientAccumulateOptimizer(keras.optimizers.SGD(loss_scale_factor=8.0), 2, lazy_sparse=True)

    def test_constraint(self):
        layer = keras.layers.Embedding(5, 2, embeddings_constraint="unit_norm")
        layer.build()
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(), 1, lazy_sparse=True)
        before = layer.embeddings.numpy()
        with pytest.raises(ValueError, match="constraint"):
            optimizer.apply([tf.IndexedSlices(tf.ones([1, 2]), tf.constant([1]))], [layer.embeddings])
        np.testing.assert_array_equal(layer.embeddings.numpy(), before)
