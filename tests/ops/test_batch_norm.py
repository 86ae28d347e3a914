"""The batch normalization ops: both backends in every mode against a definition in NumPy's float64."""

import dataclasses
import zlib

import keras
import ml_dtypes
import numpy as np
import processes
import pytest
import tensorflow as tf
from crosses import cross, label, turns

from accumops import ops

NUMPY = {tf.float16: np.float16, tf.bfloat16: ml_dtypes.bfloat16, tf.float32: np.float32, tf.float64: np.float64}
HALF = (tf.float16, tf.bfloat16)
# A power of two, so that it is exact in every dtype.
EPSILON = 2.0**-10
# The allowed errors, as multiples of the largest magnitude.
TOLERANCE = {tf.float16: 1e-5, tf.bfloat16: 1e-5, tf.float32: 1e-5, tf.float64: 1e-13}


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array's shape and the axis of its channels, and whether it has a gamma, a beta and a mask."""

    shape: tuple[int, ...]
    axis: int
    mask: str | None = None  # keeps "some", "all" or "none" of the places
    gamma: bool = True
    beta: bool = True
    compiled: bool = False  # whether XLA compiles it as well, which takes longest

    def __str__(self):
        given = [name for name in ("gamma", "beta") if getattr(self, name)]
        return f"{list(self.shape)} axis {self.axis} mask {self.mask} with {given}"


# Numbers of channels around vectors and tiles of 512 columns; numbers of rows around chunks of 128.
LAYOUTS = [
    Layout((127,), 0),
    Layout((1,), -1, gamma=False),
    Layout((17,), 0, mask="all"),
    Layout((1, 64), -1, compiled=True),
    Layout((2, 100), 1),
    Layout((127, 1), -1),
    Layout((128, 3), -1),
    Layout((129, 16), 1, mask="some"),
    Layout((129, 17), -1, gamma=False, beta=False),
    Layout((4097, 3), -1, compiled=True),
    Layout((4097, 1), 1),
    Layout((4097, 64), -1, mask="some"),
    Layout((4097, 100), 1, beta=False),
    Layout((128, 1001), -1),
    Layout((513, 513), -1, mask="some"),
    Layout((129, 1001), -1, mask="none"),
    Layout((64, 129), 0),
    Layout((513, 127), -2, gamma=False),
    Layout((3, 4097), 0),
    Layout((1, 4097), 0),
    Layout((7, 33, 16), -1, mask="some", compiled=True),
    Layout((2, 17, 129), 1, compiled=True),
    Layout((100, 3, 43), -3),
    Layout((5, 9, 100), 2, mask="all"),
    Layout((2, 7, 9, 64), -1),
    Layout((2, 3, 64, 65), 1),
    Layout((3, 4, 17, 5), -2),
    Layout((2, 513, 3, 1), 1),
    Layout((6, 3, 1, 1), 1, beta=False),
    Layout((2, 3, 5, 7, 3), -1, mask="none", compiled=True),
    Layout((2, 3, 16, 3, 43), 2),
    Layout((3, 1, 4, 11, 31), 1),
]


