"""The update op and squared norms: both backends in every mode, against NumPy in float32 and in float64."""

import handles
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, label, turns

from accumops import ops
from accumops.ops.update import CORRECTED, SLOTS

NUMPY = {tf.float16: np.float16, tf.bfloat16: ml_dtypes.bfloat16, tf.float32: np.float32, tf.float64: np.float64}
# The kernel takes blocks of 8192 values, 256 values at a time.
SHAPES = [(), (0,), (1,), (17,), (255,), (257,), (5, 111), (8191,), (8193,), (7777, 7)]
SETTINGS = {"beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-7}


def step(rule, x, g, slots, rate, dtype):
    """Computes a step in one dtype, by the formulas in `ops.update`'s docstring."""
    b1, b2, epsilon = (dtype(SETTINGS[name]) for name in ("beta_1", "beta_2", "epsilon"))
    new_1, new_2 = dtype(1 - SETTINGS["beta_1"]), dtype(1 - SETTINGS["beta_2"])
    if rule == "sgd":
        return x - rate * g, []
    m = slots[0]
    if rule in ("momentum", "nesterov"):
        m = m * b1 - rate * g
        return x + (m if rule == "momentum" else m * b1 - rate * g), [m]
    if rule == "lion":
        return x - rate * np.sign(m * b1 + g * new_1), [m * b2 + g * new_2]
    m = m + (g - m) * new_1
    v = slots[1] + (g * g - slots[1]) * new_2
    slots = [m, v] if rule == "adam" else [m, v, np.maximum(slots[2], v)]
    return x - m * rate / (np.sqrt(slots[-1]) + epsilon), slots


class Problem:
    """Random variables with their slots, accumulators and latest gradients."""

    def __init__(self, rng, rule, shapes=SHAPES, latest_dtype=tf.float32):
        def draw(dtype=np.float32):
            return [rng.standard_normal(shape).astype(dtype) for shape in shapes]

        self.rule = rule
        self.values, self.sums, self.latest = draw(), draw(), draw(NUMPY[latest_dtype])
        # All slots but the first are variances, which are not negative.
        self.slots = [[abs(each) if i else each for each in draw()] for i in range(SLOTS[rule])]
        self.variables, self.accumulators = ([tf.Variable(v) for v in vs] for vs in (self.values, self.sums))
        self.slot_variables = [[tf.Variable(v) for v in slot] for slot in self.slots]

    def run(self, mode, *, accumulated=True, latest=False, **arguments):
        @mode
        def run(*given):
            ops.update(
                self.rule,
                self.variables,
                self.slot_variables,
                accumulators=self.accumulators if accumulated else None,
                latest=given if latest else None,
                **{**SETTINGS, **arguments},
            )

        run(*(tf.constant(each) for each in self.latest))

    def expected(self, i, gradient, *, rate, decay=0.0, decays=True, dtype=np.float32):
        x = self.values[i].astype(dtype)
        if decays:
            x = x - x * dtype(np.float32(decay))
        slots = [slot[i].astype(dtype) for slot in self.slots]
        return step(self.rule, x, gradient.astype(dtype), slots, dtype(np.float32(rate)), dtype)

    def check(self, i, expected, compare):
        value, slots = expected
        compare(self.variables[i].numpy(), value)
        for actual, wanted in zip(self.slot_variables, slots, strict=True):
            compare(actual[i].numpy(), wanted)


def comparison(backend, mode):
    """Returns the assertion for a backend and mode.

    The kernel gives NumPy's bits. TensorFlow reorders constants in graphs, and XLA contracts operations.
    """
    if backend == "fused" and mode.name != "xla":
        return np.testing.assert_array_equal
    return lambda actual, wanted: np.testing.assert_allclose(actual, wanted, rtol=3e-6, atol=1e-6)


BACKENDS, MODES = ["fused", "reference"], ["eager", "graph", "xla"]
# Eagerly all rules run. In graphs, of each backend, and compiled, they take turns.
TRACED = [("fused", "graph"), ("reference", "graph"), ("fused", "xla")]
RULES = cross(
    BACKENDS,
    MODES,
    SLOTS,
    default=lambda backend, mode, rule: mode == "eager" or (rule, (backend, mode)) in turns(SLOTS, TRACED),
)


@pytest.mark.parametrize(("backend", "mode", "rule"), RULES, indirect=["backend", "mode"])
@pytest.mark.some_by_default(6)
def test_steps_as_the_rule_says(backend, mode, rng, rule):
    problem = Problem(rng, rule)
    problem.run(mode, scales=0.25, rate=0.01)
    for i, total in enumerate(problem.sums):
        gradient = np.float32(0.25) * total
        problem.check(i, problem.expected(i, gradient, rate=0.01), comparison(backend, mode))
        np.testing.assert_array_equal(problem.accumulators[i].numpy(), total)


@pytest.mark.parametrize(
    ("backend", "mode", "rule", "latest_dtype"),
    cross(
        BACKENDS,
        MODES,
        ["sgd", "adam"],
        [tf.float16, tf.bfloat16, tf.float32],
        default=lambda backend, mode, rule, latest_dtype: (
            (backend, mode) != ("reference", "xla") or (rule == "adam") == (latest_dtype == tf.bfloat16)
        ),
    ),
    ids=label,
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(8)
def test_latest_gradient_goes_straight_in(backend, mode, rng, rule, latest_dtype):
    problem = Problem(rng, rule, latest_dtype=latest_dtype)
    problem.run(mode, latest=True, scales=0.25, rate=0.01, weight=3.0)
    for i, (total, latest) in enumerate(zip(problem.sums, problem.latest, strict=True)):
        gradient = np.float32(0.25) * (total + np.float32(3.0) * latest.astype(np.float32))
        problem.check(i, problem.expected(i, gradient, rate=0.01), comparison(backend, mode))


@pytest.mark.parametrize("accumulated", [False, True])
def test_accumulators_that_are_overwritten_have_no_influence(backend, mode, rng, accumulated):
    problem = Problem(rng, "adam")
    for accumulator in problem.accumulators:
        accumulator.assign(tf.fill(accumulator.shape, np.nan))
    problem.run(mode, accumulated=accumulated, latest=True, overwrite=True, scales=0.5, rate=0.01, weight=3.0)
    for i, latest in enumerate(problem.latest):
        gradient = np.float32(0.5) * (np.float32(3.0) * latest)
        problem.check(i, problem.expected(i, gradient, rate=0.01), comparison(backend, mode))


def test_decay_clip_and_scales_of_their_own(backend, mode, rng):
    problem = Problem(rng, "momentum")
    decays = [i % 2 == 0 for i in range(len(SHAPES))]
    scales = np.linspace(0.1, 2, len(SHAPES), dtype=np.float32)
    problem.run(mode, scales=tf.constant(scales), rate=0.01, decay=0.03, decays=decays, clip=0.5)
    for i, total in enumerate(problem.sums):
        gradient = np.clip(scales[i] * total, np.float32(-0.5), np.float32(0.5))
        wanted = problem.expected(i, gradient, rate=0.01, decay=0.03, decays=decays[i])
        problem.check(i, wanted, comparison(backend, mode))


@pytest.mark.parametrize(("backend", "mode", "rule"), RULES, indirect=["backend", "mode"])
@pytest.mark.some_by_default(5)
def test_a_step_that_does_not_apply_writes_nothing(backend, mode, rng, rule):
    problem = Problem(rng, rule)
    applies = tf.Variable(False)
    problem.run(mode, latest=True, scales=np.nan, rate=0.01, decay=0.1, applies=applies)
    for i, value in enumerate(problem.values):
        problem.check(i, (value, [slot[i] for slot in problem.slots]), np.testing.assert_array_equal)
    applies.assign(True)
    problem.run(mode, scales=0.5, rate=0.01, applies=applies)
    for i, total in enumerate(problem.sums):
        problem.check(i, problem.expected(i, np.float32(0.5) * total, rate=0.01), comparison(backend, mode))


@pytest.mark.parametrize(("backend", "mode", "rule"), RULES, indirect=["backend", "mode"])
@pytest.mark.some_by_default(5)
def test_a_flag_says_whether_anything_is_done(backend, mode, rng, rule):
    problem = Problem(rng, rule)
    only_if = tf.Variable(False)
    problem.run(mode, latest=True, scales=np.nan, rate=0.01, decay=0.1, only_if=only_if)
    for i, value in enumerate(problem.values):
        problem.check(i, (value, [slot[i] for slot in problem.slots]), np.testing.assert_array_equal)
    only_if.assign(True)
    problem.run(mode, latest=True, scales=0.5, rate=0.01, applies=False, only_if=only_if)
    for i, value in enumerate(problem.values):
        problem.check(i, (value, [slot[i] for slot in problem.slots]), np.testing.assert_array_equal)
    problem.run(mode, scales=0.5, rate=0.01, only_if=only_if)
    for i, total in enumerate(problem.sums):
        problem.check(i, problem.expected(i, np.float32(0.5) * total, rate=0.01), comparison(backend, mode))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_shape_that_is_known_late_is_not_looked_at_where_nothing_is_done(backend):
    variable = tf.Variable([1.0, 2.0])

    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec([], tf.bool)])
    def run(latest, only_if):
        ops.update("sgd", [variable], latest=[latest], rate=1.0, only_if=only_if)

    run(tf.ones([3]), tf.constant(False))
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(tf.ones([3]), tf.constant(True))
    np.testing.assert_array_equal(variable.numpy(), [1, 2])
    run(tf.ones([2]), tf.constant(True))
    np.testing.assert_array_equal(variable.numpy(), [0, 1])


