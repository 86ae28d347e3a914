"""`nonfinite`: what becomes of micro-batches and windows with gradients that are not finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import AdaptiveGradientClipping, GradientAccumulateOptimizer

NAN, INF = float("nan"), float("inf")
# Windows of three micro-batches: gradients with their weights. The last gradient of a window goes straight into a fused
# update, the first one starts the window.
WINDOWS = [
    [(1.0, 1), (NAN, 2), (4.0, 3)],
    [(INF, 1), (NAN, 1), (-INF, 1)],
    [(2.0, 2), (3.0, 2), (NAN, 2)],
    [(-INF, 5), (0.5, 1), (1.5, 3)],
    [(1.0, 1), (-1.0, 1), (2.0, 1)],
]
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(SCHEDULE, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(SCHEDULE, use_ema=True, ema_overwrite_frequency=1),
    "RMSprop": lambda: keras.optimizers.RMSprop(SCHEDULE),
    "clipnorm": lambda: keras.optimizers.AdamW(SCHEDULE, clipnorm=0.5),
}


def fine(value):
    return np.isfinite(value)


def means(policy, windows=WINDOWS):
    """The gradients of the updates that a policy makes, in float64, and what it counts."""
    updates, count = [], 0
    for window in windows:
        kept = [(value, weight) for value, weight in window if fine(value)]
        if policy == "skip":
            count += len(window) - len(kept)
        elif len(kept) < len(window):
            count, kept = count + 1, []
        if kept:
            updates.append(np.average([value for value, _ in kept], weights=[weight for _, weight in kept]))
    return updates, count


def with_bad_value(value, shape=(2, 3)):
    """A gradient, all of a value; if it is not finite, only one element is it."""
    gradient = np.full(shape, value if fine(value) else 1.0)
    gradient.reshape(-1)[-1] = value
    return gradient.astype(np.float32)


def new_variables():
    return [keras.Variable(tf.ones([2, 3])), keras.Variable(tf.ones([]))]


def train(optimizer, mode=lambda function: function, windows=WINDOWS):
    """Gives windows to an optimizer. The second variable's gradient is always finite."""
    variables = new_variables()
    optimizer.build(variables)
    apply = mode(lambda gradient, weight: optimizer.apply([gradient, gradient[0, 0]], weight=weight))
    for value, weight in (each for window in windows for each in window):
        apply(tf.constant(with_bad_value(value)), tf.constant(float(weight)))
    return variables


def plain(optimizer, updates):
    variables = new_variables()
    optimizer.build(variables)
    for update in updates:
        optimizer.apply([tf.fill([2, 3], tf.cast(update, tf.float32)), tf.cast(update, tf.float32)])
    return variables


def check(variables, optimizer, wanted, updates, count):
    assert int(optimizer.iterations) == updates
    assert int(optimizer.nonfinite_count) == count
    assert optimizer.nonfinite_count.dtype == "int64"
    for found, each in zip(variables, wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), each.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "mode", "policy", "name"),
    cross(
        ["fused", "reference"],
        ["eager", "graph", "xla"],
        ["skip", "drop"],
        OPTIMIZERS,
        default=lambda backend, mode, policy, name: (
            (backend == "fused" and (mode == "graph" or (mode, name) == ("xla", "SGD")))
            or (backend == "reference" and (mode, name) == ("eager", "Adam"))
        ),
    ),
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(3)
def test_updates_are_those_of_the_finite_micro_batches(backend, mode, policy, name):
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](), 3, nonfinite=policy)
    variables = train(optimizer, mode)
    updates, count = means(policy)
    check(variables, optimizer, plain(OPTIMIZERS[name](), updates), len(updates), count)


def test_propagate_is_the_default_and_counts_nothing():
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS["SGD"](), 3)
    assert optimizer.nonfinite == "propagate"
    variables = train(optimizer)
    assert np.isnan(variables[0].numpy()[1, 2])
    assert int(optimizer.iterations) == len(WINDOWS)
    assert int(optimizer.nonfinite_count) == 0


