"""What batch_norm() and its relatives, merge_moments(), add_to_windows() and end_windows() reject; see also
test_kernel_arguments.py. No failed call writes anything."""

import numpy as np
import pytest
from malformed import LAYOUT, LIST, NO_ARRAY, check_raises, cuda_like, flags, floats, read_only

given = floats(3)


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


def test_the_momentum_is_a_number(kernels):
    check_raises(
        lambda: kernels.merge_moments(batch(), moving=moving(), momentum=None), [], TypeError,
        "momentum must be a number, got NoneType",
    )  # fmt: skip
