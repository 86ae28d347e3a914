"""The norm of each variable's gradient, in `fit` and in loops, against float64 NumPy."""

import event_files
import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops.adapters.tensorflow import operations_within

SAMPLES, MICRO, ROWS, RATE = 80, 16, 1100, 0.1


class Numbers:
    """A network of a table and two layers in float64, which learns by SGD."""

    def __init__(self, model):
        self.weights = {each.path: each.numpy().astype("float64") for each in model.trainable_variables}

    def gradients(self, x, y):
        """The gradients of the mean squared error over a batch, by the variables' paths."""
        table, kernel, bias, head, head_bias = self.weights.values()
        pooled = table[x].mean(1)
        hidden = np.tanh(pooled @ kernel + bias)
        error = 2 * (hidden @ head + head_bias - y) / y.size
        inner = (error @ head.T) * (1 - hidden**2)
        rows = np.zeros_like(table)
        np.add.at(rows, x, (inner @ kernel.T)[:, None, :] / x.shape[1])
        found = [rows, pooled.T @ inner, inner.sum(0), hidden.T @ error, error.sum(0)]
        return dict(zip(self.weights, found, strict=True))

    def window(self, x, y, rate=RATE):
        """Makes an update, and returns the norms of the gradients before it."""
        gradients = self.gradients(x, y)
        for path, gradient in gradients.items():
            self.weights[path] = self.weights[path] - rate * gradient
        return {path: np.linalg.norm(each) for path, each in gradients.items()}


def network():
    keras.utils.set_random_seed(7)
    layers = keras.layers
    body = [layers.Embedding(ROWS, 64), layers.GlobalAveragePooling1D(), layers.Dense(8, "tanh"), layers.Dense(3)]
    return keras.Sequential([keras.Input((6,), dtype="int32"), *body])


@pytest.fixture
def data(rng):
    x = rng.zipf(1.3, (SAMPLES, 6)).clip(max=ROWS).astype("int32") - 1
    return x, rng.standard_normal((SAMPLES, 3)).astype("float32")


def close_to(norms):
    return {path: pytest.approx(norm, rel=2e-5) for path, norm in norms.items()}


def logged(directory):
    """For each step the norms that are written, by the variables' paths."""
    found = {}
    for tag, steps in event_files.scalars(directory).items():
        if tag.startswith("gradient_norm/"):
            for step, value in steps.items():
                found.setdefault(step, {})[tag.removeprefix("gradient_norm/")] = value
    return found


