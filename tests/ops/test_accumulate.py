"""The accumulate op: both backends in every mode against float64 and against NumPy's float32 arithmetic."""

import threading

import handles
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, label

import accumops
from accumops import ops

NUMPY = {tf.float16: np.float16, tf.bfloat16: ml_dtypes.bfloat16, tf.float32: np.float32, tf.float64: np.float64}
# A chunk of the kernels is 256 KiB of traffic: 21845.33 elements of float32.
SIZES = [(), (0,), (1,), (3,), (17,), (5, 111), (21845,), (21846,), (65537,), (7777, 77)]
PAIRS = [(tf.float32, g) for g in (tf.float16, tf.bfloat16, tf.float32)] + [(tf.float64, g) for g in NUMPY]


def random(rng, shape, dtype):
    return rng.standard_normal(shape).astype(NUMPY[dtype])


def expected(acc, gradient, scale, overwrite):
    """Rounds product and sum separately in the accumulator's dtype, as the op promises."""
    product = gradient.astype(acc.dtype) * acc.dtype.type(scale)
    return product if overwrite else acc + product


def assert_close(actual, wanted, old, product, mode):
    """Asserts equality bit for bit, except under XLA: it may round product and sum only once, so an ulp is allowed."""
    if mode.name != "xla":
        np.testing.assert_array_equal(actual, wanted)
        return
    bound = np.spacing(np.abs(old) + np.abs(product))
    assert np.all(np.abs(actual.astype(np.float64) - wanted) <= bound)


BACKENDS, MODES = ["fused", "reference"], ["eager", "graph", "xla"]


def pair_name(value):
    return "+".join(each.name for each in value) if isinstance(value, tuple) else label(value)


