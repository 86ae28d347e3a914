"""AdaptiveGradientClipping against its definition in float64 NumPy, one unit at a time."""

import itertools
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

from accumops.optimizer.clipping import AdaptiveGradientClipping

SHAPES = [(), (5,), (7, 4), (3, 2, 4), (3, 3, 2, 6), (1, 1), (4, 1), (1, 4)]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
PAIRS = [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] == pair[1] or "float32" in pair]
MODES = ["eager", "graph", "xla"]
TOLERANCE = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-6, "float64": 1e-13}


def units(shape):
    """An index for each unit of a variable."""
    return [...] if len(shape) < 2 else [(..., i) for i in range(shape[-1])]


def norm(values):
    return math.sqrt(sum(float(value) ** 2 for value in np.ravel(values)))


def definition(gradient, weights, clip_factor, epsilon):
    """Equation 3 of the paper, and how many units it clips."""
    gradient = gradient.copy()
    clipped = 0
    for unit in units(gradient.shape):
        size, reference = norm(gradient[unit]), max(norm(weights[unit]), epsilon)
        if size / reference > clip_factor:
            gradient[unit] = clip_factor * reference / size * gradient[unit]
            clipped += 1
    return gradient, clipped


def wide(tensor):
    """The values of a tensor or variable in float64."""
    return np.asarray(tf.cast(tf.convert_to_tensor(tensor), tf.float64))


def dense(gradient, shape):
    """The gradient of the whole variable, in float64."""
    if not isinstance(gradient, tf.IndexedSlices):
        return wide(gradient)
    result = np.zeros(shape)
    np.add.at(result, np.asarray(gradient.indices), wide(gradient.values))
    return result


def slices(values, indices, shape=None, dtype="float32"):
    return tf.IndexedSlices(tf.cast(values, dtype), tf.constant(indices, "int32"), shape)


def variable_of(values, dtype="float32"):
    return tf.Variable(tf.cast(values, dtype))


def assert_same_bits(actual, wanted):
    actual, wanted = (np.asarray(tf.convert_to_tensor(values).numpy()) for values in (actual, wanted))
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("mode", "pair"),
    # Eagerly and in a graph pairs take turns.
    cross(
        MODES,
        PAIRS,
        default=lambda mode, pair: PAIRS.index(pair) % 2 == MODES.index(mode),
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
    indirect=["mode"],
)
@pytest.mark.some_by_default(3)
def test_definition(mode, pair, rng):
    """All ranks, with units far below their threshold and far above it side by side."""
    gradient_dtype, variable_dtype = pair
    clip_factor, epsilon = 0.1, 0.05
    variables, gradients = [], []
    for shape, (gain, make) in itertools.product(SHAPES, [(0.01, tf.Variable), (1.0, keras.Variable)]):
        weights = rng.standard_normal(shape)
        sizes = gain * np.resize([10.0, 0.1, 3.0, 0.3], shape[-1:] if len(shape) >= 2 else ())
        variables.append(make(tf.constant(weights, variable_dtype), dtype=variable_dtype))
        gradients.append(tf.constant(rng.standard_normal(shape) * sizes, gradient_dtype))
    clip = AdaptiveGradientClipping(clip_factor, epsilon)
    results = mode(lambda *gradients: clip(gradients, variables))(*gradients)
    clipped = total = 0
    for gradient, variable, result in zip(gradients, variables, results, strict=True):
        wanted, count = definition(wide(gradient), wide(variable), clip_factor, epsilon)
        assert result.dtype == gradient.dtype
        np.testing.assert_allclose(wide(result), wanted, rtol=TOLERANCE[gradient_dtype], atol=1e-7)
        clipped, total = clipped + count, total + len(units(gradient.shape))
    assert total // 4 < clipped < 3 * total // 4


SPARSE = {
    "unique": ((9, 4), [5, 0, 7]),
    "duplicates": ((9, 4), [5, 0, 5, 5, 7, 0]),
    "one row over and over": ((9, 4), [3] * 8),
    "a vector": ((9,), [5, 0, 5]),
    "rank 3": ((6, 2, 4), [1, 1, 4]),
    "rank 4": ((6, 2, 3, 4), [5, 0, 5]),
    "no row": ((9, 4), []),
}


