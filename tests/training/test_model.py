"""GradientAccumulateModel: partial windows, saving, mixed precision, errors; test_full_batch.py has its results."""

import contextlib
import functools
import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns
from problems import BATCH, MICRO, MODES, OPTIMIZERS, RUNS, UPDATES, Problem, largest_difference, train

import accumops
from accumops import AccumStepsScheduler, AdaptiveGradientClipping, GradientAccumulateModel


def test_normalization_by_steps_and_by_a_callable(rng):
    """A callable that returns the number of samples is "samples"; by "steps" a ragged micro-batch counts as a whole."""
    problem = Problem(rng, samples=40)
    models = {}
    for name, normalization in {
        "samples": "samples",
        "callable": lambda x, y, sample_weight: tf.shape(x)[0],
        "steps": "steps",
    }.items():
        inner = problem.model()
        model = GradientAccumulateModel(inner, micro_batch_size=24, normalization=normalization)
        train(problem, OPTIMIZERS["momentum"](), model, 40, run_eagerly=True)
        models[name] = inner
    assert largest_difference(models["samples"], models["callable"]) == 0
    assert largest_difference(models["samples"], models["steps"]) > 1e-3


class TestPartialWindows:
    """80 samples in micro-batches of 16 and windows of 4: one micro-batch of each epoch is left over."""

    def train(self, rng, partial_window, epochs=2):
        problem = Problem(rng, samples=80)
        inner = problem.model()
        model = GradientAccumulateModel(inner, accum_steps=4, partial_window=partial_window)
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        model.fit(problem.x, problem.y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        return problem, model

    def by_hand(self, problem, windows):
        model = problem.model()
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        for window in windows:
            model.train_on_batch(problem.x[window], problem.y[window])
        return model

    def test_flush(self, rng):
        problem, model = self.train(rng, "flush")
        wanted = self.by_hand(problem, [slice(0, 64), slice(64, 80)] * 2)
        assert int(model.optimizer.iterations) == 4
        assert largest_difference(wanted, model.model) <= 1e-5

    def test_drop(self, rng):
        problem, model = self.train(rng, "drop")
        wanted = self.by_hand(problem, [slice(0, 64)] * 2)
        assert int(model.optimizer.iterations) == 2
        assert largest_difference(wanted, model.model) <= 1e-5

    def test_carry(self, rng):
        problem, model = self.train(rng, "carry")
        assert int(model.optimizer.iterations) == 2
        assert int(model.optimizer.accumulator.step) == 2
        wanted = self.by_hand(problem, [slice(0, 64), [*range(64, 80), *range(0, 48)]])
        assert largest_difference(wanted, model.model) <= 1e-5
        model.flush()
        assert int(model.optimizer.iterations) == 3
        model.flush()
        assert int(model.optimizer.iterations) == 3

    def test_validation_sees_the_flushed_weights(self, rng):
        problem = Problem(rng, samples=80)
        model = GradientAccumulateModel(problem.model(), accum_steps=4)
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        data = (problem.x, problem.y)
        history = model.fit(*data, batch_size=16, shuffle=False, verbose=0, validation_data=data).history
        assert history["val_loss"][0] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-6)


def test_no_retracing_for_batches_of_any_size(rng):
    """Trace once, and once more when the number of samples becomes unknown."""
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x * 1.0

    keras.utils.set_random_seed(0)
    model = GradientAccumulateModel(
        keras.Sequential([keras.Input((5,)), Counted(), keras.layers.Dense(1)]), micro_batch_size=8
    )
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    for samples in (32, 40, 7, 19, 64, 8, 100):
        model.train_on_batch(np.ones((samples, 5), "float32"), np.ones((samples, 1), "float32"))
    settled = len(traces)
    for samples in (33, 41, 9, 20, 65, 1, 101):
        model.train_on_batch(np.ones((samples, 5), "float32"), np.ones((samples, 1), "float32"))
    assert len(traces) == settled
    assert int(model.optimizer.iterations) == 14


