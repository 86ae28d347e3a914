"""The functions that a model's steps run: whatever happens between steps, they do what one function would."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

from accumops import GradientAccumulateModel
from accumops.training.train_function import train_function


def network():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(2)])


def batches(rng, count=12, size=8):
    x = rng.standard_normal((count * size, 6)).astype("float32")
    return x, x[:, :2] ** 2


def model(accum_steps=4, *, eager=False, **arguments):
    made = GradientAccumulateModel(network(), accum_steps=accum_steps, **arguments)
    made.compile(keras.optimizers.AdamW(0.01), "mse", run_eagerly=eager, jit_compile=False)
    return made


class At(keras.callbacks.Callback):
    """Does something to the model after some steps, counted from 0."""

    def __init__(self, actions):
        super().__init__()
        self.actions = actions
        self.step = 0

    def on_train_batch_end(self, batch, logs=None):
        self.actions.get(self.step, lambda model: None)(self.model)
        self.step += 1


def set_accum_steps(steps):
    return lambda model: setattr(model, "accum_steps", steps)


def add_a_micro_batch(model):
    variables = model.trainable_variables
    model.optimizer.apply([tf.ones(v.shape) for v in variables], variables, weight=8.0)


INTERFERENCE = {
    "none": {},
    "a flush": {1: lambda model: model.flush(), 8: lambda model: model.flush()},
    "a reset": {2: lambda model: model.optimizer.accumulator.reset()},
    "more micro-batches a window": {2: set_accum_steps(6)},
    "fewer micro-batches a window": {4: set_accum_steps(1), 9: set_accum_steps(2)},
    "somebody else's micro-batch": {1: add_a_micro_batch, 6: add_a_micro_batch},
    "somebody else's window": {2: add_a_micro_batch, 5: add_a_micro_batch},
    "flushes and a reset": {
        1: lambda model: model.flush(),
        7: lambda model: model.optimizer.accumulator.reset(),
        9: lambda model: model.flush(),
    },
    "more and fewer micro-batches a window": {2: set_accum_steps(6), 6: set_accum_steps(1), 9: set_accum_steps(2)},
    "somebody else's micro-batch and window": {1: add_a_micro_batch, 5: add_a_micro_batch},
}


@pytest.mark.parametrize("case", cross(INTERFERENCE, default=lambda case: " and " in case))
@pytest.mark.some_by_default(1)
def test_as_eagerly_whatever_happens_between_steps(rng, case):
    x, y = batches(rng)
    results = []
    for eager in (False, True):
        trained = model(eager=eager)
        trained.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[At(INTERFERENCE[case])])
        results.append([*trained.get_weights(), int(trained.optimizer.iterations)])
    for graph, eager in zip(*results, strict=True):
        np.testing.assert_allclose(graph, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accum_steps", [1, 3, lambda updates: tf.where(updates < 2, 2, 3)])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_schedules_and_windows_of_one(rng, accum_steps):
    x, y = batches(rng)
    graph, eager = model(accum_steps), model(accum_steps, eager=True)
    for each in (graph, eager):
        each.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0)
    assert int(graph.optimizer.iterations) == int(eager.optimizer.iterations)
    for a, b in zip(graph.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_steps_that_cannot_end_a_window_know_nothing_of_the_update(rng, monkeypatch):
    x, y = batches(rng, count=8)
    trained = model()
    called = []
    for name in ("apply", "accumulate", "close"):
        original = getattr(type(trained.optimizer), name)

        def spy(self, *args, name=name, original=original, **kwargs):
            called.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(trained.optimizer), name, spy)
    trained.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert called == ["accumulate", "close"]  # each traced once
    assert int(trained.optimizer.iterations) == 2


def test_nothing_runs_at_the_end_of_the_data(rng):
    """A generator of random numbers that no data reaches moves once a step; in Keras once more for each epoch."""
    x, y = batches(rng, count=6)

    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(7)

        def call(self, inputs):
            return inputs + 0 * keras.random.normal((2,), seed=self.seeds)

    # Of a size that Keras does not know: it asks until there is no more.
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).filter(lambda x, y: True)
    noise = Noise()
    model = GradientAccumulateModel(keras.Sequential([keras.Input((6,)), keras.layers.Dense(2), noise]), accum_steps=3)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(data, epochs=3, verbose=0)
    np.testing.assert_array_equal(noise.seeds.state.numpy(), [7, 3 * 6])


def test_batches_that_are_given_one_by_one(rng):
    x, y = batches(rng, count=8)
    graph, eager = model(), model(eager=True)
    for each in (graph, eager):
        each.fit(x[:16], y[:16], batch_size=8, shuffle=False, verbose=0)
        for i in range(16, 64, 8):
            each.train_on_batch(x[i : i + 8], y[i : i + 8])
    for a, b in zip(graph.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_error_in_a_step_leaves_the_window(rng):
    """The next steps decide anew."""
    trained = model()
    x, y = batches(rng, count=8)
    trained.fit(x[:8], y[:8], batch_size=8, verbose=0)
    function = trained.make_train_function(force=True)
    good = iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat())
    for _ in range(2):
        function(good)
    bad = iter(tf.data.Dataset.from_tensors((x[:8, :5], y[:8])))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        function(bad)
    assert int(trained.optimizer.accumulator.step) == 2
    for _ in range(2):
        function(good)
    assert (int(trained.optimizer.accumulator.step), int(trained.optimizer.iterations)) == (0, 2)
    with pytest.raises(StopIteration):
        function(iter(tf.data.Dataset.from_tensor_slices((x[:0], y[:0])).batch(8)))


def test_an_error_in_the_step_that_ends_a_window(rng):
    """It is the user's, and not taken for the check that the window ends."""
    trained = GradientAccumulateModel(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]), accum_steps=2)
    trained.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    x, y = batches(rng)[0], np.zeros(96, "int64")
    function = trained.make_train_function(force=True)
    good = iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat())
    bad = iter(tf.data.Dataset.from_tensor_slices((x, y + 5)).batch(8).repeat())
    for _ in range(5):
        function(good)
    before = trained.get_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match="valid range"):
        function(bad)
    assert (int(trained.optimizer.accumulator.step), int(trained.optimizer.iterations)) == (1, 2)
    for a, b in zip(trained.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    function(good)
    assert (int(trained.optimizer.accumulator.step), int(trained.optimizer.iterations)) == (0, 3)


@pytest.mark.parametrize("position", [6, 7])
def test_an_assertion_of_a_layer_is_raised_wherever_the_window_is(rng, position):
    """It runs beside the update, which may be made all the same."""

    class Bounded(keras.layers.Layer):
        def call(self, inputs):
            tf.debugging.assert_less(tf.reduce_max(inputs), 50.0, message="too large")
            return inputs

    x, y = batches(rng)
    x[8 * position] = 100.0
    trained = GradientAccumulateModel(
        keras.Sequential([keras.Input((6,)), Bounded(), keras.layers.Dense(2)]), accum_steps=4
    )
    trained.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        trained.fit(x, y, batch_size=8, shuffle=False, verbose=0)


def test_functions_are_for_data_of_all_shapes(rng):
    """After two sizes there is one for all."""
    traced = []

    class Counted(keras.layers.Layer):
        def call(self, inputs):
            traced.append(inputs.shape)
            return inputs

    inputs = keras.Input((None, 2))
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(Counted()(inputs)))
    trained = GradientAccumulateModel(keras.Model(inputs, outputs), accum_steps=2)
    trained.compile("sgd", "mse", jit_compile=False)
    counts = []
    for length in range(3, 9):
        traced.clear()
        data = tf.data.Dataset.from_tensor_slices((np.ones((12, length, 2), "float32"), np.ones((12, 1), "float32")))
        trained.fit(data.batch(2), verbose=0)
        counts.append(len(traced))
    assert counts[2:] == [0, 0, 0, 0]