@pytest.mark.parametrize(
    ("backend", "mode", "pair", "overwrite"),
    # XLA compiles each pair of types once.
    cross(
        BACKENDS,
        MODES,
        PAIRS,
        [False, True],
        default=lambda backend, mode, pair, overwrite: mode != "xla" or overwrite == PAIRS.index(pair) % 2,
    ),
    ids=pair_name,
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(12)
def test_matches_numpy(backend, mode, rng, pair, overwrite):
    accumulator_dtype, gradient_dtype = pair
    old = [random(rng, shape, accumulator_dtype) for shape in SIZES]
    gradients = [random(rng, shape, gradient_dtype) for shape in SIZES]
    accumulators = [tf.Variable(value) for value in old]
    scale = 0.3

    @mode
    def run(*gradients):
        ops.accumulate(accumulators, gradients, scale=scale, overwrite=overwrite)

    run(*[tf.constant(g) for g in gradients])
    for accumulator, before, gradient in zip(accumulators, old, gradients, strict=True):
        product = gradient.astype(before.dtype) * before.dtype.type(scale)
        assert_close(accumulator.numpy(), expected(before, gradient, scale, overwrite), before, product, mode)


@pytest.mark.some_by_default(3)
def test_mixes_dtypes_in_one_list(backend, mode, rng):
    dtypes = [PAIRS[i % len(PAIRS)] for i in range(40)]
    shapes = [SIZES[i % len(SIZES)] for i in range(40)]
    old = [random(rng, shape, a) for shape, (a, _) in zip(shapes, dtypes, strict=True)]
    gradients = [random(rng, shape, g) for shape, (_, g) in zip(shapes, dtypes, strict=True)]
    accumulators = [tf.Variable(value) for value in old]

    @mode
    def run(*gradients):
        ops.accumulate(accumulators, gradients, scale=1 / 3)

    run(*[tf.constant(g) for g in gradients])
    for accumulator, before, gradient in zip(accumulators, old, gradients, strict=True):
        product = gradient.astype(before.dtype) * before.dtype.type(1 / 3)
        assert_close(accumulator.numpy(), before + product, before, product, mode)


def test_scale_and_overwrite_may_be_tensors(backend, mode):
    accumulator = tf.Variable([1.0, 2.0])

    @mode
    def run(scale, overwrite):
        ops.accumulate([accumulator], [tf.constant([10.0, 20.0])], scale=scale, overwrite=overwrite)

    run(tf.constant(0.5), tf.constant(False))
    np.testing.assert_array_equal(accumulator.numpy(), [6, 12])
    run(tf.constant(2.0), tf.constant(True))
    np.testing.assert_array_equal(accumulator.numpy(), [20, 40])
    run(tf.constant(0.25, tf.float64), tf.constant(False))
    np.testing.assert_array_equal(accumulator.numpy(), [22.5, 45])


@pytest.mark.parametrize(
    ("backend", "mode", "dtype"),
    cross(
        BACKENDS,
        MODES,
        NUMPY,
        default=lambda backend, mode, dtype: mode != "xla" or (backend, dtype) == ("fused", tf.bfloat16),
    ),
    ids=label,
    indirect=["backend", "mode"],
)
def test_a_scale_of_0_counts_as_nothing_whatever_the_gradient_holds(backend, mode, dtype):
    """Known when a function is traced, or only when it runs; and whether or not it starts a window."""
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    dense, table = tf.Variable([1.0, 2.0], dtype=wide), tf.Variable([[1.0], [2.0], [0.0]], dtype=wide)
    flags = tf.Variable([True, True, False])
    values = [np.nan, np.inf]

    @mode
    def run(scale, overwrite):
        gradients = [
            tf.constant(values, dtype),
            tf.IndexedSlices(tf.constant(values, dtype)[:, None], tf.constant([2, 2])),
        ]
        arguments = {"overwrite": overwrite, "touched_rows": [None, flags]}
        ops.accumulate([dense, table], gradients, scale=0, **arguments)
        return ops.accumulate([dense, table], gradients, scale=scale, check_finite=True, **arguments)

    assert not run(tf.constant(-0.0), tf.constant(False))
    np.testing.assert_array_equal(dense.numpy(), [1, 2])
    np.testing.assert_array_equal(table.numpy(), [[1], [2], [0]])
    np.testing.assert_array_equal(flags.numpy(), [True, True, False])
    assert not run(tf.constant(0.0), tf.constant(True))
    for zeroed in (dense, table, flags):
        assert not zeroed.numpy().any()
    run(tf.constant(1.0), tf.constant(False))
    assert not np.isfinite(dense.numpy()).any()
    np.testing.assert_array_equal(flags.numpy(), [False, False, True])


def test_overwrite_ignores_nan_in_the_accumulator(backend, mode):
    accumulator = tf.Variable([np.nan, np.inf, 3.0])

    @mode
    def run():
        ops.accumulate([accumulator], [tf.ones([3])], overwrite=True)

    run()
    np.testing.assert_array_equal(accumulator.numpy(), [1, 1, 1])


NOT_FINITE = [np.inf, -np.inf, np.nan]


@pytest.mark.parametrize(
    ("backend", "mode", "dtype", "value"),
    # XLA compiles each type once, with one of the values.
    cross(
        BACKENDS,
        MODES,
        NUMPY,
        NOT_FINITE,
        default=lambda backend, mode, dtype, value: (
            mode != "xla" or NOT_FINITE.index(value) == list(NUMPY).index(dtype) % 3
        ),
    ),
    ids=label,
    indirect=["backend", "mode"],
)
def test_check_finite(backend, mode, rng, dtype, value):
    shapes = [(3,), (65537,), ()]
    accumulators = [tf.Variable(tf.zeros(shape, tf.float64)) for shape in shapes]

    @mode
    def run(*gradients):
        return ops.accumulate(accumulators, gradients, check_finite=True)

    gradients = [random(rng, shape, dtype) for shape in shapes]
    assert run(*[tf.constant(g) for g in gradients]).numpy()
    for i, position in [(0, 2), (1, 0), (1, 65536), (1, 21845), (2, ())]:
        planted = [g.copy() for g in map(np.atleast_1d, gradients)]
        planted[i].reshape(-1)[position if position != () else 0] = value
        planted = [p.reshape(shape) for p, shape in zip(planted, shapes, strict=True)]
        assert not run(*[tf.constant(p) for p in planted]).numpy(), (i, position)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("check_finite", [False, True], ids=["norms", "norms and check_finite"])
@pytest.mark.some_by_default(4)
def test_squared_norms(backend, mode, rng, overwrite, check_finite):
    """Of gradients as they are given, and of accumulators as the op leaves them; NaN where rows are added."""
    dtypes = [PAIRS[i % len(PAIRS)] for i in range(len(SIZES))]
    accumulators = [tf.Variable(random(rng, shape, a)) for shape, (a, _) in zip(SIZES, dtypes, strict=True)]
    gradients = [random(rng, shape, g) for shape, (_, g) in zip(SIZES, dtypes, strict=True)]
    table, flags = tf.Variable(tf.zeros([5, 3])), tf.Variable(tf.zeros([5], tf.bool))
    variables = [*accumulators[:2], table, *accumulators[2:]]

    @mode
    def run(rows, *given):
        slices = tf.IndexedSlices(rows, tf.constant([1, 1]))
        touched = [None, None, flags, *[None] * (len(SIZES) - 2)]
        return ops.accumulate(
            variables, [*given[:2], slices, *given[2:]], scale=1 / 3, overwrite=overwrite, touched_rows=touched,
            check_finite=check_finite, squared_norms=True,
        )  # fmt: skip

    found = run(tf.ones([2, 3]), *[tf.constant(g) for g in gradients])
    if check_finite:
        finite, found = found
        assert finite.numpy()
    assert (found.dtype, found.shape) == (tf.float64, (2, len(SIZES) + 1))
    wanted = [[np.sum(each.astype(np.float64) ** 2) for each in gradients]]
    wanted.append([np.sum(each.numpy().astype(np.float64) ** 2) for each in accumulators])
    np.testing.assert_allclose(found.numpy(), np.insert(wanted, 2, np.nan, axis=1), rtol=2e-6)


@pytest.mark.some_by_default(3)
def test_squared_norms_where_a_tensor_asks_for_them(backend, mode, rng):
    """The gradients are added either way."""
    accumulators = [tf.Variable(random(rng, shape, tf.float32)) for shape in SIZES]
    gradients = [random(rng, shape, tf.float32) for shape in SIZES]

    @mode
    def run(wanted, *given):
        return ops.accumulate(accumulators, given, scale=0.5, squared_norms=wanted)

    for wanted in (False, True):
        before = [each.numpy() for each in accumulators]
        found = run(tf.constant(wanted), *[tf.constant(each) for each in gradients]).numpy()
        for accumulator, start, gradient in zip(accumulators, before, gradients, strict=True):
            np.testing.assert_allclose(accumulator.numpy(), start + 0.5 * gradient, rtol=1e-6)
        sums = [[np.sum(np.square(each, dtype=np.float64)) for each in gradients]]
        sums.append([np.sum(np.square(each.numpy(), dtype=np.float64)) for each in accumulators])
        np.testing.assert_allclose(found, sums if wanted else np.full_like(found, np.nan), rtol=2e-6)


def test_nothing_is_done_where_a_flag_says_so(backend, mode):
    """To no bit of an accumulator or a flag, whatever the gradients hold."""
    dense, table = tf.Variable([1.0, -0.0, np.nan]), tf.Variable([[1.0], [2.0], [0.0]], dtype=tf.float64)
    rows = tf.Variable([True, True, False])

    @mode
    def run(only_if, values, **arguments):
        gradients = [values, tf.IndexedSlices(tf.cast(values[:2, None], tf.float64), tf.constant([1, 2]))]
        return ops.accumulate(
            [dense, table], gradients, touched_rows=[None, rows], overwrite=True, only_if=only_if, **arguments
        )

    assert run(tf.constant(False), tf.constant([np.nan, 2.0, 3.0])) is None
    finite = run(tf.constant(False), tf.constant([np.nan, 2.0, 3.0]), check_finite=True)
    both = run(tf.constant(False), tf.constant([np.nan, 2.0, 3.0]), check_finite=True, squared_norms=True)
    norms = run(tf.constant(False), tf.constant([np.nan, 2.0, 3.0]), squared_norms=tf.constant(True))
    assert finite.numpy()
    assert both[0].numpy()
    for report in (both[1], norms):
        assert (report.dtype, report.shape) == (tf.float64, (2, 2))
        assert np.isnan(report.numpy()).all()
    assert dense.numpy().tobytes() == np.array([1, -0.0, np.nan], np.float32).tobytes()
    np.testing.assert_array_equal(table.numpy(), [[1], [2], [0]])
    np.testing.assert_array_equal(rows.numpy(), [True, True, False])

    finite, norms = run(tf.constant(True), tf.constant([1.0, 2.0, 3.0]), check_finite=True, squared_norms=True)
    assert finite.numpy()
    np.testing.assert_allclose(norms.numpy(), [[14, np.nan], [14, np.nan]])
    np.testing.assert_array_equal(dense.numpy(), [1, 2, 3])
    np.testing.assert_array_equal(table.numpy(), [[0], [1], [2]])
    np.testing.assert_array_equal(rows.numpy(), [False, True, True])


@pytest.mark.parametrize("does", [False, True])
def test_the_flag_may_be_known(backend, mode, does):
    accumulator = tf.Variable([1.0, 2.0])
    mode(lambda: ops.accumulate([accumulator], [tf.ones([2])], only_if=does))()
    np.testing.assert_array_equal(accumulator.numpy(), [2, 3] if does else [1, 2])


def test_a_shape_that_is_known_late_is_not_looked_at_where_nothing_is_added(backend):
    accumulator = tf.Variable([1.0, 2.0])

    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec([], tf.bool)])
    def run(gradient, only_if):
        ops.accumulate([accumulator], [gradient], only_if=only_if)

    run(tf.ones([3]), tf.constant(False))
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(tf.ones([3]), tf.constant(True))
    np.testing.assert_array_equal(accumulator.numpy(), [1, 2])
    run(tf.ones([2]), tf.constant(True))
    np.testing.assert_array_equal(accumulator.numpy(), [2, 3])


