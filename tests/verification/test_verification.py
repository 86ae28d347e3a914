import dataclasses
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops import verification
from accumops.ops import library, reference
from accumops.ops.update import SLOTS
from accumops.verification import runner
from accumops.verification.case import Case, Expected, Subject, Trial, ulp

PLACES = ("first", "last")


LARGE = ("size 598829", "all sizes", "huge")


def eager_only(subject, most=None):
    """Returns the subject with its quick grid, or `most` cases of it, without the slow modes and the large inputs."""

    def cases(quick):
        small = (case for case in subject.cases(True) if not any(large in case.name for large in LARGE))
        for case in itertools.islice(small, most):
            yield dataclasses.replace(case, modes=("eager",))

    return dataclasses.replace(subject, cases=cases)


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(runner, "SUBJECTS", tuple(eager_only(subject) for subject in verification.SUBJECTS))


@pytest.fixture
def grid_of(monkeypatch):
    """A function that leaves the small grid of one op, and three cases of each other op."""

    def leave(op):
        subjects = (eager_only(subject, None if subject.op == op else 3) for subject in verification.SUBJECTS)
        monkeypatch.setattr(runner, "SUBJECTS", tuple(subjects))

    return leave


def break_fused(monkeypatch, broken):
    """Replaces the fused accumulate by `broken(original, accumulators, gradients, **arguments)`."""
    original = accumops.ops.accumulate
    monkeypatch.setattr(accumops.ops, "accumulate", lambda *args, **kwargs: broken(original, *args, **kwargs))


def test_every_result_is_within_its_bound(small_grid):
    results = verification.run(device="cpu", quick=True)
    assert [result for result in results if not result.ok] == []
    assert {result.layout for result in results if result.op == "accumulate"} == {
        f"{dtype}, {layout}"
        for dtype in ("float16", "bfloat16", "float32", "float64", "mixed")
        for layout in ("dense", "rows")
    }
    assert {result.layout for result in results if result.op == "batch_norm"} == {
        f"{dtype}, channels {place}" for dtype in ("float16", "bfloat16", "float32", "float64") for place in PLACES
    }
    assert {result.layout for result in results if result.op == "update"} == set(SLOTS)
    assert {result.op for result in results} == {
        "accumulate",
        "add_noise_group",
        "add_to_windows",
        "batch_norm",
        "batch_norm_inference",
        "clip_units",
        "end_noise_window",
        "end_windows",
        "merge_moments",
        "update",
        "squared_norms",
    }


def test_progress_counts_up_to_the_total(grid_of):
    grid_of("merge_moments")
    calls = []
    results = verification.run(device="cpu", quick=True, progress=lambda *arguments: calls.append(arguments))
    assert calls == [(i + 1, len(results), result) for i, result in enumerate(results)]


def replace_op(monkeypatch, name, broken):
    """Replaces a fused op by `broken(original, *arguments)`."""
    original = getattr(accumops.ops, name)
    monkeypatch.setattr(accumops.ops, name, lambda *args, **kwargs: broken(original, *args, **kwargs))


