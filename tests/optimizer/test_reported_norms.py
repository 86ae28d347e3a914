"""Norms that an update clips by, or looks at for Inf and NaN: from the op that adds a window's last gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops.adapters.tensorflow import operations_within

SHAPES = [(3, 4), (4,), ()]
OPTIMIZERS = {
    "global_clipnorm": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.3),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.3),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=4.0),
    "loss scale and clipnorm": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5, clipnorm=0.3), initial_scale=4.0
    ),
}


def by_hand(name, gradients):
    """The update of a mean gradient, in float64."""
    gradients = [np.asarray(each, "float64") / (4.0 if "loss scale" in name else 1.0) for each in gradients]
    norms = [np.linalg.norm(np.ravel(each)) for each in gradients]
    if name == "global_clipnorm":
        norms = [np.linalg.norm(norms)] * len(norms)
    limit = np.inf if name == "loss scale" else 0.3
    return [-0.5 * each * min(1.0, limit / norm) for each, norm in zip(gradients, norms, strict=True)]


def build(name, steps=2, shapes=SHAPES, **arguments):
    variables = [keras.Variable(tf.zeros(shape), name=f"v{i}") for i, shape in enumerate(shapes)]
    optimizer = accumops.GradientAccumulateOptimizer(OPTIMIZERS[name](), steps, **arguments)
    optimizer.build(variables)
    assert optimizer.fused_update
    return optimizer, variables


def draw(rng, shapes=SHAPES):
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def check(variables, wanted, rtol=2e-6):
    for variable, each in zip(variables, wanted, strict=True):
        largest = np.abs(each).max(initial=0)
        np.testing.assert_allclose(variable.numpy(), each, rtol=rtol, atol=1e-7 * largest, err_msg=variable.path)


# What a loop may do with the second and last micro-batch of a window.
ENDINGS = {
    "apply": lambda optimizer, given: optimizer.apply(given),
    "close": lambda optimizer, given: optimizer.close(given),
    "accumulate, and close": lambda optimizer, given: (optimizer.accumulate(given), optimizer.close()),
    "accumulate, and flush": lambda optimizer, given: (optimizer.accumulate(given), optimizer.flush()),
}


def passes_of(function, *given):
    """How many operations of a function read tensors for their norms."""
    operations = operations_within(function.get_concrete_function(*given).graph)
    return sum(each.type == "AccumOps>SquaredNorms" for each in operations)


@pytest.mark.parametrize(
    ("mode", "name", "ending"),
    cross(
        ["eager", "graph", "xla"],
        OPTIMIZERS,
        ENDINGS,
        default=lambda mode, name, ending: (
            (mode, ending) in [("graph", "apply"), ("graph", "close"), ("eager", "apply")]
            or (name == "global_clipnorm" and mode == "graph")
            or (mode, name, ending) == ("xla", "global_clipnorm", "apply")
        ),
    ),
    indirect=["mode"],
)
@pytest.mark.some_by_default(4)
def test_as_in_float64(mode, rng, name, ending):
    optimizer, variables = build(name)
    optimizer.jit_compile = mode.name == "xla"
    add = mode(lambda *given: optimizer.apply(given))
    end = mode(lambda *given: ENDINGS[ending](optimizer, given) and None)
    wanted = [0.0] * len(SHAPES)
    for _ in range(3):
        window = [draw(rng) for _ in range(2)]
        add(*map(tf.constant, window[0]))
        end(*map(tf.constant, window[1]))
        mean = [(a.astype("float64") + b) / 2 for a, b in zip(*window, strict=True)]
        wanted = [value + step for value, step in zip(wanted, by_hand(name, mean), strict=True)]
    assert int(optimizer.iterations) == 3
    check(variables, wanted)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.some_by_default(4)
def test_sums_are_read_only_where_the_window_ends_apart(name, ending):
    optimizer, _ = build(name)
    end = tf.function(lambda *given: ENDINGS[ending](optimizer, given) and None)
    assert passes_of(end, *map(tf.zeros, SHAPES)) == (1 if "accumulate" in ending else 0)


@pytest.fixture
def asked(monkeypatch):
    """For each addition so far, whether it was asked for norms."""
    flags = []
    add_gradients = accumops.window.state.add_gradients

    def spy(*arguments, norms, **options):
        flags.append(bool(norms))
        return add_gradients(*arguments, norms=norms, **options)

    monkeypatch.setattr(accumops.window.state, "add_gradients", spy)
    return flags


def test_only_the_last_micro_batch_reports(rng, asked):
    """The op is told so when it runs."""
    optimizer, _ = build("global_clipnorm", steps=3)
    for _ in range(6):
        optimizer.apply([tf.constant(each) for each in draw(rng)])
    assert asked == [False, False, True] * 2


@pytest.mark.parametrize("name", ["global_clipnorm", "clipnorm"])
@pytest.mark.parametrize("magnitude", [1e-25, 1e18, 1e20, 1e30, 1e36])
def test_squares_that_leave_the_range_of_float32(rng, name, magnitude):
    optimizer, variables = build(name)
    window = [[each / np.abs(each).max() * np.float32(magnitude) for each in draw(rng)] for _ in range(2)]
    for gradients in window:
        optimizer.apply([tf.constant(each) for each in gradients])
    mean = [(a.astype("float64") + b) / 2 for a, b in zip(*window, strict=True)]
    for variable, each in zip(variables, by_hand(name, mean), strict=True):
        np.testing.assert_allclose(variable.numpy(), each, rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_scaled_loss_that_overflows_makes_no_update(rng, value, micro_batch):
    optimizer, variables = build("loss scale")
    window = [draw(rng) for _ in range(2)]
    window[micro_batch][0][1, 2] = value
    for gradients in window:
        optimizer.apply([tf.constant(each) for each in gradients])
    check(variables, [0.0] * len(SHAPES))
    assert (int(optimizer.iterations), float(optimizer.inner_optimizer.dynamic_scale)) == (0, 2.0)


@pytest.mark.parametrize("mode", ["eager", "graph"], indirect=True)
def test_gradients_that_are_rows_or_none_in_the_last_micro_batch(mode, rng):
    """What is not reported is read: a table's rows, small and large, and a variable that had its gradient before."""
    shapes = [(1100, 64), (9, 2), (4,), (5,)]
    optimizer, variables = build("global_clipnorm", shapes=shapes)
    rows = [np.array([1, 7, 1]), np.array([2, 2, 0])]
    values = [draw(rng, [(3, 64), (3, 2), (4,), (5,)]) for _ in range(2)]

    def apply(last, large, small, dense, other, indices):
        tables = [tf.IndexedSlices(each, indices) for each in (large, small)]
        optimizer.apply([*tables, dense, None if last else other])

    calls = [mode(lambda *given: apply(False, *given)), mode(lambda *given: apply(True, *given))]
    sums = [np.zeros(shape) for shape in shapes]
    for i, call in enumerate(calls):
        call(*map(tf.constant, values[i]), tf.constant(rows[i]))
        for table in range(2):
            np.add.at(sums[table], rows[i], values[i][table])
        sums[2] += values[i][2]
        sums[3] += values[i][3] * (i == 0)
    check(variables, by_hand("global_clipnorm", [each / 2 for each in sums]))