def test_variables_are_not_looked_at_where_nothing_is_added():
    """Not even whether they have a value."""
    accumulator = handles.uninitialized(tf.float32, [2])
    raw = ops.library.load()[0]
    arguments = {"indices": [], "touched_rows": [], "scale": 1.0, "overwrite": False, "norms_if": []}
    raw.accum_ops_accumulate(accumulators=[accumulator], gradients=[tf.ones([2])], only_if=[False], **arguments)
    with pytest.raises(tf.errors.FailedPreconditionError):
        raw.accum_ops_accumulate(accumulators=[accumulator], gradients=[tf.ones([2])], only_if=[True], **arguments)


def test_empty_list(backend, mode):
    assert mode(lambda: ops.accumulate([], [], check_finite=True))().numpy()
    assert mode(lambda: ops.accumulate([], [], squared_norms=True))().shape == (2, 0)


class TestRows:
    """Sparse gradients."""

    @pytest.mark.parametrize(
        ("backend", "mode", "shape", "tracked", "index_dtype"),
        # Compiled or by the reference, indices are int32 where rows are tracked and int64 where they are not.
        cross(
            BACKENDS,
            MODES,
            [(50, 7), (300, 2, 33), (9,), (4000, 64)],
            [False, True],
            [tf.int32, tf.int64],
            default=lambda backend, mode, shape, tracked, index_dtype: (
                (backend == "fused" and mode != "xla") or tracked == (index_dtype == tf.int32)
            ),
        ),
        ids=label,
        indirect=["backend", "mode"],
    )
    @pytest.mark.some_by_default(22)
    def test_duplicates_add_up(self, backend, mode, rng, shape, tracked, index_dtype):
        accumulator = tf.Variable(tf.zeros(shape))
        flags = tf.Variable(tf.zeros(shape[:1], tf.bool)) if tracked else None
        total = np.zeros(shape)
        touched = np.zeros(shape[0], bool)

        @mode
        def run(values, indices, overwrite):
            gradient = tf.IndexedSlices(values, indices)
            ops.accumulate([accumulator], [gradient], scale=0.5, overwrite=overwrite, touched_rows=[flags])

        for step, overwrite in enumerate([True, False, True, False, False]):
            indices = rng.integers(0, shape[0], 2000)
            indices[:500] = 3  # one hot row
            values = rng.standard_normal((2000, *shape[1:])).astype(np.float32)
            run(tf.constant(values), tf.constant(indices, index_dtype), tf.constant(overwrite))
            if overwrite:
                total[:] = 0
                touched[:] = False
            np.add.at(total, indices, 0.5 * values.astype(np.float64))
            touched[indices] = True
            np.testing.assert_allclose(accumulator.numpy(), total, atol=2e-4, err_msg=f"step {step}")
            if tracked:
                np.testing.assert_array_equal(flags.numpy(), touched)

    def test_rows_without_flag_are_not_cleared(self):
        """Only flagged rows are written, which makes the start of a window cheap."""
        accumulator = tf.Variable(tf.fill([5, 2], 7.0))
        flags = tf.Variable([False, True, False, False, False])
        gradient = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([3]))
        ops.accumulate([accumulator], [gradient], overwrite=True, touched_rows=[flags])
        np.testing.assert_array_equal(accumulator.numpy()[:, 0], [7, 0, 7, 8, 7])
        np.testing.assert_array_equal(flags.numpy(), [False, False, False, True, False])

    def test_no_rows_clear_where_a_window_starts(self, backend, mode):
        accumulator = tf.Variable(tf.ones([5, 2]))
        empty = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32))

        @mode
        def run(overwrite):
            ops.accumulate([accumulator], [empty], overwrite=overwrite)

        run(tf.constant(False))
        np.testing.assert_array_equal(accumulator.numpy(), np.ones([5, 2]))
        run(tf.constant(True))
        np.testing.assert_array_equal(accumulator.numpy(), np.zeros([5, 2]))

    def test_beside_dense_in_any_order(self, backend, mode):
        variables = [tf.Variable(tf.zeros(shape)) for shape in [(4, 2), (3,), (5, 1), (2,), (6, 3)]]
        flags = [tf.Variable(tf.ones([4], tf.bool)), None, None, None, tf.Variable(tf.ones([6], tf.bool))]

        @mode
        def run():
            gradients = [
                tf.IndexedSlices(tf.fill([2, 2], 1.0), tf.constant([1, 1])),
                tf.fill([3], 2.0),
                tf.IndexedSlices(tf.fill([1, 1], 3.0), tf.constant([4], tf.int64)),
                tf.cast(tf.fill([2], 4.0), tf.bfloat16),
                tf.IndexedSlices(tf.cast(tf.fill([1, 3], 5.0), tf.float16), tf.constant([0])),
            ]
            return ops.accumulate(variables, gradients, overwrite=True, touched_rows=flags, check_finite=True)

        assert run().numpy()
        sums = [float(tf.reduce_sum(v)) for v in variables]
        assert sums == [4.0, 6.0, 3.0, 8.0, 15.0]
        assert variables[0].numpy()[1].tolist() == [2.0, 2.0]

    @pytest.mark.parametrize("value", [np.inf, np.nan])
    def test_check_finite(self, backend, mode, value):
        accumulator = tf.Variable(tf.zeros([5, 2]))

        @mode
        def run(values):
            return ops.accumulate([accumulator], [tf.IndexedSlices(values, tf.constant([1, 4]))], check_finite=True)

        assert run(tf.ones([2, 2])).numpy()
        assert not run(tf.constant([[1.0, 1.0], [1.0, value]])).numpy()


