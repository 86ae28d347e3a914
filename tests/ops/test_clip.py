"""Adaptive gradient clipping as one op: `ops.clip_units`, its reference, and the op itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops import ops
from accumops.ops import library

SHAPES = [(), (7,), (5, 3), (3, 3, 16, 32), (300, 17), (2, 1500), (0, 4), (4, 0)]
INVALID = tf.errors.InvalidArgumentError


def exact(gradient, weights, clip_factor=0.25, epsilon=1e-3):
    """The formula in float64."""
    wide, weights = (np.asarray(each, np.float64) for each in (gradient, weights))
    axes = tuple(range(wide.ndim - 1)) if wide.ndim > 1 else None
    size, norm = (np.sqrt(np.sum(each**2, axis=axes, keepdims=True)) for each in (wide, weights))
    limit = clip_factor * np.maximum(norm, epsilon)
    return np.where(size > limit, wide * (limit / np.where(size > 0, size, 1)), wide)


def draw(rng, dtype="float32"):
    gradients = [rng.standard_normal(shape) * np.exp(rng.uniform(-4, 2)) for shape in SHAPES]
    return [[tf.constant(each, dtype) for each in group] for group in (gradients, map(rng.standard_normal, SHAPES))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-14), ("bfloat16", 1e-2)])
def test_units_are_clipped(backend, mode, rng, dtype, tolerance):
    gradients, weights = draw(rng, dtype)
    clipped = mode(lambda g, w: ops.clip_units(g, w, clip_factor=0.25))(gradients, weights)
    changed = 0
    for found, gradient, weight in zip(clipped, gradients, weights, strict=True):
        assert found.dtype == gradient.dtype
        np.testing.assert_allclose(
            tf.cast(found, tf.float64), exact(tf.cast(gradient, tf.float64), tf.cast(weight, tf.float64)),
            rtol=tolerance, atol=tolerance * 1e-3,
        )  # fmt: skip
        changed += bool(np.any(tf.cast(found, tf.float64) != tf.cast(gradient, tf.float64)))
    assert 0 < changed < len(SHAPES)


def test_kinds_of_one_call_keep_their_places(backend, rng):
    rows = tf.IndexedSlices(tf.fill([3, 4], 10.0), tf.constant([1, 1, 5]), tf.constant([9, 4]))
    table, kernel = keras.Variable(tf.ones([9, 4])), tf.Variable(tf.ones([2, 3]))
    half = tf.Variable(tf.ones([2, 3], tf.bfloat16))
    gradients = [rows, tf.fill([2, 3], 10.0), tf.fill([2, 3], tf.constant(10.0, tf.bfloat16))]
    first, second, third = ops.clip_units(gradients, [table, kernel, half], clip_factor=0.5)
    assert isinstance(first, tf.IndexedSlices)
    np.testing.assert_allclose(tf.norm(second, axis=0), [0.5 * 2**0.5] * 3, rtol=1e-6)
    assert third.dtype == tf.bfloat16
    assert float(third[0, 0]) == pytest.approx(0.5, rel=1e-2)


def test_a_gradient_that_is_read_elsewhere_stays_as_it_is(backend):
    @tf.function
    def run(gradient):
        doubled = 2 * gradient
        (clipped,) = ops.clip_units([doubled], [tf.ones([64, 8])], clip_factor=0.01)
        return doubled, clipped

    doubled, clipped = run(tf.ones([64, 8]))
    assert (doubled.numpy() == 2).all()
    assert (clipped.numpy() < 0.1).all()


def test_no_gradients(backend):
    assert ops.clip_units([], []) == []


def test_clipping_by_the_class_is_the_op(backend, rng):
    gradients, weights = draw(rng)
    variables = [tf.Variable(each, name=f"variable_{i}") for i, each in enumerate(weights)]
    clip = accumops.AdaptiveGradientClipping(0.25, exclude=["variable_2"])
    found = clip([None, *gradients[1:]], variables)
    assert found[0] is None
    np.testing.assert_array_equal(found[2], gradients[2])
    for one, other in zip(found[3:], ops.clip_units(gradients[3:], weights[3:], clip_factor=0.25), strict=True):
        np.testing.assert_array_equal(one, other)


ONES = tf.ones([2, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "settings"),
    [
        (ValueError, "`weights` must have 1 items", ([ONES], []), {}),
        (ValueError, r"gradients\[1\] must have its shape, \(3, 2\)", ([ONES, ONES], [ONES, tf.ones([3, 2])]), {}),
        (ValueError, "The gradient of 'kernel:0' must have its", ([ONES], [tf.Variable([1.0], name="kernel")]), {}),
        (ValueError, r"gradients\[0\] must be of a floating-point dtype", ([tf.ones([2], tf.int32)], [ONES]), {}),
        (ValueError, "`clip_factor` must be finite and greater", ([ONES], [ONES]), {"clip_factor": 0}),
        (TypeError, "`epsilon` must be a number", ([ONES], [ONES]), {"epsilon": "1"}),
    ],
)
def test_arguments_are_checked(backend, error, message, arguments, settings):
    with pytest.raises(error, match=message):
        ops.clip_units(*arguments, **settings)


def test_the_fused_op_says_that_it_has_no_gradient():
    if library.load()[0] is None:
        pytest.skip("the compiled ops do not load")
    with tf.GradientTape() as tape:
        tape.watch(ONES)
        (clipped,) = ops.clip_units([ONES], [ONES])
    with pytest.raises(LookupError, match=r"no gradient of its own. Use accumops.set_backend\('reference'\)"):
        tape.gradient(clipped, ONES)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_the_raw_op_checks_its_shapes(jit_compile):
    module, _ = library.load()
    if module is None:
        pytest.skip("the compiled ops do not load")

    def run(gradient, weights):
        return module.accum_ops_clip_units(gradients=[gradient], weights=[weights], clip_factor=0.1, epsilon=0.1)

    any_shape = [tf.TensorSpec(None), tf.TensorSpec(None)]
    late = run if jit_compile is None else tf.function(run, any_shape, autograph=False, jit_compile=jit_compile)
    with pytest.raises(INVALID, match=r"gradients\[0\] has shape \[2,3\] but weights\[0\] has shape \[3,2\]"):
        late(ONES, tf.ones([3, 2]))
    with pytest.raises((INVALID, ValueError), match=r"does not fit|but weights"):
        tf.function(run, autograph=False)(ONES, tf.ones([3, 2]))
    assert late(ONES, ONES)[0].shape == [2, 3]