@pytest.mark.parametrize(("backend", "mode", "rule"), RULES, indirect=["backend", "mode"])
def test_rows_without_a_flag_stay_as_they_are(backend, mode, rng, rule):
    shapes = [(1000, 33), (4, 5), (300, 2, 3), (7,), (0, 3)]
    problem = Problem(rng, rule, shapes)
    flags = [rng.random(shape[0]) < share for shape, share in zip(shapes, (0.02, 1, 0.5, 0, 0.5), strict=True)]
    flags[1] = None
    variables = [None if each is None else tf.Variable(each) for each in flags]
    problem.run(mode, scales=0.25, rate=0.01, decay=0.1, touched_rows=variables)
    for i, total in enumerate(problem.sums):
        value, slots = problem.expected(i, np.float32(0.25) * total, rate=0.01, decay=0.1)
        if flags[i] is not None:
            touched = flags[i].reshape([-1] + [1] * (total.ndim - 1))
            value = np.where(touched, value, problem.values[i])
            slots = [np.where(touched, new, old[i]) for new, old in zip(slots, problem.slots, strict=True)]
        problem.check(i, (value, slots), comparison(backend, mode))


@pytest.mark.parametrize("rule", SLOTS)
def test_close_to_float64(backend, mode, rng, rule):
    problem = Problem(rng, rule, [(7777, 7)])
    problem.run(mode, scales=0.25, rate=0.01)
    gradient = 0.25 * problem.sums[0].astype(np.float64)
    wanted = problem.expected(0, gradient, rate=0.01, dtype=np.float64)

    def compare(actual, exact):
        # Where rounding alone decides the direction, the sign may differ.
        wrong = ~np.isclose(actual, exact, rtol=1e-5, atol=1e-6)
        assert wrong.mean() < 1e-4

    problem.check(0, wanted, compare)