def test_keras_variables(backend):
    import keras

    accumulator = keras.Variable([1.0, 2.0], dtype="float32")
    ops.accumulate([accumulator], [tf.constant([1.0, 1.0])], scale=3)
    np.testing.assert_array_equal(accumulator.numpy(), [4, 5])


def test_readers_keep_what_they_read(backend):
    """A tensor read from an accumulator shares its buffer; writing in place must not change it."""
    accumulator = tf.Variable(tf.ones([1000]))
    read = accumulator.read_value()
    ops.accumulate([accumulator], [tf.ones([1000])])
    assert float(tf.reduce_sum(read)) == 1000
    assert float(tf.reduce_sum(accumulator)) == 2000
    alias = accumulator.read_value()
    ops.accumulate([accumulator], [alias])  # the gradient is the accumulator's own buffer
    assert float(tf.reduce_sum(alias)) == 2000
    assert float(tf.reduce_sum(accumulator)) == 4000


def test_after_a_scatter_readers_keep_what_they_read(backend):
    """TensorFlow's scatters put a variable into copy-on-read mode, which the op has to handle."""
    accumulator = tf.Variable(tf.ones([4, 2]))
    read = accumulator.read_value()
    accumulator.scatter_add(tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0])))
    later = accumulator.read_value()
    ops.accumulate([accumulator], [tf.ones([4, 2])])
    assert (float(tf.reduce_sum(read)), float(tf.reduce_sum(later)), float(tf.reduce_sum(accumulator))) == (8, 10, 18)