def failures(op):
    failed = [result for result in verification.run(device="cpu", quick=True) if not result.ok]
    assert {result.op for result in failed} == {op}
    return failed


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_batch_norm_has_every_dtype_place_and_mode(quick):
    subjects = {subject.op: list(subject.cases(quick)) for subject in verification.SUBJECTS}
    for op in ("batch_norm", "batch_norm_inference"):
        assert {case.layout.split(", ")[0] for case in subjects[op]} == {"float16", "bfloat16", "float32", "float64"}
        modes = {mode for case in subjects[op] for mode in case.modes}
        assert modes == ({"eager"} if quick and op != "batch_norm" else {"eager", "tf.function", "jit_compile"})
    names = " ".join(case.name for case in subjects["batch_norm"])
    for value in ("mask of 70%", "mask of 0%", "mask of 100%", "no gamma, no beta", "mean 100"):
        assert value in names
    names = " ".join(case.name for case in subjects["merge_moments"])
    for start in ("0 values to window", "to no window", "to empty window", "open", "full", "closed", "never"):
        assert start in names
    assert {mode for case in subjects["merge_moments"] for mode in case.modes} == {
        "eager",
        "tf.function",
        "jit_compile",
    }


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_grid_has_every_value_of_every_dimension(quick):
    cases = list(verification.SUBJECTS[0].cases(quick))
    for group in {case.layout for case in cases}:
        members = [case for case in cases if case.layout == group]
        assert {mode for case in members for mode in case.modes} == {"eager", "tf.function", "jit_compile"}
    names = " ".join(f"{case.name};" for case in cases)
    for size in (1, 3, 17, 555, 65535, 65536, 65537, 7777 * 77):
        assert f"size {size}," in names
    for value in ("tiny beside huge", "hot row", "duplicates", "no rows", "int32", "int64", "touched_rows"):
        assert value in names
    for value in ("overwrite True", "overwrite True as tensor", "with inf", "with -inf", "with nan", "float64 tensor"):
        assert value in names


def test_same_seed_gives_the_same_inputs():
    case = next(iter(verification.SUBJECTS[0].cases(True)))
    first, second, other = (case.make(np.random.default_rng([seed, 0])) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.variables[0], second.variables[0])
    assert (first.variables[0] != other.variables[0]).any()


def test_backend_is_what_it_was_afterwards(grid_of):
    grid_of("merge_moments")
    accumops.set_backend("reference")
    try:
        verification.run(device="cpu", quick=True)
        assert accumops.get_backend() == "reference"
    finally:
        accumops.set_backend("auto")


@pytest.mark.exhaustive
def test_dropped_last_element_is_found(grid_of, monkeypatch):
    def broken(original, accumulators, gradients, **arguments):
        flat = [g if isinstance(g, tf.IndexedSlices) else tf.reshape(g, [-1]) for g in gradients]
        flat = [
            g if isinstance(g, tf.IndexedSlices) else tf.reshape(tf.concat([g[:-1], 0 * g[-1:]], 0), v.shape)
            for g, v in zip(flat, accumulators, strict=True)
        ]
        return original(accumulators, flat, **arguments)

    grid_of("accumulate")
    break_fused(monkeypatch, broken)
    failed = [result for result in verification.run(device="cpu", quick=True) if not result.ok]
    assert {result.layout for result in failed if result.layout.endswith("dense")} == {
        f"{dtype}, dense" for dtype in ("float16", "bfloat16", "float32", "float64", "mixed")
    }
    single = next(result for result in failed if "size 65537," in result.case and result.problem is None)
    assert "accumulators[0][65536]" in single.where


@pytest.mark.exhaustive
def test_dropped_duplicate_is_found(grid_of, monkeypatch):
    def broken(original, accumulators, gradients, **arguments):
        cut = [
            tf.IndexedSlices(g.values[:-1], g.indices[:-1]) if isinstance(g, tf.IndexedSlices) else g for g in gradients
        ]
        return original(accumulators, cut, **arguments)

    grid_of("accumulate")
    break_fused(monkeypatch, broken)
    failed = [result for result in verification.run(device="cpu", quick=True) if not result.ok]
    assert {result.layout for result in failed} == {
        f"{dtype}, rows" for dtype in ("float16", "bfloat16", "float32", "float64", "mixed")
    }


def test_wrong_answer_of_check_finite_is_found(grid_of, monkeypatch):
    def broken(original, *args, **kwargs):
        reports = original(*args, **kwargs)
        if not kwargs.get("check_finite"):
            return reports
        return (tf.constant(True), reports[1]) if isinstance(reports, tuple) else tf.constant(True)

    grid_of("accumulate")
    break_fused(monkeypatch, broken)
    failed = [result for result in verification.run(device="cpu", quick=True) if not result.ok]
    assert failed
    assert {result.problem for result in failed} == {"check_finite's answer is True from the fused op, not False"}