RUNS = {"graph": {"jit_compile": False}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
# For each mode: its arguments, the batch of `fit`, the steps that are written with a new window, and the windows.
MODES = {
    "accum_steps": ({"accum_steps": 4}, MICRO, {4: slice(0, 64), 6: slice(64, 80), 9: slice(0, 64)}, [slice(64, 80)]),
    "micro_batch_size": (
        {"micro_batch_size": 12},
        32,
        {i + 1: [slice(0, 32), slice(32, 64), slice(64, 80)][i % 3] for i in range(6)},
        [],
    ),
}


@pytest.mark.parametrize(
    ("mode", "run", "lazy_sparse"),
    cross(MODES, RUNS, [False, True], default=lambda mode, run, lazy: not lazy and run != "eager"),
)
@pytest.mark.some_by_default(1)
def test_fit(data, tmp_path, mode, run, lazy_sparse):
    """Ragged windows and micro-batches; the end of the second epoch flushes a window that is read, and not written."""
    arguments, batch_size, written, flushed = MODES[mode]
    net = network()
    numbers = Numbers(net)
    model = accumops.GradientAccumulateModel(net, lazy_sparse=lazy_sparse, **arguments)
    model.compile(keras.optimizers.SGD(RATE), loss="mse", **RUNS[run])
    logger = accumops.AccumulationLogger(tmp_path, "batch", per_variable_norms=True)
    callbacks = [accumops.PartialWindow(), logger]
    model.fit(*data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    wanted = {step: numbers.window(*(each[part] for each in data)) for step, part in written.items()}
    assert logged(tmp_path) == {step: close_to(norms) for step, norms in wanted.items()}
    last = [numbers.window(*(each[part] for each in data)) for part in flushed] or [wanted[6]]
    assert accumops.per_variable_norms(model) == close_to(last[-1])
    total = np.sqrt(sum(norm**2 for norm in wanted[6].values()))
    assert event_files.scalars(tmp_path)["accumulation/gradient_norm"][6] == pytest.approx(total, rel=2e-5)


@pytest.mark.exhaustive
def test_each_epoch_without_the_norm_of_all(data, tmp_path):
    net = network()
    numbers = Numbers(net)
    net.compile(accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(RATE), 5), loss="mse")
    logger = accumops.AccumulationLogger(tmp_path, gradient_norm=False, per_variable_norms=True)
    net.fit(*data, batch_size=MICRO, epochs=2, shuffle=False, verbose=0, callbacks=[logger])
    wanted = [numbers.window(*data) for _ in range(2)]
    assert logged(tmp_path) == {0: close_to(wanted[0]), 1: close_to(wanted[1])}
    assert "accumulation/gradient_norm" not in event_files.scalars(tmp_path)
    assert accumops.per_variable_norms(net) == close_to(wanted[1])
    assert accumops.per_variable_norms(net.optimizer) == close_to(wanted[1])
    assert accumops.per_variable_norms(net.optimizer.accumulator) == close_to(wanted[1])


@pytest.mark.exhaustive
def test_tracing(data, tmp_path):
    """A step that was traced without norms is made anew, and then serves all that follow."""
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x * 1.0

    net = network()
    net.add(Counted())
    model = accumops.GradientAccumulateModel(net, accum_steps=5)
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)

    def fit(*callbacks):
        before = len(traces)
        model.fit(*data, batch_size=MICRO, shuffle=False, verbose=0, callbacks=list(callbacks))
        return len(traces) - before

    assert fit()
    model.optimizer.accumulator.track_norms()  # too late for the function that there is
    assert not fit()
    assert np.isnan(list(accumops.per_variable_norms(model).values())).all()
    assert fit(accumops.AccumulationLogger(tmp_path / "a", per_variable_norms=True))
    wanted = close_to(Numbers(net).window(*data))
    assert accumops.per_variable_norms(model) == wanted
    assert not fit()
    assert not fit(accumops.AccumulationLogger(tmp_path / "b"))
    assert not fit(accumops.AccumulationLogger(tmp_path / "c", per_variable_norms=True))
    assert logged(tmp_path / "b") == {}
    assert logged(tmp_path / "c") == {0: wanted}


def test_changes_no_bit_of_the_training(data, tmp_path):
    weights = []
    for callbacks in ([], [accumops.AccumulationLogger(tmp_path, per_variable_norms=True)]):
        model = accumops.GradientAccumulateModel(network(), accum_steps=4)
        model.compile(keras.optimizers.Adam(0.01), loss="mse", jit_compile=False)
        model.fit(*data, batch_size=MICRO, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(model.get_weights())
    for without, beside in zip(*weights, strict=True):
        np.testing.assert_array_equal(without, beside)


SHAPES = {"kernel": (4, 3), "bias": (3,), "scale": ()}


def new_variables():
    return [keras.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]


def random_gradients(rng):
    return [rng.standard_normal(shape).astype("float32") for shape in SHAPES.values()]


def norms_of(window, weights=None, divisor=None):
    """The norms of the mean of some micro-batches' gradients."""
    weights = np.ones(len(window)) if weights is None else np.array(weights, "float64")
    sums = [
        sum(w * each.astype("float64") for w, each in zip(weights, g, strict=True)) for g in zip(*window, strict=True)
    ]
    divisor = weights.sum() if divisor is None else divisor
    return {name: np.linalg.norm(np.ravel(each)) / divisor for name, each in zip(SHAPES, sums, strict=True)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("backend", "mode"),
    cross(["fused", "reference"], ["eager", "graph", "xla"], default=lambda backend, mode: backend == "fused"),
    indirect=True,
)
def test_an_accumulator_in_a_loop(backend, mode, rng, reduction):
    """Windows of several sizes, with weights; the values are those of the last window that was closed."""
    accumulator = accumops.GradientAccumulator(None, reduction=reduction)
    accumulator.track_norms()
    accumulator.build(new_variables(), jit_compile=mode.name == "xla")
    add = mode(lambda weight, *gradients: accumulator.accumulate(gradients, weight=weight))
    close = mode(lambda: accumulator.close())
    assert np.isnan(list(accumops.per_variable_norms(accumulator).values())).all()
    last = None
    for weights in ([1, 1], [16, 16, 5], [7]):
        window = [random_gradients(rng) for _ in weights]
        for weight, gradients in zip(weights, window, strict=True):
            add(tf.constant(float(weight)), *map(tf.constant, gradients))
            if last is not None:
                assert accumops.per_variable_norms(accumulator) == last
        close()
        last = close_to(norms_of(window, weights, 1 if reduction == "sum" else None))
        assert accumops.per_variable_norms(accumulator) == last


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"], indirect=True)
@pytest.mark.some_by_default(2)
def test_an_optimizer_in_a_loop(mode, rng):
    """`apply`, which knows of the end when it runs, `close` with gradients, and `flush`."""
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), 3)
    optimizer.accumulator.track_norms()
    optimizer.jit_compile = mode.name == "xla"
    optimizer.build(new_variables())
    apply, close = mode(lambda *given: optimizer.apply(given)), mode(lambda *given: optimizer.close(given))
    for ending in ("full", "close", "flush", "full"):
        window = [random_gradients(rng) for _ in range(3 if ending == "full" else 2)]
        for i, gradients in enumerate(window):
            (close if ending == "close" and i == 1 else apply)(*map(tf.constant, gradients))
        if ending == "flush":
            mode(optimizer.flush)()
        assert accumops.per_variable_norms(optimizer) == close_to(norms_of(window)), ending