def test_numbers_that_are_not_finite_stay_where_they_are(backend, mode):
    """A NaN in a gradient reaches only its own value, clipping leaves it NaN, and it wins a maximum."""
    values = np.array([1.0, 2.0, 3.0, np.inf], np.float32)
    total = np.array([np.nan, np.inf, 1.0, 1.0], np.float32)
    for rule in ("sgd", "amsgrad", "lion"):
        variable, accumulator = tf.Variable(values), tf.Variable(total)
        slots = [[tf.Variable(tf.zeros(4))] for _ in range(SLOTS[rule])]

        @mode
        def run(rule=rule, variable=variable, slots=slots, accumulator=accumulator):
            ops.update(rule, [variable], slots, accumulators=[accumulator], rate=0.5, clip=2.0, **SETTINGS)

        run()
        assert np.isnan(variable.numpy()[0])
        assert np.isfinite(variable.numpy()[1:3]).all()
        assert variable.numpy()[3] == np.inf
        if rule == "amsgrad" and (backend, mode.name) != ("reference", "xla"):  # on a CPU XLA's maximum loses NaN
            assert np.isnan(slots[2][0].numpy()[0])


@pytest.mark.parametrize(
    ("backend", "mode", "accumulated"),
    cross(
        BACKENDS,
        MODES,
        [False, True],
        default=lambda backend, mode, accumulated: mode != "xla" or (backend == "fused" and accumulated),
    ),
    indirect=["backend", "mode"],
)
def test_latest_gradients_of_weight_0_count_as_nothing_whatever_they_are(backend, mode, accumulated):
    variables = [tf.Variable([1.0, 2.0, 3.0]) for _ in range(3)]
    accumulators = [tf.Variable([1.0, -1.0, 2.0]) for _ in variables]

    @mode
    def run(weight):
        latest = [tf.constant([np.nan, np.inf, -np.inf], dtype) for dtype in (tf.float16, tf.bfloat16, tf.float32)]
        given = {"accumulators": accumulators if accumulated else None, "latest": latest, "weight": weight}
        ops.update("sgd", variables, scales=2.0, rate=0.5, **given)

    for weight in (0.0, -0.0):
        run(tf.constant(weight))
    for variable in variables:
        np.testing.assert_array_equal(variable.numpy(), [-1, 4, -1] if accumulated else [1, 2, 3])


