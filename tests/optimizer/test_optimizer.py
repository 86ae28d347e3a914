"""GradientAccumulateOptimizer: K micro-batches against one large batch in plain Keras."""

import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import AdaptiveGradientClipping, GradientAccumulateOptimizer

MICRO, STEPS, UPDATES = 8, 8, 50
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.1),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
    "loss_scale_factor": lambda: keras.optimizers.SGD(0.05, loss_scale_factor=64.0),
}


class DenseGradients(keras.optimizers.Adam):
    """Keras's own Adam squares each of a row's sparse gradients by itself, so its large batch has to be given dense."""

    def apply(self, grads, trainable_variables=None):
        return super().apply([tf.convert_to_tensor(g) for g in grads], trainable_variables)


def mlp(seed=3):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(16, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.8)),
            keras.layers.Dense(3),
        ]
    )


def embedding(seed=3):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(40, 8),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )


def data(rng, updates=UPDATES, tokens=False):
    count = MICRO * STEPS * updates
    x = rng.integers(0, 40, (count, 6)) if tokens else rng.standard_normal((count, 5)).astype("float32")
    return x, rng.standard_normal((count, 3)).astype("float32")


def fit(model, optimizer, x, y, batch_size, **compile_arguments):
    model.compile(optimizer, loss="mse", **compile_arguments)
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    return model


def largest_difference(a, b):
    """The largest difference of two models' weights, relative to the largest weight of each variable."""
    pairs = zip(a.get_weights(), b.get_weights(), strict=True)
    return max(np.abs(x - y).max() / np.abs(x).max() for x, y in pairs)


RUNS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
BACKENDS = ["fused", "reference"]


def check_against_the_full_batch(rng, name, run, updates):
    x, y = data(rng, updates)
    # A few updates take less time than tracing them.
    full = fit(mlp(), OPTIMIZERS[name](), x, y, MICRO * STEPS, run_eagerly=updates <= 12)
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](), accum_steps=STEPS)
    accumulated = fit(mlp(), optimizer, x, y, MICRO, **RUNS[run])
    assert int(optimizer.iterations) == updates
    assert largest_difference(full, accumulated) <= 1e-5


OVER_50_UPDATES = [("fused", "Adam", "graph"), ("reference", "SGD", "graph")]


