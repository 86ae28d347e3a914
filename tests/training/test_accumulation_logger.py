"""What AccumulationLogger writes, read back and compared with numbers that are computed without it."""

import event_files
import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from crosses import cross
from problems import Embedding, Problem

import accumops
from accumops import AccumulationLogger, GradientAccumulateModel, GradientAccumulateOptimizer, PartialWindow
from accumops.adapters.tensorflow import operations_within
from accumops.optimizer.window_record import WindowRecord
from accumops.training import accumulation_logger

SAMPLES, MICRO = 80, 16  # 5 micro-batches an epoch
# Two epochs in windows of 4 micro-batches, of which each epoch's last one has one.
WINDOWS = [slice(0, 64), slice(64, 80)] * 2


class Clock:
    """Stands for the module `time`: nothing but what a test says takes time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Work(keras.callbacks.Callback):
    """Takes 2 seconds for each batch in training, and more where no training is."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def _take(self, seconds):
        self.clock.now += seconds

    def on_train_batch_end(self, batch, logs=None):
        self._take(2)

    def on_test_batch_end(self, batch, logs=None):
        self._take(100)

    def on_epoch_begin(self, epoch, logs=None):
        self._take(1000)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(accumulation_logger, "time", clock)
    return clock


def with_model(problem, optimizer=None, **arguments):
    model = GradientAccumulateModel(problem.model(), **({"accum_steps": 4} | arguments))
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss="mse")
    return model


def with_optimizer(problem, optimizer=None):
    model = problem.model()
    model.compile(GradientAccumulateOptimizer(optimizer or keras.optimizers.SGD(0.1), 4), loss="mse")
    return model


def fit(model, problem, logger, *callbacks, batch_size=MICRO, **arguments):
    """Trains for two epochs, and returns what the logger has written, by the names of the tags."""
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0} | arguments
    callbacks = [PartialWindow(), *callbacks, logger]
    model.fit(problem.x, problem.y, batch_size=batch_size, callbacks=callbacks, **arguments)
    return read(logger)


def read(logger):
    found = event_files.scalars(logger.log_dir)
    assert all(tag.startswith("accumulation/") for tag in found)
    return {tag.removeprefix("accumulation/"): steps for tag, steps in found.items()}


def norms_by_hand(problem, windows, optimizer):
    """The norms of the large batches' gradients, in plain Keras."""
    model, norms = problem.model(), []
    optimizer.build(model.trainable_variables)
    for window in windows:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(problem.x[window], training=True) - problem.y[window]) ** 2)
        gradients = [tf.convert_to_tensor(each) for each in tape.gradient(loss, model.trainable_variables)]
        norms.append(np.sqrt(sum(np.square(each, dtype=np.float64).sum() for each in gradients)))
        optimizer.apply(gradients, model.trainable_variables)
    return norms


def check(found, wanted):
    """Compares all that was written, but for memory, which few allocators count."""
    found = {name: steps for name, steps in found.items() if name != "memory_peak"}
    assert set(found) == set(wanted)
    for name, steps in wanted.items():
        assert found[name] == {step: pytest.approx(value, rel=1e-5) for step, value in steps.items()}, name


@pytest.mark.parametrize("make", [with_model, with_optimizer])
@pytest.mark.some_by_default(1)
def test_each_epoch(rng, tmp_path, clock, make):
    problem = Problem(rng, SAMPLES)
    norms = norms_by_hand(problem, WINDOWS, keras.optimizers.SGD(0.1))
    validation = {"validation_data": (problem.x[:33], problem.y[:33])}
    found = fit(make(problem), problem, AccumulationLogger(tmp_path), Work(clock), **validation)
    wanted = {
        "effective_batch_size": {0: 40, 1: 40},
        "updates": {0: 2, 1: 4},
        "accum_steps": {0: 4, 1: 4},
        "gradient_norm": {0: norms[1], 1: norms[3]},
        "samples_per_second": {0: 8, 1: 8},
    }
    check(found, wanted)