def test_a_variable_that_is_being_read_keeps_what_was_read(backend):
    variable, accumulator = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 1.0])
    before = (
        variable.read_value()
        if backend == "reference"
        else tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=tf.float32)
    )
    ops.update("sgd", [variable], accumulators=[accumulator], rate=1.0)
    np.testing.assert_array_equal(before.numpy(), [1, 2])
    np.testing.assert_array_equal(variable.numpy(), [0, 1])


def test_nothing_to_update(backend, mode):
    @mode
    def run():
        ops.update("adam", [], [[], []], accumulators=[], rate=0.1)
        return ops.squared_norms([])

    assert run().shape == (0,)


@pytest.mark.parametrize(
    ("backend", "mode", "dtype"),
    cross(
        BACKENDS,
        MODES,
        NUMPY,
        default=lambda backend, mode, dtype: mode != "xla" or (backend, dtype) == ("fused", tf.float32),
    ),
    ids=label,
    indirect=["backend", "mode"],
)
def test_squared_norms(backend, mode, rng, dtype):
    shapes = [(), (0,), (1,), (15,), (17,), (32767,), (32769,), (777, 77)]
    tensors = [rng.standard_normal(shape).astype(NUMPY[dtype]) for shape in shapes]

    @mode
    def run(*given):
        return ops.squared_norms(given)

    norms = run(*map(tf.constant, tensors)).numpy()
    assert norms.dtype == np.float64
    exact = [np.sum(tensor.astype(np.float64) ** 2) for tensor in tensors]
    np.testing.assert_allclose(norms, exact, rtol=1e-12)


def test_squared_norms_are_finite_where_the_values_are(backend, mode):
    largest = np.finfo(np.float32).max

    @mode
    def run(*given):
        return ops.squared_norms(given)

    tensors = [[largest] * 40, [1.0] * 20 + [np.nan], [np.inf] + [1.0] * 20, [1e-30]]
    norms = run(*(tf.constant(each, tf.float32) for each in tensors)).numpy()
    assert np.isfinite(norms).tolist() == [True, False, False, True]
    np.testing.assert_allclose(norms[3], np.float64(np.float32(1e-30)) ** 2)


@pytest.mark.parametrize(
    ("backend", "mode", "dtype"),
    cross(
        BACKENDS,
        MODES,
        NUMPY,
        default=lambda backend, mode, dtype: mode != "xla" or (backend, dtype) == ("fused", tf.float32),
    ),
    ids=label,
    indirect=["backend", "mode"],
)
def test_all_finite(backend, mode, dtype):
    largest = float(tf.as_dtype(dtype).max)

    @mode
    def run(*given):
        rows = tf.IndexedSlices(given[1][:, None], tf.constant([4, 4]))
        return ops.all_finite([given[0], rows, tf.zeros([0], dtype), tf.constant(1.0)])

    fine = [largest, -largest]
    assert run(tf.constant(fine, dtype), tf.constant(fine, dtype))
    for value in (np.nan, np.inf, -np.inf):
        assert not run(tf.constant(fine, dtype), tf.constant([1.0, value], dtype))
        assert not run(tf.constant([value, 1.0], dtype), tf.constant(fine, dtype))


def test_all_finite_of_nothing_and_of_numbers_that_always_are():
    assert ops.all_finite([])
    with pytest.raises(TypeError, match=r"`tensors\[1\]` must be of float16, .* Received: int32"):
        ops.all_finite([tf.constant(1.0), tf.constant(1)])


