"""`NoiseScaleSchedule`: windows that grow and shrink with the noise, learning rates that follow, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import GradientAccumulateOptimizer, NoiseScaleSchedule


def train(optimizer, gradient_of, windows, mode=lambda function: function):
    """Runs windows of micro-batches, whose gradients a function of their number in the window gives.

    Returns how many micro-batches each had.
    """
    apply = mode(lambda gradient: optimizer.apply([gradient]))
    sizes = []
    for _ in range(windows):
        before, count = int(optimizer.iterations), 0
        while int(optimizer.iterations) == before:
            apply(tf.constant(gradient_of(count)))
            count += 1
        sizes.append(count)
    return sizes


def noise(i):
    """Cancels in each window: no gradient is seen for noise."""
    return np.float32([1.0, -1.0]) * (-1) ** i


def signal(i):
    """Without any noise."""
    return np.float32([1.0, 2.0])


def new(schedule, inner=None):
    optimizer = GradientAccumulateOptimizer(inner or keras.optimizers.SGD(0.0), schedule)
    variable = keras.Variable([0.0, 0.0])
    optimizer.build([variable])
    return optimizer, variable


@pytest.mark.parametrize(
    ("backend", "mode"),
    cross(["fused", "reference"], ["eager", "graph", "xla"], default=lambda backend, mode: backend == "fused"),
    indirect=True,
)
@pytest.mark.some_by_default(2)
def test_windows_follow_the_noise(backend, mode):
    schedule = NoiseScaleSchedule(2, 12, learning_rate="none", decay=0.0, patience=2)
    optimizer, _ = new(schedule)
    # Doubles after each second window, as far as the maximum allows, and comes back in the same steps.
    assert train(optimizer, noise, 7, mode) == [2, 2, 4, 4, 8, 8, 8]
    assert train(optimizer, signal, 5, mode) == [8, 4, 4, 2, 2]


def test_noise_between_half_and_twice_the_batch_changes_nothing(rng):
    schedule = NoiseScaleSchedule(2, 64, learning_rate="none", decay=0.5, patience=1)
    optimizer, _ = new(schedule)

    def some(i):  # trace 4 * 0.49, and a squared norm of 2 - 0.98 without it: a noise scale of 1.92 micro-batches
        return np.float32(1 + 0.7 * np.array([1.0, -1.0]) * (-1) ** i)

    assert train(optimizer, some, 6) == [2] * 6


@pytest.mark.parametrize(("rule", "factors"), [("none", [1, 1, 1]), ("sqrt", [1, 2**0.5, 2]), ("linear", [1, 2, 4])])
@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adagrad], ids=["fused", "unfused"])
@pytest.mark.some_by_default(3)
def test_the_learning_rate_follows_by_the_rule(kind, rule, factors):
    schedule = NoiseScaleSchedule(2, 8, learning_rate=rule, decay=0.0, patience=1)
    optimizer, variable = new(schedule, kind(0.5))
    plain, wanted = kind(0.5), keras.Variable([0.0, 0.0])
    plain.build([wanted])
    apply = tf.function(lambda gradient: optimizer.apply([gradient]))
    for steps, factor in zip((2, 4, 8), factors, strict=True):
        # The mean is seen, and the noise is far larger.
        for i in range(steps):
            apply(tf.constant(np.float32([0.1, 0.1]) + 10 * noise(i)))
        plain.learning_rate = 0.5 * factor
        plain.apply([tf.constant([0.1, 0.1])])
        np.testing.assert_allclose(variable.numpy(), wanted.numpy(), rtol=1e-4)


def test_saved_and_restored_in_mid_window():
    schedule = NoiseScaleSchedule(2, 8, learning_rate="sqrt", patience=1, decay=0.5)
    first, variable = new(schedule, keras.optimizers.SGD(0.1))
    assert train(first, noise, 2) == [2, 4]
    first.apply([tf.constant(noise(0))])
    second = GradientAccumulateOptimizer.from_config(first.get_config())
    assert second.accum_steps.get_config() == schedule.get_config()
    other = keras.Variable(variable)
    second.build([other])
    second.set_weights([each.numpy() for each in first.variables])
    for optimizer in (first, second):
        for i in range(1, 8):
            optimizer.apply([tf.constant(noise(i))])
    assert int(first.iterations) == int(second.iterations) == 3
    assert train(first, signal, 3) == train(second, signal, 3)
    np.testing.assert_array_equal(variable.numpy(), other.numpy())


@pytest.mark.exhaustive
def test_in_fit_and_in_a_file(tmp_path, rng):
    x, y = rng.standard_normal((64, 3)).astype("float32"), rng.standard_normal((64, 1)).astype("float32")
    schedule = NoiseScaleSchedule(2, 8, learning_rate="linear", patience=1, decay=0.5)
    model = accumops.GradientAccumulateModel(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), accum_steps=schedule
    )
    model.compile(keras.optimizers.SGD(1e-4), loss="mse")
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[accumops.EffectiveBatchSize()]).history
    assert history["effective_batch_size"][0] >= 8
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.accum_steps.get_config() == schedule.get_config()
    for saved, found in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(saved.numpy(), found.numpy())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"minimum": 1}, ValueError, "`minimum` must be at least 2"),
        ({"maximum": 3}, ValueError, "`maximum` must not be less than `minimum`, 4. Received: 3"),
        ({"learning_rate": "cube"}, ValueError, "must be one of 'none', 'sqrt', 'linear'"),
        ({"patience": 0}, ValueError, "`patience` must be at least 1"),
        ({"maximum": 8.0}, TypeError, "`maximum` must be an int"),
        ({"decay": 1}, ValueError, "`decay` must be at least 0 and less than 1"),
    ],
)
def test_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        NoiseScaleSchedule(**{"minimum": 4, "maximum": 16, "learning_rate": "none", **arguments})


def test_the_rule_has_to_be_chosen():
    with pytest.raises(TypeError, match="learning_rate"):
        NoiseScaleSchedule(2, 8)