INDICES = dict(zip(DTYPES, ["int32", "int64"] * 2, strict=True))
COMPILED_SPARSE = [("duplicates", "bfloat16"), ("a vector", "float64"), ("rank 4", "float16"), ("no row", "float32")]


def sparse_by_default(mode, case, dtype):
    """Eagerly and in a graph each case has two of the dtypes, in turn. XLA compiles each dtype once."""
    if mode == "xla":
        return (case, dtype) in COMPILED_SPARSE
    return (MODES.index(mode) + list(SPARSE).index(case) + DTYPES.index(dtype)) % 2 == 0


@pytest.mark.parametrize(
    ("mode", "case", "dtype"),
    cross(MODES, SPARSE, DTYPES, default=sparse_by_default),
    indirect=["mode"],
)
@pytest.mark.some_by_default(16)
def test_sparse(mode, case, dtype, rng):
    shape, indices = SPARSE[case]
    clip_factor, epsilon = 0.1, 0.05
    variable = variable_of(rng.standard_normal(shape), dtype)
    sizes = np.resize([10.0, 0.001, 3.0, 0.0003], shape[-1:] if len(shape) >= 2 else ())
    values = tf.constant(rng.uniform(0.5, 1.5, (len(indices), *shape[1:])) * sizes, dtype)
    indices = tf.constant(indices, INDICES[dtype])
    clip = AdaptiveGradientClipping(clip_factor, epsilon)

    def apply(values, indices):
        return clip([tf.IndexedSlices(values, indices, tf.constant(shape))], [variable])

    (result,) = mode(apply)(values, indices)
    assert isinstance(result, tf.IndexedSlices)
    assert result.values.dtype == values.dtype
    np.testing.assert_array_equal(result.indices, indices)
    np.testing.assert_array_equal(result.dense_shape, shape)
    summed = dense(tf.IndexedSlices(values, indices), shape)
    wanted, clipped = definition(summed, wide(variable), clip_factor, epsilon)
    assert clipped == (0 if case == "no row" else max(1, len(units(shape)) // 2))
    np.testing.assert_allclose(dense(result, shape), wanted, rtol=TOLERANCE[dtype])
    for unit in units(shape):
        if np.array_equal(wanted[unit], summed[unit]):
            assert_same_bits(result.values.numpy()[unit], values.numpy()[unit])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]),  # each below the threshold, their sum above it
        ([64.0, -64.0, 2.0, -1.5], [64.0, -64.0, 2.0, -1.5]),  # the other way round
        ([64.0, -64.0, 3.0, 1.0], [16.0, -16.0, 0.75, 0.25]),
        ([64.0, -64.0, 3.0, -3.0], [64.0, -64.0, 3.0, -3.0]),  # no gradient at all
    ],
)
@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode != "xla"), indirect=True)
def test_rows_that_repeat_count_with_their_sum(mode, rows, wanted):
    """The threshold is 1."""
    clip = AdaptiveGradientClipping(clip_factor=0.5, epsilon=2.0)
    variable = variable_of(np.zeros([5, 1]))
    apply = mode(lambda values: clip([slices(values, [2, 2, 2, 2])], [variable])[0].values)
    np.testing.assert_allclose(apply(tf.constant(rows)[:, None]), np.array(wanted)[:, None], rtol=1e-6)


