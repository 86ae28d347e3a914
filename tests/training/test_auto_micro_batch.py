"""`micro_batch_size="auto"`: found at the first step, and halved where memory runs out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops.planning.micro_batch_plan import MicroBatchPlan
from accumops.training import auto_micro_batch

L = keras.layers


def plan_of(size, samples):
    return MicroBatchPlan(
        micro_batch_size=size,
        accum_steps=-(-samples // size),
        effective_batch_size=samples,
        recompute=(),
        predicted_peak=1,
        memory_limit=2,
        fixed=0,
        samples_per_second=1.0,
        measured=(),
        device="CPU:0",
        measured_by="nobody",
    )


@pytest.fixture
def planned(monkeypatch):
    """Plans micro-batches of 8 without measuring. Has what was asked for."""
    asked = []

    def plan(model, batch, samples, memory_limit, *, stored):
        asked.append((samples, memory_limit, stored))
        return plan_of(8, samples)

    monkeypatch.setattr(auto_micro_batch, "plan_for_model", plan)
    return asked


class RunsOut(L.Layer):
    """Raises what TensorFlow raises where memory runs out, at a chosen call of a micro-batch that is too large."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.too_large = tf.Variable(1 << 30, dtype=tf.int32, trainable=False)
        self.from_call = tf.Variable(0, dtype=tf.int32, trainable=False)
        self.calls = tf.Variable(0, dtype=tf.int32, trainable=False)

    def call(self, inputs, training=False):
        if not training:
            return inputs

        def check(samples, calls, too_large, from_call):
            if samples >= too_large and calls >= from_call:
                raise MemoryError("no more memory")  # a ResourceExhaustedError where the function is run
            return np.int32(0)

        self.calls.assign_add(1)
        arguments = [tf.shape(inputs)[0], self.calls, self.too_large, self.from_call]
        zero = tf.numpy_function(check, arguments, tf.int32)
        zero.set_shape([])
        return inputs + tf.cast(zero, inputs.dtype)


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = L.Dense(8, "relu")(inputs)
    hidden = accumops.AccumBatchNormalization()(hidden)
    hidden = L.BatchNormalization()(hidden)
    hidden = RunsOut()(hidden)
    outputs = L.Dense(2)(L.Dropout(0.3, seed=1)(hidden))
    return keras.Model(inputs, outputs)


def runs_out(model):
    return next(layer for layer in model.model.layers if isinstance(layer, RunsOut))


def compiled(size, optimizer=None, **arguments):
    model = accumops.GradientAccumulateModel(network(), micro_batch_size=size)
    model.compile(
        optimizer or keras.optimizers.Adam(1e-2), "mse", metrics=["mae"], **({"jit_compile": False} | arguments)
    )
    return model


def data(samples=32):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(samples, 6)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x[:, :2])).batch(16)


def everything(model):
    model.optimizer.accumulator.reset()
    counted = {id(runs_out(model).calls), id(runs_out(model).too_large), id(runs_out(model).from_call)}
    variables = [*model.variables, *model.optimizer.variables, *(v for each in model.metrics for v in each.variables)]
    return [each.numpy().tobytes() for each in variables if id(each.value) not in counted]


RUNS = {"graph": {}, "eager": {"run_eagerly": True}}
OPTIMIZERS = {"fused": keras.optimizers.Adam, "unfused": keras.optimizers.Adagrad}


@pytest.mark.parametrize(
    ("optimizer", "run"),
    cross(OPTIMIZERS, RUNS, default=lambda optimizer, run: (optimizer == "fused") == (run == "graph")),
)
@pytest.mark.some_by_default(1)
def test_trains_as_with_a_number(planned, optimizer, run):
    models = [compiled(size, OPTIMIZERS[optimizer](0.1), **RUNS[run]) for size in ("auto", 8)]
    logs = [model.fit(data(), epochs=2, verbose=0).history for model in models]
    assert planned == [(16, None, True)]
    assert models[0].micro_batch_size == 8
    assert models[0].micro_batch_plan.micro_batch_size == 8
    assert logs[0] == logs[1]
    # Accumulators hold what the last window has left.
    trained = [[v.numpy().tobytes() for v in each.variables] for each in models]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(("step", "call"), cross([0, 2], [1, 2], default=lambda *each: each in ((0, 1), (2, 2))))
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_a_step_without_memory_is_made_again(planned, capfd, step, call):
    """The state after it is that of training with the smaller micro-batch from this step on, to the bit."""
    model, other = compiled("auto"), compiled(8)
    for i, (x, y) in enumerate(list(data()) * 2):
        if i == step:
            other.micro_batch_size = 4
            runs_out(model).calls.assign(0 if i else -1)  # the check of the loss calls it, too
            runs_out(model).from_call.assign(call)
            runs_out(model).too_large.assign(8)
        model.train_on_batch(x, y)
        other.train_on_batch(x, y)
    assert model.micro_batch_size == 4
    assert capfd.readouterr().out.count("memory ran out") == 1
    for one, another in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), another.numpy(), err_msg=one.path)
    assert int(model.optimizer.iterations) == 4


def test_down_to_one_sample_and_no_further(planned, capfd):
    model = compiled("auto")
    model.build_from = None
    model.fit(data().take(0 + 1), verbose=0)
    before = everything(model)
    runs_out(model).too_large.assign(1)
    with pytest.raises(tf.errors.ResourceExhaustedError, match="a micro-batch of one sample"):
        model.train_on_batch(*next(iter(data())))
    assert model.micro_batch_size == 1
    assert capfd.readouterr().out.count("memory ran out") == 3
    assert everything(model)[: len(model.variables) - 3] == before[: len(model.variables) - 3]
    runs_out(model).too_large.assign(2)
    model.train_on_batch(*next(iter(data())))
    assert int(model.optimizer.iterations) == 2