@pytest.mark.parametrize(
    ("backend", "name", "run"),
    cross(
        BACKENDS,
        ["SGD", "Adam"],
        RUNS,
        default=lambda *each: each in OVER_50_UPDATES,
    ),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
def test_equals_the_full_batch_over_50_updates(backend, rng, name, run):
    check_against_the_full_batch(rng, name, run, UPDATES)


@pytest.mark.parametrize(
    ("backend", "name"),
    cross(BACKENDS, ["SGD", "Adam"], default=lambda backend, name: (backend == "reference") == (name == "Adam")),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
def test_equals_the_full_batch_eagerly(backend, rng, name):
    """Over fewer updates: a step takes much longer."""
    check_against_the_full_batch(rng, name, "eager", 4)


# Without the fused op the update is the inner optimizer's own: what clips, what counts updates and what averages.
# test_fused_update.py has all settings with it.
UNFUSED = ["global_clipnorm", "schedule", "ema"]


@pytest.mark.parametrize(
    ("backend", "name"),
    cross(
        BACKENDS,
        [name for name in OPTIMIZERS if name not in ("SGD", "Adam")],
        default=lambda backend, name: backend == "reference" and name in UNFUSED,
    ),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_settings_of_the_inner_optimizer_act_once_a_window(backend, rng, name):
    check_against_the_full_batch(rng, name, "graph", 10)


EMBEDDED = {("fused", "graph"), ("reference", "eager")}


@pytest.mark.parametrize(
    ("backend", "run"),
    cross(BACKENDS, RUNS, default=lambda *each: each in EMBEDDED),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
def test_embedding_equals_the_full_batch(backend, rng, run):
    updates = 4 if run == "eager" else 10
    x, y = data(rng, updates, tokens=True)
    full = fit(embedding(), DenseGradients(0.01), x, y, MICRO * STEPS, run_eagerly=True)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=STEPS)
    accumulated = fit(embedding(), optimizer, x, y, MICRO, **RUNS[run])
    assert largest_difference(full, accumulated) <= 1e-5


@pytest.mark.parametrize(
    ("backend", "policy"),
    cross(
        BACKENDS,
        ["mixed_float16", "mixed_bfloat16"],
        default=lambda backend, policy: (backend == "fused") == (policy == "mixed_float16"),
    ),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_mixed_precision(backend, rng, policy):
    """Half-precision gradients add up in float32; `compile` wraps the optimizer for loss scaling by itself."""
    x, y = data(rng, updates=10)
    full = fit(mlp(), keras.optimizers.SGD(0.05), x, y, MICRO * STEPS, run_eagerly=True)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        half = fit(mlp(), keras.optimizers.SGD(0.05), x, y, MICRO * STEPS, run_eagerly=True)
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.05), accum_steps=STEPS)
        accumulated = fit(mlp(), optimizer, x, y, MICRO)
    finally:
        keras.config.set_dtype_policy(before)
    assert (type(accumulated.optimizer) is keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert int(optimizer.iterations) == 10
    assert {a.dtype for a in optimizer.accumulator.accumulators} == {"float32"}
    # At most twice as far from float32 training as the full batch in this precision is.
    assert largest_difference(full, accumulated) <= 2 * largest_difference(full, half)


def test_weights_of_ragged_micro_batches(backend, rng):
    """`apply(weight=)` in a custom loop: 24, 24 and 16 samples make the gradient of all 64."""
    x, y = data(rng, updates=1)
    full = fit(mlp(), keras.optimizers.SGD(0.05), x, y, 64)
    model = mlp()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.05), accum_steps=3)
    for part in (slice(0, 24), slice(24, 48), slice(48, 64)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[part]) - y[part]) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables, weight=part.stop - part.start)
    assert int(optimizer.iterations) == 1
    assert largest_difference(full, model) <= 1e-6


def test_variables_move_only_at_the_end_of_a_window(backend, rng):
    model = mlp()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=3)
    optimizer.build(model.trainable_variables)
    before = model.get_weights()
    for step in range(1, 7):
        optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])
        moved = any(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))
        assert moved == (step >= 3)
        assert int(optimizer.iterations) == step // 3


def test_apply_gradients_and_subsets_in_any_order(backend):
    a, b, c = (keras.Variable(np.ones(2, "float32"), name=name) for name in "abc")
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2)
    optimizer.build([a, b, c])
    for _ in range(2):
        optimizer.apply_gradients([(tf.constant([0.0, 2.0]), c), (tf.constant([0.5, 0.5]), a)])
    np.testing.assert_array_equal(a.numpy(), [0.5, 0.5])
    np.testing.assert_array_equal(b.numpy(), [1, 1])
    np.testing.assert_array_equal(c.numpy(), [1, -1])


def test_none_gradients_warn_as_keras_does(backend):
    a, b = (keras.Variable(np.ones(2, "float32"), name=name) for name in "ab")
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, weight_decay=0.5), accum_steps=2)
    optimizer.apply([tf.ones([2]), None], [a, b])
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b'\]"):
        optimizer.apply([tf.ones([2]), None], [a, b])
    np.testing.assert_array_equal(b.numpy(), [1, 1])
    np.testing.assert_array_equal(a.numpy(), [-0.5, -0.5])


def test_learning_rate_is_the_inner_optimizers(rng):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=2)
    model = mlp()
    x, y = data(rng, updates=1)
    model.compile(optimizer, loss="mse")
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model.fit(x, y, batch_size=16, epochs=2, callbacks=[schedule], verbose=0)
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.025)
    optimizer.learning_rate = 0.5
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.5)
    assert float(optimizer.learning_rate) == pytest.approx(0.5)


