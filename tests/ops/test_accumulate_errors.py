"""Bad input to the accumulate op: the right error, nothing written, and the process goes on."""

import numpy as np
import pytest
import tensorflow as tf

from accumops import ops
from accumops.ops import library

INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError


def raw(
    accumulators, gradients, *, indices=(), touched_rows=(), scale=1.0, overwrite=False, norms_if=(), check_finite=()
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
        check_finite=check_finite,
    )


class Case:
    """Variables to damage: `a` and `b` of shape [2, 3], flags for their rows, and what the op would take."""

    def __init__(self):
        self.a = tf.Variable(tf.ones([2, 3]))
        self.b = tf.Variable(tf.ones([2, 3]))
        self.flags = tf.Variable([False, False])
        self.more_flags = tf.Variable([False, False])
        self.gradient = tf.ones([2, 3])
        self.rows = tf.constant([0, 1])


def uninitialized(dtype=tf.float32, shape=(2, 3)):
    return tf.raw_ops.VarHandleOp(dtype=dtype, shape=shape, shared_name="never_initialized")


def table():
    return tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.int64, shared_name="not_a_variable")


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
    "integer accumulator": (INVALID, "int32", lambda c: raw([tf.Variable([1, 2]).handle], [tf.ones([2])])),
    "half accumulator": (
        INVALID,
        "half",
        lambda c: raw([tf.Variable(tf.ones([2], tf.float16)).handle], [tf.ones([2], tf.float16)]),
    ),
    "wider gradient": (INVALID, "double", lambda c: raw([c.a.handle], [tf.ones([2, 3], tf.float64)])),
    "uninitialized": (
        PRECONDITION,
        r"accumulators\[1\].*uninitialized",
        lambda c: raw([c.a.handle, uninitialized()], [c.gradient, c.gradient]),
    ),
    "not a variable": (INVALID, r"accumulators\[0\]", lambda c: raw([table(), c.a.handle], [c.gradient, c.gradient])),
    "the same variable twice": (
        INVALID,
        r"accumulators\[1\].*accumulators\[0\].*same variable",
        lambda c: raw([c.a.handle, c.a.handle], [c.gradient, c.gradient]),
    ),
    "scale is a vector": (INVALID, "scale", lambda c: raw([c.a.handle], [c.gradient], scale=[1.0, 2.0])),
    "norms_if is a vector": (INVALID, "norms_if", lambda c: raw([c.a.handle], [c.gradient], norms_if=[[True]])),
    "norms_if are two": (INVALID, "norms_if", lambda c: raw([c.a.handle], [c.gradient], norms_if=[True, True])),
    "overwrite is a vector": (INVALID, "overwrite", lambda c: raw([c.a.handle], [c.gradient], overwrite=[True])),
    "indices are a matrix": (
        INVALID,
        r"indices\[0\].*\[1,2\]",
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
        lambda c: raw([tf.Variable(1.0).handle], [tf.ones([2])], indices=[c.rows]),
    ),
    "flags are not bool": (
        INVALID,
        r"touched_rows\[0\].*float",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[tf.Variable([0.0, 0.0]).handle]),
    ),
    "flags of another length": (
        INVALID,
        r"touched_rows\[0\].*\[3\]",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[tf.Variable([True] * 3).handle]),
    ),
    "flags uninitialized": (
        PRECONDITION,
        r"touched_rows\[0\]",
        lambda c: raw([c.a.handle], [c.gradient], indices=[c.rows], touched_rows=[uninitialized(tf.bool, (2,))]),
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
        lambda c: raw([tf.stack([c.a.handle, c.b.handle])], [c.gradient]),
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
    for variable in (case.a, case.b):
        np.testing.assert_array_equal(variable.numpy(), np.ones([2, 3]))
    assert not case.flags.numpy().any()
    raw([case.a.handle, case.b.handle], [case.gradient] * 2)  # no lock was left behind
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