@pytest.mark.exhaustive
def test_a_failed_update_of_an_optimizer_that_is_not_fused(planned, monkeypatch):
    """The old values come back, and the update is made again, once."""

    class Fails(keras.optimizers.Adagrad):
        failures = tf.Variable(0, dtype=tf.int32)

        def apply(self, grads, trainable_variables=None):
            super().apply(grads, trainable_variables)

            def check(left):
                if left > 0:
                    raise MemoryError("no memory for the update")
                return np.int32(0)

            tf.numpy_function(check, [self.failures], tf.int32, stateful=True)

    models = [compiled(size, kind(0.1)) for size, kind in (("auto", Fails), (8, keras.optimizers.Adagrad))]
    for model in models:
        model.fit(data(), verbose=0)
    before = everything(models[0])
    Fails.failures.assign(1)
    with pytest.raises(tf.errors.ResourceExhaustedError, match="Memory ran out in the update"):
        models[0].train_on_batch(*next(iter(data())))
    trainable = [v.numpy().tobytes() for v in models[0].trainable_variables]
    assert trainable == [v.numpy().tobytes() for v in models[1].trainable_variables]
    slots = len(before)
    assert slots
    Fails.failures.assign(0)
    for model in models:
        model.train_on_batch(*next(iter(data())))
    ours, theirs = ([v.numpy() for v in each.trainable_variables] for each in models)
    for one, another in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.exhaustive
def test_a_larger_batch_is_planned_again(planned):
    model = compiled("auto")
    model.fit(data(), verbose=0)
    model.fit(data().unbatch().batch(4), verbose=0)
    model.fit(data().unbatch().batch(32), verbose=0)
    assert [samples for samples, _, _ in planned] == [16, 32]


def test_evaluates_predicts_and_goes_into_files(planned, tmp_path):
    model = accumops.GradientAccumulateModel(
        keras.Sequential([keras.Input((6,)), L.Dense(2)]), micro_batch_size="auto", memory_limit="4GB"
    )
    model.compile("sgd", "mse")
    model.evaluate(data(), verbose=0)
    assert model.micro_batch_size == "auto"
    assert model.micro_batch_plan is None
    model.fit(data(), validation_data=data(), verbose=0)
    assert planned == [(16, "4GB", True)]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.micro_batch_size, loaded.memory_limit) == ("auto", "4GB")
    np.testing.assert_array_equal(loaded.predict(data(), verbose=0), model.predict(data(), verbose=0))


def test_found_for_real(monkeypatch, tmp_path, capfd):
    """Nothing stands for anything: measured in the first run, and read from the file in the second."""
    monkeypatch.setenv("ACCUMOPS_CACHE_DIR", str(tmp_path))
    plans = []
    for _ in range(2):
        model = accumops.GradientAccumulateModel(
            keras.Sequential([keras.Input((6,)), L.Dense(2, name="head")], name="net"),
            micro_batch_size="auto",
            memory_limit="16GiB",
        )
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(data(), verbose=0)
        plans.append(model.micro_batch_plan)
        assert capfd.readouterr().out.count("accumops: micro_batch_size=") == 1
        keras.backend.clear_session()
    assert plans[0] == plans[1]
    assert (tmp_path / "plans.json").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"micro_batch_size": "automatic"}, TypeError, '"auto"'),
        ({"micro_batch_size": 8, "memory_limit": "4GB"}, ValueError, "needs micro_batch_size='auto'"),
        ({"accum_steps": 8, "memory_limit": "4GB"}, ValueError, "needs micro_batch_size='auto'"),
        ({"micro_batch_size": "auto", "memory_limit": "much"}, ValueError, "`memory_limit` must be"),
        ({"micro_batch_size": "auto", "memory_limit": 0.5}, TypeError, "`memory_limit` must be"),
        ({"micro_batch_size": "auto", "loss_over": "window"}, ValueError, "loss_over='window'"),
        ({"micro_batch_size": "auto", "parallel_micro_batches": 2}, ValueError, "parallel_micro_batches=2"),
    ],
)
def test_refused_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        accumops.GradientAccumulateModel(keras.Sequential([keras.Input((6,)), L.Dense(2)]), **arguments)


def test_several_steps_in_one_execution_are_refused(planned):
    model = compiled("auto", steps_per_execution=2)
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1"):
        model.fit(data(), verbose=0)


@pytest.mark.exhaustive
def test_a_size_that_is_set():
    model = compiled(8)
    model.fit(data(), verbose=0)
    model.micro_batch_size = 4
    model.fit(data(), verbose=0)
    assert int(model.optimizer.iterations) == 4
    for size, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="`micro_batch_size`"):
            model.micro_batch_size = size
    by_steps = accumops.GradientAccumulateModel(network(), accum_steps=2)
    with pytest.raises(ValueError, match="cannot be set"):
        by_steps.micro_batch_size = 8


@pytest.mark.exhaustive
def test_a_size_that_is_set_later_with_auto(planned):
    """The functions for the size that was found are made anew."""
    model, other = compiled("auto"), compiled(8)
    x, y = next(iter(data()))
    for each in (model, other):
        each.train_on_batch(x, y)
        each.micro_batch_size = 4
        each.train_on_batch(x, y)
    assert model.micro_batch_size == 4
    for one, another in zip(model.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), another.numpy())
