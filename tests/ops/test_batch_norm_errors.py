"""Bad input to the batch normalization ops: the right error, nothing written, and the process goes on."""

import pytest
import tensorflow as tf

from accumops import ops
from accumops.ops import library

INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError


def module():
    loaded, problem = library.load()
    assert loaded is not None, problem
    return loaded


# These call the ops with an array of shape (4, 2, 3), channels last, and with arguments that fit it.
def forward(**changes):
    """Calls the op itself, without the checks of `ops.batch_norm`, with some arguments changed."""
    arguments = {"x": tf.ones([4, 2, 3]), "gamma": tf.ones([3]), "beta": tf.ones([3]), "mask": [], "axis": 2}
    return module().accum_ops_batch_norm(**{**arguments, "epsilon": 1e-3, **changes})


def inference(**changes):
    vectors = {name: tf.ones([3]) for name in ("gamma", "beta", "mean", "variance")}
    return module().accum_ops_batch_norm_inference(
        **{"x": tf.ones([4, 2, 3]), **vectors, "axis": 2, "epsilon": 1e-3, **changes}
    )


def gradient(**changes):
    vectors = {name: tf.ones([3]) for name in ("gamma", "mean", "rest", "inverse")}
    arguments = {"dy": tf.ones([4, 2, 3]), "x": tf.ones([4, 2, 3]), **vectors, "count": tf.constant(8, tf.int64)}
    return module().accum_ops_batch_norm_grad(**{**arguments, "mask": [], "axis": 2, **changes})


TRUE = tf.ones([4, 2], tf.bool)
DOUBLE = tf.ones([3], tf.float64)

