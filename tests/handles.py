"""Handles to give to raw ops, right and wrong ones.

They are made outside of the function that is being traced, if one is, and live as long as the process.
"""

import itertools

import tensorflow as tf

_numbers = itertools.count()


def variable(value, dtype=None):
    """The handle of a new variable."""
    with tf.init_scope():
        value = tf.constant(value, dtype)
        handle = uninitialized(value.dtype, value.shape)
        tf.raw_ops.AssignVariableOp(resource=handle, value=value)
        return handle


def uninitialized(dtype, shape):
    """The handle of a variable without a value."""
    with tf.init_scope():
        return tf.raw_ops.VarHandleOp(dtype=dtype, shape=shape, shared_name=f"of tests/handles.py {next(_numbers)}")


def table():
    """The handle of a table, which is no variable."""
    with tf.init_scope():
        return tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.int64, shared_name="a table")


def stacked(*handles):
    """Several handles in one tensor."""
    with tf.init_scope():
        return tf.stack(handles)