def test_one_accumulate_op_in_the_step(rng):
    accumops.set_backend("fused")
    try:
        problem = Problem(rng)
        model = GradientAccumulateModel(problem.model(), accum_steps=4)
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
        model.optimizer.build(model.trainable_variables)
        data = (tf.constant(problem.x[:16]), tf.constant(problem.y[:16]))
        graph = tf.function(lambda: model.train_step(data)).get_concrete_function().graph
    finally:
        accumops.set_backend("auto")
    graphs = [graph, *(function.graph for function in graph._functions.values() if hasattr(function, "graph"))]
    kinds = [op.type for each in graphs for op in each.get_operations()]
    assert kinds.count("AccumOps>Accumulate") == 1
    assert kinds.count("AccumOps>Update") == 1
    assert "ZerosLike" not in kinds
    assert "AddN" not in kinds


def inputs_of(operation, seen):
    """All operations that this one waits for."""
    for before in [tensor.op for tensor in operation.inputs] + list(operation.control_inputs):
        if before not in seen:
            seen.add(before)
            inputs_of(before, seen)
    return seen


def test_parallel_micro_batches_depend_on_one_another_only_to_accumulate(rng):
    """TensorFlow may run their passes side by side; gradients and metrics add up in their order."""
    accumops.set_backend("fused")
    try:
        problem = Problem(rng)
        model = GradientAccumulateModel(problem.model(), micro_batch_size=16, parallel_micro_batches=3)
        model.compile(keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
        model.optimizer.build(model.trainable_variables)
        data = (tf.constant(problem.x[:48]), tf.constant(problem.y[:48]))

        @tf.function
        def body():
            carried = [*[tf.constant(0.0)] * 4, tf.zeros([1])]
            for i in range(3):
                part = tuple(each[16 * i : 16 * (i + 1)] for each in data)
                carried = model._untracked.step.train_on_slice(part, i == 0, i == 2, carried)

        operations = body.get_concrete_function().graph.get_operations()
    finally:
        accumops.set_backend("auto")
    accumulates = [each for each in operations if each.type == "AccumOps>Accumulate"]
    assert len(accumulates) == 3
    for before, after in itertools.pairwise(accumulates):
        assert before in inputs_of(after, set())
    products = [each for each in operations if each.type == "MatMul"]
    assert products
    for product in products:
        assert not inputs_of(product, set()).intersection(accumulates)


# Less than a micro-batch, and rounds of three with a ragged micro-batch after them.
@pytest.mark.parametrize(
    ("samples", "run"),
    cross(
        [5, 16, 30, 48, 50, 96, 101],
        ["graph", "xla"],
        default=lambda samples, run: run == "graph" and samples == 101,
    ),
)
def test_parallel_micro_batches_give_the_same(rng, samples, run):
    """The same bits, but that XLA compiles two bodies in two ways."""
    problem = Problem(rng, samples)
    weights = []
    for parallel in (1, 3):
        inner = problem.model()
        model = GradientAccumulateModel(inner, micro_batch_size=16, parallel_micro_batches=parallel)
        model.compile(keras.optimizers.SGD(0.1), loss="mse", **RUNS[run])
        model.train_on_batch(problem.x, problem.y)
        weights.append(inner.get_weights())
    for one, three in zip(*weights, strict=True):
        np.testing.assert_allclose(one, three, rtol=1e-5 if run == "xla" else 0, atol=1e-7 if run == "xla" else 0)


@pytest.mark.exhaustive
def test_arguments_survive_saving(rng, tmp_path):
    problem = Problem(rng)
    clipping = AdaptiveGradientClipping(0.02, exclude=["bias"])
    model = GradientAccumulateModel(
        problem.model(), accum_steps={0: 2, 3: 4}, gradient_clipping=clipping, lazy_sparse=True, partial_window="drop"
    )
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    model.train_on_batch(problem.x[:16], problem.y[:16])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.partial_window == "drop"
    assert loaded.accum_steps == {0: 2, 3: 4}
    assert loaded.optimizer.accum_steps == 2
    assert loaded.optimizer.lazy_sparse
    assert loaded.optimizer.gradient_clipping.get_config() == clipping.get_config()
    sliced = GradientAccumulateModel(problem.model(), micro_batch_size=8, parallel_micro_batches=2)
    assert GradientAccumulateModel.from_config(sliced.get_config()).parallel_micro_batches == 2


def test_accum_steps_set_by_hand(rng):
    problem = Problem(rng)
    model = GradientAccumulateModel(problem.model(), accum_steps=2)
    model.accum_steps = 3
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    lengths = []
    for i in range(9):
        model.train_on_batch(problem.x[16 * i : 16 * (i + 1)], problem.y[16 * i : 16 * (i + 1)])
        lengths.append(int(model.optimizer.accumulator.step))
        if i == 3:
            model.accum_steps = 2  # in the window that is open it is still 3
    assert lengths == [1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert repr(model) == f"<GradientAccumulateModel {model.model.name}, accum_steps=2>"
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    assert model.optimizer.accum_steps == 2
    with pytest.raises(ValueError, match="at least 1"):
        model.accum_steps = 0


def test_compiled_again_with_the_number_that_a_callback_set(rng):
    problem = Problem(rng, 64)
    model = GradientAccumulateModel(problem.model(), accum_steps=1)
    model.accum_steps = np.int64(2)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    scheduler = AccumStepsScheduler({0: 1, 1: 4})
    model.fit(problem.x, problem.y, batch_size=8, epochs=2, verbose=0, callbacks=[scheduler])
    model.compile(model.optimizer, loss="mse")
    assert model.accum_steps == model.optimizer.accum_steps == 4


@pytest.mark.exhaustive
def test_parallel_micro_batches_of_ragged_tensors():
    rows = tf.ragged.constant([[1.0], [2.0, 3.0], [4.0], [5.0, 6.0, 7.0], [8.0]])
    weights = []
    for parallel in (1, 2):
        inputs = keras.Input((None,), ragged=True)
        keras.utils.set_random_seed(0)
        outputs = keras.layers.Dense(1)(keras.layers.Lambda(lambda x: tf.reduce_sum(x, 1, keepdims=True))(inputs))
        net = keras.Model(inputs, outputs)
        model = GradientAccumulateModel(net, micro_batch_size=2, parallel_micro_batches=parallel)
        model.compile(keras.optimizers.SGD(0.01), loss="mse")
        model.fit(tf.data.Dataset.from_tensors((rows, tf.ones([5, 1]))), verbose=0)
        weights.append(net.get_weights())
    np.testing.assert_array_equal(weights[0][0], weights[1][0])


@pytest.mark.exhaustive
def test_a_callable_for_accum_steps(rng):
    """Windows of 1, 1, 3, 3, … micro-batches, of 16 samples each."""

    def schedule(updates):
        return 1 if updates < 2 else 3

    problem = Problem(rng, 8 * 16)
    inner, full = problem.model(), problem.model()
    model = GradientAccumulateModel(inner, accum_steps=schedule)
    train(problem, keras.optimizers.Adam(0.01), model, 16)
    full.compile(keras.optimizers.Adam(0.01), loss="mse", run_eagerly=True)
    for first, last in ((0, 1), (1, 2), (2, 5), (5, 8)):
        full.train_on_batch(problem.x[16 * first : 16 * last], problem.y[16 * first : 16 * last])
    assert largest_difference(full, inner) <= 1e-5


def test_a_subclass_with_a_train_step(rng):
    """It may go around ours."""

    class Noisy(GradientAccumulateModel):
        def train_step(self, data):
            x, y = data
            return super().train_step((x + 1.0, y))

    problem = Problem(rng)
    inner, full = problem.model(), problem.model()
    train(problem, keras.optimizers.Adam(0.01), Noisy(inner, micro_batch_size=24), BATCH)
    problem.x = problem.x + 1
    train(problem, keras.optimizers.Adam(0.01), full, BATCH, run_eagerly=True)
    assert largest_difference(full, inner) <= 1e-5


def test_functional_arguments_and_the_wrapped_model(rng):
    inputs = keras.Input((5,))
    model = GradientAccumulateModel(accum_steps=4, inputs=inputs, outputs=keras.layers.Dense(3)(inputs))
    assert isinstance(model.model, keras.Model)
    x = rng.standard_normal((4, 5)).astype("float32")
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.model.predict(x, verbose=0))
    assert repr(model) == f"<GradientAccumulateModel {model.model.name}, accum_steps=4>"


def test_subclassed_model_built_by_fit(rng):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(x)

    problem = Problem(rng)
    full, inner = Net(), Net()
    for model in (full, inner):
        model(problem.x[:1])
    inner.set_weights(full.get_weights())
    train(problem, OPTIMIZERS["Adam"](), full, BATCH, run_eagerly=True)
    train(problem, OPTIMIZERS["Adam"](), GradientAccumulateModel(inner, micro_batch_size=24), BATCH)
    assert largest_difference(full, inner) <= 1e-5
    for shape in (None, (None, *problem.x.shape[1:])):
        unbuilt = GradientAccumulateModel(Net(), accum_steps=4)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*build")
            if shape is not None:
                unbuilt.build(shape)  # which the network does not say how to do
            train(problem, OPTIMIZERS["Adam"](), unbuilt, MICRO)
        assert int(unbuilt.optimizer.iterations) == UPDATES


@pytest.mark.parametrize(
    ("mode", "eager"),
    cross(MODES, [False, True], default=lambda mode, eager: mode != "parallel" and eager == (mode != "accum_steps")),
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_a_model_that_says_how_it_is_built(rng, mode, eager):
    class Net(keras.Model):
        def build(self, input_shape):
            self.kernel = self.add_weight(shape=(input_shape[-1], 3))

        def call(self, x):
            return keras.ops.matmul(x, self.kernel)

    problem = Problem(rng)
    calls = {
        "call": lambda model: model(problem.x[:48]),
        "train_on_batch": lambda model: model.train_on_batch(problem.x[:48], problem.y[:48]),
        "test_on_batch": lambda model: model.test_on_batch(problem.x[:48], problem.y[:48]),
        "predict_on_batch": lambda model: model.predict_on_batch(problem.x[:48]),
        "fit": lambda model: model.fit(problem.x, problem.y, verbose=0),
    }
    for call in calls.values():
        model = GradientAccumulateModel(Net(), **MODES[mode])
        model.compile("sgd", "mse", run_eagerly=eager)
        call(model)
        assert model.model.built
        assert model.weights[0].shape == (5, 3)


def test_compiled_by_position(rng):
    problem = Problem(rng, samples=64)
    arguments = ("sgd", "mse", None, ["mae"], ["mse"], True, 1, False, True)
    plain, model = problem.model(), GradientAccumulateModel(problem.model(), micro_batch_size=16)
    logs = []
    for each in (plain, model):
        each.compile(*arguments)
        logs.append(each.fit(problem.x, problem.y, batch_size=64, verbose=0).history)
        assert each.run_eagerly
    assert set(logs[0]) == set(logs[1])
    for name, values in logs[0].items():
        np.testing.assert_allclose(logs[1][name], values, rtol=1e-5)


def test_micro_batch_size_beyond_any_batch(rng):
    problem = Problem(rng)
    model = GradientAccumulateModel(problem.model(), micro_batch_size=1 << 40)
    model.compile("sgd", "mse")
    model.train_on_batch(problem.x[:20], problem.y[:20])
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "accum_steps"))
def test_saved_and_loaded_in_the_middle_of_training(rng, tmp_path, mode):
    """With `accum_steps` in the middle of a window: the same bits as without the save."""
    problem = Problem(rng)

    def make():
        model = GradientAccumulateModel(problem.model(), **MODES[mode], partial_window="carry")
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
        return model

    def steps(model, first, last):
        for i in range(first, last):
            part = slice(i * MICRO, (i + 1) * MICRO)
            model.train_on_batch(problem.x[part], problem.y[part])

    straight, saved = make(), make()
    steps(straight, 0, 12)
    steps(saved, 0, 6)
    saved.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert repr(loaded) == repr(saved)
    assert loaded.partial_window == "carry"
    if mode == "accum_steps":
        assert int(loaded.optimizer.accumulator.step) == 2
    steps(loaded, 6, 12)
    for a, b in zip(straight.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def dtype_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


HALF = ["mixed_float16", "mixed_bfloat16"]


@functools.cache
def trained_with_whole_batches(policy):
    problem = Problem(np.random.default_rng(5))
    with dtype_policy(policy):
        model = problem.model()
        train(problem, OPTIMIZERS["momentum"](), model, BATCH, run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("mode", "policy"),
    cross(
        MODES,
        HALF,
        default=lambda mode, policy: (mode, policy) in turns(["micro_batch_size", "accum_steps"], HALF),
    ),
)
@pytest.mark.some_by_default(1)
def test_mixed_precision(mode, policy):
    full, half = trained_with_whole_batches("float32"), trained_with_whole_batches(policy)
    problem = Problem(np.random.default_rng(5))
    with dtype_policy(policy):
        inner = problem.model()
        model = GradientAccumulateModel(inner, **MODES[mode])
        train(problem, OPTIMIZERS["momentum"](), model, MICRO if mode == "accum_steps" else BATCH)
    scaled = isinstance(model.optimizer.inner_optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert int(model.optimizer.iterations) == UPDATES
    assert largest_difference(full, inner) <= 2 * largest_difference(full, half)


def test_a_window_with_nan_is_dropped_and_the_scale_backs_off(rng):
    problem = Problem(rng, samples=128)
    problem.x[70] = np.nan
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inner = problem.model()
        model = GradientAccumulateModel(inner, accum_steps=4)
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        model.fit(problem.x[:64], problem.y[:64], batch_size=16, shuffle=False, verbose=0)
        weights = model.get_weights()
        scale = float(model.optimizer.inner_optimizer.dynamic_scale)
        model.fit(problem.x[64:], problem.y[64:], batch_size=16, shuffle=False, verbose=0)
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert float(model.optimizer.inner_optimizer.dynamic_scale) == scale / 2
        model.fit(problem.x[:64], problem.y[:64], batch_size=16, shuffle=False, verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert any(np.any(a != b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_a_step_that_fails_leaves_no_window_open(rng):
    def make():
        keras.utils.set_random_seed(0)
        layers = [
            keras.Input((2,), dtype="int32"),
            keras.layers.Embedding(10, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
        return keras.Sequential(layers)

    good, bad, y = np.ones((8, 2), "int32"), np.ones((8, 2), "int32"), np.ones((8, 1), "float32")
    bad[6] = 99  # in the second micro-batch
    full, inner = make(), make()
    full.compile(keras.optimizers.SGD(0.1), loss="mse")
    model = GradientAccumulateModel(inner, micro_batch_size=4)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    for each in (full, model):
        each.train_on_batch(good, y)
        with pytest.raises(tf.errors.InvalidArgumentError):
            each.train_on_batch(bad, y)
        each.train_on_batch(2 * good, y)
    assert largest_difference(full, inner) <= 1e-6


@pytest.mark.parametrize("partial_window", ["flush", "drop"])
@pytest.mark.some_by_default(1)
def test_an_interrupted_fit_leaves_nothing_for_the_next(rng, partial_window):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise KeyboardInterrupt

    problem = Problem(rng, samples=64)
    full, inner = problem.model(), problem.model()
    train(problem, OPTIMIZERS["momentum"](), full, 64)
    model = GradientAccumulateModel(inner, accum_steps=4, partial_window=partial_window)
    model.compile(OPTIMIZERS["momentum"](), loss="mse")
    with pytest.raises(KeyboardInterrupt):
        model.fit(problem.x + 1, problem.y, batch_size=16, verbose=0, callbacks=Interrupt())
    model.fit(problem.x, problem.y, batch_size=16, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 1
    assert largest_difference(full, inner) <= 1e-6


@pytest.mark.exhaustive
def test_a_callback_list(rng):
    """Its own callbacks see the flushed weights, and it can be used again."""
    problem = Problem(rng, samples=40)
    model = GradientAccumulateModel(problem.model(), accum_steps=2)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    steps = []
    probe = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: steps.append(int(model.optimizer.accumulator.step))
    )
    callbacks = keras.callbacks.CallbackList([probe], add_history=True, model=model, epochs=1)
    for _ in range(2):
        model.fit(problem.x, problem.y, batch_size=16, verbose=0, callbacks=callbacks)
        assert len(callbacks.callbacks) == 2
    assert steps == [0, 0]
    assert int(model.optimizer.iterations) == 4


def test_inputs_reach_the_model_as_they_are():
    """Under mixed precision float16 would lose what the model casts itself."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layers = [keras.Input((1,)), keras.layers.Rescaling(1e-5, dtype="float32"), keras.layers.Dense(1)]
        net = keras.Sequential(layers)
        model = GradientAccumulateModel(net, accum_steps=2)
        x = np.full((4, 1), 70000.0, "float32")
        np.testing.assert_array_equal(model.predict(x, verbose=0), net.predict(x, verbose=0))
        assert np.isfinite(model.predict(x, verbose=0)).all()
    finally:
        keras.config.set_dtype_policy("float32")


def test_flush_before_there_is_anything(rng):
    model = GradientAccumulateModel(Problem(rng).model(), accum_steps=2)
    model.flush()
    model.compile("sgd", "mse")
    model.flush()
    model.optimizer.build(model.trainable_variables)
    model.flush()
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("arguments", [{"accum_steps": 2, "partial_window": "drop"}, {"micro_batch_size": 8}])
def test_nothing_trainable(rng, arguments):
    problem = Problem(rng, samples=64)
    inner = problem.model()
    inner.trainable = False
    model = GradientAccumulateModel(inner, **arguments)
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="trainable"):
        history = model.fit(problem.x, problem.y, 32, 1, 0).history
    assert np.isfinite(history["loss"]).all()


def test_everything_frozen_without_compiling_again(rng):
    """The accumulators still hold gradients of earlier windows; they are not applied."""
    problem = Problem(rng)
    model = GradientAccumulateModel(problem.model(), micro_batch_size=16)
    model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=True)
    model.train_on_batch(problem.x[:32], problem.y[:32])
    for layer in model.model.layers:
        layer.trainable = False
    before = model.get_weights()
    with pytest.warns(UserWarning, match="any trainable weights"):
        model.train_on_batch(problem.x[:32], problem.y[:32])
    assert int(model.optimizer.iterations) == 1
    for after, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(after, old)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
@pytest.mark.some_by_default(1)
def test_the_loss_of_many_slices_where_floats_are_half(floatx):
    keras.config.set_floatx(floatx)
    try:
        inputs = keras.Input((3,))
        model = GradientAccumulateModel(
            keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="zeros")(inputs)), micro_batch_size=4
        )
        model.compile(keras.optimizers.SGD(0.0), loss="mae")
        # In half precision the sum of losses stops growing at another slice than the sum of sizes.
        x, y = np.ones((16_000, 3)), np.full((16_000, 1), 0.3)
        losses = model.fit(x, y, batch_size=len(x), verbose=0).history["loss"]
    finally:
        keras.config.set_floatx("float32")
    np.testing.assert_allclose([float(each) for each in losses], [0.3], rtol=1e-2)


def test_compiled_again_with_its_own_optimizer(rng):
    problem = Problem(rng, samples=64)
    model = GradientAccumulateModel(problem.model(), micro_batch_size=np.int64(16))
    model.compile("adam", "mse")
    model.fit(problem.x, problem.y, steps_per_epoch=1, verbose=0)
    model.compile(model.optimizer, "mse")
    model.fit(problem.x, problem.y, batch_size=64, verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_callbacks_and_frozen_later(rng):
    problem = Problem(rng)
    model = GradientAccumulateModel(problem.model(), micro_batch_size=16)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model.fit(problem.x, problem.y, batch_size=64, epochs=2, verbose=0, callbacks=[rates])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
    first = model.model.layers[0]
    first.trainable = False
    before = first.get_weights()
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    model.fit(problem.x, problem.y, batch_size=64, verbose=0)
    np.testing.assert_array_equal(before[0], first.get_weights()[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, ValueError, "exactly one of"),
            ({"accum_steps": 2, "micro_batch_size": 8}, ValueError, "exactly one of"),
            ({"accum_steps": 0}, ValueError, "at least 1"),
            ({"accum_steps": 2.5}, TypeError, "int"),
            ({"micro_batch_size": 0}, ValueError, "at least 1"),
            ({"micro_batch_size": 2.5}, TypeError, "int"),
            ({"accum_steps": 2, "normalization": "mean"}, ValueError, "normalization"),
            ({"accum_steps": 2, "partial_window": "keep"}, ValueError, "partial_window"),
        ],
    )
    def test_arguments(self, rng, arguments, error, message):
        with pytest.raises(error, match=message):
            GradientAccumulateModel(Problem(rng).model(), **arguments)

    def test_no_model(self):
        with pytest.raises(ValueError, match="either a model"):
            GradientAccumulateModel(accum_steps=2)
        with pytest.raises(TypeError, match=r"keras\.Model"):
            GradientAccumulateModel(keras.layers.Dense(1), accum_steps=2)

    def test_sparse_input(self):
        inputs = keras.Input((5,), sparse=True)
        model = GradientAccumulateModel(keras.Model(inputs, keras.layers.Dense(1)(inputs)), micro_batch_size=2)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="accum_steps"):
            model.train_on_batch(tf.sparse.from_dense(tf.ones([4, 5])), tf.ones([4, 1]))

    def test_own_metrics(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.mean = keras.metrics.Mean()

        with pytest.raises(ValueError, match="Own has metrics of its own"):
            GradientAccumulateModel(Own(), accum_steps=2)

    def test_own_train_step(self):
        class Own(keras.Model):
            def train_step(self, data):
                return {}

        with pytest.raises(ValueError, match=r"Own has a `train_step`.*GradientAccumulateOptimizer"):
            GradientAccumulateModel(Own(), accum_steps=2)

    @pytest.mark.parametrize("reduction", ["none", None])
    def test_reduction(self, rng, reduction):
        model = GradientAccumulateModel(Problem(rng).model(), accum_steps=2)
        with pytest.raises(ValueError, match="must be a mean"):
            model.compile("sgd", loss=keras.losses.MeanSquaredError(reduction=reduction))

    def test_weighted_mean_needs_weights(self, rng):
        model = GradientAccumulateModel(Problem(rng).model(), accum_steps=2, normalization="samples")
        with pytest.raises(ValueError, match="normalization='auto'"):
            model.compile("sgd", loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))

    def test_optimizer_that_accumulates(self, rng):
        model = GradientAccumulateModel(Problem(rng).model(), accum_steps=2)
        with pytest.raises(ValueError, match="must not accumulate"):
            model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), loss="mse")

    def test_micro_batch_larger_than_the_batch(self, rng):
        problem = Problem(rng)
        model = GradientAccumulateModel(problem.model(), micro_batch_size=65)
        model.compile("sgd", loss="mse")
        with pytest.raises(ValueError, match=r"micro_batch_size=65.*64"):
            model.fit(problem.x, problem.y, batch_size=64, verbose=0)
        with pytest.raises(ValueError, match=r"micro_batch_size=65.*32"):
            model.fit(problem.x, problem.y, verbose=0)
        dataset = tf.data.Dataset.from_tensor_slices((problem.x, problem.y)).batch(64, drop_remainder=True)
        with pytest.raises(ValueError, match=r"micro_batch_size=65.*64"):
            model.fit(dataset, verbose=0)


@pytest.mark.parametrize("eager", [False, True])
def test_a_batch_without_samples(eager):
    model = GradientAccumulateModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), micro_batch_size=2)
    model.compile("sgd", "mse", run_eagerly=eager, jit_compile=False)
    data = tf.data.Dataset.from_tensors((tf.zeros([4, 3]), tf.zeros([4, 1])))
    data = data.map(lambda x, y: (tf.boolean_mask(x, x[:, 0] > 1), tf.boolean_mask(y, y[:, 0] > 1)))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="A batch without samples"):
        model.fit(data, verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_called_with_an_array():
    model = GradientAccumulateModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), accum_steps=2)
    assert model(np.ones((2, 3), "float32")).shape == (2, 1)


@pytest.mark.parametrize("mode", [{"accum_steps": 2}, {"micro_batch_size": 4}], ids=lambda mode: next(iter(mode)))
def test_a_function_of_ones_own_around_the_step(mode, caplog):
    """AutoGraph finds nothing to convert in it, or to warn of."""
    model = GradientAccumulateModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), **mode)
    model.compile("sgd", "mse")
    step = tf.function(model.train_step)
    x, y = tf.ones([8, 3]), tf.ones([8, 1])
    losses = [float(step((x, y))["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert int(model.optimizer.iterations) == (2 if "accum_steps" in mode else 4)
    assert "AutoGraph" not in caplog.text