def as_rows(array, axis):
    """Returns the array as a matrix, with a row for each place and a column for each channel."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def from_rows(rows, shape, axis):
    moved = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    return np.moveaxis(rows.reshape(*moved, shape[axis]), -1, axis)


def wide(array):
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


@dataclasses.dataclass
class Expected:
    """An expected value, and the magnitude of the numbers that it was computed from."""

    value: np.ndarray
    magnitude: float


class Definition:
    """Batch normalization and its gradients, by the textbook's formulas."""

    def __init__(self, x, gamma, beta, dy, axis, epsilon, mask=None, moments=None):
        self._shape, self._axis = x.shape, axis
        rows, dy = wide(as_rows(x, axis)), wide(as_rows(dy, axis))
        gamma, beta = wide(gamma), wide(beta)
        if moments is None:
            weights = np.ones(len(rows), bool) if mask is None else mask.reshape(-1)
            count = weights.sum()
            divisor = max(count, 1)
            mean = rows[weights].sum(0) / divisor
            variance = ((rows[weights] - mean) ** 2).sum(0) / divisor
        else:
            count, weights = 0, np.zeros(len(rows), bool)
            mean, variance = (wide(each) for each in moments)
        inverse = 1 / np.sqrt(variance + epsilon)
        normal = (rows - mean) * inverse
        y = normal * gamma + beta
        dbeta, dgamma = dy.sum(0), (dy * normal).sum(0)
        through = (dbeta + normal * dgamma) / max(count, 1) * (weights[:, None] & (count > 0))
        slope = gamma * inverse
        self.count = count
        self.y = self._array(y, np.abs(normal * gamma) + np.abs(beta))
        self.mean = Expected(mean, largest(rows))
        self.variance = Expected(variance, largest(variance))
        self.dx = self._array(slope * (dy - through), np.abs(slope * dy) + np.abs(slope * through))
        self.dgamma = Expected(dgamma, largest(dgamma, dy * normal))
        self.dbeta = Expected(dbeta, largest(dbeta, dy))

    def _array(self, rows, terms):
        return Expected(from_rows(rows, self._shape, self._axis), largest(rows, terms))


def largest(*arrays):
    return float(max(np.abs(array).max(initial=0) for array in arrays))


def assert_close(actual, expected, dtype, name):
    """Asserts that errors are within `TOLERANCE`; results in half precision may be off by half an ulp more."""
    assert actual.shape == expected.value.shape, name
    bound = np.full(actual.shape, TOLERANCE[dtype] * expected.magnitude)
    if actual.dtype in (np.float16, ml_dtypes.bfloat16):
        nearest = np.abs(expected.value).astype(actual.dtype)
        bound += np.spacing(nearest).astype(np.float64) / 2
    error = np.abs(wide(actual) - expected.value)
    assert not error.size or np.all(error <= bound), f"{name}: {np.max(error - bound)} above the bound {np.max(bound)}"


class Data:
    """Random inputs of a layout, and the expected results."""

    def __init__(self, layout, dtype, mean=0.5, deviation=2.0):
        rng = np.random.default_rng(zlib.crc32(str(layout).encode()))
        channels = layout.shape[layout.axis]
        statistics = np.float64 if dtype == tf.float64 else np.float32
        self.layout, self.dtype = layout, dtype
        self.x = rng.normal(mean, deviation, layout.shape).astype(NUMPY[dtype])
        self.dy = (rng.standard_normal(layout.shape) + 0.1).astype(NUMPY[dtype])
        # These have few digits, because Keras's layer rounds its gamma and beta to half precision.
        self.gamma = (rng.integers(2, 17, channels) / 8).astype(statistics)
        self.beta = (rng.integers(-16, 17, channels) / 8).astype(statistics)
        self.moments = [
            rng.standard_normal(channels).astype(statistics),
            rng.uniform(0.1, 4, channels).astype(statistics),
        ]
        self.mask = None
        if layout.mask is not None:
            share = {"some": 0.7, "all": 1.0, "none": 0.0}[layout.mask]
            self.mask = rng.random(layout.shape[:-1]) < share
        self.gamma = self.gamma if layout.gamma else np.ones_like(self.gamma)
        self.beta = self.beta if layout.beta else np.zeros_like(self.beta)

    def expected(self, *, inference=False):
        moments = self.moments if inference else None
        return Definition(
            self.x, self.gamma, self.beta, self.dy, self.layout.axis, EPSILON, None if inference else self.mask, moments
        )

    def parameters(self):
        """Returns gamma and beta as tensors that gradients can flow to, or None where there are none."""
        gamma = tf.constant(self.gamma) if self.layout.gamma else None
        beta = tf.constant(self.beta) if self.layout.beta else None
        return gamma, beta

    def train(self, mode=lambda function: function, x=None):
        """Runs `batch_norm`. Returns y, the moments and the gradients."""
        gamma, beta = self.parameters()
        mask = None if self.mask is None else tf.constant(self.mask)

        @mode
        def run(x, dy):
            with tf.GradientTape() as tape:
                watched = [each for each in (x, gamma, beta) if each is not None]
                tape.watch(watched)
                y, moments = ops.batch_norm(x, gamma, beta, axis=self.layout.axis, epsilon=EPSILON, mask=mask)
            return y, moments, tape.gradient(y, watched, dy)

        return run(tf.constant(self.x) if x is None else x, tf.constant(self.dy))

    def infer(self, mode=lambda function: function):
        gamma, beta = self.parameters()
        mean, variance = (tf.constant(each) for each in self.moments)

        @mode
        def run(x, dy):
            with tf.GradientTape() as tape:
                watched = [each for each in (x, gamma, beta) if each is not None]
                tape.watch(watched)
                y = ops.batch_norm_inference(x, gamma, beta, mean, variance, axis=self.layout.axis, epsilon=EPSILON)
            return y, tape.gradient(y, watched, dy)

        return run(tf.constant(self.x), tf.constant(self.dy))

    def check_moments(self, moments, expected):
        assert moments.count.dtype == tf.int64
        assert moments.count.numpy() == expected.count, self.layout
        for each in moments[1:]:
            assert each.dtype == (tf.float64 if self.dtype == tf.float64 else tf.float32)
        both = moments.mean.numpy().astype(np.float64) + moments.rest.numpy()
        assert_close(both, expected.mean, self.dtype, f"mean of {self.layout}")
        assert_close(moments.variance.numpy(), expected.variance, self.dtype, f"variance of {self.layout}")

    def check_gradients(self, gradients, expected):
        names = ["dx", *(["dgamma"] if self.layout.gamma else []), *(["dbeta"] if self.layout.beta else [])]
        for name, gradient in zip(names, gradients, strict=True):
            assert_close(gradient.numpy(), getattr(expected, name), self.dtype, f"{name} of {self.layout}")