def test_config_round_trip():
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.AdamW(0.02, weight_decay=0.3),
        accum_steps=5,
        gradient_clipping=AdaptiveGradientClipping(0.1, exclude=["head"]),
        lazy_sparse=True,
        name="wrapped",
    )
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(restored, GradientAccumulateOptimizer)
    assert restored.get_config() == optimizer.get_config()
    assert restored.accum_steps == 5
    assert isinstance(restored.inner_optimizer, keras.optimizers.AdamW)
    assert repr(restored) == "<GradientAccumulateOptimizer AdamW, accum_steps=5>"


@pytest.mark.parametrize("scaling", ["none", "dynamic", "fixed"])
@pytest.mark.some_by_default(6)
def test_adaptive_clipping_sees_the_unscaled_gradient(backend, mode, scaling):
    """Clipping comes after the loss scale is taken out, whichever way the wrapped optimizer scales."""
    inner = keras.optimizers.SGD(1.0, loss_scale_factor=1024.0 if scaling == "fixed" else None)
    if scaling == "dynamic":
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
    scale = 1.0 if scaling == "none" else 1024.0
    variable = keras.Variable(np.full((4, 2), 2.0, "float32"))
    optimizer = GradientAccumulateOptimizer(inner, 2, gradient_clipping=AdaptiveGradientClipping(0.1))
    optimizer.build([variable])
    micro_step = mode(lambda gradient: optimizer.apply([gradient], [variable]))
    for _ in range(2):  # norms of the columns: 6 and 0.2; limits: 0.1 of 4
        micro_step(tf.constant([[3.0, 0.1]] * 4) * scale)
    np.testing.assert_allclose(variable.numpy(), [[2 - 0.2, 2 - 0.1]] * 4, rtol=1e-6)


def test_adaptive_clipping_leaves_a_window_with_nan_to_loss_scaling():
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)
    variable = keras.Variable(np.ones((4, 2), "float32"))
    optimizer = GradientAccumulateOptimizer(inner, 1, gradient_clipping=AdaptiveGradientClipping(0.1))
    optimizer.apply([tf.constant([[np.nan, 1.0]] * 4)], [variable])
    np.testing.assert_array_equal(variable.numpy(), np.ones((4, 2)))
    assert float(inner.dynamic_scale) == 4.0


def test_clipping_by_any_callable(backend):
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = GradientAccumulateOptimizer(
        "sgd", 2, gradient_clipping=lambda gradients, variables: [tf.sign(g) for g in gradients]
    )
    optimizer.learning_rate = 1.0
    for _ in range(2):
        optimizer.apply([tf.constant([5.0, -7.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [-1, 1])


@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_saved_in_the_middle_of_a_window(backend, rng, tmp_path):
    """5 of 8 micro-batches, a save, and the other 3 in a loaded model: the same bits as without the save."""
    x, y = data(rng, updates=2)

    def train(model, first, last):
        for i in range(first, last):
            part = slice(i * MICRO, (i + 1) * MICRO)
            model.train_on_batch(x[part], y[part])

    straight = mlp()
    straight.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=STEPS), loss="mse")
    train(straight, 0, 16)
    saved = mlp()
    saved.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=STEPS), loss="mse")
    train(saved, 0, 5)
    saved.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.accumulator.step) == 5
    with zipfile.ZipFile(tmp_path / "model.keras") as archive, h5py.File(archive.open("model.weights.h5")) as weights:
        assert list(weights["optimizer"]) == ["vars"]
        assert len(weights["optimizer/vars"]) == len(saved.optimizer.variables)
    train(loaded, 5, 16)
    for a, b in zip(straight.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loads_what_the_inner_optimizer_saved_alone(rng, tmp_path):
    x, y = data(rng, updates=4)
    plain = fit(mlp(), keras.optimizers.Adam(0.01), x, y, 64)
    plain.save_weights(tmp_path / "model.weights.h5")
    wrapped = mlp(seed=4)
    wrapped.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=2), loss="mse")
    wrapped.train_on_batch(x[:8], y[:8])
    assert int(wrapped.optimizer.accumulator.step) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Keras warns where it skips a variable
        wrapped.load_weights(tmp_path / "model.weights.h5")
    assert int(wrapped.optimizer.iterations) == 4
    assert int(wrapped.optimizer.accumulator.step) == 0  # the open window belonged to other weights
    pairs = zip(plain.optimizer.variables, wrapped.optimizer.inner_optimizer.variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_accumulators_are_one_float32_copy(rng):
    model = mlp()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=2)
    optimizer.build(model.trainable_variables)
    values = sum(int(np.prod(a.shape)) for a in optimizer.accumulator.accumulators)
    assert values == model.count_params()