@pytest.mark.parametrize("make", [with_model, with_optimizer])
@pytest.mark.parametrize("update_freq", ["batch", 2])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_each_so_many_batches(rng, tmp_path, clock, make, update_freq):
    """The epoch's fifth batch opens a window, which its end flushes after the fifth write."""
    problem = Problem(rng, SAMPLES)
    norms = norms_by_hand(problem, WINDOWS, keras.optimizers.SGD(0.1))
    logger = AccumulationLogger(str(tmp_path), update_freq)
    found = fit(make(problem), problem, logger, Work(clock))
    updates = dict(enumerate([0, 0, 0, 1, 1, 2, 2, 2, 3, 3], start=1))
    wanted = {
        "effective_batch_size": {4: 64, 9: 40},
        "updates": updates,
        "accum_steps": dict.fromkeys(updates, 4),
        "gradient_norm": {4: norms[0], 6: norms[1], 9: norms[2]},
        "samples_per_second": dict.fromkeys(updates, 8),
    }
    if update_freq == 2:
        wanted = {name: {step: each for step, each in steps.items() if step % 2 == 0} for name, steps in wanted.items()}
        wanted["gradient_norm"][10] = norms[2]
    check(found, wanted)


@pytest.mark.parametrize("update_freq", ["epoch", 1])
@pytest.mark.some_by_default(1)
def test_micro_batches_of_a_batch(rng, tmp_path, clock, update_freq):
    problem = Problem(rng, SAMPLES)
    windows = [slice(0, 32), slice(32, 64), slice(64, 80)]
    norms = norms_by_hand(problem, windows, keras.optimizers.SGD(0.1))
    model = with_model(problem, accum_steps=None, micro_batch_size=12)
    found = fit(model, problem, AccumulationLogger(tmp_path, update_freq), Work(clock), batch_size=32, epochs=1)
    of_batches = {
        "effective_batch_size": [32, 32, 16],
        "updates": [1, 2, 3],
        "accum_steps": [3, 3, 2],
        "gradient_norm": norms,
        "samples_per_second": [16, 16, 8],
    }
    of_epoch = {
        "effective_batch_size": 80 / 3,
        "updates": 3,
        "accum_steps": 8 / 3,
        "gradient_norm": norms[-1],
        "samples_per_second": 80 / 6,
    }
    if update_freq == "epoch":
        check(found, {name: {0: value} for name, value in of_epoch.items()})
    else:
        check(found, {name: dict(enumerate(values, start=1)) for name, values in of_batches.items()})


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "clipped": lambda: keras.optimizers.Adam(0.01, clipnorm=0.05),
    "clipped together": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "unfused": lambda: keras.optimizers.Adagrad(0.1),
}
RUNS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
MODES = {"accum_steps": {}, "micro_batch_size": {"accum_steps": None, "micro_batch_size": 16}}