def test_a_window_that_does_not_end_after_all_loses_no_data(rng):
    """Another number of micro-batches, set where the next step would have ended the window: each batch counts once."""
    x, y = batches(rng, count=6)
    trained = model(accum_steps=3)
    seen = []
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    data = data.map(lambda x, y: tf.py_function(lambda x, y: seen.append(1) or (x, y), [x, y], [tf.float32] * 2))
    data = data.map(lambda x, y: (tf.ensure_shape(x, [None, 6]), tf.ensure_shape(y, [None, 2])))
    function = trained.make_train_function(force=True)
    iterator = iter(data)
    for _ in range(2):
        function(iterator)
    trained.optimizer.accumulator.reset()  # the function knows nothing of it
    for _ in range(3):
        function(iterator)
    assert (int(trained.optimizer.accumulator.step), int(trained.optimizer.iterations)) == (0, 1)
    function(iterator)
    with pytest.raises(StopIteration):
        function(iterator)
    assert len(seen) == 6


@pytest.mark.exhaustive
def test_functions_that_run_eagerly(rng):
    x, y = batches(rng)
    graph, eager = model(), model()
    graph.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    tf.config.run_functions_eagerly(True)
    try:
        eager.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    finally:
        tf.config.run_functions_eagerly(False)
    for a, b in zip(graph.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_data_is_not_kept(rng):
    """What an epoch's iterator holds goes with it."""
    x, y = batches(rng)
    trained = model()
    ended = []

    def samples():
        try:
            for i in range(1000):
                yield x[i % 96], y[i % 96]
        finally:
            ended.append(1)

    signature = (tf.TensorSpec([6]), tf.TensorSpec([2]))
    data = tf.data.Dataset.from_generator(samples, output_signature=signature).batch(8)
    function = trained.make_train_function(force=True)
    iterator = iter(data)
    for _ in range(5):
        function(iterator)
    assert not ended
    del iterator
    gc.collect()
    assert ended


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.some_by_default(1)
def test_features_of_all_kinds(rng, drop):
    """Strings, ragged tensors and what a dataset leaves out, through the one operation that waits for data."""
    x, y = batches(rng, count=4)
    features = {
        "numbers": x,
        "words": np.array(["a", "b", "c", "d"] * 8)[:, None],
        "bags": tf.RaggedTensor.from_row_lengths(tf.range(32 * 3) % 7, [3] * 32),
    }
    data = tf.data.Dataset.from_tensor_slices((features, y, None)).batch(8, drop_remainder=drop)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="one_hot")
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            bags = tf.cast(tf.reduce_sum(inputs["bags"], axis=1), tf.float32)[:, tf.newaxis]
            words = tf.ensure_shape(tf.cast(self.lookup(inputs["words"]), tf.float32), [None, 4])
            return self.dense(tf.concat([inputs["numbers"], words, bags], axis=1))

    results = []
    for eager, steps in ((True, 1), (False, 1), (False, 3)):
        keras.utils.set_random_seed(1)
        trained = GradientAccumulateModel(Net(), accum_steps=2)
        sgd = keras.optimizers.SGD(0.01)
        trained.compile(sgd, "mse", run_eagerly=eager, steps_per_execution=steps, jit_compile=False)
        trained.fit(data, epochs=2, verbose=0)
        results.append(trained.get_weights())
    for wanted, *found in zip(*results, strict=True):
        for each in found:
            np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=1e-6)