MALFORMED = {
    "axis past the end": ("axis", lambda: forward(axis=3)),
    "axis negative": ("axis", lambda: forward(axis=-1)),
    "scalar": ("axis", lambda: forward(x=tf.constant(1.0), axis=0)),
    "gamma short": (r"\b3\b", lambda: forward(gamma=tf.ones([2]))),
    "gamma of one value": (r"\b3\b", lambda: forward(gamma=tf.ones([1]))),
    "gamma a scalar": ("", lambda: forward(gamma=tf.constant(1.0))),
    "gamma a matrix": ("", lambda: forward(gamma=tf.ones([1, 3]))),
    "beta long": (r"\b3\b", lambda: forward(beta=tf.ones([4]))),
    "gamma for another axis": ("", lambda: forward(axis=0)),
    "integer x": ("", lambda: forward(x=tf.ones([4, 2, 3], tf.int32))),
    "mask of another length": ("mask", lambda: forward(mask=[tf.ones([4, 3], tf.bool)])),
    "mask of x's shape": ("mask", lambda: forward(mask=[tf.ones([4, 2, 3], tf.bool)])),
    "mask flat": ("mask", lambda: forward(mask=[tf.ones([8], tf.bool)])),
    "mask a scalar": ("mask", lambda: forward(mask=[tf.constant(True)])),
    "mask where channels are not last": (
        "mask",
        lambda: forward(mask=[TRUE], axis=1, gamma=tf.ones([2]), beta=tf.ones([2])),
    ),
    "mask of numbers": ("", lambda: forward(mask=[tf.ones([4, 2])])),
    "two masks": ("mask_count", lambda: forward(mask=[TRUE, TRUE])),
    "epsilon negative": ("epsilon", lambda: forward(epsilon=-1e-3)),
    "epsilon not a number": ("epsilon", lambda: forward(epsilon=float("nan"))),
    "double statistics of float data": ("double", lambda: forward(gamma=DOUBLE, beta=DOUBLE)),
    "double statistics of half data": (
        "double",
        lambda: forward(x=tf.ones([4, 2, 3], tf.float16), gamma=DOUBLE, beta=DOUBLE),
    ),
    "float statistics of double data": ("double", lambda: forward(x=tf.ones([4, 2, 3], tf.float64))),
    "half statistics": (
        "",
        lambda: forward(
            x=tf.ones([4, 2, 3], tf.float16), gamma=tf.ones([3], tf.float16), beta=tf.ones([3], tf.float16)
        ),
    ),
    "gamma and beta of two dtypes": ("", lambda: forward(gamma=DOUBLE)),
    "inference: axis": ("axis", lambda: inference(axis=3)),
    "inference: mean": (r"\b3\b", lambda: inference(mean=tf.ones([2]))),
    "inference: variance": (r"\b3\b", lambda: inference(variance=tf.ones([4]))),
    "inference: variance a scalar": ("", lambda: inference(variance=tf.constant(1.0))),
    "inference: gamma": (r"\b3\b", lambda: inference(gamma=tf.ones([2]))),
    "inference: epsilon": ("epsilon", lambda: inference(epsilon=-1.0)),
    "inference: float statistics of double data": ("double", lambda: inference(x=tf.ones([4, 2, 3], tf.float64))),
    "gradient: axis": ("axis", lambda: gradient(axis=3)),
    "gradient: dy of another shape": ("", lambda: gradient(dy=tf.ones([4, 3, 3]))),
    "gradient: dy flat": ("", lambda: gradient(dy=tf.ones([24]))),
    "gradient: dy transposed": ("", lambda: gradient(dy=tf.ones([3, 2, 4]))),
    "gradient: dy of another dtype": ("", lambda: gradient(dy=tf.ones([4, 2, 3], tf.bfloat16))),
    "gradient: gamma": (r"\b3\b", lambda: gradient(gamma=tf.ones([2]))),
    "gradient: mean": (r"\b3\b", lambda: gradient(mean=tf.ones([2]))),
    "gradient: rest": (r"\b3\b", lambda: gradient(rest=tf.ones([4]))),
    "gradient: inverse": (r"\b3\b", lambda: gradient(inverse=tf.ones([0]))),
    "gradient: count a vector": ("count", lambda: gradient(count=tf.constant([8], tf.int64))),
    "gradient: count of no values": ("count", lambda: gradient(count=tf.zeros([0], tf.int64))),
    "gradient: mask": ("mask", lambda: gradient(mask=[tf.ones([3, 2], tf.bool)])),
    "gradient: two masks": ("mask_count", lambda: gradient(mask=[TRUE, TRUE])),
    "gradient: float statistics of double data": (
        "double",
        lambda: gradient(x=tf.ones([4, 2, 3], tf.float64), dy=tf.ones([4, 2, 3], tf.float64)),
    ),
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_raw_op_raises(name):
    message, call = MALFORMED[name]
    with pytest.raises((INVALID, ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("name", list(MALFORMED))
def test_raw_op_raises_in_a_graph(name):
    """The error comes when the graph is built, or when it runs."""
    message, call = MALFORMED[name]
    with pytest.raises((INVALID, ValueError, TypeError), match=message):
        tf.function(lambda: tf.nest.map_structure(tf.identity, call()), autograph=False)()


@pytest.mark.parametrize("name", list(MALFORMED))
@pytest.mark.some_by_default(18)
def test_raw_op_raises_under_xla(name):
    _, call = MALFORMED[name]
    with pytest.raises((INVALID, ValueError, TypeError)):
        tf.function(lambda: tf.nest.map_structure(tf.identity, call()), autograph=False, jit_compile=True)()


SHAPES = {
    "channels": ({"x": [4, 2, 5]}, r"\b5\b"),
    "rank": ({"x": [12]}, "axis"),
    "gamma": ({"gamma": [4]}, r"\b3\b"),
    "beta": ({"beta": [3, 1]}, r"\b3\b"),
    "mask": ({"mask": [2, 4]}, "mask"),
}


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_unknown_until_run(name, jit_compile):
    changes, message = SHAPES[name]
    shapes = {"x": [4, 2, 3], "gamma": [3], "beta": [3], "mask": [4, 2], **changes}

    @tf.function(
        input_signature=[tf.TensorSpec(None), tf.TensorSpec(None), tf.TensorSpec(None), tf.TensorSpec(None, tf.bool)],
        jit_compile=jit_compile,
    )
    def run(x, gamma, beta, mask):
        return forward(x=x, gamma=gamma, beta=beta, mask=[mask])

    with pytest.raises(INVALID, match=message):
        run(*(tf.ones(shape, tf.bool if key == "mask" else tf.float32) for key, shape in shapes.items()))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dy", [4, 2, 2], "dy has shape"),
        ("rest", [2], "rest has shape.*3 channels"),
        ("count", [3], "count must be a scalar"),
    ],
)
def test_shapes_of_a_gradient_unknown_until_run(name, shape, message, jit_compile):
    dtype = tf.int64 if name == "count" else tf.float32
    run = tf.function(
        lambda value: tf.nest.map_structure(tf.identity, gradient(**{name: value})),
        input_signature=[tf.TensorSpec(None, dtype)],
        autograph=False,
        jit_compile=jit_compile,
    )
    with pytest.raises(INVALID, match=message):
        run(tf.ones(shape, dtype))


def test_channels_that_xla_counts_late():
    values = tf.ones([3])

    @tf.function(autograph=False, jit_compile=True)
    def run(mask, name):
        return forward(**({name: tf.boolean_mask(values, mask)} if name == "gamma" else {"x": late_channels(mask)}))

    def late_channels(mask):
        return tf.transpose(tf.boolean_mask(tf.ones([3, 2, 4]), mask))

    for name, message in (("gamma", r"gamma is f32\[<=3\]"), ("x", r"x is f32\[4,2,<=3\]")):
        with pytest.raises(INVALID, match=message):
            run(tf.constant([True, True, False]), name)


X = tf.ones([4, 2, 3])
ONES = tf.ones([3])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "axis", lambda: ops.batch_norm(X, None, None, axis=3)),
        (ValueError, "axis", lambda: ops.batch_norm(X, None, None, axis=-4)),
        (ValueError, "axis", lambda: ops.batch_norm(tf.constant(1.0), None, None)),
        (TypeError, "`axis` must be an int. Received: None", lambda: ops.batch_norm(X, None, None, axis=None)),
        (TypeError, "`axis` must be an int", lambda: ops.batch_norm(X, None, None, axis=True)),
        (ValueError, "gamma", lambda: ops.batch_norm(X, tf.ones([2]), None)),
        (ValueError, "gamma", lambda: ops.batch_norm(X, 1.0, None)),
        (ValueError, "gamma", lambda: ops.batch_norm(X, tf.ones([1, 3]), None)),
        (ValueError, "gamma", lambda: ops.batch_norm(X, ONES, None, axis=0)),
        (ValueError, "beta", lambda: ops.batch_norm(X, None, tf.ones([1]))),
        (ValueError, "mask", lambda: ops.batch_norm(X, None, None, mask=tf.ones([4], tf.bool))),
        (ValueError, "mask", lambda: ops.batch_norm(X, None, None, mask=tf.ones([4, 1], tf.bool))),
        (ValueError, "mask", lambda: ops.batch_norm(X, None, None, mask=tf.ones([4, 2, 3], tf.bool))),
        (ValueError, "mask", lambda: ops.batch_norm(X, None, None, mask=tf.constant(True))),
        (TypeError, "int32", lambda: ops.batch_norm(tf.ones([4, 3], tf.int32), None, None)),
        (TypeError, "bool", lambda: ops.batch_norm(tf.ones([4, 3], tf.bool), None, None)),
        (TypeError, "complex64", lambda: ops.batch_norm(tf.ones([4, 3], tf.complex64), None, None)),
        (ValueError, "mean", lambda: ops.batch_norm_inference(X, None, None, tf.ones([2]), ONES)),
        (ValueError, "variance", lambda: ops.batch_norm_inference(X, None, None, ONES, tf.ones([4]))),
        (ValueError, "variance", lambda: ops.batch_norm_inference(X, None, None, ONES, 1.0)),
        (ValueError, "gamma", lambda: ops.batch_norm_inference(X, tf.ones([2]), None, ONES, ONES)),
        (ValueError, "axis", lambda: ops.batch_norm_inference(X, None, None, ONES, ONES, axis=3)),
        (TypeError, "int64", lambda: ops.batch_norm_inference(tf.ones([4, 3], tf.int64), None, None, ONES, ONES)),
        ((INVALID, ValueError), "epsilon", lambda: ops.batch_norm(X, None, None, epsilon=-1.0)),
        ((INVALID, ValueError), "epsilon", lambda: ops.batch_norm_inference(X, None, None, ONES, ONES, epsilon=-1.0)),
    ],
)
def test_public_functions_check_their_arguments(backend, error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", [ops.batch_norm, lambda x, g, b: ops.batch_norm_inference(x, g, b, ONES, ONES)])
def test_unknown_rank(backend, call):
    run = tf.function(lambda x: call(x, None, None), input_signature=[tf.TensorSpec(None)], autograph=False)
    with pytest.raises(ValueError, match="rank"):
        run(X)


def test_a_mask_where_channels_are_not_last(backend):
    """Such a mask would be different for each channel."""
    with pytest.raises(ValueError, match=r"axis=1 for shape \(6, 3, 5\)"):
        ops.batch_norm(tf.zeros([6, 3, 5]), None, None, axis=1, mask=tf.ones([6, 3], tf.bool))
