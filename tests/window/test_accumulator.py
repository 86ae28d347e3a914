"""GradientAccumulator: the window's state machine, in custom loops."""

import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import GradientAccumulator
from accumops.window import touched_rows


@pytest.fixture
def variables():
    return [tf.Variable(tf.zeros([2, 3]), name="kernel"), tf.Variable(tf.zeros([]), name="scale")]


def gradients(value):
    return [tf.fill([2, 3], float(value)), tf.constant(10.0 * value)]


def test_mean_of_a_window(backend, mode, variables):
    accumulator = GradientAccumulator(accum_steps=3)
    accumulator.build(variables)
    accumulate = mode(lambda value: accumulator.accumulate([tf.fill([2, 3], value), 10.0 * value]))
    close = mode(accumulator.close)
    for start in (1.0, 100.0):
        for step in range(3):
            assert int(accumulator.step) == step
            assert not accumulator.ready
            accumulate(tf.constant(start + step))
        assert accumulator.ready
        kernel, scale = close()
        np.testing.assert_allclose(kernel, np.full([2, 3], start + 1), rtol=1e-6)
        np.testing.assert_allclose(scale, 10 * (start + 1), rtol=1e-6)
        assert int(accumulator.step) == 0


def test_weighted_mean(backend, variables):
    accumulator = GradientAccumulator(accum_steps=3)
    for value, weight in [(1, 24), (2, 24), (7, 16)]:
        accumulator.accumulate(gradients(value), variables, weight=weight)
    kernel, _ = accumulator.close()
    np.testing.assert_allclose(kernel, np.full([2, 3], (24 + 48 + 112) / 64), rtol=1e-6)


def test_weights_of_zero_give_zero(variables):
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.accumulate(gradients(5), variables, weight=0)
    np.testing.assert_array_equal(accumulator.close()[0], np.zeros([2, 3]))


def test_a_weight_of_0_counts_as_nothing_whatever_the_gradient_is(backend, mode, variables):
    """In the micro-batch that starts the window, and in later ones; also where only the run knows the weight."""
    accumulator = GradientAccumulator(accum_steps=None)
    accumulator.build(variables)
    accumulate = mode(lambda value, weight: accumulator.accumulate([tf.fill([2, 3], value), value], weight=weight))
    for value, weight in ((np.nan, 0.0), (1.0, 1.0), (np.inf, -0.0), (4.0, 2.0)):
        accumulate(tf.constant(value), tf.constant(weight))
    np.testing.assert_allclose(accumulator.close()[0], np.full([2, 3], 3.0))
    for _ in range(2):
        accumulator.accumulate(gradients(np.nan), weight=0)
    np.testing.assert_array_equal(accumulator.close()[0], np.zeros([2, 3]))


class TestNonfinite:
    @pytest.mark.parametrize(
        ("backend", "mode", "policy"),
        cross(
            ["fused", "reference"],
            ["eager", "graph", "xla"],
            ["skip", "drop"],
            default=lambda backend, mode, policy: backend == "fused" and (mode != "xla" or policy == "skip"),
        ),
        indirect=["backend", "mode"],
    )
    def test_a_window_that_makes_no_update_is_never_ready(self, backend, mode, variables, policy):
        accumulator = GradientAccumulator(accum_steps=2, nonfinite=policy)
        accumulator.build(variables)
        accumulate = mode(lambda value: accumulator.accumulate([tf.fill([2, 3], value), value]))
        closed = []
        for value in (1.0, np.nan, np.inf, np.nan, 1.0, 3.0):
            accumulate(tf.constant(value))
            if accumulator.ready:
                closed.append(float(accumulator.close()[1]))
        assert closed == ([1.0, 2.0] if policy == "skip" else [2.0])
        assert int(accumulator.nonfinite_count) == (3 if policy == "skip" else 2)
        assert int(accumulator.step) == 0

    @pytest.mark.parametrize("policy", ["propagate", "skip", "drop"])
    def test_windows_that_are_closed_by_hand(self, variables, policy):
        accumulator = GradientAccumulator(accum_steps=None, nonfinite=policy)
        accumulator.build(variables)
        assert not accumulator.makes_update
        for value in (np.nan, 2.0):
            accumulator.accumulate(gradients(value))
        assert bool(accumulator.makes_update) == (policy != "drop")
        np.testing.assert_array_equal(accumulator.close()[1], {"propagate": np.nan, "skip": 20.0, "drop": 0.0}[policy])
        accumulator.accumulate(gradients(np.inf))
        assert bool(accumulator.makes_update) == (policy == "propagate")
        accumulator.reset()
        accumulator.accumulate(gradients(3.0))
        assert accumulator.makes_update
        np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 3.0))

    def test_none_and_integers_are_finite(self, variables):
        accumulator = GradientAccumulator(accum_steps=1, nonfinite="skip")
        accumulator.accumulate([None, tf.constant(3)], variables)
        assert float(accumulator.close()[1]) == 3

    def test_the_count_can_be_set(self, variables):
        accumulator = GradientAccumulator(accum_steps=2, nonfinite="skip")
        accumulator.accumulate(gradients(np.nan), variables)
        assert any(each is accumulator.nonfinite_count for each in accumulator.variables)
        accumulator.nonfinite_count.assign(0)
        accumulator.accumulate(gradients(np.nan))
        assert int(accumulator.nonfinite_count) == 1