def layouts(backend, mode, dtype):
    """The fused op eagerly in all layouts. Its graphs and TensorFlow's ops have one in three, others for each dtype."""
    if mode.name == "xla":
        return [layout for layout in LAYOUTS if layout.compiled]
    return LAYOUTS if (backend, mode.name) == ("fused", "eager") else LAYOUTS[list(NUMPY).index(dtype) % 3 :: 3]


# Fused, each dtype runs eagerly, and in turn in a graph or compiled. The reference is TensorFlow's own operations: half
# precision runs eagerly and compiled, the others in graphs too.
TURNS = {"fused": ["xla", "graph"], "reference": ["eager", "xla", "graph"]}
DEFINED = cross(
    ["fused", "reference"],
    ["eager", "graph", "xla"],
    NUMPY,
    default=lambda backend, mode, dtype: (
        (backend, mode) == ("fused", "eager") or (dtype, mode) in turns(NUMPY, TURNS[backend])
    ),
)


def check_training(mode, dtype, layouts):
    for layout in layouts:
        data = Data(layout, dtype)
        expected = data.expected()
        y, moments, gradients = data.train(mode)
        assert y.dtype == dtype
        assert_close(y.numpy(), expected.y, dtype, f"y of {layout}")
        data.check_moments(moments, expected)
        data.check_gradients(gradients, expected)


def check_inference(mode, dtype, layouts):
    for layout in layouts:
        data = Data(layout, dtype)
        expected = data.expected(inference=True)
        y, gradients = data.infer(mode)
        assert y.dtype == dtype
        assert_close(y.numpy(), expected.y, dtype, f"y of {layout}")
        data.check_gradients(gradients, expected)


@pytest.mark.parametrize(("backend", "mode", "dtype"), DEFINED, ids=label, indirect=["backend", "mode"])
@pytest.mark.some_by_default(3)
def test_training_matches_the_definition(backend, mode, dtype):
    check_training(mode, dtype, layouts(backend, mode, dtype))


@pytest.mark.parametrize(("backend", "mode", "dtype"), DEFINED, ids=label, indirect=["backend", "mode"])
@pytest.mark.some_by_default(5)
def test_inference_matches_the_definition(backend, mode, dtype):
    check_inference(mode, dtype, layouts(backend, mode, dtype)[::2])


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", list(NUMPY), ids=label)
def test_every_layout_in_every_mode(backend, mode, dtype):
    check_training(mode, dtype, LAYOUTS)
    check_inference(mode, dtype, LAYOUTS)