@pytest.mark.parametrize("mode", ["eager", "graph"], indirect=True)
def test_variables_without_a_gradient_in_some_micro_batches(mode, rng):
    """One has none in the last micro-batch, and one in the whole window."""
    variables = new_variables()
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
    optimizer.accumulator.track_norms()
    optimizer.build(variables)
    first, second = random_gradients(rng), random_gradients(rng)
    all_of_them = mode(lambda *given: optimizer.apply([*given[:2], None]))
    some = mode(lambda given: optimizer.apply([given, None, None]))
    all_of_them(*map(tf.constant, first))
    some(tf.constant(second[0]))
    wanted = norms_of([first, [second[0], np.zeros(3), np.zeros(())]]) | {"scale": 0.0}
    assert accumops.per_variable_norms(optimizer) == close_to(wanted)


def test_rows_of_an_earlier_window_do_not_count():
    """Large tables, whose touched rows are known, and small ones."""
    large, small = keras.Variable(tf.zeros([ROWS, 64]), name="large"), keras.Variable(tf.zeros([9, 2]), name="small")
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), 1)
    optimizer.accumulator.track_norms()
    optimizer.build([large, small])
    for rows, wanted in (([1, 1, 5], 5.0), ([7], 1.0)):
        slices = [
            tf.IndexedSlices(tf.ones([len(rows), width]) / np.sqrt(width), tf.constant(rows)) for width in (64, 2)
        ]
        optimizer.apply(slices)
        assert accumops.per_variable_norms(optimizer) == close_to({"large": wanted**0.5, "small": wanted**0.5})


def test_a_scaled_loss_is_unscaled(rng):
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0, dynamic_growth_steps=1)
    optimizer = accumops.GradientAccumulateOptimizer(inner, 2)
    optimizer.accumulator.track_norms()
    optimizer.build(new_variables())
    for _ in range(2):
        window, scale = [random_gradients(rng) for _ in range(2)], float(inner.dynamic_scale)  # grows
        for gradients in window:
            optimizer.apply([tf.constant(scale * each) for each in gradients])
        assert accumops.per_variable_norms(optimizer) == close_to(norms_of(window))


def test_scaling_around_the_optimizer_that_accumulates(rng):
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
    optimizer.accumulator.track_norms()
    around = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    variables = new_variables()
    around.build(variables)
    window = [random_gradients(rng) for _ in range(2)]
    for gradients in window:
        around.apply([tf.constant(64 * each) for each in gradients], variables)
    assert accumops.per_variable_norms(around) == close_to(norms_of(window))