class TestGradientNorm:
    """Of windows of 64 and 16 samples, in turns."""

    def check(self, problem, model, tmp_path, optimizer, *, batch_size=MICRO):
        norms = norms_by_hand(problem, WINDOWS, optimizer)
        logger = AccumulationLogger(tmp_path, "batch")
        found = fit(model, problem, logger, batch_size=batch_size)["gradient_norm"]
        assert list(found.values()) == pytest.approx(norms[: len(found)], rel=1e-5)
        assert len(found) == (4 if batch_size == 64 else 3)

    @pytest.mark.parametrize(
        ("optimizer", "mode", "run"),
        cross(
            OPTIMIZERS,
            MODES,
            RUNS,
            default=lambda optimizer, mode, run: (
                (optimizer, mode, run)
                in [
                    ("clipped", "accum_steps", "graph"),
                    ("clipped together", "micro_batch_size", "graph"),
                    ("unfused", "accum_steps", "graph"),
                    ("momentum", "micro_batch_size", "xla"),
                    ("momentum", "accum_steps", "eager"),
                ]
            ),
        ),
    )
    @pytest.mark.some_by_default(1)
    @pytest.mark.exhaustive
    def test_optimizers(self, rng, tmp_path, optimizer, mode, run):
        problem = Problem(rng, SAMPLES)
        model = GradientAccumulateModel(problem.model(), **({"accum_steps": 4} | MODES[mode]))
        model.compile(OPTIMIZERS[optimizer](), loss="mse", **RUNS[run])
        self.check(
            problem, model, tmp_path, OPTIMIZERS[optimizer](), batch_size=64 if mode == "micro_batch_size" else MICRO
        )

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("backend", ["reference"], indirect=True)
    def test_the_reference(self, rng, tmp_path, backend):
        problem = Problem(rng, SAMPLES)
        self.check(problem, with_optimizer(problem), tmp_path, keras.optimizers.SGD(0.1))

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.some_by_default(1)
    @pytest.mark.exhaustive
    def test_under_loss_scaling(self, rng, tmp_path, inside):
        """The norm is without the factor of the loss."""
        problem = Problem(rng, SAMPLES)
        if inside:
            model = with_model(problem, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 16.0))
        else:
            model = problem.model()
            optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
            model.compile(keras.optimizers.LossScaleOptimizer(optimizer, 16.0), loss="mse")
        self.check(problem, model, tmp_path, keras.optimizers.SGD(0.1))

    def test_clipping_comes_after(self, rng, tmp_path):
        problem = Problem(rng, SAMPLES)
        model = with_model(
            problem, keras.optimizers.SGD(0.0), gradient_clipping=accumops.AdaptiveGradientClipping(1e-3)
        )
        self.check(problem, model, tmp_path, keras.optimizers.SGD(0.0))

    @pytest.mark.parametrize("lazy_sparse", [False, True])
    @pytest.mark.some_by_default(1)
    def test_rows_of_a_table(self, rng, tmp_path, lazy_sparse):
        """Rows that an earlier window has touched, and this one has not, do not count."""
        problem = Embedding(rng)
        problem.x, problem.y = problem.x[:SAMPLES], problem.y[:SAMPLES]
        model = with_model(problem, lazy_sparse=lazy_sparse)
        self.check(problem, model, tmp_path, keras.optimizers.SGD(0.1))

    def test_sums(self, rng, tmp_path):
        """The gradient of a loss that is a sum is the sum."""
        problem = Problem(rng, SAMPLES)
        model = GradientAccumulateModel(problem.model(), accum_steps=5)
        model.compile(keras.optimizers.SGD(0.0), loss=keras.losses.MeanSquaredError(reduction="sum"))
        (norm,) = norms_by_hand(problem, [slice(0, SAMPLES)], keras.optimizers.SGD(0.0))
        found = fit(model, problem, AccumulationLogger(tmp_path), epochs=1)["gradient_norm"]
        assert found == {0: pytest.approx(SAMPLES * norm, rel=1e-5)}

    @pytest.mark.exhaustive
    def test_left_out(self, rng, tmp_path):
        problem = Problem(rng, SAMPLES)
        model = with_model(problem)
        found = fit(model, problem, AccumulationLogger(tmp_path, gradient_norm=False))
        assert "gradient_norm" not in found
        assert found["accum_steps"] == {0: 4, 1: 4}
        assert model.optimizer.record is None

    def test_left_out_with_micro_batch_size(self, rng, tmp_path):
        problem = Problem(rng, SAMPLES)
        model = with_model(problem, accum_steps=None, micro_batch_size=12)
        found = fit(model, problem, AccumulationLogger(tmp_path, gradient_norm=False), batch_size=32)
        assert "gradient_norm" not in found
        assert found["accum_steps"] == {0: pytest.approx(8 / 3), 1: pytest.approx(8 / 3)}

    @pytest.mark.parametrize(
        ("optimizer", "norms", "number"),
        [
            (keras.optimizers.SGD(0.1), True, 0),
            (keras.optimizers.SGD(0.1, clipnorm=1.0), None, 0),
            (keras.optimizers.SGD(0.1, clipnorm=1.0), True, 0),
            (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), True, 0),
        ],
    )
    def test_no_sums_are_read_for_it(self, rng, optimizer, norms, number):
        """The op that adds the last micro-batch reports their norms, which serve an update that needs them, too."""
        variables = Problem(rng, SAMPLES).model().trainable_variables
        wrapped = GradientAccumulateOptimizer(optimizer, 4)
        wrapped.record = None if norms is None else WindowRecord(norms)
        wrapped.build(variables)

        @tf.function
        def step():
            wrapped.apply([tf.ones(variable.shape) for variable in variables])

        operations = operations_within(step.get_concrete_function().graph)
        assert sum(each.type == "AccumOps>SquaredNorms" for each in operations) == number

    @pytest.mark.parametrize("make", [with_model, with_optimizer])
    @pytest.mark.some_by_default(1)
    def test_changes_no_bit_of_the_training(self, rng, tmp_path, make):
        problem = Problem(rng, SAMPLES)
        weights = []
        for callbacks in ([], [AccumulationLogger(tmp_path)]):
            model = make(problem, keras.optimizers.Adam(0.01))
            model.fit(problem.x, problem.y, batch_size=MICRO, shuffle=False, verbose=0, callbacks=callbacks)
            weights.append(model.get_weights())
        for without, beside in zip(*weights, strict=True):
            np.testing.assert_array_equal(without, beside)