def test_no_gradient_flows_to_the_moments(backend):
    x, mean, variance = tf.ones([4, 3]), tf.zeros([3]), tf.ones([3])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, mean, variance])
        y = ops.batch_norm_inference(x, None, None, mean, variance)
        _, moments = ops.batch_norm(x, None, None)
        total = tf.add_n([tf.reduce_sum(each) for each in moments[1:]])
    assert tape.gradient(y, [mean, variance]) == [None, None]
    assert tape.gradient(total, x) is None


@pytest.mark.parametrize("shape", [(40, 3), (5, 8, 3), (2, 3, 40)])
def test_default_epsilon_and_parameters(backend, rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    axes = tuple(range(len(shape) - 1))
    y, _ = ops.batch_norm(x, None, None)
    np.testing.assert_allclose(y, (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3), atol=1e-5)


def test_mask_of_numbers(backend, rng):
    x = tf.constant(rng.standard_normal((6, 3)), tf.float32)
    mask = np.array([1, 0, 1, 1, 0, 1])
    (a, wanted), (b, moments) = (ops.batch_norm(x, None, None, mask=tf.constant(m)) for m in (mask.astype(bool), mask))
    np.testing.assert_array_equal(a, b)
    assert moments.count.numpy() == wanted.count.numpy() == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masked_values_are_not_in_the_moments(backend, mode, rng, value):
    x = rng.standard_normal((300, 20)).astype(np.float32)
    mask = rng.random(300) < 0.5
    expected = x[mask].astype(np.float64)
    x[~mask] = value
    y, moments = mode(lambda x: ops.batch_norm(x, None, None, mask=tf.constant(mask)))(tf.constant(x))
    assert moments.count.numpy() == mask.sum()
    np.testing.assert_allclose(moments.mean, expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.variance, expected.var(0), rtol=1e-5)
    assert np.isfinite(y.numpy()[mask]).all()


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 1), ((0, 3, 4), 1), ((5, 3, 0), 1), ((0, 2, 100), 2)])
def test_no_values_at_all(backend, mode, shape, axis):
    data = Data(Layout(shape, axis), tf.float32)
    y, moments, (dx, dgamma, dbeta) = data.train(mode)
    assert y.shape == dx.shape == shape
    assert moments.count.numpy() == 0
    for each in (*moments[1:], dgamma, dbeta):
        np.testing.assert_array_equal(each, np.zeros(shape[axis]))
    y, (dx, dgamma, dbeta) = data.infer(mode)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dgamma, np.zeros(shape[axis]))
    np.testing.assert_array_equal(dbeta, np.zeros(shape[axis]))


NO_CHANNELS = """
    import tensorflow as tf
    import accumops

    for backend in ("fused", "reference"):
        accumops.set_backend(backend)
        for shape, axis in [((5, 0), 1), ((0, 0), 1), ((5, 0, 4), 1), ((0,), 0)]:
            y, moments = accumops.ops.batch_norm(tf.zeros(shape), None, None, axis=axis)
            assert y.shape == shape, (backend, shape, y.shape)
            assert moments.mean.shape == moments.variance.shape == (0,), (backend, shape, moments)
            assert moments.count.numpy() >= 0, (backend, shape, moments)
            y = accumops.ops.batch_norm_inference(tf.zeros(shape), None, None, tf.zeros([0]), tf.zeros([0]), axis=axis)
            assert y.shape == shape, (backend, shape, y.shape)
"""