def test_a_sparse_gradient_is_clipped_like_the_dense_one(rng):
    """The norm of the weights is taken over the whole variable, whichever rows the gradient has."""
    weights = rng.standard_normal((50, 4))
    weights[10:] *= 10
    variable = variable_of(weights)
    gradient = slices(rng.standard_normal((6, 4)) * 20, [1, 2, 3, 2, 1, 1])
    clip = AdaptiveGradientClipping(0.01)
    same = tf.constant(dense(gradient, (50, 4)), tf.float32)
    sparse_result, dense_result = clip([gradient, same], [variable, variable])
    _, clipped = definition(wide(same), wide(variable), 0.01, 1e-3)
    assert clipped == 4
    np.testing.assert_allclose(dense(sparse_result, (50, 4)), dense_result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    cross(MODES, DTYPES, default=lambda mode, dtype: mode != "xla" or dtype == "float16"),
    indirect=["mode"],
)
def test_up_to_the_threshold_nothing_changes(mode, dtype):
    """Bit for bit, the threshold itself and minus zero included."""
    clip = AdaptiveGradientClipping(clip_factor=0.25, epsilon=1e-3)
    below = np.array([[0.5, -0.0, 1e-4], [-0.25, 1e-3, 0.1]])
    at = np.array([[1.0, -41.0, 47.0], [41.0, 49.0, -55.0]])  # 1 / 41 * 41 is not 1
    above = np.array([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    variable = variable_of([[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]], dtype)
    variables = [variable, variable_of(4 * at, dtype), variable]
    gradients = [tf.constant(values, dtype) for values in (below, at, above)]
    results = mode(lambda *gradients: clip(gradients, variables))(*gradients)
    assert_same_bits(results[0], gradients[0])
    assert_same_bits(results[1], gradients[1])
    np.testing.assert_allclose(wide(results[2]), above / math.sqrt(2), rtol=TOLERANCE[dtype])


ZEROS = [(), (3,), (4, 3)]


@pytest.mark.parametrize(
    ("mode", "shape", "dtype"),
    # XLA compiles one dtype.
    cross(
        MODES, ZEROS, DTYPES, default=lambda mode, shape, dtype: mode != "xla" or (dtype, shape) == ("float32", (4, 3))
    ),
    ids=str,
    indirect=["mode"],
)
@pytest.mark.some_by_default(13)
def test_zeros(mode, dtype, shape):
    """A zero gradient stays, whatever the weights; weights of zero count as epsilon."""
    clip = AdaptiveGradientClipping(clip_factor=0.5, epsilon=0.25)
    zero_weights, weights = variable_of(np.zeros(shape), dtype), variable_of(np.ones(shape), dtype)
    zero, gradient = tf.zeros(shape, dtype), tf.ones(shape, dtype)

    def apply(zero, gradient):
        return clip([zero, zero, gradient], [weights, zero_weights, zero_weights])

    of_weights, of_zero_weights, clipped = mode(apply)(zero, gradient)
    assert_same_bits(of_weights, zero)
    assert_same_bits(of_zero_weights, zero)
    for unit in units(shape):
        assert norm(wide(clipped)[unit]) == pytest.approx(0.125, rel=TOLERANCE[dtype])


BAD = [[np.inf], [-np.inf], [np.nan], [np.nan, np.inf], [np.inf, -np.inf]]


def by_default(mode, bad, dtype, sparse):
    """Sparse or dense in turn. XLA compiles each combination of values that are not finite once, with one dtype."""
    turn = BAD.index(bad) + DTYPES.index(dtype)
    if mode == "xla":
        return turn % len(DTYPES) == 0 and sparse == BAD.index(bad) % 2
    return sparse == (turn + MODES.index(mode)) % 2


@pytest.mark.parametrize(
    ("mode", "bad", "dtype", "sparse"),
    cross(MODES, BAD, DTYPES, [False, True], default=by_default),
    ids=str,
    indirect=["mode"],
)
@pytest.mark.some_by_default(20)
def test_what_is_not_finite_stays(mode, bad, dtype, sparse):
    """Its unit does not change, and the others are clipped as ever."""
    values = np.array([[8.0, 0.0, 8.0], [-8.0, 0.0, 8.0], [8.0, 0.0, -8.0]])
    values[: len(bad), 1] = bad
    variable = variable_of(np.ones([3, 3]), dtype)
    clip = AdaptiveGradientClipping(0.01)
    gradient = tf.constant(values, dtype)

    def apply(gradient):
        (result,) = clip([slices(gradient, [2, 0, 2], dtype=dtype) if sparse else gradient], [variable])
        return result.values if sparse else result

    result = mode(apply)(gradient)
    assert_same_bits(result.numpy()[:, 1], gradient.numpy()[:, 1])
    others = wide(result)[:, [0, 2]]
    assert np.all(np.isfinite(others))
    assert np.abs(others).max() < 0.1


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode != "xla"), indirect=True)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_vector_that_is_not_finite_stays(mode, shape, bad):
    values = np.full(shape, 8.0, "float32")
    values[(0,) * len(shape)] = bad
    clip, variable = AdaptiveGradientClipping(0.01), variable_of(np.ones(shape))
    (result,) = mode(lambda gradient: clip([gradient], [variable]))(tf.constant(values))
    assert_same_bits(result, values)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_weights_that_are_not_finite_leave_the_gradient(bad):
    gradient = tf.constant([[5.0], [6.0]])
    (result,) = AdaptiveGradientClipping()([gradient], [variable_of([[bad], [1.0]])])
    assert_same_bits(result, gradient)