class Logged(GradientAccumulateModel):
    """Its logs are not the metrics after the step."""

    def train_step(self, data):
        super().train_step(data)
        return {"samples": tf.shape(data[0])[0]}


def test_where_keras_function_stays(monkeypatch):
    """XLA compiles a whole step that loops over micro-batches, and several steps have logs of their own."""
    made = []
    monkeypatch.setattr("accumops.training.model.train_function", lambda *args: made.append(1) or train_function(*args))
    by_steps, by_size = {"accum_steps": 2}, {"micro_batch_size": 2}
    for kind, mode, arguments, own in (
        (GradientAccumulateModel, by_size, {"jit_compile": True}, 0),
        (Logged, by_size, {"steps_per_execution": 2}, 0),
        (GradientAccumulateModel, by_size, {"steps_per_execution": 2, "jit_compile": True}, 0),
        (GradientAccumulateModel, by_size, {"steps_per_execution": 2}, 1),
        (GradientAccumulateModel, by_steps, {"steps_per_execution": 2}, 2),
        (GradientAccumulateModel, by_steps, {"jit_compile": True}, 3),
        (GradientAccumulateModel, by_steps, {"jit_compile": False}, 4),
        (Logged, by_steps, {}, 5),
    ):
        trained = kind(network(), **mode)
        trained.compile("sgd", "mse", **{"jit_compile": False, **arguments})
        trained.make_train_function()
        assert trained.make_train_function() is trained.train_function
        assert trained.jit_compile == arguments.get("jit_compile", False)
        assert len(made) == own


MODES = {"micro_batch_size": {"micro_batch_size": 3}, "accum_steps": {"accum_steps": 3}}


