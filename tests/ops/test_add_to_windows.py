"""Adding batches' moments to many windows at once: `ops.add_to_windows`, its reference, and the op itself."""

import numpy as np
import pytest
import tensorflow as tf
from handles import table, uninitialized, variable

from accumops import ops
from accumops.ops import library

INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError
NEVER = 1 << 40


def make_windows(count):
    """Windows of 1, 2, … channels, every third one empty."""
    return [
        ops.MomentsWindow(
            tf.Variable([10 * (i % 3), 2, NEVER], dtype=tf.int64),
            tf.Variable(tf.fill([2, i + 1], np.float64(i if i % 3 else np.nan))),
        )
        for i in range(count)
    ]


def make_batches(rng, count):
    """Batches for them, of float32 and float64; every fourth one has no values, and NaN for its moments."""
    batches = []
    for i in range(count):
        dtype, values = (tf.float64 if i % 5 == 1 else tf.float32), 7 * (i % 4)
        moments = rng.standard_normal((3, i + 1)) ** 2 if values else np.full((3, i + 1), np.nan)
        mean, rest, variance = (tf.constant(each, dtype) for each in (moments[0], moments[1] * 1e-9, moments[2]))
        batches.append(ops.BatchMoments(tf.constant(values, tf.int64), mean, rest, variance))
    return batches


def numbers(windows):
    return [[each.numpy() for each in window] for window in windows]


def check_same(windows, wanted, exactly):
    for i, (window, (counters, moments)) in enumerate(zip(windows, wanted, strict=True)):
        np.testing.assert_array_equal(window.counters.numpy(), counters, err_msg=str(i))
        if counters[0]:  # a window without values may hold anything
            np.testing.assert_allclose(window.moments.numpy(), moments, rtol=0 if exactly else 1e-14)


@pytest.mark.parametrize("count", [1, 7, 80])
def test_as_one_merge_after_another(backend, mode, rng, count):
    windows, merged, batches = make_windows(count), make_windows(count), make_batches(rng, count)
    for batch, window in zip(batches, merged, strict=True):
        ops.merge_moments(batch, window=window)

    @mode
    def run(counts, moments, applies):
        given = [ops.BatchMoments(*each) for each in zip(counts, *moments, strict=True)]
        ops.add_to_windows(given, windows, applies=applies)

    counts, *moments = (list(each) for each in zip(*batches, strict=True))
    before = numbers(windows)
    run(counts, moments, tf.constant(False))
    check_same(windows, before, exactly=True)
    run(counts, moments, tf.constant(True))
    check_same(windows, numbers(merged), exactly=mode.name == "eager")


def test_no_windows(backend):
    assert ops.add_to_windows([], []) is None


W3 = make_windows(3)[2]
B3, B4 = make_batches(np.random.default_rng(0), 4)[2:]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`batches` must be a list", (B3, [W3])),
        (TypeError, "`windows` must be a list", ([B3], W3)),
        (TypeError, r"`batches\[0\]` must be a BatchMoments", ([(1, 2, 3, 4)], [W3])),
        (TypeError, r"`windows\[0\]` must be a MomentsWindow", ([B3], [(1, 2)])),
        (TypeError, r"`windows\[0\]\.counters` must be a tf\.Variable", ([B3], [W3._replace(counters=[0, 0, 1])])),
        (ValueError, "`batches` must have 1 items, one for each window. Received: 2", ([B3, B3], [W3])),
        (ValueError, r"`batches\[0\]\.mean` must have a value for each channel, of shape \(3,\)", ([B4], [W3])),
        (
            ValueError,
            r"`batches\[0\]\.mean` must be float32 or float64",
            ([B3._replace(mean=tf.ones([3], tf.float16))], [W3]),
        ),
    ],
)
def test_arguments_are_checked(backend, error, message, arguments):
    before = numbers([W3])
    with pytest.raises(error, match=message):
        ops.add_to_windows(*arguments)
    check_same([W3], before, exactly=True)


class Add:
    """Two windows of three channels, for the raw op."""

    def __init__(self):
        self.windows = [
            ops.MomentsWindow(tf.Variable([5, 2, 9], dtype=tf.int64), tf.Variable(tf.ones([2, 3], tf.float64)))
            for _ in range(2)
        ]

    def run(self, **changes):
        module, _ = library.load()
        if module is None:
            pytest.skip("the compiled ops do not load")
        arguments = {
            "windows": [each.handle for window in self.windows for each in window],
            "counts": [tf.constant(4, tf.int64)] * 2,
            "moments": [tf.ones([3])] * 6,
            "applies": tf.constant(True),
        }
        return module.accum_ops_add_to_windows(**arguments | changes)

    def handle(self, i):
        return self.windows[i // 2][i % 2].handle


DAMAGE = {
    "half a window": lambda a: a.run(windows=[a.handle(i) for i in range(3)]),
    "one batch": lambda a: a.run(counts=[tf.constant(4, tf.int64)], moments=[tf.ones([3])] * 3),
    "a moment short": lambda a: a.run(moments=[tf.ones([3])] * 5),
    "a window twice": lambda a: a.run(windows=[a.handle(i) for i in (0, 1, 0, 1)]),
    "counters as moments": lambda a: a.run(windows=[a.handle(i) for i in (1, 0, 2, 3)]),
    "a table": lambda a: a.run(windows=[a.handle(0), table(), a.handle(2), a.handle(3)]),
    "uninitialized": lambda a: a.run(windows=[uninitialized(tf.int64, [3]), *(a.handle(i) for i in (1, 2, 3))]),
    "moments are a vector": lambda a: a.run(
        windows=[a.handle(0), variable([1.0], tf.float64), a.handle(2), a.handle(3)]
    ),
    "other channels": lambda a: a.run(moments=[tf.ones([3])] * 5 + [tf.ones([4])]),
    "moments of a table": lambda a: a.run(moments=[tf.ones([1, 3])] * 6),
    "two counts in one": lambda a: a.run(counts=[tf.constant([4, 4], tf.int64), tf.constant(4, tf.int64)]),
    "two flags": lambda a: a.run(applies=tf.constant([True, True])),
}


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("name", list(DAMAGE))
def test_the_raw_op_raises_and_writes_nothing(name, jit_compile):
    add = Add()
    call = DAMAGE[name]
    run = call if jit_compile is None else tf.function(call, autograph=False, jit_compile=jit_compile)
    before = numbers(add.windows)
    with pytest.raises((INVALID, PRECONDITION, TypeError, ValueError)):
        run(add)
    check_same(add.windows, before, exactly=True)
    add.run()  # no lock was left behind
    assert add.windows[1].counters.numpy().tolist() == [9, 3, 9]


@pytest.mark.parametrize("name", ["counts", "moments", "applies"])
def test_shapes_that_only_the_call_shows(name):
    add = Add()
    wrong = {"counts": tf.constant([4, 4], tf.int64), "moments": tf.ones([4]), "applies": tf.constant([True, True])}
    for jit_compile in (False, True):

        @tf.function(autograph=False, jit_compile=jit_compile, input_signature=[tf.TensorSpec(None, wrong[name].dtype)])
        def run(given):
            right = {"counts": tf.constant(4, tf.int64), "moments": tf.ones([3])}
            lists = {each: [value] * (2 if each == "counts" else 6) for each, value in right.items()}
            if name == "applies":
                add.run(applies=given)
            else:
                add.run(**{name: [*lists[name][:-1], given]})

        before = numbers(add.windows)
        with pytest.raises(INVALID):
            run(wrong[name])
        check_same(add.windows, before, exactly=True)