def check_nonfinite(rng, tmp_path, policy):
    """The second of 5 micro-batches has NaN, in windows of 4 that each epoch's end flushes."""
    problem = Problem(rng, SAMPLES)
    problem.x[20] = np.nan
    logger = AccumulationLogger(tmp_path, "batch")
    return fit(with_model(problem, nonfinite=policy), problem, logger)


@pytest.mark.exhaustive
def test_windows_that_are_dropped(rng, tmp_path):
    found = check_nonfinite(rng, tmp_path, "drop")
    assert found["nonfinite_windows"] == dict(enumerate([0, 0, 0, 1, 1, 1, 1, 1, 2, 2], start=1))
    assert found["updates"] == dict(enumerate([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], start=1))
    assert list(found["gradient_norm"]) == [4, 6, 9]
    assert np.isnan([found["gradient_norm"][step] for step in (4, 9)]).all()
    assert np.isfinite(found["gradient_norm"][6])


def test_micro_batches_that_are_skipped(rng, tmp_path):
    found = check_nonfinite(rng, tmp_path, "skip")
    assert found["nonfinite_windows"] == dict(enumerate([0, 1, 1, 1, 1, 1, 2, 2, 2, 2], start=1))
    assert found["updates"] == dict(enumerate([0, 0, 0, 1, 1, 2, 2, 2, 3, 3], start=1))
    assert found["effective_batch_size"] == {4: 48, 9: 32}
    assert np.isfinite(list(found["gradient_norm"].values())).all()