def test_clipping_of_ones_own_comes_before():
    """The norm is then taken of what the callable has returned."""
    optimizer, variables = build("global_clipnorm", gradient_clipping=lambda gradients, _: [10 * g for g in gradients])
    for _ in range(2):
        optimizer.apply([tf.fill(shape, 1e-3) for shape in SHAPES])
    check(variables, by_hand("global_clipnorm", [np.full(shape, 1e-2) for shape in SHAPES]))


def test_gradients_in_several_operations(rng, monkeypatch):
    monkeypatch.setattr("accumops.window.buckets.BUCKET_BYTES", 12)
    monkeypatch.setattr("accumops.window.buckets.SMALL_BYTES", 12)
    optimizer, variables = build("clipnorm")
    apply = tf.function(lambda *given: optimizer.apply([1.0 * each for each in given[::-1]][::-1]))
    window = [draw(rng) for _ in range(2)]
    for gradients in window:
        apply(*map(tf.constant, gradients))
    check(variables, by_hand("clipnorm", [(a + b) / 2 for a, b in zip(*window, strict=True)]))


def test_a_window_that_goes_on_after_its_slices(rng):
    """What is reported of the last slice is no longer the norm of the sums."""
    optimizer, variables = build("global_clipnorm", None)
    window = [draw(rng) for _ in range(2)]
    optimizer.accumulate_slice([tf.constant(each) for each in window[0]], variables, weight=1.0, starts=True, last=True)
    optimizer.accumulator.state.count(1, tf.constant(1.0))
    optimizer.accumulate([tf.constant(each) for each in window[1]])
    optimizer.close()
    check(variables, by_hand("global_clipnorm", [(a + b) / 2 for a, b in zip(*window, strict=True)]))


