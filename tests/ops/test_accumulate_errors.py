"""Bad input to the accumulate op: the right error, nothing written, and the process goes on."""

import types

import numpy as np
import pytest
import tensorflow as tf
from handles import stacked, table, uninitialized, variable

from accumops import ops
from accumops.ops import library

INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError


def raw(
    accumulators,
    gradients,
    *,
    indices=(),
    touched_rows=(),
    scale=1.0,
    overwrite=False,
    norms_if=(),
    only_if=(),
    check_finite=(),
):
    """The op itself, without the checks of `ops.accumulate`."""
    module, problem = library.load()
    assert module is not None, problem
    return module.accum_ops_accumulate(
        accumulators=accumulators,
        gradients=gradients,
        indices=list(indices),
        touched_rows=list(touched_rows),
        scale=tf.constant(scale),
        overwrite=tf.constant(overwrite),
        norms_if=list(norms_if),
        only_if=list(only_if),
        check_finite=check_finite,
    )


class Case:
    """Variables to damage: `a` and `b` of shape [2, 3], flags for their rows, and what the op would take."""

    def __init__(self):
        self.a = tf.Variable(tf.ones([2, 3]))
        self.b = tf.Variable(tf.ones([2, 3]))
        self.flags = tf.Variable([False, False])
        self.gradient = tf.ones([2, 3])
        self.rows = tf.constant([0, 1])


