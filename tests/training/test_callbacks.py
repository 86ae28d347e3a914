"""Callbacks, in `fit` of a GradientAccumulateModel and of a plain model with a GradientAccumulateOptimizer."""

import keras
import numpy as np
import pytest
from crosses import cross, turns
from problems import Problem, largest_difference

from accumops import (
    AccumStepsScheduler,
    EffectiveBatchSize,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    PartialWindow,
)

SAMPLES, MICRO = 80, 16  # 5 micro-batches an epoch


def with_model(problem, accum_steps, **arguments):
    model = GradientAccumulateModel(problem.model(), accum_steps=accum_steps, **arguments)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    return model, model.model, model.optimizer


def with_optimizer(problem, accum_steps):
    model = problem.model()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), accum_steps)
    model.compile(optimizer, loss="mse")
    return model, model, optimizer


def fit(model, problem, epochs, **arguments):
    return model.fit(problem.x, problem.y, batch_size=MICRO, epochs=epochs, shuffle=False, verbose=0, **arguments)


def by_hand(problem, windows):
    """Plain Keras on whole windows, given by their micro-batches' numbers."""
    model = problem.model()
    model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=True)
    for window in windows:
        samples = np.concatenate([np.arange(i * MICRO, (i + 1) * MICRO) for i in window])
        model.train_on_batch(problem.x[samples], problem.y[samples])
    return model


MAKERS = [with_model, with_optimizer]
SCHEDULES = {"dict": {0: 1, 1: 5, 3: 2}, "callable": lambda epoch, steps: {0: 1, 3: 2}.get(epoch, 5)}


class TestAccumStepsScheduler:
    @pytest.mark.parametrize(
        ("make", "schedule"), cross(MAKERS, SCHEDULES, default=lambda *each: each in turns(MAKERS, SCHEDULES))
    )
    @pytest.mark.some_by_default(1)
    def test_sets_the_number_of_micro_batches(self, rng, make, schedule):
        problem = Problem(rng, SAMPLES)
        model, net, optimizer = make(problem, 1)
        callbacks = [PartialWindow(), AccumStepsScheduler(SCHEDULES[schedule])]
        history = fit(model, problem, 4, callbacks=callbacks).history
        assert history["accum_steps"] == [1, 5, 5, 2]
        windows = [[0], [1], [2], [3], [4], [*range(5)], [*range(5)], [0, 1], [2, 3], [4]]
        assert int(optimizer.iterations) == len(windows)
        assert largest_difference(by_hand(problem, windows), net) <= 1e-5

    @pytest.mark.exhaustive
    def test_a_model_with_a_dict(self, rng):
        problem = Problem(rng, SAMPLES)
        model, net, _ = with_model(problem, {0: 2, 1: 4}, partial_window="drop")
        assert fit(model, problem, 2).history["accum_steps"] == [2, 4]
        assert largest_difference(by_hand(problem, [[0, 1], [2, 3], [0, 1, 2, 3]]), net) <= 1e-5
        assert model.accum_steps == {0: 2, 1: 4}
        # A fit that goes on in a later epoch, as after a restart, has that epoch's number.
        assert fit(model, problem, 5, initial_epoch=4).history["accum_steps"] == [4]

    def test_an_open_window_goes_on_as_it_started(self, rng):
        """2 of 3 micro-batches are carried into an epoch in which windows are of 2."""
        problem = Problem(rng, SAMPLES)
        model, net, _ = with_model(problem, {0: 3, 1: 2}, partial_window="carry")
        fit(model, problem, 2)
        assert largest_difference(by_hand(problem, [[0, 1, 2], [3, 4, 0], [1, 2], [3, 4]]), net) <= 1e-5

    def test_does_not_retrace(self, rng):
        traces = []

        class Counted(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x * 1.0

        problem = Problem(rng, SAMPLES)
        problem.layers = lambda: [Counted(), keras.layers.Dense(3)]
        model, _, _ = with_model(problem, {0: 1, 1: 2, 2: 3, 3: 4})
        fit(model, problem, 2)  # a step that cannot end a window has a function of its own
        before = len(traces)
        fit(model, problem, 4)
        assert len(traces) == before

    def test_says_what_changes(self, rng, capsys):
        problem = Problem(rng, SAMPLES)
        model, _, _ = with_model(problem, 1)
        fit(model, problem, 3, callbacks=[AccumStepsScheduler({0: 1, 2: 4}, verbose=1)])
        assert capsys.readouterr().out.split("\n")[1:-1] == ["Epoch 3: accum_steps=4."]

    @pytest.mark.parametrize(
        ("schedule", "error", "match"),
        [
            ({}, ValueError, "epoch 0"),
            ({1: 2}, ValueError, "epoch 0"),
            ({0: 1, -1: 2}, ValueError, "epoch 0"),
            ({np.int64(0): 0}, ValueError, "at least 1"),
            ({0: 2.5}, TypeError, "int"),
            ({0: None}, TypeError, "epoch 0"),
            ({"0": 1}, TypeError, "keys"),
            (4, TypeError, "dict"),
        ],
    )
    def test_wrong_schedules(self, schedule, error, match):
        with pytest.raises(error, match=match):
            AccumStepsScheduler(schedule)

    def test_a_callable_that_returns_no_int(self, rng):
        problem = Problem(rng, SAMPLES)
        model, _, _ = with_model(problem, 1)
        with pytest.raises(TypeError, match=r"2\.5"):
            fit(model, problem, 1, callbacks=[AccumStepsScheduler(lambda epoch, steps: 2.5)])

    def test_where_it_cannot_be_set(self, rng):
        problem = Problem(rng, SAMPLES)
        model = GradientAccumulateModel(problem.model(), micro_batch_size=8)
        model.compile("sgd", loss="mse")
        with pytest.raises(ValueError, match="micro_batch_size"):
            fit(model, problem, 1, callbacks=[AccumStepsScheduler({0: 2})])

    def test_nothing_accumulates(self, rng):
        problem = Problem(rng, SAMPLES)
        model = problem.model()
        model.compile("sgd", loss="mse")
        with pytest.raises(ValueError, match="GradientAccumulateOptimizer"):
            fit(model, problem, 1, callbacks=[AccumStepsScheduler({0: 2})])


# What each policy makes of two epochs of 5 micro-batches.
WINDOWS = {
    "flush": [[0, 1, 2, 3], [4], [0, 1, 2, 3], [4]],
    "drop": [[0, 1, 2, 3], [0, 1, 2, 3]],
    "carry": [[0, 1, 2, 3], [4, 0, 1, 2]],
}


class TestPartialWindow:
    """Windows of 4, so that an epoch's last micro-batch is left over."""

    @pytest.mark.parametrize(
        ("policy", "run_eagerly"),
        cross(WINDOWS, [True, False], default=lambda policy, run_eagerly: run_eagerly == (policy != "flush")),
    )
    @pytest.mark.some_by_default(2)
    def test_policies(self, rng, policy, run_eagerly):
        windows = WINDOWS[policy]
        problem = Problem(rng, SAMPLES)
        model, net, optimizer = with_optimizer(problem, 4)
        model.run_eagerly = run_eagerly
        fit(model, problem, 2, callbacks=[PartialWindow(policy)])
        assert int(optimizer.iterations) == len(windows)
        assert largest_difference(by_hand(problem, windows), net) <= 1e-5

    def test_within_a_loss_scale_optimizer(self, rng):
        problem = Problem(rng, SAMPLES)
        model = problem.model()
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=16.0), loss="mse")
        fit(model, problem, 1, callbacks=[PartialWindow("flush")])
        assert largest_difference(by_hand(problem, [[0, 1, 2, 3], [4]]), model) <= 1e-5

    def test_validation_sees_the_update(self, rng):
        problem = Problem(rng, SAMPLES)
        model, _, _ = with_optimizer(problem, 4)
        data = (problem.x, problem.y)
        history = fit(model, problem, 1, callbacks=[PartialWindow()], validation_data=data).history
        assert history["val_loss"][0] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-6)

    def test_evaluate_does_not_train(self, rng):
        problem = Problem(rng, SAMPLES)
        model, _, optimizer = with_optimizer(problem, 4)
        model.train_on_batch(problem.x[:4], problem.y[:4])
        model.evaluate(problem.x, problem.y, verbose=0, callbacks=[PartialWindow("flush")])
        assert int(optimizer.iterations) == 0
        assert int(optimizer.accumulator.step) == 1

    def test_a_wrong_policy(self):
        with pytest.raises(ValueError, match="'apply'"):
            PartialWindow("apply")