class TestMovingAverages:
    """They are the wrapped optimizer's, and saved with it."""

    def make(self, rng, wrap, policy=None):
        x, y = data(rng, updates=4)
        optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy or "float32")
        try:
            model = mlp()
        finally:
            keras.config.set_dtype_policy(before)
        model = wrap(model, optimizer)
        return model, x, y

    def fit(self, model, x, y, batch_size=MICRO):
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)

    @staticmethod
    def plain(model, optimizer):
        model.compile(optimizer, loss="mse")
        return model

    @staticmethod
    def optimizer(model, optimizer):
        model.compile(GradientAccumulateOptimizer(optimizer, STEPS), loss="mse")
        return model

    @staticmethod
    def scaled(model, optimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
        model.compile(GradientAccumulateOptimizer(optimizer, STEPS), loss="mse", auto_scale_loss=False)
        return model

    @staticmethod
    def model(model, optimizer):
        model = accumops.GradientAccumulateModel(model, accum_steps=STEPS)
        model.compile(optimizer, loss="mse")
        return model

    @pytest.mark.parametrize("wrap", ["optimizer", "scaled", "model"])
    @pytest.mark.some_by_default(1)
    def test_saved_loaded_and_trained_on(self, rng, tmp_path, wrap):
        plain, x, y = self.make(rng, self.plain)
        model, _, _ = self.make(rng, getattr(self, wrap))
        self.fit(plain, x, y, MICRO * STEPS)
        self.fit(model, x, y)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        self.fit(plain, x, y, MICRO * STEPS)
        self.fit(loaded, x, y)
        assert largest_difference(plain, loaded) <= 1e-5
        inner = loaded.optimizer.inner_optimizer
        averages = getattr(inner, "inner_optimizer", inner)._model_variables_moving_average
        assert len(averages) == 4
        assert {id(average) for average in averages} <= {id(variable) for variable in loaded.optimizer.variables}

    @pytest.mark.exhaustive
    def test_compiled_again(self, rng):
        plain, x, y = self.make(rng, self.plain)
        model, _, _ = self.make(rng, self.model)
        for each, batch_size in ((plain, MICRO * STEPS), (model, MICRO)):
            self.fit(each, x, y, batch_size)
            each.compile(each.optimizer, loss="mse")
            self.fit(each, x, y, batch_size)
        assert largest_difference(plain, model) <= 1e-5

    def test_swapped_for_evaluation(self, rng):
        model, x, y = self.make(rng, self.model)
        plain, _, _ = self.make(rng, self.plain)
        for each, batch_size in ((plain, MICRO * STEPS), (model, MICRO)):
            callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
            each.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        assert largest_difference(plain, model) <= 1e-5


def test_weight_decay_exclusions_reach_through_loss_scaling():
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, weight_decay=0.5), initial_scale=1.0)
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = GradientAccumulateOptimizer(inner, 1)
    optimizer.exclude_from_weight_decay(var_list=[variable])
    optimizer.apply([tf.zeros([2])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [1, 1])


def test_a_failed_update_keeps_the_window():
    variable = keras.Variable(np.zeros(2, "float32"))
    fail = [True]

    def clip(gradients, variables):
        if fail:
            raise RuntimeError("not now")
        return gradients

    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2, gradient_clipping=clip)
    optimizer.apply([tf.constant([1.0, 2.0])], [variable])
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.apply([tf.constant([3.0, 4.0])], [variable])
    fail.clear()
    optimizer.flush()
    np.testing.assert_array_equal(variable.numpy(), [-2, -3])