@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype(backend, policy, dtype):
    """The largest number of a dtype is finite, though its square is not."""
    variable = keras.Variable(np.zeros(3), dtype=dtype)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2, nonfinite=policy)
    optimizer.build([variable])
    largest = float(tf.as_dtype(dtype).max)
    for gradient in ([1.0, 2.0, 3.0], [3.0, INF, 1.0], [0.0, 0.0, largest], [0.0, 0.0, -largest]):
        optimizer.apply([tf.constant(gradient, dtype)])
    np.testing.assert_array_equal(variable.numpy(), [-1.0, -2.0, -3.0] if policy == "skip" else [0.0, 0.0, 0.0])
    assert int(optimizer.iterations) == (2 if policy == "skip" else 1)
    assert int(optimizer.nonfinite_count) == 1


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.some_by_default(4)
def test_rows(backend, policy, lazy):
    """The rows of a micro-batch that is skipped are not touched by it: lazy momentum does not move them."""
    table = keras.Variable(np.zeros((1100, 64), "float32"))
    inner = keras.optimizers.SGD(1.0, momentum=0.5)
    optimizer = GradientAccumulateOptimizer(inner, 2, nonfinite=policy, lazy_sparse=lazy)
    optimizer.build([table])
    apply = tf.function(lambda values, rows: optimizer.apply([tf.IndexedSlices(values, rows)]))
    for value, row in ((2.0, 0), (2.0, 1), (4.0, 0), (NAN, 1), (INF, 2), (8.0, 0)):
        apply(tf.fill([1, 64], value), tf.constant([row]))
    moved = table.numpy()[:3, 0]
    if policy == "drop":  # the first window alone
        np.testing.assert_array_equal(moved, [-1, -1, 0])
    else:  # momentums of row 0: 1, 4.5, 10.25; of row 1: 1, 0.5, 0.25 if they decay
        np.testing.assert_array_equal(moved, [-15.75, -1.0 if lazy else -1.75, 0])
    assert not table.numpy()[3:].any()
    assert int(optimizer.nonfinite_count) == 2


@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.some_by_default(2)
def test_gradient_clipping_sees_what_is_left(backend, policy):
    def optimizer(**arguments):
        clip = AdaptiveGradientClipping(0.3)
        return GradientAccumulateOptimizer(keras.optimizers.Adam(0.1), gradient_clipping=clip, **arguments)

    updates, count = means(policy)
    wanted = optimizer(accum_steps=1)
    expected = train(wanted, windows=[[(update, 1)] for update in updates])
    found = optimizer(accum_steps=3, nonfinite=policy)
    check(train(found, tf.function), found, expected, len(updates), count)


def test_a_callable_that_clips_inf_away_does_not_save_a_window():
    def clip(gradients, variables):
        return [tf.clip_by_value(each, -1.0, 1.0) for each in gradients]

    for inner in (keras.optimizers.SGD(1.0), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), 4.0)):
        variable = keras.Variable([1.0])
        optimizer = GradientAccumulateOptimizer(inner, 2, nonfinite="drop", gradient_clipping=clip)
        optimizer.build([variable])
        for gradient in (INF, 4.0):
            optimizer.apply([tf.constant([gradient])])
        assert (variable.numpy().tolist(), int(optimizer.iterations)) == ([1.0], 0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "drop"])
@pytest.mark.some_by_default(3)
def test_a_loss_scale_inside_backs_off_whatever_is_left_of_the_window(policy, fused):
    kind = keras.optimizers.SGD if fused else keras.optimizers.Adagrad
    inner = keras.optimizers.LossScaleOptimizer(kind(0.5), initial_scale=8.0, dynamic_growth_steps=3)
    optimizer = GradientAccumulateOptimizer(inner, 2, nonfinite=policy)
    variables = [keras.Variable([1.0, 1.0])]
    optimizer.build(variables)
    apply = tf.function(lambda gradient: optimizer.apply([gradient]))
    scales, iterations = [], []
    for window in ([2.0, 4.0], [INF, 4.0], [NAN, INF], [2.0, 2.0]):
        scale = float(inner.dynamic_scale)
        for gradient in window:
            apply(scale * tf.constant([gradient, 1.0]))
        scales.append(float(inner.dynamic_scale))
        iterations.append(int(optimizer.iterations))
    assert scales == [8.0, 4.0, 2.0, 2.0]
    assert iterations == ([1, 2, 2, 3] if policy == "skip" else [1, 1, 1, 2])
    assert int(optimizer.nonfinite_count) == {"propagate": 0, "skip": 3, "drop": 2}[policy]
    wanted = keras.Variable([1.0, 1.0])
    plainly = kind(0.5)
    plainly.build([wanted])
    for update in ([3.0, 1.0], [4.0, 1.0], [2.0, 1.0]) if policy == "skip" else ([3.0, 1.0], [2.0, 1.0]):
        plainly.apply([tf.constant(update)])
    np.testing.assert_allclose(variables[0].numpy(), wanted.numpy(), rtol=1e-6)