class TestEffectiveBatchSize:
    @pytest.mark.parametrize(
        ("make", "validation"), cross(MAKERS, [True, False], default=lambda *each: each in turns(MAKERS, [True, False]))
    )
    @pytest.mark.some_by_default(1)
    def test_in_the_logs(self, rng, make, validation):
        problem = Problem(rng, SAMPLES)
        model, _, _ = make(problem, 1)
        data = (problem.x[:33], problem.y[:33]) if validation else None
        callbacks = [PartialWindow(), AccumStepsScheduler({0: 1, 1: 2, 2: 4}), EffectiveBatchSize()]
        history = fit(model, problem, 3, callbacks=callbacks, validation_data=data).history
        assert history["effective_batch_size"] == [16, 80 / 3, 40]

    def test_with_micro_batches_of_a_batch(self, rng):
        problem = Problem(rng, 96)
        model = GradientAccumulateModel(problem.model(), micro_batch_size=8)
        model.compile("sgd", loss="mse")
        callbacks = [EffectiveBatchSize()]
        history = model.fit(problem.x, problem.y, batch_size=48, verbose=0, callbacks=callbacks).history
        assert history["effective_batch_size"] == [48]

    def test_an_epoch_without_update(self, rng):
        problem = Problem(rng, SAMPLES)
        model, _, _ = with_optimizer(problem, 7)
        history = fit(model, problem, 2, callbacks=[EffectiveBatchSize()]).history
        assert np.isnan(history["effective_batch_size"][0])
        assert history["effective_batch_size"][1] == SAMPLES

    def test_a_train_step_that_counts_nothing(self, rng):
        class Own(keras.Sequential):
            def train_step(self, data):
                return {}

        problem = Problem(rng, SAMPLES)
        model = Own([keras.Input((5,)), keras.layers.Dense(3)])
        model.compile(GradientAccumulateOptimizer("sgd", 2), loss="mse")
        with pytest.raises(ValueError, match="`train_step` of Own"):
            fit(model, problem, 1, callbacks=[EffectiveBatchSize()])