class TestSlices:
    """With `micro_batch_size`, where a loop adds all micro-batches, and the window ends after it."""

    X = np.random.default_rng(0).normal(size=(44, 5)).astype("float32")
    Y = np.random.default_rng(1).normal(size=(44, 3)).astype("float32")

    def model(self, optimizer, body=(), **arguments):
        keras.utils.set_random_seed(3)
        net = keras.Sequential([keras.Input((5,)), *body, keras.layers.Dense(3)])
        model = accumops.GradientAccumulateModel(net, **({"micro_batch_size": 6} | arguments))
        model.compile(optimizer, loss="mse", jit_compile=False)
        return model

    def fit(self, model, **arguments):
        model.fit(self.X, self.Y, batch_size=16, shuffle=False, verbose=0, **arguments)
        return model

    def by_hand(self, clip):
        """The weights after windows of 16, 16 and 12 samples, in float64."""
        start = self.model("sgd").model.get_weights()
        kernel, bias = (each.astype("float64") for each in start)
        for begin in range(0, 44, 16):
            x, y = (each[begin : begin + 16].astype("float64") for each in (self.X, self.Y))
            error = 2 * (x @ kernel + bias - y) / y.size
            steps = by_hand(clip, [x.T @ error, error.sum(0)])
            kernel, bias = kernel + steps[0], bias + steps[1]
        return [kernel, bias]

    @pytest.mark.parametrize("arguments", [{}, {"parallel_micro_batches": 2}], ids=["loop", "parallel"])
    @pytest.mark.parametrize("run_eagerly", [False, True])
    @pytest.mark.parametrize("name", ["global_clipnorm", "clipnorm"])
    @pytest.mark.some_by_default(2)
    def test_as_in_float64(self, name, run_eagerly, arguments):
        model = self.model(OPTIMIZERS[name](), **arguments)
        model.run_eagerly = run_eagerly
        check(self.fit(model).trainable_variables, self.by_hand(name), rtol=1e-5)

    def passes(self, model):
        """How often a step reads sums for their norms, and how many of its additions may report some."""
        model.optimizer.build(model.trainable_variables)
        step = tf.function(model.train_step, autograph=False)
        signature = tuple(tf.TensorSpec([None, *each.shape[1:]], each.dtype) for each in (self.X, self.Y))
        operations = operations_within(step.get_concrete_function(signature).graph)
        reports = [each for each in operations if each.type == "AccumOps>Accumulate" and each.get_attr("squared_norms")]
        return sum(each.type == "AccumOps>SquaredNorms" for each in operations), len(reports)

    @pytest.mark.parametrize(
        ("optimizer", "asks"),
        [(OPTIMIZERS["global_clipnorm"], 1), (OPTIMIZERS["loss scale"], 1), (keras.optimizers.SGD, 0)],
        ids=["clipped", "scaled", "neither"],
    )
    def test_no_sums_are_read(self, optimizer, asks):
        assert self.passes(self.model(optimizer())) == (0, asks)

    def test_sums_are_read_for_a_loss_over_the_window(self):
        """Its last pass is over a micro-batch in the middle."""
        model = self.model(OPTIMIZERS["global_clipnorm"](), loss_over="window")
        assert self.passes(model) == (1, 0)
        check(self.fit(model).trainable_variables, self.by_hand("global_clipnorm"), rtol=1e-5)

    def test_only_the_last_slice_reports(self, asked):
        model = self.model(OPTIMIZERS["global_clipnorm"]())
        model.run_eagerly = True
        self.fit(model)
        assert asked == [False, False, True, False, False, True, False, True]

    def test_norms_of_variables_are_reported_as_well(self):
        model = self.model(keras.optimizers.SGD(0.1))
        model.optimizer.accumulator.track_norms()
        assert self.passes(model) == (0, 1)
        weights = [each.numpy().astype("float64") for each in model.trainable_variables]
        model.fit(self.X, self.Y, batch_size=44, shuffle=False, verbose=0)
        error = 2 * (self.X @ weights[0] + weights[1] - self.Y) / self.Y.size
        wanted = [np.linalg.norm(self.X.T @ error), np.linalg.norm(error.sum(0))]
        np.testing.assert_allclose(list(accumops.per_variable_norms(model).values()), wanted, rtol=1e-5)