def test_partial_window_by_hand(variables):
    accumulator = GradientAccumulator(accum_steps=4)
    for value in (1, 2):
        accumulator.accumulate(gradients(value), variables)
    np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 1.5))


def test_reset_drops_the_window(backend, variables):
    accumulator = GradientAccumulator(accum_steps=2)
    accumulator.accumulate(gradients(np.nan), variables)
    accumulator.reset()
    for value in (1, 3):
        accumulator.accumulate(gradients(value))
    np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 2.0))


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8"])
def test_gradients_of_any_number(backend, mode, variables, dtype):
    """As Keras's optimizers take them, NumPy arrays and rows included."""
    accumulator = GradientAccumulator(accum_steps=2)
    accumulator.build(variables)
    rows = tf.IndexedSlices(tf.constant([[1, 2, 3]], dtype), tf.constant([1]), tf.constant([2, 3]))
    mode(lambda: accumulator.accumulate([np.full([2, 3], 3, dtype), tf.constant(2, dtype)]))()
    mode(lambda: accumulator.accumulate([rows, np.array(4, dtype)]))()
    kernel, scale = accumulator.close()
    assert kernel.dtype == scale.dtype == tf.float32
    np.testing.assert_array_equal(kernel, [[1.5, 1.5, 1.5], [2, 2.5, 3]])
    assert float(scale) == 3


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_weight_that_is_nan_is_that_windows_alone(backend, mode, variables, end):
    accumulator = GradientAccumulator(accum_steps=2)
    accumulator.build(variables)
    accumulate = mode(lambda weight: accumulator.accumulate(gradients(3), weight=weight))
    for weight in (float("nan"), 1.0):
        accumulate(tf.constant(weight))
    getattr(accumulator, end)()
    for _ in range(2):
        accumulate(tf.constant(1.0))
    np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 3.0))


def test_none_counts_as_zero_within_a_window(backend, variables):
    """A variable may get no gradient in some micro-batches; what it held before the window must not come back."""
    accumulator = GradientAccumulator(accum_steps=2)
    for value in (1, 3):
        accumulator.accumulate(gradients(value), variables)
    accumulator.close()
    accumulator.accumulate([None, tf.constant(1.0)])
    accumulator.accumulate([tf.fill([2, 3], 4.0), None])
    kernel, scale = accumulator.close()
    np.testing.assert_array_equal(kernel, np.full([2, 3], 2.0))
    np.testing.assert_array_equal(scale, 0.5)
    accumulator.accumulate([None, tf.constant(1.0)])
    assert accumulator.close()[0] is None


def test_a_variable_that_never_has_a_gradient_closes_with_none(variables):
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.accumulate([None, tf.constant(1.0)], variables)
    kernel, scale = accumulator.close()
    assert kernel is None
    assert float(scale) == 1.0


def test_accumulators_are_wide():
    dtypes = [tf.float16, tf.bfloat16, tf.float32, tf.float64]
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.build([tf.Variable(tf.zeros([2], dtype)) for dtype in dtypes])
    assert [a.dtype for a in accumulator.accumulators] == ["float32", "float32", "float32", "float64"]


@pytest.fixture
def tables_of_any_size(monkeypatch):
    """Small tables have flags for their rows too."""
    monkeypatch.setattr(touched_rows, "is_table", lambda accumulator: len(accumulator.shape) >= 2)