def test_the_same_bits_on_every_run(rng):
    tensors = [tf.constant(rng.standard_normal(n), tf.float32) for n in (100_003, 7, 65_536)]
    ops.set_backend("fused")
    try:
        norms = {ops.squared_norms(tensors).numpy().tobytes() for _ in range(50)}
    finally:
        ops.set_backend("auto")
    assert len(norms) == 1


def variables(*shapes, dtype=tf.float32):
    return [tf.Variable(tf.zeros(shape, dtype)) for shape in shapes]


ONE = variables((3,))
WRONG = {
    "an unknown rule": (("adagrad", ONE), {}, ValueError, "must be one of 'sgd'"),
    "slots that the rule has not": (("sgd", ONE, [variables((3,))]), {}, ValueError, "has 0 slots. Received: 1"),
    "no gradients": (("sgd", ONE), {"accumulators": None}, ValueError, "give `accumulators`, or `latest`"),
    "no variable": (("sgd", [tf.zeros([3])]), {}, TypeError, r"`variables\[0\]` must be a tf.Variable"),
    "no list of variables": (("sgd", ONE[0]), {}, TypeError, "`variables` must be a list of variables"),
    "no slots": (("sgd", ONE, None), {}, TypeError, "`slots` must be a list of lists"),
    "no list of slots": (("sgd", ONE, [None]), {}, TypeError, r"must be a list of variables. Received: None"),
    "a float64 variable": (("sgd", variables((3,), dtype=tf.float64)), {}, ValueError, "must be float32"),
    "too few accumulators": (("sgd", variables((3,), (3,))), {}, ValueError, "must have 2 items"),
    "another shape": (("sgd", ONE), {"accumulators": variables((4,))}, ValueError, r"of shape \(3,\). Received"),
    "a variable twice": (("sgd", ONE), {"accumulators": ONE}, ValueError, "the same variable; give it once"),
    "another shape of the latest": (("sgd", ONE), {"latest": [tf.zeros([4])]}, ValueError, r"`latest\[0\]`"),
    "a wide latest": (("sgd", ONE), {"latest": [tf.zeros([3], tf.float64)]}, ValueError, "Received: float64"),
    "flags of other rows": (
        ("sgd", ONE),
        {"touched_rows": variables((4,), dtype=tf.bool)},
        ValueError,
        "with a flag for each row",
    ),
    "a negative clip": (("sgd", ONE), {"clip": -1.0}, ValueError, "`clip` must be finite and not negative"),
    "a decay rate that is no number": (("sgd", ONE), {"beta_1": "0.9"}, TypeError, "`beta_1` must be a number"),
    "a rate of many": (("sgd", ONE), {"rate": tf.zeros([3])}, ValueError, "`rate` must be of shape"),
    "scales of others": (("sgd", ONE), {"scales": tf.zeros([3])}, ValueError, "`scales` must be of shape"),
    "a number as a flag": (("sgd", ONE), {"applies": 1}, ValueError, "`applies` must be a bool or a scalar bool"),
    "a number for only_if": (("sgd", ONE), {"only_if": 0}, ValueError, "`only_if` must be a bool or a scalar bool"),
    "many flags": (("sgd", ONE), {"overwrite": tf.constant([True])}, ValueError, "`overwrite` must be a bool or a"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(backend, case):
    positional, keywords, error, message = WRONG[case]
    arguments = {"accumulators": variables((3,)), "rate": 0.1, **keywords}
    with pytest.raises(error, match=message):
        ops.update(*positional, **arguments)


def test_shapes_that_only_the_call_knows(rng):
    variable, accumulator = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 1.0])

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def run(latest):
        ops.update("sgd", [variable], accumulators=[accumulator], latest=[latest], rate=1.0)

    ops.set_backend("fused")
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"latest\[0\] has shape \[3\]"):
            run(tf.zeros([3]))
    finally:
        ops.set_backend("auto")
    np.testing.assert_array_equal(variable.numpy(), [1, 2])