MALFORMED = {
    "too few gradients": (
        INVALID,
        "one gradient|2 accumulators",
        lambda c: raw([c.a.handle, c.b.handle], [c.gradient]),
    ),
    "more indices than accumulators": (
        INVALID,
        "2 indices",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows, c.rows]),
    ),
    "more touched rows than indices": (
        INVALID,
        "1 touched rows",
        lambda c: raw([c.a.handle], [c.gradient], touched_rows=[c.flags.handle]),
    ),
    "shape": (
        INVALID,
        r"accumulators\[1\].*\[2,3\].*gradients\[1\].*\[2,4\]",
        lambda c: raw([c.a.handle, c.b.handle], [c.gradient, tf.ones([2, 4])]),
    ),
    "rank": (INVALID, r"gradients\[0\]", lambda c: raw([c.a.handle], [tf.ones([2, 3, 1])])),
    "same size, other shape": (INVALID, r"\[6\]", lambda c: raw([c.a.handle], [tf.ones([6])])),
    "integer accumulator": (INVALID, "int32", lambda c: raw([variable([1, 2])], [tf.ones([2])])),
    "half accumulator": (
        INVALID,
        "half",
        lambda c: raw([variable([1, 1], tf.float16)], [tf.ones([2], tf.float16)]),
    ),
    "wider gradient": (INVALID, "double", lambda c: raw([c.a.handle], [tf.ones([2, 3], tf.float64)])),
    "uninitialized": (
        PRECONDITION,
        r"accumulators\[1\].*uninitialized",
        lambda c: raw([c.a.handle, uninitialized(tf.float32, [2, 3])], [c.gradient, c.gradient]),
    ),
    "not a variable": (INVALID, r"accumulators\[0\]", lambda c: raw([table(), c.a.handle], [c.gradient, c.gradient])),
    "the same variable twice": (
        INVALID,
        r"accumulators\[1\].*accumulators\[0\].*same variable",
        lambda c: raw([c.a.handle, c.a.handle], [c.gradient, c.gradient]),
    ),
    "scale is a vector": (INVALID, "scale|rank 0", lambda c: raw([c.a.handle], [c.gradient], scale=[1.0, 2.0])),
    "overwrite is a vector": (INVALID, "overwrite|rank 0", lambda c: raw([c.a.handle], [c.gradient], overwrite=[True])),
    "norms_if is a vector": (INVALID, "norms_if", lambda c: raw([c.a.handle], [c.gradient], norms_if=[[True]])),
    "norms_if are two": (INVALID, "norms_if", lambda c: raw([c.a.handle], [c.gradient], norms_if=[True, True])),
    "only_if is a vector": (INVALID, "only_if|rank 0", lambda c: raw([c.a.handle], [c.gradient], only_if=[[True]])),
    "only_if are two": (INVALID, "only_if", lambda c: raw([c.a.handle], [c.gradient], only_if=[True, True])),
    "indices are a matrix": (
        INVALID,
        r"indices\[0\].*\[1,2\]|rank 1",
        lambda c: raw([c.b.handle, c.a.handle], [c.gradient, c.gradient], indices=[[[0, 1]]]),
    ),
    "fewer indices than rows": (INVALID, r"indices\[0\]", lambda c: raw([c.a.handle], [c.gradient], indices=[[0]])),
    "index too large": (
        INVALID,
        r"indices\[0\]\[1\] = 2 is not a row of accumulators\[1\]",
        lambda c: raw([c.b.handle, c.a.handle], [c.gradient, c.gradient], indices=[[0, 2]]),
    ),
    "index negative": (
        INVALID,
        r"indices\[0\]\[0\] = -1",
        lambda c: raw([c.a.handle], [c.gradient], indices=[tf.constant([-1, 0], tf.int64)]),
    ),
    "rows of another width": (
        INVALID,
        r"gradients\[0\].*\[2,4\]",
        lambda c: raw([c.a.handle], [tf.ones([2, 4])], indices=[c.rows]),
    ),
    "rows of a scalar": (
        INVALID,
        r"\[\]",
        lambda c: raw([variable(1.0)], [tf.ones([2])], indices=[c.rows]),
    ),
    "flags are not bool": (
        INVALID,
        r"touched_rows\[0\].*float",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[variable([0.0, 0.0])]),
    ),
    "flags of another length": (
        INVALID,
        r"touched_rows\[0\].*\[3\]",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[variable([True] * 3)]),
    ),
    "flags uninitialized": (
        PRECONDITION,
        r"touched_rows\[0\]",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[uninitialized(tf.bool, [2])]),
    ),
    "flags shared": (
        INVALID,
        "same variable",
        lambda c: raw(
            [c.a.handle, c.b.handle],
            [c.gradient] * 2,
            indices=[c.rows] * 2,
            touched_rows=[c.flags.handle, c.flags.handle],
        ),
    ),
    "several handles in one": (
        INVALID,
        r"accumulators\[0\].*\[2\]",
        lambda c: raw([stacked(variable([[1.0] * 3] * 2), variable([[1.0] * 3] * 2))], [c.gradient]),
    ),
    "check_finite out of range": (
        INVALID,
        "check_finite",
        lambda c: raw([c.a.handle], [c.gradient], check_finite=[tf.bool] * 2),
    ),
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_raw_op_raises_and_writes_nothing(name):
    error, message, call = MALFORMED[name]
    case = Case()
    with pytest.raises(error, match=message):
        call(case)
    check_untouched(case)
    check_unlocked(case)


def check_untouched(case):
    for each in (case.a, case.b):
        np.testing.assert_array_equal(each.numpy(), np.ones([2, 3]))
    assert not case.flags.numpy().any()


def check_unlocked(case):
    """No lock is left behind."""
    raw([case.a.handle, case.b.handle], [case.gradient] * 2)
    np.testing.assert_array_equal(case.a.numpy(), np.full([2, 3], 2.0))


def test_shapes_are_checked_when_a_graph_is_built():
    accumulator = tf.Variable(tf.ones([2, 3]))
    with pytest.raises(ValueError, match=r"gradients\[0\] of shape \[2,4\]"):
        tf.function(
            lambda: raw([accumulator.handle], [tf.ones([2, 4])], check_finite=[tf.bool])
        ).get_concrete_function()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_shapes_unknown_until_run(jit_compile):
    accumulator = tf.Variable(tf.ones([2, 3]))

    @tf.function(input_signature=[tf.TensorSpec(None)], jit_compile=jit_compile)
    def run(gradient):
        return raw([accumulator.handle], [gradient], check_finite=[tf.bool])

    with pytest.raises(INVALID, match=r"accumulators\[0\]"):
        run(tf.ones([3, 2]))
    np.testing.assert_array_equal(accumulator.numpy(), np.ones([2, 3]))