@pytest.mark.parametrize("first", ["s", "d"])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.usefixtures("tables_of_any_size")
@pytest.mark.some_by_default(4)
def test_sparse_gradients_over_windows(backend, jit_compile, first, rng):
    """Rows left from earlier windows, rows never touched, and switches to dense gradients, traced in either order."""
    table = tf.Variable(tf.zeros([40, 5]))
    accumulator = GradientAccumulator(accum_steps=2)
    accumulator.build([table])

    @tf.function(jit_compile=jit_compile)
    def sparse(values, indices):
        accumulator.accumulate([tf.IndexedSlices(values, indices)])

    @tf.function(jit_compile=jit_compile)
    def dense(values):
        accumulator.accumulate([values])

    for kinds in (first * 2, "ss", "ss", "sd", "ss", "ds", "dd", "ss"):
        wanted = np.zeros([40, 5])
        for kind in kinds:
            if kind == "s":
                indices = rng.integers(0, 40, 6)
                values = rng.standard_normal((6, 5)).astype("float32")
                sparse(tf.constant(values), tf.constant(indices))
                np.add.at(wanted, indices, values)
            else:
                values = rng.standard_normal((40, 5)).astype("float32")
                dense(tf.constant(values))
                wanted += values
        np.testing.assert_allclose(accumulator.close()[0], wanted / 2, atol=1e-6, err_msg=kinds)


@pytest.mark.usefixtures("tables_of_any_size")
def test_dense_and_sparse_in_one_function(backend):
    """The first sparse gradient may come with a retrace, when a tf.function makes no variables any more."""
    table = tf.Variable(tf.zeros([4, 1]))
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.build([table])

    @tf.function
    def step(is_dense):
        accumulator.accumulate([tf.ones([4, 1]) if is_dense else tf.IndexedSlices(tf.ones([1, 1]), tf.constant([0]))])
        return accumulator.close()[0]

    for is_dense in (True, False, True, False):
        np.testing.assert_array_equal(step(is_dense)[:, 0], [1, 1, 1, 1] if is_dense else [1, 0, 0, 0])


def test_large_tables_have_flags_and_small_ones_none():
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.build([tf.Variable(tf.zeros(shape)) for shape in [(5000, 16), (300, 2000), (100, 8), (70000,)]])
    flags = [v for v in accumulator.variables if v.dtype == "bool"]
    assert [tuple(v.shape) for v in flags] == [(5000,)]


def test_gradients_of_some_variables_in_some_traces():
    """What is left out when the closing function is traced must not be lost silently later."""
    a, b = (tf.Variable(0.0, name=name) for name in "ab")
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.build([a, b])

    @tf.function
    def step(with_b):
        accumulator.accumulate([tf.constant(1.0), tf.constant(1.0) if with_b else None])
        return [gradient for gradient in accumulator.close() if gradient is not None]

    assert len(step(False)) == 1
    with pytest.raises(ValueError, match=r"\['b:0'\] was None in every call"):
        step(True)


def test_restored_window_keeps_gradients_that_are_none_afterwards(tmp_path):
    def make():
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build([tf.Variable(0.0), tf.Variable(0.0), tf.Variable(0.0)])
        return accumulator

    for first in ([1.0, 2.0, 4.0], [1.0, 2.0, None]):
        saved = make()
        saved.accumulate([None if value is None else tf.constant(value) for value in first])
        path = tf.train.Checkpoint(accumulator=saved).save(str(tmp_path / "checkpoint"))
        restored = make()
        tf.train.Checkpoint(accumulator=restored).restore(path)
        restored.accumulate([tf.constant(3.0), None, None])
        wanted = [2.0, 1.0, None if first[2] is None else 2.0]
        assert [None if g is None else float(g) for g in restored.close()] == wanted
        at_once = make()
        tf.train.Checkpoint(accumulator=at_once).restore(path)
        assert [None if g is None else float(g) for g in at_once.close()] == first