@pytest.mark.parametrize("policy", ["propagate", "skip", "drop"])
def test_gradients_that_are_not_finite(rng, policy):
    """A window that is dropped has no norms. Without a policy the norms say which variable it is."""
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2, nonfinite=policy)
    optimizer.accumulator.track_norms()
    optimizer.build(new_variables())
    window = [random_gradients(rng) for _ in range(2)]
    window[1][1][2] = np.inf
    for gradients in window:
        optimizer.apply([tf.constant(each) for each in gradients])
    found = accumops.per_variable_norms(optimizer)
    if policy == "drop":
        assert np.isnan(list(found.values())).all()
    elif policy == "skip":
        assert found == close_to(norms_of(window[:1]))
    else:
        assert found == close_to(norms_of(window))
        assert found["bias"] == np.inf
        assert np.isfinite([found["kernel"], found["scale"]]).all()


def test_large_values(rng):
    """Their squares overflow in float32."""
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
    optimizer.accumulator.track_norms()
    optimizer.build(new_variables())
    window = [[each * np.float32(1e30) for each in random_gradients(rng)] for _ in range(2)]
    for gradients in window:
        optimizer.apply([tf.constant(each) for each in gradients])
    assert accumops.per_variable_norms(optimizer) == close_to(norms_of(window))


def test_gradients_in_several_operations(rng, monkeypatch):
    """Large gradients are added by more than one, in the order in which the graph makes them."""
    monkeypatch.setattr("accumops.window.buckets.BUCKET_BYTES", 12)
    monkeypatch.setattr("accumops.window.buckets.SMALL_BYTES", 12)
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
    optimizer.accumulator.track_norms()
    optimizer.build(new_variables())

    @tf.function
    def apply(*given):
        optimizer.apply([1.0 * each for each in given[::-1]][::-1])

    window = [random_gradients(rng) for _ in range(2)]
    for gradients in window:
        apply(*map(tf.constant, gradients))
    operations = operations_within(apply.get_concrete_function(*map(tf.constant, window[0])).graph)
    assert sum(each.type == "AccumOps>Accumulate" for each in operations) == 2
    assert accumops.per_variable_norms(optimizer) == close_to(norms_of(window))


@pytest.mark.parametrize(
    ("optimizer", "passes"),
    [(keras.optimizers.SGD(0.1), 0), (keras.optimizers.Adagrad(0.1), 0), (keras.optimizers.SGD(0.1, clipnorm=1.0), 0)],
    ids=["fused", "unfused", "clipped"],
)
def test_no_sums_are_read_for_it(optimizer, passes):
    """The op that adds the last micro-batch reports their norms."""
    wrapped = accumops.GradientAccumulateOptimizer(optimizer, 4)
    wrapped.accumulator.track_norms()
    wrapped.build(new_variables())
    step = tf.function(lambda: wrapped.apply([tf.ones(shape) for shape in SHAPES.values()]))
    operations = operations_within(step.get_concrete_function().graph)
    assert sum(each.type == "AccumOps>SquaredNorms" for each in operations) == passes


def test_names_that_repeat():
    variables = [tf.Variable(tf.zeros(2)), tf.Variable(0.0), tf.Variable(0.0, name="other")]
    accumulator = accumops.GradientAccumulator(1)
    accumulator.track_norms()
    accumulator.accumulate([tf.constant([3.0, 4.0]), tf.constant(2.0), tf.constant(1.0)], variables)
    accumulator.close()
    assert accumops.per_variable_norms(accumulator) == {"Variable:0": 5.0, "Variable:0_1": 2.0, "other:0": 1.0}


def test_what_is_wrong():
    with pytest.raises(TypeError, match="`per_variable_norms` must be True or False"):
        accumops.AccumulationLogger(per_variable_norms=1)
    with pytest.raises(TypeError, match=r"takes a model, a GradientAccumulateOptimizer or .*Received: \[\]"):
        accumops.per_variable_norms([])
    for nothing in (keras.optimizers.SGD(0.1), network()):
        with pytest.raises(ValueError, match="Nothing accumulates"):
            accumops.per_variable_norms(nothing)
    accumulator = accumops.GradientAccumulator(2)
    with pytest.raises(ValueError, match="is not built"):
        accumops.per_variable_norms(accumulator)
    accumulator.build(new_variables())
    with pytest.raises(ValueError, match=r"Nobody has asked gradient_accumulator for norms\. Call its `track_norms"):
        accumops.per_variable_norms(accumulator)
    with pytest.raises(ValueError, match=r"outside of `tf\.function`"):
        tf.function(lambda: accumops.per_variable_norms(accumulator) and None)()