def fitted(mode, x, y, *, steps, jit_compile=False, optimizer="adamw", nonfinite="propagate", **arguments):
    """What is left of two epochs, in which `steps` run in one call: weights, optimizer, logs."""
    trained = GradientAccumulateModel(network(), **MODES[mode], nonfinite=nonfinite)
    trained.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=steps, jit_compile=jit_compile)
    history = trained.fit(x, y, epochs=2, shuffle=False, verbose=0, **arguments).history
    return [*trained.get_weights(), *(each.numpy() for each in trained.optimizer.variables)], history


@pytest.mark.some_by_default(1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("steps", "optimizer", "jit_compile"),
    [
        (4, "adamw", False),  # the last call has 2 steps
        pytest.param(5, "adamw", False, marks=pytest.mark.exhaustive),
        pytest.param(100, "adamw", False, marks=pytest.mark.exhaustive),
        pytest.param(4, "adagrad", False, marks=pytest.mark.exhaustive),  # its update is not one op
        pytest.param(4, "adamw", True, marks=pytest.mark.exhaustive),
    ],
)
def test_several_steps_in_one_call(rng, mode, steps, optimizer, jit_compile):
    """The same as one by one. The data ends in the middle of a call and of a window, and its last batch is smaller."""
    x, y = batches(rng, count=9)
    x, y = x[:-3], y[:-3]
    batch_size = 7  # ten batches, the last one of 6
    how = {"batch_size": batch_size, "optimizer": optimizer, "jit_compile": jit_compile}
    weights, logs = fitted(mode, x, y, steps=1, **how)
    found, found_logs = fitted(mode, x, y, steps=steps, **how)
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    assert found_logs.keys() == logs.keys()
    for name, values in logs.items():
        np.testing.assert_allclose(found_logs[name], values, rtol=2e-5)


@pytest.mark.some_by_default(1)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_does_not_count_among_several(rng, mode):
    """In the first call, which makes the variables of metrics, and in a later one."""
    x, y = batches(rng, count=9)
    x[[10, 41]] = np.nan
    weights, logs = fitted(mode, x, y, steps=1, batch_size=8, nonfinite="skip")
    found, found_logs = fitted(mode, x, y, steps=3, batch_size=8, nonfinite="skip")
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found_logs == logs


def test_several_steps_take_no_batch_too_many(rng):
    """A call leaves the iterator at the next batch, and the last call has what is left."""
    x, y = batches(rng, count=9)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    trained = GradientAccumulateModel(network(), micro_batch_size=3)
    trained.compile("sgd", "mse", steps_per_execution=3, jit_compile=False)
    train, iterator = trained.make_train_function(), iter(data)
    train(iterator)
    next(iterator)
    updates = [3]
    for _ in range(2):
        assert np.isfinite(train(iterator)["loss"])
        updates.append(int(trained.optimizer.iterations))
    assert updates == [3, 6, 8]
    with pytest.raises(StopIteration):
        train(iterator)
    assert int(trained.optimizer.iterations) == 8


def test_an_error_among_several_steps(rng):
    """The steps before it stay, and the next call goes on."""
    x, y = batches(rng, count=6)
    numbers = tf.data.Dataset.range(6).map(
        lambda i: tf.debugging.check_numerics(tf.where(i == 3, np.nan, 1.0), "a hole")
    )
    data = tf.data.Dataset.zip((tf.data.Dataset.from_tensor_slices((x, y)).batch(8), numbers)).map(lambda xy, _: xy)
    trained = GradientAccumulateModel(network(), micro_batch_size=3, check_loss=False)
    trained.compile("sgd", "mse", steps_per_execution=2, jit_compile=False)
    train, iterator = trained.make_train_function(), iter(data)
    train(iterator)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a hole"):
        train(iterator)
    assert trained.optimizer.iterations.numpy() == 3
    train(iterator)
    assert trained.optimizer.iterations.numpy() == 5


@pytest.mark.exhaustive
def test_several_steps_where_functions_run_eagerly(rng):
    x, y = batches(rng, count=3)
    tf.config.run_functions_eagerly(True)
    try:
        found, _ = fitted("micro_batch_size", x, y, steps=2, batch_size=8)
    finally:
        tf.config.run_functions_eagerly(False)
    wanted, _ = fitted("micro_batch_size", x, y, steps=2, batch_size=8)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.exhaustive
def test_several_steps_of_many_models_warn_of_no_retracing(rng, caplog):
    """TensorFlow counts the traces of all functions that have the same code together."""
    x, y = batches(rng, count=4)
    for _ in range(8):
        fitted("micro_batch_size", x, y, steps=2, batch_size=8)
    assert "retracing" not in caplog.text