@pytest.mark.exhaustive
def test_unset_touched_rows_are_found(grid_of, monkeypatch):
    def broken(original, *args, touched_rows=None, **kwargs):
        spare = touched_rows and [None if flags is None else tf.Variable(flags) for flags in touched_rows]
        return original(*args, touched_rows=spare, **kwargs)

    grid_of("accumulate")
    break_fused(monkeypatch, broken)
    failed = [result for result in verification.run(device="cpu", quick=True) if not result.ok]
    assert failed
    assert all("touched_rows" in result.problem for result in failed)


@pytest.mark.exhaustive
def test_unbiased_variance_is_found(grid_of, monkeypatch):
    def broken(original, *args, **kwargs):
        y, moments = original(*args, **kwargs)
        count = tf.cast(moments.count, moments.variance.dtype)
        return y, moments._replace(variance=tf.math.divide_no_nan(moments.variance * count, count - 1))

    grid_of("batch_norm")
    replace_op(monkeypatch, "batch_norm", broken)
    failed = failures("batch_norm")
    assert {result.layout for result in failed} == {
        f"{dtype}, channels {place}" for dtype in ("float16", "bfloat16", "float32", "float64") for place in PLACES
    }
    assert all(result.where.startswith("variance") for result in failed)


@pytest.mark.exhaustive
def test_epsilon_of_another_size_is_found(grid_of, monkeypatch):
    """An epsilon that is off by a thousandth is found in full precision."""
    grid_of("batch_norm")

    def broken(original, *args, epsilon, **kwargs):
        return original(*args, epsilon=epsilon * 1.001, **kwargs)

    replace_op(monkeypatch, "batch_norm", broken)
    layouts = {result.layout for result in failures("batch_norm")}
    assert {"float32, channels last", "float64, channels first", "float64, channels last"} <= layouts


def test_gradient_without_the_sums_is_found(grid_of, monkeypatch):
    """Such a gradient treats the moments as constants. The forward pass cannot show the error."""

    def broken(original, x, gamma, beta, *, axis, epsilon, mask):
        y, moments = original(x, gamma, beta, axis=axis, epsilon=epsilon, mask=mask)
        mean = tf.cast(moments.mean, tf.float64) + tf.cast(moments.rest, tf.float64)
        mean = tf.cast(mean, moments.mean.dtype)
        given = accumops.ops.batch_norm_inference(x, gamma, beta, mean, moments.variance, axis=axis, epsilon=epsilon)
        return given + tf.stop_gradient(y - given), moments

    grid_of("batch_norm")
    replace_op(monkeypatch, "batch_norm", broken)
    failed = failures("batch_norm")
    assert len({result.layout for result in failed}) == 8
    assert all("dx" in result.where for result in failed)


def test_inference_with_the_batchs_own_mean_is_found(grid_of, monkeypatch):
    def broken(original, x, gamma, beta, mean, variance, **kwargs):
        return original(x, gamma, beta, mean * 1.01, variance, **kwargs)

    grid_of("batch_norm_inference")
    replace_op(monkeypatch, "batch_norm_inference", broken)
    assert failures("batch_norm_inference")


@pytest.mark.parametrize("wrong", ["mean of means", "ignored end", "no variance between", "no momentum"])
@pytest.mark.some_by_default(1)
def test_wrong_merges_are_found(grid_of, monkeypatch, wrong):
    def broken(original, batch, *, window, moving):
        if wrong == "no momentum":
            original(batch, window=window, moving=None if moving is None else moving._replace(momentum=0.0))
            return
        if window is None or batch is None or wrong == "ignored end":
            original(batch, window=window, moving=moving if window is None or batch is None else None)
            return
        before = tf.identity(window.moments)
        original(batch, window=window, moving=moving)
        mean, centred = tf.unstack(tf.identity(window.moments))
        if wrong == "mean of means":
            mean = (before[0] + tf.cast(batch.mean, tf.float64)) / 2
        else:
            centred = before[1] + tf.cast(batch.variance, tf.float64) * tf.cast(batch.count, tf.float64)
        window.moments.assign(tf.stack([mean, centred]))

    grid_of("merge_moments")
    replace_op(monkeypatch, "merge_moments", broken)
    assert {result.layout for result in failures("merge_moments")} == {"float32, moments", "float64, moments"}


