"""The barrier: the same tensors, in an order, and nothing merged across it."""

import re
import time

import numpy as np
import pytest
import tensorflow as tf

from accumops import ops


def test_same_tensors_and_gradients(backend, mode, rng):
    x, z = tf.constant(rng.normal(size=(3, 4))), tf.constant(rng.normal(size=5), tf.bfloat16)
    n = tf.constant([7, 8])

    def run(x, z, n):
        with tf.GradientTape() as tape:
            tape.watch([x, z])
            a, b, c = ops.barrier([x, z, n], after=[tf.reduce_sum(x), tf.constant(True), n])
            y = tf.reduce_sum(a**2) + tf.cast(tf.reduce_sum(3 * b), tf.float64)
        return a, b, c, *tape.gradient(y, [x, z])

    a, b, c, of_x, of_z = mode(run)(x, z, n)
    for result, given in ((a, x), (b, z), (c, n)):
        assert result.dtype == given.dtype
        assert result.shape == given.shape
        np.testing.assert_array_equal(result, given)
    np.testing.assert_array_equal(of_x, 2 * x)
    np.testing.assert_array_equal(of_z, tf.fill([5], tf.constant(3, tf.bfloat16)))


def test_gradient_of_second_order(backend, mode):
    def run(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = ops.barrier([x])[0] ** 3
            slope = ops.barrier([inner.gradient(y, x)], after=[y])[0]
        return outer.gradient(slope, x)

    assert float(mode(run)(tf.constant(2.0))) == 12


def test_shapes_that_the_graph_does_not_know(backend):
    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec(None)])
    def run(x, y):
        a, b = ops.barrier([x, y])
        assert a.shape.as_list() == [None, 3]
        assert b.shape.rank is None
        return a, b

    a, b = run(tf.ones([2, 3]), tf.ones([4]))
    assert a.shape == (2, 3)
    assert b.shape == (4,)


def test_waits(backend):
    order = []

    def note(name, seconds):
        def run(x):
            time.sleep(seconds)
            order.append(name)
            return x

        return run

    @tf.function
    def run(x):
        first = tf.numpy_function(note("first", 0.05), [x], tf.float32, stateful=False)
        (same,) = ops.barrier([x], after=[first])
        return first, tf.numpy_function(note("second", 0), [same], tf.float32, stateful=False)

    run(tf.constant(1.0))
    assert order == ["first", "second"]


def test_xla_computes_again_behind_it(backend, rng):
    x = tf.constant(rng.normal(size=(16, 16)), tf.float32)

    def products(again):
        @tf.function(jit_compile=True)
        def run(x):
            once = tf.tanh(x @ x)
            return once, tf.tanh(again(x, once) @ x)

        program = run.experimental_get_compiler_ir(x)(stage="optimized_hlo")
        return len(re.findall(r" dot\(| custom-call\(|__onednn\$matmul", program))

    def behind_a_dependency(x, once):
        with tf.control_dependencies([once]):
            return tf.identity(x)

    once = products(lambda x, once: x)
    assert products(behind_a_dependency) == once
    assert products(lambda x, once: ops.barrier([x], after=[once])[0]) > once


def test_nothing_to_hold():
    assert ops.barrier([], after=[tf.constant(1.0)]) == []


@pytest.mark.parametrize("arguments", [{"tensors": tf.ones(2)}, {"tensors": [1.0], "after": tf.ones(2)}])
def test_a_tensor_is_no_list(arguments):
    with pytest.raises(TypeError, match="must be a list of tensors"):
        ops.barrier(**arguments)


def test_xla_refuses_what_is_no_tensor():
    variable = tf.Variable(1.0)

    @tf.function(jit_compile=True)
    def run():
        return ops.barrier([variable.handle])

    with pytest.raises(tf.errors.InvalidArgumentError, match="tensors only"):
        run()