@pytest.mark.parametrize("masked", [False, True])
def test_a_number_of_rows_that_xla_learns_when_it_runs(rng, masked):
    values = rng.standard_normal((9, 3)).astype(np.float32)
    valid = tf.constant(values[:, :1] > -1)

    def train(x, chosen):
        with tf.GradientTape() as tape:
            tape.watch(x)
            rows = tf.boolean_mask(x, chosen)[:, tf.newaxis]
            mask = tf.boolean_mask(valid, chosen) if masked else None
            y, moments = ops.batch_norm(rows, tf.constant([1.0, 2.0, 3.0]), None, mask=mask)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x), *moments

    compiled = tf.function(train, jit_compile=True)
    for chosen in (values[:, 0] > 0, values[:, 0] < 9, values[:, 0] > 9):
        arguments = tf.constant(values), tf.constant(chosen)
        for actual, expected in zip(compiled(*arguments), train(*arguments), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_no_channels():
    """Runs in a process of its own, so that a call that never returns can be stopped."""
    done = processes.run(NO_CHANNELS, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize(("shape", "axis"), [((4097, 17), 1), ((1000, 64), 1), ((3, 5, 4097), 1)])
def test_large_mean_costs_no_digits(backend, mode, rng, shape, axis):
    """The mean is 1e4 and the deviation 1e-2, ten times the distance between float32's numbers near that mean.

    The definition gets the data as float32 has rounded them, so the usual bound holds.
    """
    layout = Layout(shape, axis)
    data = Data(layout, tf.float32, mean=1e4, deviation=1e-2)
    epsilon = 1e-9
    expected = Definition(data.x, data.gamma, data.beta, data.dy, axis, epsilon)
    y, moments = mode(lambda x: ops.batch_norm(x, data.gamma, data.beta, axis=axis, epsilon=epsilon))(
        tf.constant(data.x)
    )
    assert_close(y.numpy(), expected.y, tf.float32, "y")
    # TensorFlow's own sums of thousands of squares are longer than the fused op's, and less exact.
    np.testing.assert_allclose(
        moments.variance, expected.variance.value, rtol=1e-5 if backend == "fused" else 1e-4, atol=0
    )
    mean = moments.mean.numpy().astype(np.float64) + moments.rest.numpy()
    np.testing.assert_allclose(mean, expected.mean.value, rtol=0, atol=1e-4 * 1e-2)


def test_large_mean_of_many_rows(mode, rng):
    """The fused op adds few float32 numbers in one sum, however many rows there are."""
    x = rng.normal(1e4, 1e-2, (1 << 18, 4)).astype(np.float32)
    y, moments = mode(lambda x: ops.batch_norm(x, None, None, epsilon=1e-9))(tf.constant(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-5)
    assert largest(y.numpy() - (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-9)) < 1e-5 * largest(y.numpy())


@pytest.mark.parametrize("value", [0.1, 10000.1, -3e8])
def test_constant_channels_have_no_negative_variance(backend, mode, value):
    y, moments = mode(lambda x: ops.batch_norm(x, None, None, epsilon=1e-6))(tf.fill([4097, 5], value))
    variance = moments.variance.numpy()
    assert np.all(variance >= 0)
    assert np.all(variance <= (1e-6 * value) ** 2)
    assert np.isfinite(y.numpy()).all()


KERAS_LAYOUTS = [
    Layout((513, 64), -1),
    Layout((2, 9, 7, 17), -1),
    Layout((4, 16, 65), 1),
    Layout((129, 100), -1, "some"),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("layout", KERAS_LAYOUTS, ids=str)
def test_half_precision_is_as_good_as_keras(backend, dtype, layout, training):
    data = Data(layout, dtype)
    layer = keras.layers.BatchNormalization(axis=layout.axis, epsilon=EPSILON, dtype=f"mixed_{dtype.name}")
    layer.build(layout.shape)
    for variable, value in [
        (layer.gamma, data.gamma),
        (layer.beta, data.beta),
        (layer.moving_mean, data.moments[0]),
        (layer.moving_variance, data.moments[1]),
    ]:
        variable.assign(value)
    if not training:  # the layer rounds given moments to half precision, so the definition must as well
        data.moments = [each.astype(NUMPY[dtype]).astype(np.float32) for each in data.moments]
    x, dy = tf.constant(data.x), tf.constant(data.dy)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=None if data.mask is None else tf.constant(data.mask))
    keras_results = [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)]
    if training:
        y, _, gradients = data.train()
    else:
        y, gradients = data.infer()
    expected = data.expected(inference=not training)
    wanted = (expected.y, expected.dx, expected.dgamma, expected.dbeta)
    names = ("y", "dx", "dgamma", "dbeta")
    for name, ours, theirs, exact in zip(names, [y, *gradients], keras_results, wanted, strict=True):
        assert ours.dtype == (dtype if name in ("y", "dx") else tf.float32)
        error, allowed = (largest(wide(each.numpy()) - exact.value) for each in (ours, theirs))
        # Sums over a channel are float32. Keras's may be nearly exact by chance: allow for a few float32 roundings.
        rounding = 0 if name in ("y", "dx") else 1e-6 * largest(exact.value)
        assert error <= max(2 * allowed, rounding), (name, error, allowed)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", [Layout((6, 4, 8), -1, "some"), Layout((6, 8, 4), 1)], ids=str)
def test_no_copy_in_float32(dtype, layout):
    """Forward and backward, each tensor of x's size has x's dtype."""
    data = Data(layout, dtype)
    traced = []

    def trace(function):
        traced.append(tf.function(function))
        return traced[-1]

    data.train(trace)
    data.infer(trace)
    for function in traced:
        graph = function.get_concrete_function(tf.constant(data.x), tf.constant(data.dy)).graph
        operations = graph.get_operations()
        assert any(op.type == "AccumOps>BatchNormGrad" for op in operations)
        size = data.x.size
        for op in operations:
            for output in op.outputs:
                if output.shape.num_elements() == size:
                    assert output.dtype == dtype, op
        assert not [op for op in operations if op.type == "Cast" and op.inputs[0].shape == layout.shape]


def test_is_one_op_each_way_in_the_graph(backend):
    data = Data(Layout((6, 4, 8), -1), tf.float32)
    graphs = []

    def trace(function):
        graphs.append(tf.function(function).get_concrete_function(tf.constant(data.x), tf.constant(data.dy)).graph)
        return tf.function(function)

    data.train(trace)
    kinds = [op.type for op in graphs[0].get_operations()]
    fused = [kind for kind in kinds if kind.startswith("AccumOps>")]
    assert fused == (["AccumOps>BatchNorm", "AccumOps>BatchNormGrad"] if backend == "fused" else [])
    if backend == "fused":
        assert not {"Mul", "Sub", "Sum", "Mean", "Rsqrt"} & set(kinds)


def assert_same_bits(first, second):
    for a, b in zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


DETERMINISM = [
    Layout((40_000, 64), -1),
    Layout((70_001, 17), -1),
    Layout((5000, 600), -1, "some"),
    Layout((8, 33, 5000), 1),
    Layout((3, 3, 100, 1001), 1),
]


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
@pytest.mark.parametrize("layout", DETERMINISM, ids=str)
@pytest.mark.some_by_default(5)
def test_same_bits_every_time(layout, dtype):
    data = Data(layout, dtype)
    first = data.train()
    for _ in range(3):
        assert_same_bits(first, data.train())
    assert_same_bits(first, data.train(tf.function))


THREADS = """
    import sys
    import zlib
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
    from accumops import ops, set_backend

    set_backend("fused")
    digest = 0
    for shape, axis in [((40_000, 64), 1), ((40, 2048), 1), ((70_001, 17), 1), ((8, 33, 5000), 1), ((1_000_003, 1), 1)]:
        rng = np.random.default_rng(5)
        x = tf.constant(rng.normal(3, 1, shape), tf.float32)
        dy = tf.constant(rng.normal(0, 1, shape), tf.float32)
        parameters = [tf.constant(rng.normal(1, 1, shape[axis]), tf.float32) for _ in range(2)]
        with tf.GradientTape() as tape:
            tape.watch([x, *parameters])
            y, moments = ops.batch_norm(x, *parameters, axis=axis)
        for each in (y, *moments, *tape.gradient(y, [x, *parameters], dy)):
            digest = zlib.crc32(each.numpy().tobytes(), digest)
    print(digest)
"""


def test_same_bits_with_any_number_of_threads():
    outputs = set()
    for threads in (1, 7):
        done = processes.run(THREADS, threads, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().strip().isdigit()


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize(
    "layout", [Layout((130, 17), -1), Layout((130, 3), -1, "some"), Layout((130, 5, 7), 1)], ids=str
)
def test_unaligned_input(backend, dtype, layout):
    """A slice shares its tensor's buffer, from any element on."""
    data = Data(layout, dtype)
    aligned = data.train()
    longer = tf.concat([tf.zeros([1, *layout.shape[1:]], dtype), tf.constant(data.x)], 0)
    assert_same_bits(aligned, data.train(x=longer[1:]))
    np.testing.assert_array_equal(aligned[0], data.train()[0])


def test_shapes_unknown_until_run(backend):
    data = Data(Layout((7, 5, 3), -1, "some"), tf.float32)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None]),
            tf.TensorSpec(None, tf.bool),
            tf.TensorSpec([None, None, 3]),
        ]
    )
    def run(x, mask, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, moments = ops.batch_norm(x, data.gamma, data.beta, epsilon=EPSILON, mask=mask)
        return y, moments, tape.gradient(y, x, dy)

    expected = data.expected()
    y, moments, dx = run(data.x, data.mask, data.dy)
    assert_close(y.numpy(), expected.y, tf.float32, "y")
    data.check_moments(moments, expected)
    assert_close(dx.numpy(), expected.dx, tf.float32, "dx")


class TestSecondOrder:
    """Gradients of gradients, which only the reference has."""

    @pytest.fixture
    def second_order(self):
        def run(normalize):
            x = tf.constant([[1.0], [2.0], [4.0]])
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(normalize(x) ** 3)
                gradient = inner.gradient(loss, x)
            return outer.gradient(gradient, x)

        return run

    @pytest.mark.parametrize("name", ["batch_norm", "batch_norm_inference"])
    def test_raises_or_works(self, backend, second_order, name):
        def normalize(x):
            if name == "batch_norm":
                return ops.batch_norm(x, None, None)[0]
            return ops.batch_norm_inference(x, None, None, tf.zeros([1]), tf.ones([1]))

        for run in (second_order, tf.function(second_order, autograph=False)):
            if backend == "fused":
                with pytest.raises(LookupError, match=r"no gradient of second order.*set_backend"):
                    run(normalize)
            else:
                assert np.isfinite(run(normalize).numpy()).all()


@pytest.mark.some_by_default(1)
def test_memory_stays_flat(backend, resident_bytes):
    x = tf.ones([64, 33])
    counters, moments_of = tf.Variable([0, 0, 4], dtype=tf.int64), tf.Variable(tf.zeros([2, 33], tf.float64))
    moving = ops.MovingStatistics(tf.Variable(tf.zeros([33])), tf.Variable(tf.ones([33])), 0.9)

    @tf.function
    def run():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, moments = ops.batch_norm(x, None, None)
        ops.merge_moments(moments, window=ops.MomentsWindow(counters, moments_of), moving=moving)
        return tape.gradient(y, x)

    for _ in range(300):
        run()
    before = resident_bytes()
    for _ in range(1500):
        run()
    assert resident_bytes() - before < 1 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_on_gpu_matches_the_definition(dtype):
    with tf.device("GPU:0"):
        for layout in LAYOUTS:
            data = Data(layout, dtype)
            expected = data.expected()
            y, moments, gradients = data.train()
            assert "GPU" in y.device
            assert_close(y.numpy(), expected.y, dtype, f"y of {layout}")
            data.check_moments(moments, expected)
            data.check_gradients(gradients, expected)


@pytest.mark.parametrize("axis", [1, -1])
def test_nothing_of_many_rows_takes_no_time(axis):
    x = tf.zeros([1 << 40, 3, 0]) if axis == 1 else tf.zeros([1 << 40, 0, 3])
    y, moments = ops.batch_norm(x, tf.ones([3]), tf.zeros([3]), axis=axis)
    assert y.shape == x.shape
    assert int(moments.count) == 0
    assert not moments.mean.numpy().any()