@pytest.mark.exhaustive
def test_exception_is_a_result(grid_of, monkeypatch):
    def broken(original, *args, **kwargs):
        raise tf.errors.InternalError(None, None, "no kernel image\nand more")

    grid_of("accumulate")
    break_fused(monkeypatch, broken)
    results = [result for result in verification.run(device="cpu", quick=True) if result.op == "accumulate"]
    assert {result.problem for result in results} == {"InternalError: no kernel image"}
    assert not any(result.ok for result in results)


def test_half_precision_is_judged_by_the_references_own_error(monkeypatch):
    exact = np.array([1.0, 1.0])

    def make(rng):
        return Trial(
            variables=[np.zeros(2, np.float32)],
            arguments=[],
            step=lambda implementation, variables: implementation(variables),
            expected=[Expected("out", exact, ulp(exact, np.dtype("float32")))],
        )

    def assign(errors_in_ulp):
        def implementation(variables):
            variables[0].assign(1.0 + 2.0**-23 * np.array(errors_in_ulp))
            return []

        return implementation

    def run(errors, half):
        case = Case("bfloat16", "one", make, modes=("eager",), half=half)
        subject = Subject("op", fused=assign(errors), reference=assign([2.0, 0.0]), cases=lambda quick: iter([case]))
        monkeypatch.setattr(runner, "SUBJECTS", (subject,))
        (result,) = verification.run(device="cpu")
        return result

    within = run([-5.0, 0.0], half=True)
    assert (within.fused_vs_reference, within.fused_vs_float64, within.reference_vs_float64) == (7.0, 5.0, 2.0)
    assert within.ok
    assert within.fused_vs_float64_bound == 5.0
    assert within.fused_vs_reference_bound == math.inf
    assert not run([0.0, 6.0], half=True).ok
    assert not run([-5.0, 0.0], half=False).ok
    assert run([4.0, 0.0], half=False).ok


def test_infinity_in_the_wrong_place_is_an_infinite_error():
    unit = np.ones(3)
    actual = np.array([np.inf, np.nan, 1.0])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(runner._errors(actual, np.array([np.inf, np.nan, 1.0]), unit), 0.0)
        np.testing.assert_array_equal(runner._errors(actual, np.array([-np.inf, 0.0, np.nan]), unit), np.inf)


def test_no_library_is_nothing_to_verify(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (None, "it was not built"))
    with pytest.raises(verification.NothingToVerify, match="it was not built"):
        verification.run()


def test_no_gpu_is_nothing_to_verify_there(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    with pytest.raises(verification.NothingToVerify, match="sees no GPU"):
        verification.run(device="gpu")
    assert verification.find_device("auto") == "/CPU:0"


def test_gpu_without_kernels_is_nothing_to_verify_there(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["a GPU"])
    monkeypatch.setattr(library, "gpu_problem", lambda: "they were built without CUDA kernels")
    with pytest.raises(verification.NothingToVerify, match="without CUDA kernels"):
        verification.run(device="gpu")
    assert verification.find_device("auto") == "/CPU:0"


def test_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="'tpu'"):
        verification.run(device="tpu")


@pytest.mark.gpu
def test_gpu_is_within_its_bounds():
    assert [result for result in verification.run(device="gpu", quick=True) if not result.ok] == []


def test_reference_is_the_plain_one():
    assert verification.SUBJECTS[0].reference is reference.accumulate