@pytest.mark.parametrize("in_graph", [False, True])
def test_close_gives_none_for_what_its_window_has_no_gradient_for(in_graph):
    """Not for what no window had one for. A graph cannot return None in some windows only: there it is an error."""
    a, b = (tf.Variable(0.0, name=name) for name in "ab")
    accumulator = GradientAccumulator(accum_steps=None)
    accumulator.build([a, b])
    close = tf.function(accumulator.close) if in_graph else accumulator.close

    def window(*gradients):
        for each in gradients:
            accumulator.accumulate([None if value is None else tf.constant(value) for value in each])
        return [None if each is None else float(each) for each in close()]

    assert window([1.0, 2.0]) == [1.0, 2.0]
    assert window([1.0, None], [None, 4.0]) == [0.5, 2.0]
    if not in_graph:
        assert window([3.0, None], [1.0, None]) == [2.0, None]
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="a graph cannot return None in some windows only"):
        window([3.0, None], [1.0, None])
    assert [None if each is None else float(each) for each in accumulator.close()] == [2.0, None]  # it is still there


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_micro_batch_that_fails_changes_nothing(backend, in_graph):
    dense, table = tf.Variable(tf.zeros([2])), tf.Variable(tf.zeros([3, 2]))
    accumulator = GradientAccumulator(accum_steps=3)
    accumulator.build([dense, table])

    def accumulate(row):
        accumulator.accumulate([tf.ones([2]), tf.IndexedSlices(tf.ones([1, 2]), row)])

    step = tf.function(accumulate) if in_graph else accumulate
    step(tf.constant([0]))
    for _ in range(5):
        with pytest.raises(tf.errors.InvalidArgumentError):
            step(tf.constant([7]))
    assert int(accumulator.step) == 1
    step(tf.constant([1]))
    first, second = accumulator.close()
    np.testing.assert_array_equal(first, [1, 1])
    np.testing.assert_array_equal(second, [[0.5, 0.5], [0.5, 0.5], [0, 0]])


def test_accumulators_are_beside_their_variables():
    cpus = tf.config.list_logical_devices("CPU")
    with tf.device(cpus[-1].name):
        variable = tf.Variable(tf.zeros([2000, 64]))
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.build([variable])
    assert {v.value.device for v in accumulator.variables if tuple(v.shape)[:1] == (2000,)} == {variable.device}


@pytest.mark.usefixtures("tables_of_any_size")
def test_checkpoint_in_the_middle_of_a_window(backend, tmp_path):
    """Restored into a new accumulator, and into one that is in the middle of another window."""

    def make():
        table = tf.Variable(tf.zeros([10, 2]))
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build([table])
        return accumulator

    def slices(row, value):
        return [tf.IndexedSlices(tf.fill([1, 2], float(value)), tf.constant([row]))]

    saved = make()
    saved.accumulate(slices(3, 1))
    path = tf.train.Checkpoint(accumulator=saved).save(str(tmp_path / "checkpoint"))
    busy = make()
    for row in (5, 6, 7):
        busy.accumulate(slices(row, 100))
    for other in (make(), busy):
        tf.train.Checkpoint(accumulator=other).restore(path)
        assert int(other.step) == 1
        other.accumulate(slices(4, 3))
        wanted = np.zeros([10, 2])
        wanted[3], wanted[4] = 0.5, 1.5
        np.testing.assert_array_equal(other.close()[0], wanted)
        other.accumulate(slices(0, 8))
        wanted = np.zeros([10, 2])
        wanted[0] = 8
        np.testing.assert_array_equal(other.close()[0], wanted)


def test_one_accumulate_op_for_all_variables():
    accumops.set_backend("fused")
    try:
        variables = [tf.Variable(tf.zeros([3])) for _ in range(100)]
        accumulator = GradientAccumulator(accum_steps=4)
        accumulator.build(variables)
        step = tf.function(lambda: accumulator.accumulate([tf.ones([3])] * 100))
        kinds = [op.type for op in step.get_concrete_function().graph.get_operations()]
    finally:
        accumops.set_backend("auto")
    assert kinds.count("AccumOps>Accumulate") == 1
    assert "ZerosLike" not in kinds
    assert sum("Assign" in kind for kind in kinds) == 3  # step, limit and weight