@pytest.mark.parametrize(
    ("dtype", "size", "epsilon"),
    [
        ("float16", 60000.0, 1e-3),
        ("bfloat16", 1e38, 1e-3),
        ("float32", 3e38, 1e-3),
        ("float64", 1e308, 1e-3),
        ("float32", 1e-25, 1e-30),
        ("float64", 1e-200, 1e-210),
    ],
)
@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode != "xla"), indirect=True)
def test_squares_out_of_range(mode, dtype, size, epsilon):
    """A norm whose square overflows or vanishes is still the norm."""
    clip = AdaptiveGradientClipping(clip_factor=0.5, epsilon=epsilon)
    variable = variable_of(np.zeros([4, 2]), dtype)
    gradient = tf.constant(np.array([[size, size / 2]] * 4), dtype)
    (result,) = mode(lambda gradient: clip([gradient], [variable]))(gradient)
    np.testing.assert_allclose(wide(result), np.full([4, 2], epsilon / 4), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e30, 1e-25])
def test_weights_whose_squares_are_out_of_range(size):
    clip = AdaptiveGradientClipping(clip_factor=0.5, epsilon=1e-30)
    (result,) = clip([tf.fill([4, 1], np.float32(4 * size))], [variable_of(np.full([4, 1], size))])
    np.testing.assert_allclose(result, np.full([4, 1], size / 2), rtol=1e-6)


PATHS = ["block_dense/kernel", "block_dense/bias", "head/kernel", "head/bias"]
EXCLUDE = {
    "nothing": ((), []),
    "a layer": (["head"], ["head/kernel", "head/bias"]),
    "the end of a path": (["bias$"], ["block_dense/bias", "head/bias"]),
    "the start of a path": (["^dense"], []),
    "several": (("^head/k", "dense/b"), ["head/kernel", "block_dense/bias"]),
    "alternatives": ({"head/(kernel|bias)"}, ["head/kernel", "head/bias"]),
}


@pytest.mark.parametrize("kind", ["tf", "keras"])
@pytest.mark.parametrize("case", EXCLUDE)
def test_exclude(case, kind):
    exclude, left = EXCLUDE[case]
    if kind == "tf":
        variables = [tf.Variable(tf.ones([2]), name=path) for path in PATHS]
        exclude = [pattern.replace("bias$", "bias:0$") for pattern in exclude]
    else:
        variables = []
        for path in PATHS:
            scope, name = path.split("/")
            with keras.name_scope(scope):
                variables.append(keras.Variable(np.ones([2]), name=name))
        assert [variable.path for variable in variables] == PATHS
    gradients = [tf.fill([2], 100.0) for _ in PATHS]
    results = AdaptiveGradientClipping(exclude=exclude)(gradients, variables)
    for path, gradient, result in zip(PATHS, gradients, results, strict=True):
        if path in left:
            assert_same_bits(result, gradient)
        else:
            np.testing.assert_allclose(result, np.full([2], 0.01), rtol=1e-6)