def test_threads_with_opposite_orders_do_not_deadlock():
    accumulators = [tf.Variable(tf.zeros([5000])) for _ in range(20)]
    gradients = [tf.ones([5000])] * 20
    errors = []

    def work(variables):
        try:
            for _ in range(200):
                ops.accumulate(variables, gradients)
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(order,), daemon=True) for order in (accumulators, accumulators[::-1]) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors
    for accumulator in accumulators:
        np.testing.assert_array_equal(accumulator.numpy(), np.full(5000, 800.0))


def test_same_bits_every_time(rng):
    shapes = [(3,), (300_001,), (64, 64)]
    gradients = [tf.constant(random(rng, shape, tf.float32)) for shape in shapes]
    rows = tf.IndexedSlices(tf.constant(random(rng, (5000, 64), tf.float32)), tf.constant(rng.integers(0, 100, 5000)))

    def run():
        accumulators = [tf.Variable(tf.ones(shape)) for shape in (*shapes, (100, 64))]
        for _ in range(3):
            ops.accumulate(accumulators, [*gradients, rows], scale=0.1)
        return [a.numpy() for a in accumulators]

    first = run()
    for _ in range(20):
        for a, b in zip(first, run(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_is_one_op_in_the_graph(backend):
    accumulators = [tf.Variable(tf.zeros([3])) for _ in range(50)]

    @tf.function
    def run():
        ops.accumulate(accumulators, [tf.ones([3])] * 50)

    kinds = [op.type for op in run.get_concrete_function().graph.get_operations()]
    if backend == "fused":
        assert kinds.count("AccumOps>Accumulate") == 1
        assert not {"AssignVariableOp", "AssignAddVariableOp", "ReadVariableOp", "Mul"} & set(kinds)
    else:
        assert "AccumOps>Accumulate" not in kinds


@pytest.mark.some_by_default(1)
def test_memory_stays_flat(backend, resident_bytes):
    accumulators = [tf.Variable(tf.zeros([257])) for _ in range(10)]
    embedding = tf.Variable(tf.zeros([1000, 16]))
    flags = tf.Variable(tf.zeros([1000], tf.bool))
    gradients = [tf.ones([257])] * 10 + [tf.IndexedSlices(tf.ones([20, 16]), tf.range(20) * 7)]

    @tf.function
    def run():
        return ops.accumulate(
            [*accumulators, embedding], gradients, touched_rows=[*[None] * 10, flags], check_finite=True
        )

    for _ in range(300):
        run()
    growth = []
    for _ in range(3):  # a leak grows each time; what else the process does may grow once
        before = resident_bytes()
        for _ in range(800):
            run()
        growth.append(resident_bytes() - before)
    assert min(growth) < 1 << 19


@pytest.mark.gpu
def test_on_gpu_same_bits_as_cpu(rng):
    accumulators, gradients = {}, {}
    old = [random(rng, shape, tf.float32) for shape in SIZES]
    new = [random(rng, shape, tf.bfloat16) for shape in SIZES]
    for device in ("CPU:0", "GPU:0"):
        with tf.device(device):
            accumulators[device] = [tf.Variable(value) for value in old]
            gradients[device] = [tf.constant(value) for value in new]
            for overwrite in (False, True, False):
                ops.accumulate(accumulators[device], gradients[device], scale=0.3, overwrite=overwrite)
    for cpu, gpu in zip(accumulators["CPU:0"], accumulators["GPU:0"], strict=True):
        assert "GPU" in gpu.device
        np.testing.assert_array_equal(cpu.numpy(), gpu.numpy())


@pytest.mark.gpu
def test_on_gpu_rows_and_finite_flag(rng):
    with tf.device("GPU:0"):
        accumulator = tf.Variable(tf.zeros([100, 33]))
        flags = tf.Variable(tf.ones([100], tf.bool))
        indices = rng.integers(0, 100, 5000)
        values = random(rng, (5000, 33), tf.float32)
        finite = accumops.ops.accumulate(
            [accumulator],
            [tf.IndexedSlices(tf.constant(values), tf.constant(indices))],
            overwrite=True,
            touched_rows=[flags],
            check_finite=True,
        )
    total = np.zeros((100, 33))
    np.add.at(total, indices, values.astype(np.float64))
    np.testing.assert_allclose(accumulator.numpy(), total, atol=1e-4)
    np.testing.assert_array_equal(flags.numpy(), np.isin(np.arange(100), indices))
    assert finite.numpy()