class TestAccumStepsThatChange:
    def steps(self, accumulator, variables, count, micro_step=None):
        """How many micro-batches each of the windows had."""
        lengths = []
        for value in range(count):
            (micro_step or (lambda value: accumulator.accumulate(gradients(int(value)), variables)))(tf.constant(value))
            if accumulator.ready:
                lengths.append(int(accumulator.step))
                accumulator.close()
        return lengths

    def test_set_by_hand_for_the_next_window(self, backend, mode, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build(variables)
        traces = []

        @mode
        def micro_step(value):
            traces.append(1)
            accumulator.accumulate([tf.fill([2, 3], tf.cast(value, tf.float32)), 1.0])

        assert self.steps(accumulator, variables, 3, micro_step) == [2]
        accumulator.accum_steps = 3
        assert accumulator.accum_steps == 3
        assert self.steps(accumulator, variables, 4, micro_step) == [2, 3]
        assert len(traces) == (7 if mode.name == "eager" else 1)

    def test_set_before_it_is_built(self, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.accum_steps = 3
        assert self.steps(accumulator, variables, 6) == [3, 3]

    def test_a_callable_of_the_updates(self, backend, mode, variables):
        def schedule(updates):
            return 1 if updates < 2 else 3

        accumulator = GradientAccumulator(accum_steps=schedule)
        assert accumulator.accum_steps is schedule
        accumulator.build(variables)
        micro_step = mode(lambda value: accumulator.accumulate([tf.fill([2, 3], tf.cast(value, tf.float32)), 1.0]))
        assert self.steps(accumulator, variables, 9, micro_step) == [1, 1, 3, 3]

    def test_a_callable_of_an_optimizers_updates(self, variables):
        iterations = tf.Variable(5, dtype=tf.int64)
        accumulator = GradientAccumulator(accum_steps=lambda updates: tf.maximum(updates // 2, 1))
        accumulator.build(variables, iterations=iterations)
        assert self.steps(accumulator, variables, 4) == [2, 2]
        iterations.assign(6)
        assert self.steps(accumulator, variables, 4) == [3]

    def test_a_restored_window_goes_on_as_it_started(self, variables):
        first, second = GradientAccumulator(accum_steps=3), GradientAccumulator(accum_steps=2)
        assert self.steps(first, variables, 2) == []
        second.build(variables)
        for before, after in zip(first.variables, second.variables, strict=True):
            after.assign(before)
        assert self.steps(second, variables, 5) == [3, 2, 2]

    def test_a_callable_that_returns_too_little_later(self, variables):
        accumulator = GradientAccumulator(accum_steps=lambda updates: 1 - updates)
        accumulator.accumulate(gradients(1), variables)
        accumulator.close()
        with pytest.raises(tf.errors.InvalidArgumentError, match="at least 1"):
            accumulator.accumulate(gradients(1))
        assert int(accumulator.step) == 0

    def test_a_checkpoint_holds_the_window_and_not_the_setting(self, variables, tmp_path):
        first, second = GradientAccumulator(accum_steps=3), GradientAccumulator(accum_steps=2)
        assert self.steps(first, variables, 1) == []
        second.build(variables)
        tf.train.Checkpoint(accumulator=second).restore(
            tf.train.Checkpoint(accumulator=first).save(str(tmp_path / "checkpoint"))
        )
        assert int(second.step) == 1
        assert self.steps(second, variables, 6) == [3, 2, 2]

    def test_what_cannot_be_set(self, variables):
        for before, after in ((None, 2), (lambda updates: 2, 2), (2, None), (2, lambda updates: 2)):
            accumulator = GradientAccumulator(accum_steps=before)
            with pytest.raises(ValueError, match=r"from one int to another|where it is None"):
                accumulator.accum_steps = after
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build(variables)
        for wrong, error in ((0, ValueError), (2.5, TypeError)):
            with pytest.raises(error, match="accum_steps"):
                accumulator.accum_steps = wrong
        assert accumulator.accum_steps == 2

    @pytest.mark.parametrize(
        ("schedule", "error", "match"),
        [
            (lambda updates: 0, ValueError, "callable for 0 updates: 0"),
            (lambda updates: tf.cast(updates, tf.float32), TypeError, "callable"),
            (lambda updates: 2.5, TypeError, "callable for 0 updates"),
            (lambda updates: [1, 2], TypeError, "callable for 0 updates"),
            (eval("lambda updates: 1 if updates < 2 else 3"), TypeError, "tf.where"),
            ({0: 1}, TypeError, "AccumStepsScheduler"),
            (lambda: 2, TypeError, "count of updates"),
            (10**30, ValueError, "int64"),
        ],
    )
    def test_wrong_callables(self, schedule, error, match):
        with pytest.raises(error, match=match):
            GradientAccumulator(accum_steps=schedule)


@pytest.mark.some_by_default(3)
def test_sparse_rows_are_kept_where_they_are_known(backend, mode, rng):
    """Each row once and in order; a gradient that was dense, or a small variable, closes as a tensor."""
    table, other, small = (tf.Variable(tf.zeros(shape)) for shape in ([2000, 40], [2000, 40], [20, 2]))
    accumulator = GradientAccumulator(accum_steps=2)
    accumulator.build([table, other, small])
    accumulate = mode(
        lambda indices, values: accumulator.accumulate(
            [tf.IndexedSlices(values, indices), tf.ones([2000, 40]), tf.IndexedSlices(values[:, :2], indices // 100)]
        )
    )
    close = mode(lambda: accumulator.close(keep_sparse=True))
    for _ in range(2):
        wanted = np.zeros([2000, 40])
        for _ in range(2):
            indices, values = rng.integers(0, 2000, 9), rng.standard_normal((9, 40)).astype("float32")
            np.add.at(wanted, indices, values / 2)
            accumulate(tf.constant(indices), tf.constant(values))
        rows, dense, dense_too = close()
        assert isinstance(rows, tf.IndexedSlices)
        np.testing.assert_array_equal(rows.indices, np.flatnonzero(np.abs(wanted).max(axis=1)))
        np.testing.assert_allclose(tf.convert_to_tensor(rows), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(dense, np.ones([2000, 40]))
        assert tuple(dense_too.shape) == (20, 2)


def test_a_close_that_is_traced_first_keeps_dense_gradients(backend):
    """Its flags have to be right for gradients of any kind, in a window of another process too."""
    restored, here = (tf.Variable(tf.zeros([2000, 40])) for _ in range(2))
    first, second = GradientAccumulator(accum_steps=2), GradientAccumulator(accum_steps=2)
    first.build([restored])
    second.build([here])

    @tf.function
    def close():
        return [tf.convert_to_tensor(gradient) for gradient in second.close(keep_sparse=True)]

    dense = tf.function(lambda: second.accumulate([tf.ones([2000, 40])]))
    close.get_concrete_function()
    dense()
    close()
    first.accumulate([tf.IndexedSlices(tf.ones([1, 40]), [3])])
    for before, after in zip(first.variables, second.variables, strict=True):
        after.assign(before)
    dense()
    np.testing.assert_array_equal(close()[0][:, 0], np.where(np.arange(2000) == 3, 1.0, 0.5))


def test_a_failure_between_leaves_the_window_open(variables):
    accumulator = GradientAccumulator(accum_steps=1)
    accumulator.accumulate(gradients(2), variables)
    with pytest.raises(RuntimeError), accumulator.state.ending():
        raise RuntimeError
    assert accumulator.ready
    np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 2.0))


COUNTERS = """
import tensorflow as tf
import accumops

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

def counters(build, **arguments):
    with tf.device("CPU:1"):  # in place of a GPU
        variables = [tf.Variable(tf.zeros([3]))]
        accumulator = accumops.GradientAccumulator(accum_steps=2)
        build(accumulator, variables)
        for value in (1.0, 3.0, 2.0, 6.0):
            accumulator.accumulate([tf.fill([3], value)])
            if accumulator.ready:
                print(accumulator.close()[0].numpy().tolist(), end=" ")
        assert accumulator.accumulators[0].value.device.endswith("CPU:1")
        print(accumulator.variables[0].value.device[-5:])

def build_in(jit_compile):
    def build(accumulator, variables):
        step = tf.function(lambda: accumulator.accumulate([tf.ones([3])], variables), jit_compile=jit_compile)
        step()
        accumulator.close()
    return build

counters(lambda accumulator, variables: accumulator.build(variables))
counters(lambda accumulator, variables: accumulator.build(variables, jit_compile=False))
counters(lambda accumulator, variables: accumulator.build(variables, jit_compile=True))
counters(build_in(False))
counters(build_in(True))
"""


def test_counters_are_where_conditions_are_decided():
    """On the host for functions that XLA does not compile; where these run for others, and where it is not known."""
    run = processes.run(COUNTERS)
    assert run.returncode == 0, run.stderr
    means = "[2.0, 2.0, 2.0] [4.0, 4.0, 4.0]"
    assert run.stdout.splitlines() == [f"{means} CPU:{device}" for device in (1, 0, 1, 0, 1)]


class TestErrors:
    @pytest.mark.parametrize(
        ("accum_steps", "error"),
        [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("4", TypeError), (True, TypeError)],
    )
    def test_accum_steps(self, accum_steps, error):
        with pytest.raises(error, match=r"accum_steps.*Received"):
            GradientAccumulator(accum_steps=accum_steps)

    def test_not_built(self):
        accumulator = GradientAccumulator(accum_steps=2)
        with pytest.raises(ValueError, match="build"):
            accumulator.accumulate([tf.ones([2])])
        with pytest.raises(ValueError, match="build"):
            accumulator.close()

    def test_built_twice(self, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build(variables)
        with pytest.raises(ValueError, match="already built"):
            accumulator.build(variables)

    def test_no_variables(self):
        with pytest.raises(ValueError, match="At least one variable"):
            GradientAccumulator(accum_steps=2).build([])

    @pytest.mark.parametrize("wrong", [[1], ["x"], tf.Variable([1.0]), 3, None])
    def test_not_variables(self, wrong):
        with pytest.raises(TypeError, match="`variables`"):
            GradientAccumulator(accum_steps=2).build(wrong)

    def test_a_variable_twice(self, variables):
        with pytest.raises(ValueError, match=r"kernel.*twice"):
            GradientAccumulator(accum_steps=2).build([*variables, variables[0]])

    @pytest.mark.parametrize(
        "arguments",
        [{"iterations": 5}, {"iterations": tf.Variable(1.0)}, {"jit_compile": "yes"}, {"track_all_rows": 1}],
    )
    def test_arguments_of_build(self, variables, arguments):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            GradientAccumulator(accum_steps=2).build(variables, **arguments)

    def test_integer_variable(self):
        with pytest.raises(ValueError, match=r"counter.*int32"):
            GradientAccumulator(accum_steps=2).build([tf.Variable(1, name="counter")])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ([tf.ones([2, 3])], "2 variables.*1 gradients"),
            ([None, None], "No gradients.*kernel"),
            ([tf.ones([3, 2]), tf.constant(1.0)], r"kernel.*\(2, 3\).*\(3, 2\)"),
        ],
    )
    def test_gradients_that_do_not_fit_change_nothing(self, variables, wrong, message):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.accumulate(gradients(1), variables)
        with pytest.raises(ValueError, match=message):
            accumulator.accumulate(wrong)
        assert int(accumulator.step) == 1
        accumulator.accumulate(gradients(3))
        np.testing.assert_array_equal(accumulator.close()[0], np.full([2, 3], 2.0))

    def test_dtype_that_is_no_number_changes_nothing(self, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.accumulate(gradients(1), variables)
        for dtype in (tf.bool, tf.complex64):
            with pytest.raises(ValueError, match=dtype.name):
                accumulator.accumulate([tf.ones([2, 3], dtype), tf.constant(1.0)])
        assert int(accumulator.step) == 1
        assert float(accumulator.accumulators[1].numpy()) == 10

    def test_negative_weight(self, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        with pytest.raises(ValueError, match=r"weight.*-1"):
            accumulator.accumulate(gradients(1), variables, weight=-1)
        for weight in ("3", None, True, 1j):
            with pytest.raises(TypeError, match="weight"):
                accumulator.accumulate(gradients(1), weight=weight)
        for weight in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="weight"):
                accumulator.accumulate(gradients(1), weight=weight)

    def test_nothing_to_close(self, variables):
        accumulator = GradientAccumulator(accum_steps=2)
        accumulator.build(variables)
        with pytest.raises(ValueError, match="no open window"):
            accumulator.close()
        with pytest.raises(tf.errors.InvalidArgumentError, match="no open window"):
            tf.function(accumulator.close)()


@pytest.mark.parametrize("backend", ["fused", pytest.param("reference", marks=pytest.mark.exhaustive)], indirect=True)
def test_keras_model_in_a_custom_loop(backend):
    """The loop of the class's docstring against the full batch."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 3)).astype("float32"), rng.standard_normal((64, 1)).astype("float32")

    def make():
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])

    full, accumulated = make(), make()
    full.compile(keras.optimizers.Adam(0.01), loss="mse", run_eagerly=True)
    for _ in range(10):
        full.train_on_batch(x, y)

    variables = accumulated.trainable_variables
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(variables)
    accumulator = GradientAccumulator(accum_steps=4)
    accumulator.build(variables)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((accumulated(x, training=True) - y) ** 2)
        accumulator.accumulate(tape.gradient(loss, variables))
        if accumulator.ready:
            optimizer.apply(accumulator.close(), variables)

    for _ in range(10):
        for i in range(0, 64, 16):
            train_step(x[i : i + 16], y[i : i + 16])
    assert int(optimizer.iterations) == 10
    for a, b in zip(full.get_weights(), accumulated.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