class TestErrors:
    @pytest.mark.parametrize(("accum_steps", "error"), [(0, ValueError), (2.5, TypeError), ("4", TypeError)])
    def test_accum_steps(self, accum_steps, error):
        with pytest.raises(error, match="accum_steps"):
            GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=accum_steps)

    def test_no_inner_optimizer(self):
        with pytest.raises(ValueError, match="optimizer is needed"):
            GradientAccumulateOptimizer(None, 2)

    def test_lazy_sparse_is_a_bool(self):
        with pytest.raises(TypeError, match=r"lazy_sparse.*'no'"):
            GradientAccumulateOptimizer("sgd", 2, lazy_sparse="no")

    def test_a_variable_twice(self):
        variable = keras.Variable(np.zeros(2, "float32"))
        optimizer = GradientAccumulateOptimizer("sgd", 2)
        optimizer.build([variable])
        with pytest.raises(ValueError, match="twice"):
            optimizer.apply([tf.ones([2])] * 2, [variable, variable])

    def test_a_build_that_fails_changes_nothing(self):
        count, variable = keras.Variable(1, dtype="int32"), keras.Variable(np.zeros(2, "float32"))
        optimizer = GradientAccumulateOptimizer("adam", 1)
        with pytest.raises(ValueError, match="int32"):
            optimizer.build([count, variable])
        optimizer.apply([tf.ones([2])], [variable])
        assert int(optimizer.iterations) == 1

    @pytest.mark.parametrize("returned", [None, 3, []])
    def test_what_gradient_clipping_returns(self, returned):
        variable = keras.Variable(np.zeros(2, "float32"))
        optimizer = GradientAccumulateOptimizer("sgd", 1, gradient_clipping=lambda gradients, variables: returned)
        with pytest.raises(ValueError, match="one gradient for each of 1 variables"):
            optimizer.apply([tf.ones([2])], [variable])

    def test_gradient_clipping(self):
        with pytest.raises(TypeError, match="AdaptiveGradientClipping"):
            GradientAccumulateOptimizer("sgd", 2, gradient_clipping=AdaptiveGradientClipping)
        with pytest.raises(TypeError, match=r"gradient_clipping.*0\.01"):
            GradientAccumulateOptimizer("sgd", 2, gradient_clipping=0.01)

    @pytest.mark.parametrize(
        "inner",
        [
            lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            lambda: GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=2),
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
            pytest.param(
                lambda: keras.optimizers.MultiOptimizer(
                    keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
                ),
                marks=pytest.mark.skipif(
                    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
                ),
            ),
        ],
    )
    def test_an_inner_optimizer_that_accumulates(self, inner):
        with pytest.raises(ValueError, match="must not accumulate"):
            GradientAccumulateOptimizer(inner(), accum_steps=2)

    def test_not_an_optimizer(self):
        with pytest.raises(ValueError, match="optimizer"):
            GradientAccumulateOptimizer("no such optimizer", accum_steps=2)

    def test_unknown_variable(self):
        a, b = (keras.Variable(np.ones(2, "float32"), name=name) for name in "ab")
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2)
        optimizer.build([a])
        with pytest.raises(ValueError, match="Unknown variable"):
            optimizer.apply([tf.ones([2])], [b])

    def test_not_built(self):
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2)
        with pytest.raises(ValueError, match="build"):
            optimizer.apply([tf.ones([2])])

    def test_float8(self):
        """Such layers have variables whose "gradient" is their next value."""
        scale = keras.Variable(1.0, name="scale")
        scale.overwrite_with_gradient = True
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2)
        with pytest.raises(ValueError, match=r"'scale'.*float8"):
            optimizer.build([scale])

    def test_lengths(self):
        a = keras.Variable(np.ones(2, "float32"))
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2)
        with pytest.raises(ValueError, match="2 gradients for 1 variables"):
            optimizer.apply([tf.ones([2])] * 2, [a])

    def test_a_strategy_that_is_not_supported(self):
        with tf.distribute.experimental.CentralStorageStrategy(["CPU:0"]).scope():
            model = mlp()
            model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps=2), loss="mse")
            with pytest.raises(ValueError, match="does not work under CentralStorageStrategy"):
                model.optimizer.build(model.trainable_variables)

    def test_loss_scaled_twice(self, rng):
        x, y = data(rng, updates=1)
        keras.config.set_dtype_policy("mixed_float16")
        try:
            scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
            optimizer = GradientAccumulateOptimizer(scaled, accum_steps=2)
            with pytest.raises(ValueError, match="auto_scale_loss=False"):
                mlp().compile(optimizer, loss="mse")
            model = mlp()
            model.compile(optimizer, loss="mse", auto_scale_loss=False)
            model.fit(x, y, batch_size=8, verbose=0)
            assert int(optimizer.iterations) > 0
        finally:
            keras.config.set_dtype_policy("float32")