def test_a_schedule_of_updates(rng, tmp_path):
    """K is that of the open window, or else of the last one."""
    problem = Problem(rng, SAMPLES)
    optimizer = GradientAccumulateOptimizer("sgd", lambda updates: tf.where(updates < 1, 2, 3))
    model = problem.model()
    model.compile(optimizer, loss="mse")
    found = fit(model, problem, AccumulationLogger(tmp_path, "batch"), epochs=1)
    assert found["accum_steps"] == {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    assert found["effective_batch_size"] == {2: 32, 5: 48}


def test_a_window_that_is_carried_on(rng, tmp_path):
    """It is open where the second fit starts: no samples of a whole window are known until another one has ended."""
    problem = Problem(rng, SAMPLES)
    model = with_model(problem, partial_window="carry")
    first, second = (AccumulationLogger(tmp_path / name, "batch") for name in "ab")
    for logger, epochs in ((first, 2), (second, 1)):
        arguments = {"epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": [logger]}
        model.fit(problem.x, problem.y, batch_size=MICRO, **arguments)
    assert read(first)["effective_batch_size"] == {4: 64, 8: 64}
    assert read(second)["updates"] == dict(enumerate([2, 3, 3, 3, 3], start=1))
    assert "effective_batch_size" not in read(second)


def test_the_second_fit_traces_nothing(rng, tmp_path):
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x * 1.0

    problem = Problem(rng, SAMPLES)
    problem.layers = lambda: [Counted(), keras.layers.Dense(3)]
    model = with_model(problem)
    fit(model, problem, AccumulationLogger(tmp_path / "a"))
    before = len(traces)
    found = fit(model, problem, AccumulationLogger(tmp_path / "b"))
    assert len(traces) == before
    assert list(found["gradient_norm"]) == [0, 1]
    assert found["updates"] == {0: 6, 1: 8}


@pytest.mark.exhaustive
def test_a_model_that_was_trained_before(rng, tmp_path):
    """The functions of the first fit, that of its flush included, note nothing."""
    problem = Problem(rng, SAMPLES)
    model = with_model(problem, keras.optimizers.SGD(0.1))
    model.fit(problem.x, problem.y, batch_size=MICRO, epochs=1, shuffle=False, verbose=0)
    norms = norms_by_hand(problem, [*WINDOWS, *WINDOWS[:2]], keras.optimizers.SGD(0.1))
    found = fit(model, problem, AccumulationLogger(tmp_path))
    assert found["gradient_norm"] == {0: pytest.approx(norms[3], rel=1e-5), 1: pytest.approx(norms[5], rel=1e-5)}


@pytest.mark.exhaustive
def test_another_callback_that_does_not_record(rng, tmp_path):
    """Keras's callback leaves a condition of its own open between batches."""

    class Silent(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.scope = tf.summary.record_if(False)
            self.scope.__enter__()

        def on_train_batch_end(self, batch, logs=None):
            self.scope.__exit__(None, None, None)

    problem = Problem(rng, SAMPLES)
    logger = AccumulationLogger(tmp_path, 5)
    model = with_model(problem)
    model.fit(problem.x, problem.y, batch_size=MICRO, verbose=0, callbacks=[logger, Silent()])
    assert list(read(logger)["updates"]) == [5]


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("update_freq", ["epoch", 1])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_a_training_that_is_resumed(rng, tmp_path, clock, update_freq):
    """It was interrupted after the backup of the second epoch's third batch."""
    problem = Problem(rng, SAMPLES)
    backup = accumops.BackupAndRestore(tmp_path / "backup", save_freq=4)
    with pytest.raises(KeyboardInterrupt):
        fit(with_model(problem), problem, AccumulationLogger(tmp_path / "a"), Interrupt(1, 3), backup)
    logger = AccumulationLogger(tmp_path / "b", update_freq)
    callbacks = [Work(clock), logger, accumops.BackupAndRestore(tmp_path / "backup", save_freq=4)]
    model = with_model(problem)
    model.fit(problem.x, problem.y, batch_size=MICRO, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    norms = norms_by_hand(problem, WINDOWS, keras.optimizers.SGD(0.1))
    found = read(logger)
    if update_freq == "epoch":
        wanted = {
            "effective_batch_size": {1: 40},
            "updates": {1: 4},
            "accum_steps": {1: 4},
            "gradient_norm": {1: norms[3]},
            "samples_per_second": {1: 8},
        }
    else:  # 3 batches were passed
        wanted = {
            "updates": {4: 3, 5: 3},
            "accum_steps": {4: 4, 5: 4},
            "gradient_norm": {4: norms[2]},
            "samples_per_second": {4: 8, 5: 8},
        }
    check(found, wanted)


def test_a_train_step_that_counts_nothing(rng, tmp_path):
    class Own(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    problem = Problem(rng, SAMPLES)
    model = Own([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(GradientAccumulateOptimizer("sgd", 4), loss="mse")
    found = fit(model, problem, AccumulationLogger(tmp_path))
    assert set(found) - {"memory_peak"} == {"updates", "accum_steps", "gradient_norm"}
    assert found["updates"] == {0: 2, 1: 4}


def test_a_model_that_is_built_in_its_first_step(rng, tmp_path):
    problem = Problem(rng, SAMPLES)
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile(GradientAccumulateOptimizer("sgd", 4), loss="mse")
    found = fit(model, problem, AccumulationLogger(tmp_path))
    assert len(found["gradient_norm"]) == 2


@pytest.mark.exhaustive
def test_memory_where_the_allocator_counts():
    with processes.that_counts() as process:
        logged, at_the_end = process.call(event_files.logged_memory, jit_compile=False)
        by_xla, _ = process.call(event_files.logged_memory, jit_compile=True)
    assert len(logged) == 2
    assert 4 * 4096 * 256 < logged[0] <= logged[1]  # the weights, at least
    assert logged[1] == pytest.approx(at_the_end, rel=1e-6)
    assert by_xla == []


@pytest.mark.exhaustive
def test_memory_where_it_does_not(rng, tmp_path, monkeypatch):
    def does_not_count(device):
        raise ValueError("no allocator stats")

    monkeypatch.setattr(tf.config.experimental, "get_memory_info", does_not_count)
    problem = Problem(rng, SAMPLES)
    assert "memory_peak" not in fit(with_model(problem), problem, AccumulationLogger(tmp_path))


@pytest.mark.parametrize("update_freq", ["never", 0, -1, 1.5, True, None])
def test_wrong_frequencies(update_freq):
    with pytest.raises(ValueError, match="update_freq"):
        AccumulationLogger(update_freq=update_freq)


def test_a_norm_that_is_no_bool():
    with pytest.raises(TypeError, match="gradient_norm"):
        AccumulationLogger(gradient_norm=1)


def test_nothing_accumulates(rng, tmp_path):
    problem = Problem(rng, SAMPLES)
    model = problem.model()
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match=r"AccumulationLogger needs .*GradientAccumulateOptimizer"):
        model.fit(problem.x, problem.y, verbose=0, callbacks=[AccumulationLogger(tmp_path)])