HANDLE = tf.TensorSpec(None, tf.resource)


# Under XLA, rows that are not there are skipped, as TensorFlow's own scatters do.
@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [(name, False) for name in MALFORMED] + [(name, True) for name in MALFORMED if not name.startswith("index ")],
)
@pytest.mark.some_by_default(20)
def test_variables_and_shapes_unknown_until_run(name, jit_compile):
    error, message, call = MALFORMED[name]
    case = Case()
    if jit_compile and name == "not a variable":
        error = PRECONDITION  # TensorFlow makes a variable of that name, which has no value

    @tf.function(
        input_signature=[HANDLE] * 3 + [tf.TensorSpec(None), tf.TensorSpec(None, tf.int32)],
        autograph=False,
        jit_compile=jit_compile,
    )
    def run(a, b, flags, gradient, rows):
        a, b, flags = (types.SimpleNamespace(handle=each) for each in (a, b, flags))
        call(types.SimpleNamespace(a=a, b=b, flags=flags, gradient=gradient, rows=rows))

    with pytest.raises((error, ValueError), match=message):
        run(case.a.handle, case.b.handle, case.flags.handle, case.gradient, case.rows)
    check_untouched(case)
    check_unlocked(case)


def test_a_resource_of_xla_that_is_no_variable():
    gradient = tf.ones([2, 3])

    @tf.function(autograph=False, jit_compile=True)
    def run():
        def accumulate(i, stack):
            raw([stack], [gradient])
            return i + 1, stack

        start = tf.constant(0), tf.raw_ops.StackV2(max_size=2, elem_type=tf.float32)
        shapes = tf.TensorShape([]), tf.TensorShape(None)
        tf.while_loop(lambda i, _: i < 1, accumulate, start, shape_invariants=shapes)

    with pytest.raises(INVALID, match=r"accumulators\[0\].*stack, not a variable"):
        run()


def test_sizes_that_xla_knows_late():
    """Which rows a mask takes is known when it runs. Their number cannot be checked before something is written."""
    case = Case()

    @tf.function(autograph=False, jit_compile=True)
    def dense(mask):
        return raw([case.a.handle], [tf.boolean_mask(case.gradient, mask)])

    for mask in ([True, True], [True, False]):
        with pytest.raises(INVALID, match=r"gradients\[0\] is f32\[<=2,3\]"):
            dense(tf.constant(mask))
        check_untouched(case)

    grows = tf.Variable(case.gradient, shape=[None, 3])

    @tf.function(autograph=False, jit_compile=True)
    def into_rows_of_a_mask(mask):
        grows.assign(tf.boolean_mask(case.gradient, mask))
        return raw([grows.handle], [case.gradient])

    with pytest.raises(INVALID, match=r"accumulators\[0\].*f32\[<=2,3\]"):
        into_rows_of_a_mask(tf.constant([True, False]))
    np.testing.assert_array_equal(grows.numpy(), np.ones([2, 3]))