@pytest.mark.some_by_default(2)
def test_a_loss_scale_inside_follows_as_keras_does(mode):
    """Where the op decides, the scale, its counter and the count of updates are those of Keras's own conditions."""

    def new(wrap):
        adam = keras.optimizers.Adam(0.1)
        inner = keras.optimizers.LossScaleOptimizer(adam, initial_scale=8.0, dynamic_growth_steps=2)
        optimizer, variable = wrap(inner), keras.Variable([1.0, 1.0])
        optimizer.build([variable])
        return optimizer, inner, variable

    optimizer, inner, variable = new(lambda inner: GradientAccumulateOptimizer(inner, 1))
    assert optimizer.fused_update
    plainly, same, wanted = new(lambda inner: inner)
    apply = mode(lambda gradient: optimizer.apply([gradient]))
    for gradient in (2.0, 4.0, 1.0, INF, 3.0, NAN, -INF, 1.0, 2.0, 3.0, 4.0, 5.0):
        scaled = float(same.dynamic_scale) * tf.constant([gradient, 1.0])
        apply(scaled)
        plainly.apply([scaled])
        assert float(inner.dynamic_scale) == float(same.dynamic_scale)
        assert int(inner.step_counter) == int(same.step_counter)
        assert int(inner.iterations) == int(same.iterations)
        np.testing.assert_allclose(variable.numpy(), wanted.numpy(), rtol=1e-5)


@pytest.mark.parametrize("policy", ["propagate", "skip", "drop"])
def test_a_loss_scale_around_skips_by_itself(policy):
    """A micro-batch that it skips never reaches the window, and the next one takes its place."""
    inner = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 2, nonfinite=policy)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    for gradient in (2.0, INF, 4.0):
        optimizer.apply([optimizer.dynamic_scale * tf.constant([gradient])])
    assert variable.numpy().tolist() == [1.0 - 0.5 * 3.0]
    assert int(inner.nonfinite_count) == 0


@pytest.mark.some_by_default(2)
def test_a_weight_of_0_is_neither_skipped_nor_does_it_drop(mode):
    """The mean loss of no samples is 0 / 0. A window of such weights makes the update of a gradient of zero."""
    for policy in ("skip",) if mode.name == "xla" else ("propagate", "skip", "drop"):
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5, momentum=0.5), 3, nonfinite=policy)
        variables = train(optimizer, mode, windows=[[(NAN, 0), (1.0, 1), (NAN, -0.0)], [(NAN, 0)] * 3])
        check(variables, optimizer, plain(keras.optimizers.SGD(0.5, momentum=0.5), [1.0, 0.0]), 2, 0)


def test_a_weight_that_is_not_finite_is_treated_as_a_gradient():
    for policy, wanted in (("skip", 1), ("drop", 0)):
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 2, nonfinite=policy)
        variables = train(optimizer, windows=[[(1.0, 1.0), (1.0, NAN)]])
        check(variables, optimizer, plain(keras.optimizers.SGD(0.5), [1.0] * wanted), wanted, 1)


@pytest.mark.parametrize("policy", ["skip", "drop"])
def test_flush_and_close_end_as_apply_does(policy):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), None, nonfinite=policy)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    for gradient in (1.0, NAN):
        optimizer.accumulate([tf.constant([gradient])])
    optimizer.flush()
    assert variable.numpy().tolist() == [0.5 if policy == "skip" else 1.0]
    optimizer.close([tf.constant([NAN])])
    optimizer.close([tf.constant([1.0])])
    assert variable.numpy().tolist() == [0.0 if policy == "skip" else 0.5]
    assert int(optimizer.nonfinite_count) == 2


@pytest.mark.parametrize("policy", ["skip", "drop"])
def test_a_saved_window_goes_on(policy):
    windows = [[(1.0, 1), (NAN, 2), (4.0, 3)], [(1.0, 1), (-1.0, 1), (2.0, 1)]]
    stream = [each for window in windows for each in window]
    wanted = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), 3, nonfinite=policy)
    expected = train(wanted, windows=windows)
    first = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), 3, nonfinite=policy)
    before = train(first, windows=[stream[:2]])
    second = GradientAccumulateOptimizer.from_config(first.get_config())
    assert second.nonfinite == policy
    variables = new_variables()
    second.build(variables)
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    second.set_weights([each.numpy() for each in first.variables])
    for value, weight in stream[2:]:
        gradient = tf.constant(with_bad_value(value))
        second.apply([gradient, gradient[0, 0]], weight=float(weight))
    check(variables, second, expected, int(wanted.iterations), 1)


def test_a_failed_call_counts_nothing():
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 2, nonfinite="skip")
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="must have its shape"):
        optimizer.apply([tf.constant([NAN, 1.0])])
    assert (int(optimizer.nonfinite_count), int(optimizer.accumulator.step)) == (0, 0)


@pytest.mark.parametrize("make", [GradientAccumulateOptimizer, accumops.GradientAccumulator])
def test_another_policy_is_refused(make):
    given = ("sgd", 2) if make is GradientAccumulateOptimizer else (2,)
    with pytest.raises(ValueError, match=r"`nonfinite` must be 'propagate', 'skip' or 'drop'\. Received: 'ignore'"):
        make(*given, nonfinite="ignore")