def test_settings_are_the_inner_optimizers():
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.25, clipnorm=2.0, use_ema=True, loss_scale_factor=8.0)
    optimizer = GradientAccumulateOptimizer(inner, accum_steps=2)
    assert (optimizer.weight_decay, optimizer.clipnorm, optimizer.use_ema) == (0.25, 2.0, True)
    assert optimizer.loss_scale_factor == 8.0
    optimizer.loss_scale_factor = None
    optimizer.weight_decay = 0.5
    assert (inner.loss_scale_factor, inner.weight_decay) == (None, 0.5)
    a, b = (keras.Variable(np.ones(2, "float32"), name=name) for name in "ab")
    optimizer.exclude_from_weight_decay(var_list=[b])
    optimizer.build([a, b])
    for _ in range(2):
        assert optimizer.apply_gradients([(tf.zeros([2]), a), (tf.zeros([2]), b)]) is inner.iterations
    assert a.numpy()[0] < 1
    assert b.numpy()[0] == 1


@pytest.mark.exhaustive
def test_loss_scaling_of_the_inner_optimizer_under_mixed_float16(rng):
    """`compile` puts a LossScaleOptimizer around, which switches the inner optimizer's own scaling off."""
    x, y = data(rng, updates=5)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = []
        for factor in (None, 64.0):
            inner = keras.optimizers.SGD(0.05, loss_scale_factor=factor)
            models.append(fit(mlp(), GradientAccumulateOptimizer(inner, accum_steps=8), x, y, MICRO))
    finally:
        keras.config.set_dtype_policy("float32")
    assert largest_difference(*models) == 0


def test_loading_where_nothing_is_trainable(tmp_path):
    model = mlp()
    model.trainable = False
    model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=2), loss="mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, GradientAccumulateOptimizer)
    loaded.optimizer.apply([], [])


@pytest.mark.some_by_default(1)
def test_a_batch_that_fails_does_not_count(backend):
    """Not even where the forward pass fails, long before the gradients are there."""
    model = embedding()
    model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps=3), loss="mse")
    x, y = np.zeros((4, 6), "int32"), np.zeros((4, 3), "float32")
    model.train_on_batch(x, y)
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.train_on_batch(x + 99, y)
    assert int(model.optimizer.accumulator.step) == 1
    assert float(model.optimizer.accumulator.variables[1].numpy()) == 1


def test_memory_and_traces_stay_flat(backend, rng):
    """Windows do not retrace."""
    model = mlp()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), accum_steps=3)
    optimizer.build(model.trainable_variables)
    traces = []

    @tf.function
    def step(x):
        traces.append(1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for _ in range(30):
        step(tf.constant(rng.standard_normal((4, 5)), tf.float32))
    assert len(traces) == 1
    assert int(optimizer.iterations) == 10
    assert accumops.get_backend() == backend