INVALID = tf.errors.InvalidArgumentError
VARIABLES = ("variables", "slots", "accumulators", "touched_rows")
RAW = {
    "iterations of a rule without": ({"iterations": [1]}, INVALID, "Update by 'sgd' got 1 iterations"),
    "S": ({"slots": ["other"]}, INVALID, "1 slots"),
    "A": ({"accumulators": []}, INVALID, "0 accumulators, 0 latest"),
    "decays": ({"decays": []}, INVALID, "0 decays"),
    "rows_of": ({"rows_of": [0]}, INVALID, "0 touched rows and 1 rows_of"),
    "rows out of range": ({"rows_of": [7], "touched_rows": ["flags"]}, INVALID, "rows_of must be ascending positions"),
    "flags of other rows": (
        {"rows_of": [0], "touched_rows": ["other flags"]},
        INVALID,
        r"touched_rows\[0\].*it must be bool with a flag for each row of variables\[0\]",
    ),
    "flags of numbers": (
        {"rows_of": [0], "touched_rows": ["other"]},
        INVALID,
        r"touched_rows\[0\].*is float.*it must be bool",
    ),
    "a slot": (
        {"rule": "momentum", "slots": ["short"]},
        INVALID,
        r"does not fit|slots\[0\].*\[1\]; it must be float of shape \[2\]",
    ),
    "an accumulator of doubles": ({"accumulators": ["wide"]}, INVALID, r"accumulators\[0\].*double.*must be float"),
    "a variable of doubles": ({"variables": ["wide"]}, INVALID, r"variables\[0\].*double.*must be float"),
    "the same variable twice": ({"accumulators": ["variable"]}, INVALID, r"accumulators\[0\].*the same variable"),
    "several handles in one": ({"accumulators": ["two"]}, INVALID, r"accumulators\[0\] is not one variable.*\[2\]"),
    "latest": (
        {"latest": [np.zeros(3, np.float32)]},
        INVALID,
        r"[lL]atest.*\[3\]",
    ),
    "scales of others": (
        {"scales": [1.0, 2.0]},
        INVALID,
        "scales must be a scalar or have one for each of 1 variables",
    ),
    "scales of no variable": ({"scales": np.ones(0, np.float32)}, INVALID, r"scales must be .*\[0\]"),
    "rate": ({"rate": [1.0]}, INVALID, "rank 0|rate must be a scalar"),
    "applies": ({"applies": [True]}, INVALID, "rank 0|applies must be a scalar"),
    "only_if": ({"only_if": [[True]]}, INVALID, "rank 0|only_if must be one scalar"),
    "two of only_if": ({"only_if": [True, True]}, INVALID, "only_if must be one scalar or none"),
    "clip": ({"clip": -1.0}, INVALID, "clip must not be negative"),
    "uninitialized": (
        {"accumulators": ["gone"]},
        tf.errors.FailedPreconditionError,
        r"accumulators\[0\].*uninitialized",
    ),
}


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
@pytest.mark.parametrize("case", RAW)
@pytest.mark.some_by_default(32)
def test_malformed_calls_of_the_raw_op_fail_and_change_nothing(case, way):
    """No wrapper has checked these arguments. Functions learn when they run what their variables are."""
    raw = ops.library.load()[0]
    variable, accumulator = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 1.0])
    named = {
        "variable": variable.handle,
        "accumulator": accumulator.handle,
        "other": handles.variable([3.0, 3.0]),
        "short": handles.variable([1.0]),
        "wide": handles.variable([3.0, 3.0], tf.float64),
        "flags": handles.variable([True, True]),
        "other flags": handles.variable([True]),
        "gone": handles.uninitialized(tf.float32, [2]),
    }
    two = handles.stacked(named["variable"], named["other"])
    changes, error, message = RAW[case]
    arguments = {
        "variables": ["variable"],
        "slots": [],
        "accumulators": ["accumulator"],
        "touched_rows": [],
        "latest": [],
        "scales": 1.0,
        "rate": 1.0,
        "iterations": [],
        "decay": 0.0,
        "weight": 1.0,
        "overwrite": False,
        "applies": True,
        "only_if": [],
        "rule": "sgd",
        "decays": [False],
        **changes,
    }

    def call(*given):
        known = dict(zip(named, given, strict=True)) | {"two": two}
        lists = {name: [known[each] for each in arguments[name]] for name in VARIABLES}
        raw.accum_ops_update(**arguments | lists)

    if way != "eager":
        unknown = [tf.TensorSpec(None, tf.resource)] * len(named)
        call = tf.function(call, input_signature=unknown, autograph=False, jit_compile=way == "xla")
    with pytest.raises((error, ValueError), match=message):
        call(*named.values())
    np.testing.assert_array_equal(variable.numpy(), [1, 2])
    np.testing.assert_array_equal(accumulator.numpy(), [1, 1])