def test_exclude_is_read_once():
    clip = AdaptiveGradientClipping(exclude=iter(["head", "bias"]))
    assert clip.exclude == ("head", "bias")
    assert clip.exclude == ("head", "bias")


def test_none_and_order(mode):
    variables = [variable_of(np.ones(shape)) for shape in ([2], [3], [4, 1])]
    clip = AdaptiveGradientClipping(1.0)
    first, none, last = mode(lambda a, b: clip([a, None, b], variables))(tf.fill([2], 9.0), tf.fill([4, 1], 9.0))
    assert none is None
    np.testing.assert_allclose(first, np.ones([2]), rtol=1e-6)
    np.testing.assert_allclose(last, np.ones([4, 1]), rtol=1e-6)
    assert clip([], []) == []
    assert clip(iter([None]), iter(variables[:1])) == [None]


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    cross(
        ["float32", "mixed_float16", "bfloat16"],
        [False, True],
        default=lambda policy, jit_compile: not jit_compile,
    ),
)
def test_gradients_of_a_model(policy, jit_compile, rng):
    """Gradients of real layers: a table with sparse ones, a convolution, a normalization, biases."""
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(11, 8, dtype=policy),
            keras.layers.Conv1D(5, 3, activation="relu", dtype=policy),
            keras.layers.LayerNormalization(dtype=policy),
            keras.layers.Flatten(),
            keras.layers.Dense(1, name="head", dtype=policy),
        ]
    )
    variables = model.trainable_variables
    clip = AdaptiveGradientClipping(0.02, exclude=["head"])

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(x, training=True), tf.float32) - y) ** 2)
        gradients = tape.gradient(loss, variables)
        return gradients, clip(gradients, variables)

    gradients, results = step(tf.constant(rng.integers(0, 11, (4, 6))), tf.fill([4, 1], 10.0))
    assert isinstance(gradients[0], tf.IndexedSlices)
    assert isinstance(results[0], tf.IndexedSlices)
    clipped = 0
    for variable, gradient, result in zip(variables, gradients, results, strict=True):
        before, after = dense(gradient, variable.shape), dense(result, variable.shape)
        if "head" in variable.path:
            np.testing.assert_array_equal(after, before)
            continue
        wanted, count = definition(before, wide(variable), clip.clip_factor, clip.epsilon)
        tolerance = TOLERANCE["bfloat16" if policy == "bfloat16" else "float32"] * 8
        np.testing.assert_allclose(after, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
        clipped += count
    assert clipped > 0


def test_one_trace_for_any_number_of_rows():
    """Sparse gradients of a batch size that is not known when tracing."""
    variable = variable_of(np.ones([6, 2]))
    clip = AdaptiveGradientClipping(0.1)

    @tf.function(input_signature=[tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)])
    def apply(values, indices):
        return clip([tf.IndexedSlices(values, indices)], [variable])[0].values

    for indices in ([1], [4, 4, 0], []):
        gradient = slices(np.full([len(indices), 2], 5.0), indices)
        result = tf.IndexedSlices(apply(gradient.values, gradient.indices), gradient.indices)
        wanted, _ = definition(dense(gradient, (6, 2)), wide(variable), 0.1, 1e-3)
        np.testing.assert_allclose(dense(result, (6, 2)), wanted, rtol=1e-6)


def test_sparse_results_repeat_exactly(rng):
    """The same gradient gives the same bits each time, duplicates or not."""
    variable = variable_of(rng.standard_normal((100, 16)))
    gradient = slices(rng.standard_normal((5000, 16)), rng.integers(0, 100, 5000))
    clip = AdaptiveGradientClipping()
    results = [clip([gradient], [variable])[0].values.numpy() for _ in range(5)]
    assert not np.array_equal(results[0], gradient.values)
    assert len({result.tobytes() for result in results}) == 1


CONFIGS = [{}, {"clip_factor": 0.02, "epsilon": 1e-4, "exclude": ("head", "bias$")}, {"clip_factor": 1, "epsilon": 2}]


