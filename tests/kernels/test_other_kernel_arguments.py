"""What update(), squared_norms(), batch_norm() and its relatives, merge_moments(), end_windows() and clip_units()
reject; see also test_kernel_arguments.py. No failed call writes anything."""

import numpy as np
import pytest
from kernel_definitions import SLOTS
from malformed import LAYOUT, LIST, NO_ARRAY, check_raises, cuda_like, floats, read_only, unaligned

NUMBER = "must be a number, or for CUDA arrays a one-element device array, got {}"


def flags(size):
    return np.ones(size, np.bool_)


def update_arguments():
    """The arguments of a call of update() that is right: adam over two values."""
    return {
        "rule": "adam",
        "values": [floats(3), floats(4, 2)],
        "slots": [[floats(3), floats(4, 2)], [floats(3), floats(4, 2)]],
        "accumulators": [floats(3), floats(4, 2)],
        "latest": [floats(3, dtype=np.float16), floats(4, 2)],
        "touched_rows": [None, flags(4)],
        "rate": 0.1,
    }


given = floats(3)
UPDATE_ERRORS = {
    "iterations of another rule": (
        {"rule": "lion", "slots": [[floats(3), floats(4, 2)]], "iterations": 3}, ValueError,
        "iterations are for 'adam' and 'amsgrad', not for 'lion'",
    ),
    "negative iterations": ({"iterations": -1}, ValueError, "iterations must be a whole number from 0 on, got -1"),
    "half an iteration": ({"iterations": 1.5}, ValueError, "iterations must be a whole number from 0 on, got 1.5"),
    "iterations nan": ({"iterations": float("nan")}, ValueError, "iterations must be a whole number from 0 on"),
    "iterations str": ({"iterations": "one"}, TypeError, "iterations must be a number"),
    "rule": ({"rule": "adagrad"}, ValueError, "rule must be one of 'sgd', 'momentum', 'nesterov', 'adam', 'amsgrad',"),
    "rule bytes": ({"rule": b"adam"}, TypeError, "rule must be a str, got bytes"),
    "values array": ({"values": floats(3)}, TypeError, "values " + LIST.format("ndarray")),
    "values None": ({"values": None}, TypeError, "values " + LIST.format("NoneType")),
    "a value None": ({"values": [None, floats(4, 2)]}, TypeError, "values[0] " + NO_ARRAY.format("NoneType")),
    "float64 value": (
        {"values": [floats(3), floats(4, 2, dtype=np.float64)]}, TypeError,
        "values[1] has dtype float64; it must be float32",
    ),
    "read-only value": ({"values": [read_only(floats(3)), floats(4, 2)]}, ValueError, "values[0] is read-only"),
    "strided value": ({"values": [floats(6)[::2], floats(4, 2)]}, ValueError, f"values[0] of shape (3,) {LAYOUT}"),
    "unaligned value": ({"values": [unaligned(), floats(4, 2)]}, ValueError, f"values[0] of shape (3,) {LAYOUT}"),
    "slots None": ({"slots": None}, TypeError, "slots must be a sequence with a list of arrays for each slot"),
    "slots of another rule": ({"rule": "lion"}, ValueError, "slots has 2 items; it must have 1, a list of arrays for"),
    "no slots": ({"slots": ()}, ValueError, "slots has 0 items; it must have 2, a list of arrays for each slot of"),
    "slots without lists": ({"slots": [floats(3), floats(3)]}, TypeError, "slots[0] " + LIST.format("ndarray")),
    "a slot too few": (
        {"slots": [[floats(3), floats(4, 2)], [floats(3)]]}, ValueError,
        "slots[1] has 1 items; it must have 2, one for each of values",
    ),
    "a slot's shape": (
        {"slots": [[floats(3), floats(4, 2)], [floats(3), floats(2, 4)]]}, ValueError,
        "slots[1][1] has shape (2, 4); it must have shape (4, 2), that of values[1]",
    ),
    "read-only slot": (
        {"slots": [[floats(3), floats(4, 2)], [read_only(floats(3)), floats(4, 2)]]}, ValueError,
        "slots[1][0] is read-only",
    ),
    "half slot": (
        {"slots": [[floats(3, dtype=np.float16), floats(4, 2)], [floats(3), floats(4, 2)]]}, TypeError,
        "slots[0][0] has dtype float16; it must be float32",
    ),
    "accumulators too few": (
        {"accumulators": [floats(3)]}, ValueError, "accumulators has 1 items; it must have 2, one for each of values",
    ),
    "an accumulator's shape": (
        {"accumulators": [floats(4), floats(4, 2)]}, ValueError,
        "accumulators[0] has shape (4,); it must have shape (3,), that of values[0]",
    ),
    "half accumulator": (
        {"accumulators": [floats(3, dtype=np.float16), None]}, TypeError,
        "accumulators[0] has dtype float16; it must be float32",
    ),
    "no gradients": (
        {"accumulators": None, "latest": None}, ValueError, "accumulators[0] and latest[0] are both None; give one of",
    ),
    "no gradient of one": (
        {"accumulators": [floats(3), None], "latest": [None, None]}, ValueError,
        "accumulators[1] and latest[1] are both None",
    ),
    "wide latest": (
        {"latest": [floats(3, dtype=np.float64), None]}, TypeError,
        "latest[0] has dtype float64; it must be float16, bfloat16 (or its bits as uint16) or float32",
    ),
    "latest's shape": ({"latest": [floats(1), None]}, ValueError, "latest[0] has shape (1,); it must have shape (3,)"),
    "strided latest": ({"latest": [floats(6)[::2], None]}, ValueError, f"latest[0] of shape (3,) {LAYOUT}"),
    "flags' type": (
        {"touched_rows": [None, np.ones(4, np.uint8)]}, TypeError, "touched_rows[1] has dtype uint8; it must be bool",
    ),
    "flags' shape": (
        {"touched_rows": [None, flags(8)]}, ValueError,
        "touched_rows[1] has shape (8,); it must have shape (4,): a flag for each row of values[1]",
    ),
    "flags too few": ({"touched_rows": [None]}, ValueError, "touched_rows has 1 items; it must have 2, one for each"),
    "strided flags": ({"touched_rows": [None, flags(8)[::2]]}, ValueError, f"touched_rows[1] of shape (4,) {LAYOUT}"),
    "scales too few": (
        {"scales": floats(3)}, ValueError,
        "scales has shape (3,); it must have shape (2,), one for each of values, or be one for all",
    ),
    "scales double": ({"scales": np.ones(2)}, TypeError, "scales has dtype float64; it must be float32"),
    "scales text": ({"scales": "1"}, TypeError, "scales " + NUMBER.format("str")),
    "scales on a device": (
        {"scales": cuda_like(shape=(2,))}, ValueError, "scales is in CUDA memory, but values[0] is in host memory",
    ),
    "rate text": ({"rate": "1"}, TypeError, "rate " + NUMBER.format("str")),
    "rate None": ({"rate": None}, TypeError, "rate " + NUMBER.format("NoneType")),
    "rate double on a device": (
        {"rate": cuda_like(shape=(), typestr="<f8")}, TypeError, "rate has dtype <f8; it must be float32",
    ),
    "rate of two": ({"rate": cuda_like(shape=(2,))}, ValueError, "rate has shape (2,); it must have one element"),
    "decay on a device": (
        {"decay": cuda_like(shape=())}, ValueError, "decay is in CUDA memory, but values[0] is in host memory",
    ),
    "weight list": ({"weight": [1.0]}, TypeError, "weight " + NUMBER.format("list")),
    "decays too few": ({"decays": [True]}, ValueError, "decays has 1 items; it must have 2, one for each of values"),
    "decays too many to copy": ({"decays": range(1 << 60)}, ValueError, "decays has 1152921504606846976 items"),
    "decays bool": ({"decays": True}, TypeError, "decays must be None or a sequence of bool, got bool"),
    "overwrite number": ({"overwrite": 1}, TypeError, "overwrite must be a bool"),
    "applies number": ({"applies": 0}, TypeError, "applies must be a bool"),
    "applies of two": ({"applies": flags(2)}, ValueError, "applies has shape (2,); it must have one element"),
    "beta_1": ({"beta_1": "0.9"}, TypeError, "beta_1 must be a number, got str"),
    "beta_2": ({"beta_2": None}, TypeError, "beta_2 must be a number, got NoneType"),
    "epsilon": ({"epsilon": 1j}, TypeError, "epsilon must be a number, got complex"),
    "clip negative": ({"clip": -1.0}, ValueError, "clip must be finite and not negative, got -1.0"),
    "clip NaN": ({"clip": np.nan}, ValueError, "clip must be finite and not negative, got nan"),
    "threads": ({"threads": 0}, ValueError, "threads must be None or an int of at least 1, got 0"),
    "stream": ({"stream": "main"}, TypeError, "incompatible function arguments"),
    "a value twice": (
        {"values": [given, floats(4, 2)], "slots": [[given, floats(4, 2)], [floats(3), floats(4, 2)]]}, ValueError,
        "values[0] and slots[0][0] share memory",
    ),
    "a value as its accumulator": (
        {"values": [given, floats(4, 2)], "accumulators": [given, None]}, ValueError,
        "accumulators[0] and values[0] share memory",
    ),
    "a device array among host arrays": (
        {"latest": [cuda_like(), None]}, ValueError, "latest[0] is in CUDA memory, but values[0] is in host memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UPDATE_ERRORS.values(), ids=UPDATE_ERRORS.keys())
def test_what_update_rejects(kernels, case):
    changes, error, message = case
    arguments = update_arguments() | changes
    lists = [arguments["values"], *(arguments["slots"] or ())]
    written = [each for arrays in lists if isinstance(arrays, list) for each in arrays if isinstance(each, np.ndarray)]
    positional = [arguments.pop(name) for name in ("rule", "values", "slots")]
    check_raises(lambda: kernels.update(*positional, **arguments), written, error, message)


def test_the_call_that_the_errors_are_made_of_is_right(kernels):
    arguments = update_arguments()
    rule, values, slots = (arguments.pop(name) for name in ("rule", "values", "slots"))
    before = [value.copy() for value in values]
    kernels.update(rule, values, slots, **arguments)
    for value, old in zip(values, before, strict=True):
        assert (value != old).all()


def test_rows_of_a_value_without_axes(kernels):
    with pytest.raises(ValueError, match=r"values\[0\] has shape \(\), so touched_rows\[0\] must be None"):
        kernels.update("sgd", [floats()], accumulators=[floats()], touched_rows=[flags(1)], rate=1.0)


@pytest.mark.parametrize("rule", SLOTS)
def test_a_rate_is_needed(kernels, rule):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        kernels.update(rule, [], [[]] * SLOTS[rule])


sums = np.ones(2)
NORM_ERRORS = {
    "array for a list": ([floats(3), sums], {}, TypeError, "arrays " + LIST.format("ndarray")),
    "None": ([[None, floats(3)], sums], {}, TypeError, "arrays[0] " + NO_ARRAY.format("NoneType")),
    "integers": ([[floats(3), np.ones(3, np.int32)], sums], {}, TypeError, "arrays[1] has dtype int32; it must be fl"),
    "strided": ([[floats(6)[::2], floats(3)], sums], {}, ValueError, f"arrays[0] of shape (3,) {LAYOUT}"),
    "unaligned": ([[floats(3), unaligned(np.float16)], sums], {}, ValueError, f"arrays[1] of shape (3,) {LAYOUT}"),
    "few sums": ([[floats(3)], sums], {}, ValueError, "sums has shape (2,); it must have shape (1,), one for each of"),
    "float32 sums": ([[floats(3)], floats(1)], {}, TypeError, "sums has dtype float32; it must be float64"),
    "read-only sums": ([[floats(3)] * 2, read_only(sums)], {}, ValueError, "sums is read-only"),
    "strided sums": ([[floats(3)] * 2, np.ones(4)[::2]], {}, ValueError, f"sums of shape (2,) {LAYOUT}"),
    "sums among the arrays": ([[floats(3), sums], sums], {}, ValueError, "arrays[1] and sums share memory"),
    "workspace": ([[floats(3)] * 2, sums], {"workspace": 8}, TypeError, "workspace " + NO_ARRAY.format("int")),
    "read-only workspace": (
        [[floats(3)] * 2, sums], {"workspace": read_only(floats(9))}, ValueError, "workspace is read-only",
    ),
    "workspace on a device": (
        [[floats(3)] * 2, sums], {"workspace": cuda_like()}, ValueError, "workspace is in CUDA memory, but sums is in",
    ),
    "unaligned workspace": (
        [[floats(3)] * 2, sums], {"workspace": cuda_like(4100)}, ValueError, "workspace is not aligned to 256 bytes",
    ),
    "threads": ([[floats(3)] * 2, sums], {"threads": -1}, ValueError, "threads must be None or an int of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", NORM_ERRORS.values(), ids=NORM_ERRORS.keys())
def test_what_squared_norms_rejects(kernels, case):
    positional, options, error, message = case
    check_raises(lambda: kernels.squared_norms(*positional, **options), [sums], error, message)


def test_the_workspaces_of_a_build_without_cuda_are_empty(kernels):
    norms, batch_norm = kernels.squared_norms_workspace([floats(3)]), kernels.batch_norm_workspace(floats(9, 3))
    assert (norms > 0, batch_norm > 0) == (kernels.build_info()["cuda_runtime_version"] is not None,) * 2
    with pytest.raises(ValueError, match=r"axis is 2, but x has shape \(9, 3\)"):
        kernels.batch_norm_workspace(floats(9, 3), 2)
    with pytest.raises(TypeError, match=r"arrays\[0\] has dtype int64"):
        kernels.squared_norms_workspace([np.arange(3)])


def forward_arguments(**changes):
    """A call of batch_norm() that is right, as changed."""
    return {
        "x": floats(6, 3), "gamma": floats(3), "beta": floats(3), "y": floats(6, 3), "count": np.ones(1, np.int64),
        "mean": floats(3), "rest": floats(3), "variance": floats(3), "inverse": floats(3), **changes,
    }  # fmt: skip


def gradient_arguments(**changes):
    """A call of batch_norm_gradient() that is right, as changed."""
    return {
        "x": floats(6, 3), "dy": floats(6, 3), "gamma": floats(3), "mean": floats(3), "rest": floats(3),
        "inverse": floats(3), "count": np.ones(1, np.int64), "dx": floats(6, 3), "dgamma": floats(3),
        "dbeta": floats(3), **changes,
    }  # fmt: skip


def inference_arguments(**changes):
    """A call of batch_norm_inference() that is right, as changed."""
    return {
        "x": floats(6, 3), "gamma": floats(3), "beta": floats(3), "mean": floats(3), "variance": floats(3),
        "y": floats(6, 3), **changes,
    }  # fmt: skip


shared = floats(6, 3)
halves = floats(6, 3, dtype=np.float16)
ANY_X_ERRORS = {
    "x list": ({"x": [[1.0]]}, TypeError, "x " + NO_ARRAY.format("list")),
    "x of integers": ({"x": np.ones((6, 3), np.int32)}, TypeError, "x has dtype int32; it must be float16, bfloat16"),
    "strided x": ({"x": floats(3, 6).T}, ValueError, f"x of shape (6, 3) {LAYOUT}"),
    "x without axes": ({"x": floats()}, ValueError, "axis is -1, but x has shape ()"),
    "x without channels": ({"x": floats(6, 0)}, ValueError, "x has shape (6, 0); it must have channels"),
    "axis": ({"axis": 2}, ValueError, "axis is 2, but x has shape (6, 3)"),
    "negative axis": ({"axis": -3}, ValueError, "axis is -3, but x has shape (6, 3)"),
    "axis text": ({"axis": "last"}, TypeError, "incompatible function arguments"),
    "another axis": ({"axis": 0}, ValueError, " has shape (3,); it must have shape (6,), a value for each channel"),
    "gamma's shape": ({"gamma": floats(4)}, ValueError, "gamma has shape (4,); it must have shape (3,), a value for"),
    "gamma None": ({"gamma": None}, TypeError, "gamma " + NO_ARRAY.format("NoneType")),
    "gamma's dtype": (
        {"gamma": floats(3, dtype=np.float64)}, TypeError,
        "gamma has dtype float64; it must be float32, for x of another dtype than float64",
    ),
    "mean's shape": ({"mean": floats(1, 3)}, ValueError, "mean has shape (1, 3); it must have shape (3,)"),
    "threads": ({"threads": 1.5}, TypeError, "threads must be None or an int of at least 1, got 1.5"),
    "x too large": (
        {"x": cuda_like(shape=(2**62, 1, 4, 0))}, ValueError, "x has shape (4611686018427387904, 1, 4, 0), which is",
    ),
}  # fmt: skip
FORWARD_ERRORS = {
    **ANY_X_ERRORS,
    "y's shape": ({"y": floats(3, 6)}, ValueError, "y has shape (3, 6); it must have shape (6, 3), that of x"),
    "y's dtype": ({"y": halves}, TypeError, "y has dtype float16; it must be that of x, float32"),
    "y in place": ({"x": shared, "y": shared}, ValueError, "x and y share memory"),
    "read-only y": ({"y": read_only(floats(6, 3))}, ValueError, "y is read-only"),
    "count's dtype": ({"count": np.ones(1, np.int32)}, TypeError, "count has dtype int32; it must be int64"),
    "count's shape": ({"count": np.ones(3, np.int64)}, ValueError, "count has shape (3,); it must have one element"),
    "count None": ({"count": None}, TypeError, "count " + NO_ARRAY.format("NoneType")),
    "double variance": ({"variance": np.ones(3)}, TypeError, "variance has dtype float64; it must be float32, for x"),
    "epsilon": ({"epsilon": -1e-3}, ValueError, "epsilon must be finite and not negative, got -0.001"),
    "epsilon NaN": ({"epsilon": np.nan}, ValueError, "epsilon must be finite and not negative, got nan"),
    "epsilon text": ({"epsilon": "small"}, TypeError, "epsilon must be a number, got str"),
    "mask's dtype": ({"mask": np.ones(6, np.uint8)}, TypeError, "mask has dtype uint8; it must be bool"),
    "mask's shape": (
        {"mask": flags(3)}, ValueError, "mask has shape (3,); it must have shape (6,), that of x without its channels",
    ),
    "mask of channels first": (
        {"mask": flags(6), "x": floats(3, 6), "y": floats(3, 6), "axis": 0}, ValueError,
        "mask must be None unless channels are x's last axis; x has shape (3, 6)",
    ),
    "one array for two": ({"mean": given, "rest": given}, ValueError, "mean and rest share memory"),
    "small workspace on a device": (
        {"workspace": cuda_like()}, ValueError, "workspace is in CUDA memory, but y is in host memory",
    ),
}  # fmt: skip
GRADIENT_ERRORS = {
    **ANY_X_ERRORS,
    "dy's shape": ({"dy": floats(6)}, ValueError, "dy has shape (6,); it must have shape (6, 3), that of x"),
    "dy's dtype": ({"dy": halves}, TypeError, "dy has dtype float16; it must be that of x, float32"),
    "dx in place": ({"dy": shared, "dx": shared}, ValueError, "dy and dx share memory"),
    "dgamma's dtype": ({"dgamma": halves[0]}, TypeError, "dgamma has dtype float16; it must be float32"),
    "read-only dbeta": ({"dbeta": read_only(floats(3))}, ValueError, "dbeta is read-only"),
    "count": ({"count": 18}, TypeError, "count " + NO_ARRAY.format("int")),
    "mask's shape": ({"mask": flags(7)}, ValueError, "mask has shape (7,); it must have shape (6,)"),
    "a device array among host arrays": (
        {"inverse": cuda_like()}, ValueError, "inverse is in CUDA memory, but dx is in host memory",
    ),
}  # fmt: skip
INFERENCE_ERRORS = {
    **ANY_X_ERRORS,
    "y in place": ({"x": shared, "y": shared}, ValueError, "x and y share memory"),
    "variance's shape": ({"variance": floats(2)}, ValueError, "variance has shape (2,); it must have shape (3,)"),
    "epsilon": ({"epsilon": np.inf}, ValueError, "epsilon must be finite and not negative, got inf"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "case"),
    [
        pytest.param(function, arguments, case, id=f"{function}, {name}")
        for function, arguments, errors in (
            ("batch_norm", forward_arguments, FORWARD_ERRORS),
            ("batch_norm_gradient", gradient_arguments, GRADIENT_ERRORS),
            ("batch_norm_inference", inference_arguments, INFERENCE_ERRORS),
        )
        for name, case in errors.items()
    ],
)
def test_what_batch_normalization_rejects(kernels, function, arguments, case):
    changes, error, message = case
    call = arguments(**changes)
    written = [each for each in (*call.values(), shared, given) if isinstance(each, np.ndarray)]
    check_raises(lambda: getattr(kernels, function)(**call), written, error, message)
    getattr(kernels, function)(**arguments())


def test_a_great_many_places_without_values(kernels):
    """The kernel returns at once: it does not visit the places one by one."""
    x, y = (np.empty((1 << 40, 3, 0), np.float32) for _ in range(2))
    arguments = forward_arguments(x=x, y=y, axis=1)
    kernels.batch_norm(**arguments)
    assert arguments["count"][0] == 0


def batch(channels=3, dtype=np.float32):
    return [np.array([5]), *(floats(channels, dtype=dtype) for _ in range(3))]


def window(channels=3):
    return [np.array([0, 0, 2]), np.zeros((2, channels))]


def moving(channels=3, dtype=np.float32):
    return [floats(channels, dtype=dtype), floats(channels, dtype=dtype)]


MERGE_ERRORS = {
    "alone": ((batch(), None, None), ValueError, "two of batch, window and moving, or all, must not be None"),
    "nothing": ((None, None, None), ValueError, "two of batch, window and moving, or all, must not be None"),
    "batch array": ((floats(4), window(), None), TypeError, "batch " + LIST.format("ndarray")),
    "batch too short": (
        (batch()[:3], window(), None), ValueError, "batch has 3 items; it must have 4: count, mean, rest and variance",
    ),
    "window too long": ((batch(), window() * 2, None), ValueError, "window has 4 items; it must have 2: counters and"),
    "moving too short": ((batch(), None, moving()[:1]), ValueError, "moving has 1 items; it must have 2: mean and"),
    "count's dtype": (([floats(1), *batch()[1:]], window(), None), TypeError, "batch[0] has dtype float32; it must be"),
    "count's shape": (
        ([np.ones(3, np.int64), *batch()[1:]], window(), None), ValueError,
        "batch[0] has shape (3,); it must have one element",
    ),
    "half moments": (
        (batch(dtype=np.float16), window(), None), TypeError, "batch[1] has dtype float16; it must be float32 or",
    ),
    "mixed moments": (
        ([*batch()[:3], np.ones(3)], window(), None), TypeError, "batch[3] has dtype float64; it must be that of batch",
    ),
    "moments' shapes": (
        ([*batch()[:3], floats(4)], window(), None), ValueError,
        "batch[3] has shape (4,); it must have shape (3,), that of batch[1]",
    ),
    "moments of two axes": (
        ([np.array([5]), *[floats(3, 1)] * 3], window(), None), ValueError,
        "batch[1] has shape (3, 1); it must have one axis, a value for each channel",
    ),
    "counters' dtype": (
        (batch(), [np.zeros(3), window()[1]], None), TypeError, "window[0] has dtype float64; it must be int64",
    ),
    "counters' shape": (
        (batch(), [np.zeros(2, np.int64), window()[1]], None), ValueError,
        "window[0] has shape (2,); it must have shape (3,): values, calls and their limit",
    ),
    "window of other channels": (
        (batch(), window(4), None), ValueError, "window[1] has shape (2, 4); it must have shape (2, 3): means and sums",
    ),
    "float32 window": (
        (batch(), [window()[0], floats(2, 3)], None), TypeError, "window[1] has dtype float32; it must be float64",
    ),
    "moving of other channels": (
        (batch(), None, moving(4)), ValueError, "moving[0] has shape (4,); it must have shape (3,), that of batch[1]",
    ),
    "half moving": (
        (batch(), None, moving(dtype=np.float16)), TypeError, "moving[0] has dtype float16; it must be float32 or flo",
    ),
    "mixed moving": (
        (None, window(), [floats(3), np.ones(3)]), TypeError, "moving[1] has dtype float64; it must be that of moving[",
    ),
    "read-only moving": (
        (batch(), None, [floats(3), read_only(floats(3))]), ValueError, "moving[1] is read-only",
    ),
    "one array for two": ((batch(), None, [given, given]), ValueError, "moving[0] and moving[1] share memory"),
    "a batch that is the moving statistics": (
        ([np.array([5]), given, floats(3), floats(3)], None, [given, floats(3)]), ValueError,
        "batch[1] and moving[0] share memory",
    ),
    "a device array among host arrays": (
        (batch(), [window()[0], cuda_like(shape=(2, 3), typestr="<f8")], None), ValueError,
        "window[1] is in CUDA memory, but window[0] is in host memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGE_ERRORS.values(), ids=MERGE_ERRORS.keys())
def test_what_merge_moments_rejects(kernels, case):
    (batch_arrays, window_arrays, moving_arrays), error, message = case
    written = [*(window_arrays or []), *(moving_arrays or []), given]
    check_raises(
        lambda: kernels.merge_moments(batch_arrays, window=window_arrays, moving=moving_arrays),
        [each for each in written if isinstance(each, np.ndarray)], error, message,
    )  # fmt: skip


def ends(**changes):
    """The arguments of a call of end_windows() that is right, for two windows of three channels."""
    pairs = [window(), window()]
    arguments = {"counters": [each[0] for each in pairs], "moments": [each[1] for each in pairs]}
    arguments |= {"moving_means": [floats(3), floats(3)], "moving_variances": [floats(3), floats(3)]}
    return arguments | {"momenta": [0.5, 0.9]} | changes


END_ERRORS = {
    "no list": ({"counters": 3}, TypeError, "counters"),
    "a window short": ({"moments": [window()[1]]}, ValueError, "moments has 1 items; it must have 2, one for each of"),
    "means alone": ({"moving_variances": None}, ValueError, "moving_means and moving_variances must both be None"),
    "a mean short": ({"moving_means": [floats(3)]}, ValueError, "moving_means has 1 items; it must have 2"),
    "a momentum short": ({"momenta": [0.5]}, ValueError, "momenta has 1 items; it must have 2"),
    "one momentum": ({"momenta": 0.5}, TypeError, "momenta must be a sequence of numbers, got float"),
    "a momentum that is a text": ({"momenta": [0.5, "a"]}, TypeError, "momenta must be numbers, got str"),
    "int32 counters": (
        {"counters": [window()[0], np.zeros(3, np.int32)]}, TypeError, "counters[1] has dtype int32; it must be int64",
    ),
    "moments of a vector": (
        {"moments": [window()[1], np.zeros(3)]}, ValueError, "moments[1] has shape (3,); it must be (2, channels)",
    ),
    "float32 moments": (
        {"moments": [floats(2, 3), window()[1]]}, TypeError, "moments[0] has dtype float32; it must be float64",
    ),
    "a mean of other channels": (
        {"moving_means": [floats(3), floats(4)]}, ValueError,
        "moving_means[1] has shape (4,); it must have shape (3,), the channels of moments[1]",
    ),
    "mixed statistics": (
        {"moving_variances": [floats(3), np.ones(3)]}, TypeError,
        "moving_variances[1] has dtype float64; it must be that of moving_means[1]",
    ),
    "a read-only mean": (
        {"moving_means": [floats(3), read_only(floats(3))]}, ValueError, "moving_means[1] is read-only",
    ),
    "one mean for two": ({"moving_means": [given, given]}, ValueError, "moving_means[0] and moving_means[1] share mem"),
    "a number for a flag": ({"applies": 0.5}, TypeError, "applies"),
}  # fmt: skip


@pytest.mark.parametrize("case", END_ERRORS.values(), ids=END_ERRORS.keys())
def test_what_end_windows_rejects(kernels, case):
    changes, error, message = case
    arguments = ends(**changes)
    lists = [each for each in arguments.values() if isinstance(each, list)]
    written = [array for each in lists for array in each if isinstance(array, np.ndarray)]
    check_raises(lambda: kernels.end_windows(**arguments), written, error, message)


ADD_ERRORS = {
    "no list": (3, [], TypeError, "batches must be a sequence with four arrays for each window, got int"),
    "no windows": ([batch()], None, TypeError, "windows must be a sequence with two arrays for each window, got None"),
    "a batch short": ([batch()], [window(), window()], ValueError, "batches has 1 items; it must have 2, one for each"),
    "a window short": ([batch()], [window()[:1]], ValueError, "window has 1 items; it must have 2"),
    "no batch": ([None], [window()], ValueError, "two of batch, window and moving, or all, must not be None"),
    "half a batch": ([batch()[:2]], [window()], ValueError, "batch has 2 items; it must have 4"),
    "a window of other channels": (
        [batch(), batch()], [window(), window(4)], ValueError, "window[1] has shape (2, 4); it must have shape (2, 3)",
    ),
    "one window for two": ([batch(), batch()], [given_window := window(), given_window], ValueError, "share memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADD_ERRORS.values(), ids=ADD_ERRORS.keys())
def test_what_add_to_windows_rejects(kernels, case):
    batches, windows, error, message = case
    written = [array for each in windows or [] for array in each]
    check_raises(lambda: kernels.add_to_windows(batches, windows), written, error, message)


def clips(**changes):
    """The arguments of a call of clip_units() that is right, for two gradients."""
    shapes = [(3, 2), (4,)]
    arguments = {name: [floats(*shape) for shape in shapes] for name in ("gradients", "weights", "outputs")}
    return arguments | {"clip_factor": 0.1, "epsilon": 1e-3} | changes


four = floats(4)
CLIP_ERRORS = {
    "no list": ({"gradients": 3}, TypeError, "gradients"),
    "a weight short": ({"weights": [floats(3, 2)]}, ValueError, "weights has 1 items; it must have 2, one for each of"),
    "an output short": ({"outputs": [floats(3, 2)]}, ValueError, "outputs has 1 items; it must have 2, one for each"),
    "another shape": (
        {"weights": [floats(3, 2), floats(5)]}, ValueError, "weights[1] has shape (5,); it must have shape (4,), the",
    ),
    "another output": (
        {"outputs": [floats(2, 3), floats(4)]}, ValueError, "outputs[0] has shape (2, 3); it must have shape (3, 2),",
    ),
    "a double": (
        {"gradients": [np.ones((3, 2)), floats(4)]}, TypeError, "gradients[0] has dtype float64; it must be float32",
    ),
    "a read-only output": (
        {"outputs": [floats(3, 2), read_only(floats(4))]}, ValueError, "outputs[1] is read-only",
    ),
    "a gradient as output": (
        {"gradients": [floats(3, 2), four], "outputs": [floats(3, 2), four]}, ValueError, "share memory",
    ),
    "no factor": ({"clip_factor": None}, TypeError, "clip_factor must be a number, got NoneType"),
    "a negative factor": ({"clip_factor": -1.0}, ValueError, "clip_factor"),
    "an infinite epsilon": ({"epsilon": np.inf}, ValueError, "epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIP_ERRORS.values(), ids=CLIP_ERRORS.keys())
def test_what_clip_units_rejects(kernels, case):
    changes, error, message = case
    arguments = clips(**changes)
    written = [array for array in arguments["outputs"] if isinstance(array, np.ndarray)]
    check_raises(lambda: kernels.clip_units(**arguments), written, error, message)


def test_the_momentum_is_a_number(kernels):
    check_raises(
        lambda: kernels.merge_moments(batch(), moving=moving(), momentum=None), [], TypeError,
        "momentum must be a number, got NoneType",
    )  # fmt: skip


def test_cuda_arrays_where_cuda_is_missing(kernels):
    status = kernels.cuda_status()
    if status["device_count"] > 0:
        pytest.skip("there is a CUDA device")
    message = "no CUDA kernels" if not status["built"] else "CUDA|cuda"

    def array(i, *shape, typestr="<f4"):
        return cuda_like(4096 * (i + 1), shape, typestr)

    three = [array(i, 3) for i in range(9)]
    count, large = array(20, 1, typestr="<i8"), [array(30 + i, 6, 3) for i in range(3)]
    calls = (
        lambda: kernels.update("sgd", three[:1], accumulators=three[1:2], rate=1.0),
        lambda: kernels.squared_norms(three[:1], array(12, 1, typestr="<f8")),
        lambda: kernels.batch_norm(
            large[0], *three[:2], y=large[1], count=count, mean=three[2], rest=three[3], variance=three[4],
            inverse=three[5],
        ),
        lambda: kernels.batch_norm_gradient(
            large[0], large[1], three[0], mean=three[1], rest=three[2], inverse=three[3], count=None, dx=large[2],
            dgamma=three[4], dbeta=three[5],
        ),
        lambda: kernels.batch_norm_inference(large[0], *three[:4], y=large[1]),
        lambda: kernels.merge_moments([count, *three[:3]], moving=three[3:5]),
        lambda: kernels.clip_units(large[:1], large[1:2], large[2:], clip_factor=0.1, epsilon=0.1),
        lambda: kernels.end_windows([array(50, 3, typestr="<i8")], [array(51, 2, 3, typestr="<f8")]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()