def test_sizes_that_xla_knows_late():
    """Which values a mask takes is known when it runs. Their number cannot be checked before something is written."""
    raw = ops.library.load()[0]
    variable = tf.Variable([1.0, 2.0])

    @tf.function(jit_compile=True, autograph=False)
    def run(mask, late):
        gradient, scales = tf.boolean_mask([1.0, 1.0], mask), tf.boolean_mask([1.0], mask[:1])
        raw.accum_ops_update(
            variables=[variable.handle], slots=[], accumulators=[], touched_rows=[], rate=1.0, decay=0.0, weight=1.0,
            latest=[gradient if late == "latest" else [1.0, 1.0]], scales=scales if late == "scales" else 1.0,
            iterations=[], overwrite=False, applies=True, only_if=[], rule="sgd", decays=[False],
        )  # fmt: skip

    for late, message in (("latest", r"latest\[0\] is f32\[<=2\]"), ("scales", r"scales is f32\[<=1\]")):
        for mask in ([True, True], [True, False]):
            with pytest.raises(INVALID, match=message):
                run(tf.constant(mask), late)
            np.testing.assert_array_equal(variable.numpy(), [1, 2])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("rule", CORRECTED)
def test_the_rate_is_corrected_for_the_bias_of_the_slots(backend, mode, rule):
    """As in Adam's paper: from slots of zeros, the first step moves each value by the rate, against its gradient."""
    for iterations in (0, 1, 2, 700, 10**6):
        variable, *slots, gradient = (tf.Variable(tf.fill([3], each)) for each in (5.0, *[0.0] * SLOTS[rule], 0.25))

        @mode
        def run(iterations, given=(variable, slots, gradient)):
            variable, slots, gradient = given
            slots = [[slot] for slot in slots]
            ops.update(
                rule, [variable], slots, accumulators=[gradient], rate=0.5, iterations=iterations,
                beta_1=0.9, beta_2=0.999,
            )  # fmt: skip

        run(tf.constant(iterations))
        power_1, power_2 = (float(np.float32(float(np.float32(b)) ** (iterations + 1))) for b in (0.9, 0.999))
        m, v = 0.1 * 0.25, 0.001 * 0.25**2
        wanted = 5 - m / np.sqrt(v) * 0.5 * np.sqrt(1 - power_2) / (1 - power_1)
        np.testing.assert_allclose(variable.numpy(), [wanted] * 3, rtol=3e-5 if iterations < 3 else 1e-6)
        if iterations == 0:
            np.testing.assert_allclose(variable.numpy(), [4.5] * 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "iterations", "message"),
    [
        ("sgd", 1, "`iterations` is for the rules 'adam' and 'amsgrad', not for 'sgd'"),
        ("adam", 1.0, "`iterations` must be an integer or a scalar integer tensor"),
        ("adam", [1, 2], "`iterations` must be an integer or a scalar integer tensor"),
    ],
)
def test_iterations_that_do_not_fit(rule, iterations, message):
    variable, *slots = (tf.Variable([1.0]) for _ in range(1 + SLOTS[rule]))
    with pytest.raises(ValueError, match=message):
        ops.update(rule, [variable], [[slot] for slot in slots], latest=[tf.ones([1])], rate=1.0, iterations=iterations)
    assert variable.numpy() == 1


@pytest.mark.parametrize("name", ["rate", "decay", "weight", "overwrite", "applies", "only_if"])
def test_a_vector_for_a_scalar_that_only_the_call_shows(name):
    """Under XLA, too: no lowering takes it element by element."""
    raw = ops.library.load()[0]
    variable, accumulator = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 1.0])
    scalars = {"rate": 0.5, "decay": 0.0, "weight": 1.0, "overwrite": False, "applies": True, "only_if": True}
    dtype = tf.bool if isinstance(scalars[name], bool) else tf.float32
    for jit_compile in (False, True):

        @tf.function(jit_compile=jit_compile, input_signature=[tf.TensorSpec(None, dtype)])
        def run(value):
            given = scalars | {name: value}
            given["only_if"] = [given["only_if"]]
            raw.accum_ops_update(
                variables=[variable.handle], slots=[], accumulators=[accumulator.handle], touched_rows=[], latest=[],
                scales=1.0, rule="sgd", decays=[True], iterations=[], **given,
            )  # fmt: skip

        with pytest.raises(tf.errors.InvalidArgumentError, match="scalar"):
            run(tf.cast([1, 1], dtype))
    np.testing.assert_array_equal(variable.numpy(), [1, 2])