@pytest.mark.parametrize("arguments", CONFIGS)
def test_serialization(arguments):
    clip = AdaptiveGradientClipping(**arguments)
    through_json = json.loads(json.dumps(keras.saving.serialize_keras_object(clip)))
    assert through_json["registered_name"] == "accumops>AdaptiveGradientClipping"
    for copy in (
        keras.saving.deserialize_keras_object(through_json),
        AdaptiveGradientClipping.from_config(clip.get_config()),
    ):
        assert isinstance(copy, AdaptiveGradientClipping)
        assert copy.get_config() == clip.get_config()
        assert copy.clip_factor == arguments.get("clip_factor", 0.01)
        assert copy.epsilon == arguments.get("epsilon", 1e-3)
        assert copy.exclude == tuple(arguments.get("exclude", ()))


def test_repr():
    clip = AdaptiveGradientClipping(0.02, exclude=("head",))
    assert repr(clip) == "<AdaptiveGradientClipping clip_factor=0.02, epsilon=0.001, exclude=['head']>"


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.float64(0.5), np.int64(2)])
@pytest.mark.parametrize("name", ["clip_factor", "epsilon"])
def test_numbers(name, value):
    clip = AdaptiveGradientClipping(**{name: value})
    assert getattr(clip, name) == value
    assert type(getattr(clip, name)) is float


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("0.1", TypeError, "must be a number. Received: '0.1'"),
        (None, TypeError, "must be a number. Received: None"),
        (True, TypeError, "must be a number. Received: True"),
        ([0.1], TypeError, r"must be a number. Received: \[0.1\]"),
        (1j, TypeError, "must be a number. Received: 1j"),
        (0, ValueError, "must be finite and greater than 0. Received: 0"),
        (-0.5, ValueError, "must be finite and greater than 0. Received: -0.5"),
        (math.inf, ValueError, "must be finite and greater than 0. Received: inf"),
        (math.nan, ValueError, "must be finite and greater than 0. Received: nan"),
    ],
)
@pytest.mark.parametrize("name", ["clip_factor", "epsilon"])
def test_number_errors(name, value, error, message):
    with pytest.raises(error, match=f"`{name}` {message}"):
        AdaptiveGradientClipping(**{name: value})


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("head", TypeError, r"for one of them, use \['head'\]"),
        (None, TypeError, "must be an iterable of strings. Received: None"),
        (3, TypeError, "must be an iterable of strings. Received: 3"),
        (["head", 3], TypeError, "Received one that holds 3"),
        (b"head", TypeError, "Received one that holds 104"),
        (["head", "(bias"], ValueError, r"must hold regular expressions. Received: '\(bias' \(missing \)"),
    ],
)
def test_exclude_errors(exclude, error, message):
    with pytest.raises(error, match=message):
        AdaptiveGradientClipping(exclude=exclude)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([], "one gradient for each variable. Received: 0 gradients for 1 variables"),
        ([None, None], "one gradient for each variable. Received: 2 gradients for 1 variables"),
        ([tf.zeros([3])], r"'kernel:0' must have its shape, \(4, 3\). Received: \(3,\)"),
        ([tf.zeros([4, 1])], r"'kernel:0' must have its shape, \(4, 3\). Received: \(4, 1\)"),
        ([slices(np.zeros([1, 2]), [0])], r"must have its shape, \(4, 3\). Received: rows of \(2,\)"),
        ([tf.zeros([4, 3], tf.int32)], "'kernel:0' must be of a floating-point dtype. Received: int32"),
    ],
)
def test_call_errors(mode, gradients, message):
    variable = tf.Variable(tf.ones([4, 3]), name="kernel")
    with pytest.raises(ValueError, match=message):
        mode(lambda: AdaptiveGradientClipping()(gradients, [variable]))()


def test_a_scalar_has_no_rows():
    with pytest.raises(ValueError, match=r"'gain:0' must have its shape, \(\). Received: rows of \(\)"):
        AdaptiveGradientClipping()([slices(np.zeros([1]), [0])], [tf.Variable(1.0, name="gain")])