def test_rows_that_xla_knows_late_are_added():
    table, flags = tf.Variable(tf.zeros([3, 2])), tf.Variable([False] * 3)
    values = tf.constant([[1.0, 2], [3, 4], [5, 6]])

    @tf.function(autograph=False, jit_compile=True)
    def run(mask):
        rows = tf.where(mask)[:, 0]
        return raw(
            [table.handle], [tf.boolean_mask(values, mask)], indices=[rows], touched_rows=[flags.handle], scale=2.0
        )

    run(tf.constant([False, True, True]))
    np.testing.assert_array_equal(table.numpy(), [[0, 0], [6, 8], [10, 12]])
    assert flags.numpy().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "1 accumulators and 2 gradients", lambda v: ops.accumulate([v], [tf.ones([2, 3])] * 2)),
        (ValueError, r"shape \(2, 3\) of accumulators\[0\] \('kernel", lambda v: ops.accumulate([v], [tf.ones([3])])),
        (ValueError, "same variable", lambda v: ops.accumulate([v, v], [tf.ones([2, 3])] * 2)),
        (ValueError, "float64", lambda v: ops.accumulate([v], [tf.ones([2, 3], tf.float64)])),
        (ValueError, "int32", lambda v: ops.accumulate([v], [tf.ones([2, 3], tf.int32)])),
        (ValueError, "must be float32 or float64", lambda v: ops.accumulate([tf.Variable([1])], [tf.ones([1])])),
        (TypeError, r"gradients\[0\]` is None", lambda v: ops.accumulate([v], [None])),
        (TypeError, r"accumulators\[0\]", lambda v: ops.accumulate([tf.ones([2])], [tf.ones([2])])),
        (TypeError, r"gradients\[0\]", lambda v: ops.accumulate([v], [object()])),
        (ValueError, "scale", lambda v: ops.accumulate([v], [tf.ones([2, 3])], scale=tf.ones([2]))),
        (ValueError, "overwrite", lambda v: ops.accumulate([v], [tf.ones([2, 3])], overwrite=1)),
        (ValueError, "touched_rows", lambda v: ops.accumulate([v], [tf.ones([2, 3])], touched_rows=[])),
        (
            ValueError,
            r"touched_rows\[0\]` must be bool of shape \(2,\)",
            lambda v: ops.accumulate([v], [tf.ones([2, 3])], touched_rows=[tf.Variable([True] * 3)]),
        ),
        (
            ValueError,
            r"touched_rows\[1\]` and `touched_rows\[0\]` are the same",
            lambda v: ops.accumulate(
                [v, tf.Variable(tf.ones([2, 3]))],
                [tf.ones([2, 3])] * 2,
                touched_rows=[flags := tf.Variable([True] * 2), flags],
            ),
        ),
        (
            ValueError,
            "shape that is known",
            lambda v: ops.accumulate([tf.Variable(tf.ones([2, 3]), shape=[None, 3])], [tf.ones([2, 3])]),
        ),
        (
            ValueError,
            "int32 or int64",
            lambda v: ops.accumulate([v], [tf.IndexedSlices(tf.ones([1, 3]), tf.constant([0], tf.int16))]),
        ),
        (
            ValueError,
            "one index for each",
            lambda v: ops.accumulate([v], [tf.IndexedSlices(tf.ones([2, 3]), tf.constant([0]))]),
        ),
        (
            ValueError,
            "scalar",
            lambda v: ops.accumulate([tf.Variable(1.0)], [tf.IndexedSlices(tf.ones([1]), tf.constant([0]))]),
        ),
    ],
)
def test_public_function_checks_its_arguments(backend, error, message, call):
    variable = tf.Variable(tf.ones([2, 3]), name="kernel")
    with pytest.raises(error, match=message):
        call(variable)
    np.testing.assert_array_equal(variable.numpy(), np.ones([2, 3]))


def test_index_out_of_range_changes_nothing(backend):
    dense, table = tf.Variable(tf.ones([2])), tf.Variable(tf.ones([3, 2]))
    for row in (-1, 3):
        with pytest.raises(INVALID):
            ops.accumulate([dense, table], [tf.ones([2]), tf.IndexedSlices(tf.ones([1, 2]), tf.constant([row]))])
        np.testing.assert_array_equal(dense.numpy(), [1, 1])
        np.testing.assert_array_equal(table.numpy(), np.ones([3, 2]))


@pytest.mark.gpu
def test_variables_on_different_devices():
    with tf.device("CPU:0"):
        a = tf.Variable(tf.ones([2]))
    with tf.device("GPU:0"):
        b = tf.Variable(tf.ones([2]))
    with pytest.raises(INVALID, match="device"):
        ops.accumulate([a, b], [tf.ones([2])] * 2)
