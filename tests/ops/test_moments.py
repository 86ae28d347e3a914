"""Merging moments: `ops.merge_moments`, `ops.end_windows`, their references, and the ops themselves."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from handles import stacked, table, uninitialized, variable

from accumops import ops
from accumops.ops import library

NUMPY = {tf.bfloat16: tf.bfloat16.as_numpy_dtype, tf.float32: np.float32, tf.float64: np.float64}
SIZES = (5, 1, 128, 0, 33, 4097, 2)
INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError


def make_window(channels, *, limit=1 << 40, values=0, calls=0, moments=np.nan):
    return ops.MomentsWindow(
        tf.Variable([values, calls, limit], dtype=tf.int64), tf.Variable(tf.fill([2, channels], np.float64(moments)))
    )


def make_moving(channels, momentum=0.25, dtype=tf.float32):
    return ops.MovingStatistics(
        tf.Variable(tf.fill([channels], tf.constant(8.0, dtype))),
        tf.Variable(tf.fill([channels], tf.constant(2.0, dtype))),
        momentum,
    )


def make_batch(channels, count=4, mean=1.0, rest=0.0, variance=0.5, dtype=tf.float32):
    return ops.BatchMoments(
        tf.constant(count, tf.int64),
        *(tf.fill([channels], tf.constant(each, dtype)) for each in (mean, rest, variance)),
    )


def batches_of(rng, channels, dtype=tf.float32):
    """Makes batches with different means, so that most of the variance is between batches."""
    return [
        (rng.normal(rng.normal(0, 3, channels), 1.0, (size, channels))).astype(NUMPY[dtype]).astype(NUMPY[dtype])
        for size in SIZES
    ]


def check(window, pooled, tolerance):
    largest = np.abs(pooled).max()
    np.testing.assert_allclose(window.moments[0], pooled.mean(0), rtol=0, atol=tolerance * largest)
    np.testing.assert_allclose(window.moments[1], pooled.var(0) * len(pooled), rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(tf.float32, 1e-6), (tf.float64, 1e-13), (tf.bfloat16, 1e-6)])
@pytest.mark.some_by_default(4)
def test_ragged_micro_batches_are_the_pooled_batch(backend, mode, rng, dtype, tolerance):
    batches = batches_of(rng, 17, dtype)
    window = make_window(17)
    sizes = SIZES if mode.name == "eager" else SIZES[:4]  # a graph is traced, and compiled, for each size
    run = mode(lambda x: ops.merge_moments(ops.batch_norm(x, None, None)[1], window=window))
    for _ in range(2):  # the second window starts on the first one's values
        for batch in batches[: len(sizes)]:
            run(tf.constant(batch))
        pooled = np.concatenate(batches[: len(sizes)]).astype(np.float64)
        assert window.counters.numpy().tolist() == [len(pooled), len(sizes), 1 << 40]
        check(window, pooled, tolerance)
        window.counters.assign([0, 0, 1 << 40])


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16, tf.bfloat16])
@pytest.mark.some_by_default(5)
def test_moving_statistics_move_at_the_limit(backend, mode, rng, dtype):
    batches = [rng.normal(i, 1.0, (size, 5)).astype(np.float32) for i, size in enumerate((4, 7, 3))]
    window, moving = make_window(5, limit=3), make_moving(5, dtype=dtype)
    run = mode(lambda x: ops.merge_moments(ops.batch_norm(x, None, None)[1], window=window, moving=moving))
    expected = [np.full(5, 8.0), np.full(5, 2.0)]
    for _ in range(2):
        for i, batch in enumerate(batches):
            for statistic, value in zip(moving[:2], expected, strict=True):
                np.testing.assert_allclose(
                    tf.cast(statistic, tf.float64), value, rtol=2e-2 if dtype.size == 2 else 1e-6
                )
            run(tf.constant(batch))
            assert window.counters.numpy()[1] == (i + 1) % 3
        pooled = np.concatenate(batches).astype(np.float64)
        for i, value in enumerate((pooled.mean(0), pooled.var(0))):
            expected[i] = expected[i] * 0.25 + value * 0.75
    assert window.counters.numpy().tolist() == [0, 0, 3]


def test_limit_is_read_when_it_runs(backend, mode):
    window, moving = make_window(2, limit=3), make_moving(2)
    run = mode(lambda: ops.merge_moments(make_batch(2), window=window, moving=moving))
    run()
    window.counters.assign([4, 1, 2])
    run()
    np.testing.assert_allclose(moving.mean, 8 * 0.25 + 0.75)


def test_without_a_window_the_batch_is_all_of_it(backend, mode):
    moving = make_moving(3, momentum=0.99)
    mode(lambda: ops.merge_moments(make_batch(3, mean=1.0, variance=0.3), moving=moving))()
    # The result equals Keras's computation bit for bit.
    one = np.float32(1)
    np.testing.assert_array_equal(moving.mean, np.float32(8) * np.float32(0.99) + one * np.float32(1 - 0.99))
    np.testing.assert_array_equal(
        moving.variance, np.float32(2) * np.float32(0.99) + np.float32(0.3) * np.float32(1 - 0.99)
    )


def test_without_a_batch_the_window_ends(backend, mode):
    window, moving = make_window(3, limit=100, values=10, calls=2, moments=5.0), make_moving(3)
    close = mode(lambda: ops.merge_moments(None, window=window, moving=moving))
    close()
    np.testing.assert_allclose(moving.mean, 8 * 0.25 + 5 * 0.75)
    np.testing.assert_allclose(moving.variance, 2 * 0.25 + 0.5 * 0.75)
    assert window.counters.numpy().tolist() == [0, 0, 100]
    close()  # ends an empty window
    np.testing.assert_allclose(moving.mean, 8 * 0.25 + 5 * 0.75)


def test_a_window_without_values_moves_nothing(backend, mode):
    """A batch without values has no moments, so whatever it holds for them is ignored."""
    window, moving = make_window(2, limit=2), make_moving(2)
    run = mode(lambda: ops.merge_moments(make_batch(2, 0, np.nan, np.nan, np.nan), window=window, moving=moving))
    for calls in (1, 0):
        run()
        assert window.counters.numpy().tolist() == [0, calls, 2]
    assert (moving.mean.numpy() == 8).all()
    assert (moving.variance.numpy() == 2).all()
    mode(lambda: ops.merge_moments(make_batch(2, 0, np.nan, np.nan, np.nan), moving=moving))()
    assert (moving.mean.numpy() == 8).all()


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("wrong", ["mean", "variance"])
def test_a_batch_that_is_not_finite_counts_as_none(backend, mode, wrong, dtype):
    good = make_batch(2000, dtype=dtype)
    values = np.ones(2000)
    values[1999] = np.inf if wrong == "mean" else np.nan
    bad = good._replace(**{wrong: tf.constant(values, dtype)})
    window, moving = make_window(2000, limit=2), make_moving(2000)
    run = mode(lambda batch: ops.merge_moments(ops.BatchMoments(*batch), window=window, only_finite=True))
    run(tuple(bad))
    assert window.counters.numpy().tolist() == [0, 1, 2]
    run(tuple(good))
    assert window.counters.numpy().tolist() == [4, 2, 2]
    run(tuple(bad))
    np.testing.assert_array_equal(window.moments, [[1.0] * 2000, [2.0] * 2000])
    mode(lambda batch: ops.merge_moments(ops.BatchMoments(*batch), moving=moving, only_finite=True))(tuple(bad))
    assert (moving.mean.numpy() == 8).all()


def test_large_mean(backend, rng):
    batches = [rng.normal(1e4 + i, 1e-2, (500, 3)).astype(np.float32) for i in (0, 0, 1e-2)]
    window = make_window(3)
    for batch in batches:
        ops.merge_moments(ops.batch_norm(batch, None, None)[1], window=window)
    pooled = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(window.moments[1], pooled.var(0) * len(pooled), rtol=1e-5)


def test_masked_rows_do_not_count(backend, rng):
    x = rng.standard_normal((2, 50, 3)).astype(np.float32)
    mask = rng.random((2, 50)) < 0.5
    window = make_window(3)
    for i in range(2):
        ops.merge_moments(ops.batch_norm(x[i], None, None, mask=tf.constant(mask[i]))[1], window=window)
    valid = x[mask].astype(np.float64)
    assert window.counters.numpy()[0] == len(valid)
    np.testing.assert_allclose(window.moments[0], valid.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(window.moments[1], valid.var(0) * len(valid), rtol=1e-5)


@pytest.mark.some_by_default(2)
def test_rest_of_the_mean_counts(backend, mode):
    window = make_window(2)
    mode(lambda: ops.merge_moments(make_batch(2, rest=1e-9), window=window))()
    np.testing.assert_allclose(window.moments[0], np.full(2, 1 + np.float64(np.float32(1e-9))), rtol=1e-15)


def test_keras_variables(backend):
    window = ops.MomentsWindow(
        keras.Variable(np.array([0, 0, 1]), dtype="int64"), keras.Variable(np.zeros([2, 2]), dtype="float64")
    )
    moving = ops.MovingStatistics(keras.Variable(np.zeros(2)), keras.Variable(np.ones(2)), 0.5)
    ops.merge_moments(make_batch(2, mean=4.0), window=window, moving=moving)
    np.testing.assert_array_equal(moving.mean.numpy(), [2, 2])


def test_readers_keep_what_they_read(backend):
    window, moving = make_window(1000, limit=1, values=3, moments=1.0), make_moving(1000)
    variables = [*window, *moving[:2]]
    read = [each.read_value() for each in variables]
    before = [each.numpy() for each in variables]
    ops.merge_moments(make_batch(1000), window=window, moving=moving)
    for then, value in zip(read, before, strict=True):
        np.testing.assert_array_equal(then, value)
    assert (moving.mean.numpy() != 8).all()
    assert window.counters.numpy()[0] == 0


def make_windows(dtypes):
    """Windows of 1, 2, … channels, every third one empty, and their moving statistics."""
    windows = [
        make_window(i + 1, limit=9, values=10 * (i % 3), calls=2, moments=i if i % 3 else np.nan)
        for i in range(len(dtypes))
    ]
    moving = [make_moving(i + 1, momentum=i / len(dtypes), dtype=dtype) for i, dtype in enumerate(dtypes)]
    return windows, moving


def check_windows(windows, moving, *, ended, moved):
    for i, (window, (mean, variance, momentum)) in enumerate(zip(windows, moving, strict=True)):
        values, share = 10 * (i % 3), 1 - momentum if moved and i % 3 else 0
        assert window.counters.numpy().tolist() == ([0, 0, 9] if ended else [values, 2, 9])
        for each, old, new in ((mean, 8, i), (variance, 2, i / (values or 1))):
            tolerance = {2: 1e-2, 4: 1e-6, 8: 1e-14}[each.dtype.size]
            np.testing.assert_allclose(tf.cast(each, tf.float64), old + (new - old) * share, rtol=tolerance)


KINDS = [tf.float32, tf.float64, tf.float16, tf.float32, tf.bfloat16, tf.float64, tf.float32]


@pytest.mark.parametrize("moves", [True, False], ids=["moving", "dropped"])
def test_windows_of_many_layers_end_at_once(backend, mode, moves):
    windows, moving = make_windows(KINDS)
    run = mode(lambda: ops.end_windows(windows, moving if moves else None))
    for _ in range(2):  # the second call ends empty windows
        run()
        check_windows(windows, moving, ended=True, moved=moves)


@pytest.mark.parametrize("moves", [True, False], ids=["moving", "dropped"])
def test_windows_end_where_the_flag_says_so(backend, mode, moves):
    windows, moving = make_windows(KINDS)
    run = mode(lambda flag: ops.end_windows(windows, moving if moves else None, applies=flag))
    for flag in (False, True):
        run(tf.constant(flag))
        check_windows(windows, moving, ended=flag, moved=flag and moves)


def test_end_of_a_window_is_a_merge_without_a_batch(backend, rng):
    batch = rng.normal(3, 2, (50, 7)).astype(np.float32)
    results = []
    for end in (
        lambda window, moving: ops.merge_moments(None, window=window, moving=moving),
        lambda window, moving: ops.end_windows([window], [moving]),
    ):
        window, moving = make_window(7), make_moving(7)
        ops.merge_moments(ops.batch_norm(batch, None, None)[1], window=window)
        end(window, moving)
        results.append([each.numpy() for each in (*window, *moving[:2])])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_windows(backend):
    assert ops.end_windows([]) is None
    assert ops.end_windows([], []) is None


W3, M3, M4 = make_window(3), make_moving(3), make_moving(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`windows` must be a list", (W3,)),
        (TypeError, r"`windows\[1\]` must be a MomentsWindow", ([W3, (1, 2)],)),
        (TypeError, "`moving` must be a list", ([W3], M3)),
        (TypeError, r"`moving\[0\]` must be a MovingStatistics", ([W3], [(1, 2, 0.5)])),
        (TypeError, r"`windows\[0\]\.counters` must be a tf\.Variable", ([W3._replace(counters=[0, 0, 1])],)),
        (ValueError, "`moving` must have 1 items, one for each window. Received: 2", ([W3], [M3, M4])),
        (ValueError, r"`moving\[0\]\.mean` must have a value for each channel, of shape \(3,\)", ([W3], [M4])),
        (ValueError, r"`moving\[0\]\.momentum` must be from 0 to 1", ([W3], [M3._replace(momentum=-1)])),
    ],
)
def test_arguments_of_an_end_are_checked(backend, error, message, arguments):
    with pytest.raises(error, match=message):
        ops.end_windows(*arguments)
    assert W3.counters.numpy()[2] == 1 << 40


def test_the_flag_of_an_end_is_a_bool(backend):
    with pytest.raises((TypeError, ValueError), match="applies"):
        ops.end_windows([W3], applies=0.5)


SHORT = tf.Variable([1.0])


@pytest.mark.parametrize(
    ("message", "batch", "variables"),
    [
        ("at least two", make_batch(2), {}),
        ("at least two", None, {"window": make_window(2)}),
        ("at least two", None, {"moving": make_moving(2)}),
        ("batch.mean", make_batch(2), {"window": make_window(3)}),
        ("batch.variance", make_batch(2)._replace(variance=tf.ones([3])), {"window": make_window(2)}),
        ("moving.mean", make_batch(2), {"moving": make_moving(3)}),
        ("moving.variance", None, {"window": make_window(2), "moving": make_moving(2)._replace(variance=SHORT)}),
    ],
)
def test_arguments_are_checked(backend, message, batch, variables):
    with pytest.raises(ValueError, match=message):
        ops.merge_moments(batch, **variables)


@pytest.mark.parametrize(
    ("error", "message", "batch", "variables"),
    [
        (TypeError, "`batch` must be a BatchMoments", (1, 2, 3, 4), {"window": make_window(3)}),
        (TypeError, "`window` must be a MomentsWindow", make_batch(3), {"window": (1, 2)}),
        (TypeError, "`moving` must be a MovingStatistics", make_batch(3), {"moving": (1, 2, 0.5)}),
        (
            TypeError,
            r"`moving\.mean` must be a tf\.Variable",
            make_batch(3),
            {"moving": make_moving(3)._replace(mean=tf.zeros([3]))},
        ),
        (
            TypeError,
            r"`window\.counters` must be a tf\.Variable",
            make_batch(3),
            {"window": make_window(3)._replace(counters=[0, 0, 1])},
        ),
        (ValueError, r"`moving\.momentum` must be from 0 to 1.*nan", make_batch(3), {"moving": make_moving(3, np.nan)}),
        (ValueError, r"`moving\.momentum` must be from 0 to 1.*2", make_batch(3), {"moving": make_moving(3, 2)}),
    ],
)
def test_kinds_of_arguments(backend, error, message, batch, variables):
    with pytest.raises(error, match=message):
        ops.merge_moments(batch, **variables)


def raw(**changes):
    module, _ = library.load()
    if module is None:
        pytest.skip("the compiled ops do not load")
    return module.accum_ops_merge_moments(**changes)


class Merge:
    """A window of three channels to damage, with running statistics, and a micro-batch for it."""

    def __init__(self):
        self.counters, self.moments = make_window(3, limit=2, values=2, calls=1, moments=1.0)
        self.mean, self.variance, _ = make_moving(3)

    def run(self, **changes):
        arguments = {
            "window": [self.counters.handle, self.moments.handle],
            "moving": [self.mean.handle, self.variance.handle],
            "count": [tf.constant(2, tf.int64)],
            "moments": [tf.fill([3], 3.0), tf.zeros([3]), tf.ones([3])],
            "momentum": tf.constant(0.5, tf.float64),
        }
        return raw(**{**arguments, **changes})

    def values(self):
        return [each.numpy().tolist() for each in (self.counters, self.moments, self.mean, self.variance)]


UNTOUCHED = Merge().values()


ONE = tf.constant(2, tf.int64)
DAMAGE = {
    "counters uninitialized": (
        PRECONDITION, r"window\[0\].*uninit",
        lambda m: m.run(window=[uninitialized(tf.int64, [3]), m.moments.handle])),
    "mean uninitialized": (
        PRECONDITION, r"moving\[0\].*uninit",
        lambda m: m.run(moving=[uninitialized(tf.float32, [3]), m.variance.handle])),
    "not a variable": (INVALID, r"window\[1\]", lambda m: m.run(window=[m.counters.handle, table()])),
    "several handles in one": (
        INVALID, r"moving\[0\]",
        lambda m: m.run(moving=[stacked(variable([1.0] * 3), variable([1.0] * 3)), m.variance.handle])),
    "counters are int32": (
        INVALID, r"window\[0\].*int32",
        lambda m: m.run(window=[variable([0, 0, 1], tf.int32), m.moments.handle])),
    "counters are two": (
        INVALID, r"window\[0\].*\[2\]", lambda m: m.run(window=[variable([0, 0], tf.int64), m.moments.handle])),
    "moments are float": (
        INVALID, r"window\[1\].*float",
        lambda m: m.run(window=[m.counters.handle, variable([[1.0] * 3] * 2, tf.float32)])),
    "moments are of two channels": (
        INVALID, r"window\[1\].*\[2,2\]",
        lambda m: m.run(window=[m.counters.handle, variable([[1.0] * 2] * 2, tf.float64)])),
    "moments are a vector": (
        INVALID, r"window\[1\]", lambda m: m.run(window=[m.counters.handle, variable([1.0] * 3, tf.float64)])),
    "moments given as counters": (
        INVALID, "same variable", lambda m: m.run(window=[m.moments.handle, m.moments.handle])),
    "one running statistic for both": (
        INVALID, "same variable", lambda m: m.run(moving=[m.mean.handle, m.mean.handle])),
    "running mean is a half": (
        INVALID, r"moving\[0\].*half", lambda m: m.run(moving=[variable([1.0] * 3, tf.float16), m.variance.handle])),
    "running variance is a double": (
        INVALID, r"moving\[1\].*double", lambda m: m.run(moving=[m.mean.handle, variable([1.0] * 3, tf.float64)])),
    "running variance is short": (
        INVALID, r"moving\[1\].*\[2\]",
        lambda m: m.run(moving=[m.mean.handle, variable([1.0] * 2, tf.float32)])),
    "other number of channels": (INVALID, r"window\[1\].*\[2,3\]", lambda m: m.run(moments=[tf.ones([2])] * 3)),
    "rest is short": (INVALID, "shape|moments", lambda m: m.run(moments=[tf.ones([3]), tf.ones([2]), tf.ones([3])])),
    "moments are matrices": (INVALID, "rank|shape|vectors", lambda m: m.run(moments=[tf.ones([1, 3])] * 3)),
    "moments are scalars": (INVALID, "rank|shape|vectors", lambda m: m.run(moments=[tf.constant(1.0)] * 3)),
    "two dtypes of moments": (
        INVALID, "double|float64", lambda m: m.run(moments=[tf.ones([3]), tf.zeros([3], tf.float64), tf.ones([3])])),
    "count is a vector": (INVALID, "scalar|rank", lambda m: m.run(count=[tf.constant([2], tf.int64)])),
    "count is float": (INVALID, "int64|dtype", lambda m: m.run(count=[tf.constant(2.0)])),
    "momentum is a vector": (INVALID, "scalar|rank", lambda m: m.run(momentum=tf.constant([0.5], tf.float64))),
    "half a window": (INVALID, "window's 2", lambda m: m.run(window=[m.counters.handle])),
    "three running statistics": (
        INVALID, "2 moving", lambda m: m.run(moving=[m.mean.handle, m.variance.handle, m.moments.handle])),
    "two batches": (INVALID, "not 2, 2, 2 and 6", lambda m: m.run(count=[ONE, ONE], moments=[tf.ones([3])] * 6)),
    "moments without count": (INVALID, "count", lambda m: m.run(count=[])),
    "count without moments": (INVALID, "3 moments", lambda m: m.run(moments=[])),
    "a batch alone": (INVALID, "two or all", lambda m: m.run(window=[], moving=[])),
    "a window alone": (INVALID, "two or all", lambda m: m.run(moving=[], count=[], moments=[])),
    "running statistics alone": (INVALID, "two or all", lambda m: m.run(window=[], count=[], moments=[])),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_raw_op_raises_and_writes_nothing(name):
    error, message, call = DAMAGE[name]
    merge = Merge()
    with pytest.raises((error, TypeError, ValueError), match=message):
        call(merge)
    assert merge.values() == UNTOUCHED
    merge.run()  # no lock was left behind
    assert merge.values()[0] == [0, 0, 2]
    np.testing.assert_allclose(merge.mean, 8 / 2 + 2 / 2)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", list(DAMAGE))
@pytest.mark.some_by_default(20)
def test_variables_unknown_until_it_runs(name, jit_compile):
    error, message, call = DAMAGE[name]
    merge = Merge()
    if jit_compile and name == "not a variable":
        error = PRECONDITION  # TensorFlow makes a variable of that name, which has no value

    @tf.function(input_signature=[tf.TensorSpec(None, tf.resource)] * 4, autograph=False, jit_compile=jit_compile)
    def run(*handles):
        late = Merge.__new__(Merge)
        late.counters, late.moments, late.mean, late.variance = (types.SimpleNamespace(handle=each) for each in handles)
        call(late)

    with pytest.raises((error, TypeError, ValueError), match=message):
        run(*(each.handle for each in (merge.counters, merge.moments, merge.mean, merge.variance)))
    assert merge.values() == UNTOUCHED


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_shapes_unknown_until_it_runs(jit_compile):
    merge = Merge()

    @tf.function(input_signature=[tf.TensorSpec(None)], autograph=False, jit_compile=jit_compile)
    def run(values):
        merge.run(moments=[values] * 3)

    for shape, message in (([2], r"window\[1\].*\[2,2\]"), ([3, 1], r"moments\[0\].*vectors"), ([], "vectors")):
        with pytest.raises(INVALID, match=message):
            run(tf.ones(shape))
        assert merge.values() == UNTOUCHED
    run(tf.ones([3]))
    assert merge.counters.numpy()[0] == 0


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("moving", [True, False])
def test_a_momentum_or_count_of_a_shape_unknown_until_it_runs(moving, jit_compile):
    merge = Merge()
    variables = {} if moving else {"moving": []}
    any_shape = [tf.TensorSpec(None, tf.float64), tf.TensorSpec(None, tf.int64)]

    @tf.function(input_signature=any_shape, autograph=False, jit_compile=jit_compile)
    def run(momentum, count):
        merge.run(momentum=momentum, count=[count], **variables)

    one, many = tf.constant(0.5, tf.float64), tf.fill([3], tf.constant(0.5, tf.float64))
    for arguments, message in (((many, ONE), "momentum must be a scalar"), ((one, [ONE]), "count must be a scalar")):
        with pytest.raises(INVALID, match=message):
            run(*arguments)
        assert merge.values() == UNTOUCHED
    run(one, ONE)
    assert merge.values() != UNTOUCHED


def test_channels_that_xla_counts_late():
    merge = Merge()

    @tf.function(autograph=False, jit_compile=True)
    def run(mask):
        merge.run(moments=[tf.boolean_mask(tf.ones([3]), mask)] * 3)

    for mask in ([True, True, True], [True, True, False]):
        with pytest.raises(INVALID, match=r"moments\[0\] is f32\[<=3\]"):
            run(tf.constant(mask))
        assert merge.values() == UNTOUCHED


@pytest.mark.gpu
def test_variables_on_different_devices():
    merge = Merge()
    with tf.device("GPU:0"):
        there = tf.Variable(tf.ones([2, 3], tf.float64))
    with pytest.raises(INVALID, match="device"):
        merge.run(window=[merge.counters.handle, there.handle])
    assert merge.values() == UNTOUCHED


class End:
    """Two windows of three channels, and their running statistics, for the raw op."""

    def __init__(self):
        self.windows, self.moving = make_windows([tf.float32] * 2)

    def run(self, **changes):
        module, _ = library.load()
        if module is None:
            pytest.skip("the compiled ops do not load")
        arguments = {
            "windows": [each.handle for window in self.windows for each in window],
            "moving": [each.handle for moving in self.moving for each in moving[:2]],
            "momenta": tf.constant([0.0, 0.5], tf.float64),
            "applies": tf.constant(True),
        }
        return module.accum_ops_end_windows(**arguments | changes)

    def handle(self, i):
        return self.windows[i // 2][i % 2].handle


END_DAMAGE = {
    "half a window": lambda e: e.run(windows=[e.handle(i) for i in range(3)]),
    "a statistic short": lambda e: e.run(moving=[each.handle for each in e.moving[0][:2]]),
    "a window twice": lambda e: e.run(windows=[e.handle(i) for i in (0, 1, 0, 1)]),
    "counters as moments": lambda e: e.run(windows=[e.handle(i) for i in (1, 0, 2, 3)]),
    "another window's moments": lambda e: e.run(windows=[e.handle(i) for i in (0, 3, 2, 1)]),
    "a table": lambda e: e.run(windows=[e.handle(0), table(), e.handle(2), e.handle(3)]),
    "uninitialized": lambda e: e.run(windows=[uninitialized(tf.int64, [3]), *(e.handle(i) for i in (1, 2, 3))]),
    "moments are a vector": lambda e: e.run(
        windows=[e.handle(0), variable([1.0], tf.float64), e.handle(2), e.handle(3)]
    ),
    "one momentum": lambda e: e.run(momenta=tf.constant([0.5], tf.float64)),
    "a momentum without statistics": lambda e: e.run(moving=[]),
    "a scalar momentum": lambda e: e.run(momenta=tf.constant(0.5, tf.float64)),
    "two flags": lambda e: e.run(applies=tf.constant([True, True])),
}


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("name", list(END_DAMAGE))
def test_the_raw_end_raises_and_writes_nothing(name, jit_compile):
    end = End()
    call = END_DAMAGE[name]
    run = call if jit_compile is None else tf.function(call, autograph=False, jit_compile=jit_compile)
    with pytest.raises((INVALID, PRECONDITION, TypeError, ValueError)):
        run(end)
    check_windows(*(end.windows, end.moving), ended=False, moved=False)
    end.run()  # no lock was left behind
    assert end.windows[1].counters.numpy().tolist() == [0, 0, 9]
