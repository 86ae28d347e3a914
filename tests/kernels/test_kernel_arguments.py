"""What is accepted as an array, and the message for everything that is not. No failed call writes anything."""

import array
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from malformed import LAYOUT, LIST, NO_ARRAY, check_raises, cuda_like, floats, read_only, unaligned

good, other = floats(3), floats(3) * 2
overlapping = floats(10)
strided = floats(6)[::2]

ACCUMULATE_ERRORS = {
    "array for a list": (floats(3), [good], TypeError, "accumulators " + LIST.format("ndarray")),
    "number for a list": ([good], 3, TypeError, "gradients " + LIST.format("int")),
    "string for a list": ([good], "abc", TypeError, "gradients " + LIST.format("str")),
    "generator": ([good], (g for g in [good]), TypeError, "gradients " + LIST.format("generator")),
    "device array for a list": (cuda_like(), [good], TypeError, "accumulators " + LIST.format("SimpleNamespace")),
    "lengths": ([floats(3)], [good, good], ValueError, "accumulators has 1 items and gradients has 2"),
    "None": ([floats(3), None], [good, good], TypeError, "accumulators[1] " + NO_ARRAY.format("NoneType")),
    "list for an array": ([floats(3)], [[1.0, 2.0, 3.0]], TypeError, "gradients[0] " + NO_ARRAY.format("list")),
    "class": ([floats(3)], [np.ndarray], TypeError, "gradients[0] " + NO_ARRAY.format("type")),
    "integer accumulator": (
        [floats(3), floats(3, dtype=np.int32)], [good, good], TypeError,
        "accumulators[1] has dtype int32; it must be float32 or float64",
    ),
    "half accumulator": (
        [floats(3, dtype=np.float16)], [good], TypeError,
        "accumulators[0] has dtype float16; it must be float32 or float64",
    ),
    "integer gradient": (
        [floats(3), floats(3)], [good, floats(3, dtype=np.int64)], TypeError,
        "gradients[1] has dtype int64; it must be float16, bfloat16 (or its bits as uint16), float32 or float64",
    ),
    "complex gradient": ([floats(3)], [floats(3, dtype=np.complex64)], TypeError, "gradients[0] has dtype complex64"),
    "long double": ([floats(3)], [floats(3, dtype=np.longdouble)], TypeError, "gradients[0] has dtype float128"),
    "objects": ([floats(3)], [np.array([1, 2, None])], TypeError, "gradients[0] has dtype object"),
    "structure": ([floats(3)], [np.zeros(3, "V2")], TypeError, "gradients[0] has dtype |V2"),
    "other byte order": ([floats(3)], [floats(3, dtype=">f4")], TypeError, "gradients[0] has dtype >f4"),
    "narrower accumulator": (
        [floats(3)], [floats(3, dtype=np.float64)], TypeError,
        "gradients[0] has dtype float64, which is wider than that of accumulators[0], float32; use a float64",
    ),
    "shape": (
        [floats(3), floats(2, 3)], [good, floats(3, 2)], ValueError,
        "gradients[1] has shape (3, 2); it must have shape (2, 3), that of accumulators[1]",
    ),
    "no broadcasting": (
        [floats(3)], [floats(1)], ValueError,
        "gradients[0] has shape (1,); it must have shape (3,), that of accumulators[0]",
    ),
    "strided accumulator": ([strided], [good], ValueError, f"accumulators[0] of shape (3,) {LAYOUT}"),
    "transposed gradient": ([floats(2, 3)], [floats(3, 2).T], ValueError, f"gradients[0] of shape (2, 3) {LAYOUT}"),
    "unaligned accumulator": ([unaligned()], [good], ValueError, f"accumulators[0] of shape (3,) {LAYOUT}"),
    "unaligned gradient": ([floats(3)], [unaligned(np.float16)], ValueError, f"gradients[0] of shape (3,) {LAYOUT}"),
    "read-only accumulator": (
        [floats(3), read_only(good)], [good, good], ValueError, "accumulators[1] is read-only; pass a writable array"
    ),
    "bytes as accumulator": ([bytes(12)], [good], TypeError, "accumulators[0] has dtype uint8"),
    "NumPy scalar as accumulator": ([np.float32(1)], [np.float32(1)], ValueError, "accumulators[0] is read-only"),
    "one accumulator twice": (
        [other, floats(3), other], [good] * 3, ValueError, "accumulators[0] and accumulators[2] share memory"
    ),
    "overlapping accumulators": (
        [overlapping[5:8], floats(3), overlapping[3:6]], [good] * 3, ValueError,
        "accumulators[2] and accumulators[0] share memory",
    ),
    "gradient is accumulator": ([other], [other], ValueError, "gradients[0] and accumulators[0] share memory"),
    "gradient overlaps another's accumulator": (
        [floats(3), overlapping[:9]], [overlapping[8:9].repeat(3), overlapping[1:10]], ValueError,
        "gradients[1] and accumulators[1] share memory",
    ),
    "gradient within an accumulator": (
        [overlapping, floats(3)], [floats(10), overlapping[4:7]], ValueError,
        "gradients[1] and accumulators[0] share memory",
    ),
    "mixed memory": (
        [floats(3), cuda_like()], [good, good], ValueError,
        "accumulators[1] is in CUDA memory, but accumulators[0] is in host memory; pass all arrays of one call in",
    ),
    "mixed memory of a gradient": (
        [cuda_like()], [good], ValueError, "gradients[0] is in host memory, but accumulators[0] is in CUDA memory"
    ),
    "interface without data": (
        [SimpleNamespace(__cuda_array_interface__={"shape": (3,), "typestr": "<f4"})], [cuda_like()], TypeError,
        "accumulators[0] has a malformed __cuda_array_interface__: 'data' is not a pair",
    ),
    "interface is no dict": (
        [SimpleNamespace(__cuda_array_interface__=3)], [cuda_like()], TypeError,
        "accumulators[0] has a malformed __cuda_array_interface__: it is not a dict",
    ),
    "interface with a negative extent": ([cuda_like(shape=(-3,))], [cuda_like()], TypeError, "'shape' holds something"),
    "interface with a shape of text": ([cuda_like(shape=("a",))], [cuda_like()], TypeError, "'shape' holds something"),
    "interface without shape": ([cuda_like(shape=None)], [cuda_like()], TypeError, "'shape' is not a tuple"),
    "interface with a huge shape": ([cuda_like(shape=(2**40,) * 3)], [cuda_like()], TypeError, "too many elements"),
    "interface with a null address": ([cuda_like(address=0)], [cuda_like()], TypeError, "'data' holds no address"),
    "interface with a text address": ([cuda_like(address="a")], [cuda_like()], TypeError, "'data' holds no address"),
    "interface without a type": ([cuda_like(typestr="f")], [cuda_like()], TypeError, "'typestr' is not a type string"),
    "interface with a mask": ([cuda_like(mask=3)], [cuda_like()], TypeError, "accumulators[0] has a mask"),
    "interface with stream 0": (
        [cuda_like(stream=0)], [cuda_like()], TypeError, "'stream' is neither None nor a positive",
    ),
    "interface with odd strides": ([cuda_like(strides=(4, 4))], [cuda_like()], TypeError, "'strides' does not match"),
    "device array with strides": (
        [cuda_like(strides=(8,))], [cuda_like()], ValueError, f"accumulators[0] of shape (3,) {LAYOUT}"
    ),
    "unaligned device array": ([cuda_like(4098)], [cuda_like()], ValueError, f"accumulators[0] of shape (3,) {LAYOUT}"),
    "device array of integers": (
        [cuda_like(typestr="<i4")], [cuda_like()], TypeError,
        "accumulators[0] has dtype <i4; it must be float32 or float64",
    ),
    "overlapping device arrays": (
        [cuda_like()], [cuda_like(4104)], ValueError, "gradients[0] and accumulators[0] share memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCUMULATE_ERRORS.values(), ids=ACCUMULATE_ERRORS.keys())
def test_arrays_that_accumulate_rejects(kernels, case):
    accumulators, gradients, error, message = case
    writable = [a for a in accumulators if isinstance(a, np.ndarray)] if isinstance(accumulators, list) else []
    check_raises(lambda: kernels.accumulate(accumulators, gradients), [*writable, overlapping], error, message)


OPTION_ERRORS = {
    "scale text": (
        {"scale": "2"}, TypeError, "scale must be a number, or for CUDA arrays a one-element device array, got str",
    ),
    "scale None": ({"scale": None}, TypeError, "scale must be a number, or for CUDA arrays"),
    "scale complex": ({"scale": 1j}, TypeError, "scale must be a number, or for CUDA arrays"),
    "scale too large": ({"scale": 10**400}, OverflowError, "too large"),
    "scale on a device": (
        {"scale": cuda_like(shape=())}, ValueError, "scale is in CUDA memory, but accumulators[0] is in host memory"
    ),
    "scale of two": ({"scale": cuda_like(shape=(2,))}, ValueError, "scale has shape (2,); it must have one element"),
    "scale of integers": (
        {"scale": cuda_like(shape=(), typestr="<i4")}, TypeError, "scale has dtype <i4; it must be float32",
    ),
    "overwrite number": (
        {"overwrite": 1}, TypeError,
        "overwrite must be a bool, or for CUDA arrays a one-element device array of bool, got int",
    ),
    "overwrite text": ({"overwrite": "no"}, TypeError, "overwrite must be a bool"),
    "overwrite None": ({"overwrite": None}, TypeError, "overwrite must be a bool"),
    "overwrite of floats": ({"overwrite": np.float32(0)}, TypeError, "overwrite has dtype float32; it must be bool"),
    "overwrite of two": (
        {"overwrite": np.array([True, False])}, ValueError, "overwrite has shape (2,); it must have one",
    ),
    "overwrite on a device": (
        {"overwrite": cuda_like(shape=(), typestr="|b1")}, ValueError,
        "overwrite is in CUDA memory, but accumulators[0] is in",
    ),
    "all_finite True": ({"all_finite": True}, TypeError, "all_finite must be an array, got bool"),
    "all_finite NumPy scalar": ({"all_finite": np.True_}, ValueError, "all_finite is read-only"),
    "all_finite of floats": ({"all_finite": floats(1)}, TypeError, "all_finite has dtype float32; it must be bool"),
    "all_finite of none": (
        {"all_finite": np.ones(0, np.bool_)}, ValueError, "all_finite has shape (0,); it must have one element"
    ),
    "all_finite on a device": (
        {"all_finite": cuda_like(shape=(), typestr="|b1")}, ValueError,
        "all_finite is in CUDA memory, but accumulators[0] is in",
    ),
    "threads 0": ({"threads": 0}, ValueError, "threads must be None or an int of at least 1, got 0"),
    "threads negative": ({"threads": -(10**30)}, ValueError, "threads must be None or an int of at least 1, got -1000"),
    "threads fraction": ({"threads": 1.5}, TypeError, "threads must be None or an int of at least 1, got 1.5"),
    "stream text": ({"stream": "main"}, TypeError, "incompatible function arguments"),
    "stream negative": ({"stream": -1}, TypeError, "incompatible function arguments"),
    "unknown": ({"thread": 1}, TypeError, "incompatible function arguments"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTION_ERRORS.values(), ids=OPTION_ERRORS.keys())
def test_options_that_are_rejected(kernels, case):
    options, error, message = case
    accumulator = floats(4, 3)
    if "accumulators" not in message:
        indices = np.arange(2)
        check_raises(
            lambda: kernels.accumulate_rows(accumulator, floats(2, 3), indices, **options),
            [accumulator],
            error,
            message,
        )
    check_raises(lambda: kernels.accumulate([accumulator], [floats(4, 3)], **options), [accumulator], error, message)


NORMS_ERRORS = {
    "True": (True, TypeError, "squared_norms must be an array, got bool"),
    "of float32": (floats(2, 1), TypeError, "squared_norms has dtype float32; it must be float64"),
    "of two accumulators": (
        np.zeros([2, 2]), ValueError,
        "squared_norms has shape (2, 2); it must have shape (2, 1): two for each of accumulators",
    ),
    "read-only": (read_only(np.zeros([2, 1])), ValueError, "squared_norms is read-only"),
    "on a device": (
        cuda_like(shape=(2, 1), typestr="<f8"), ValueError,
        "squared_norms is in CUDA memory, but accumulators[0] is in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS_ERRORS.values(), ids=NORMS_ERRORS.keys())
def test_squared_norms_that_are_rejected(kernels, case):
    norms, error, message = case
    accumulator = floats(4, 3)
    check_raises(
        lambda: kernels.accumulate([accumulator], [floats(4, 3)], squared_norms=norms), [accumulator], error, message
    )


def test_options_are_keywords(kernels):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        kernels.accumulate([floats(3)], [floats(3)], 0.5)


rows_accumulator = floats(10, 3)
rows_touched = np.ones(10, np.bool_)
ROWS_ERRORS = {
    "list": ([[1.0]], floats(4, 3), np.arange(4), None, TypeError, "accumulator " + NO_ARRAY.format("list")),
    "type": (
        floats(10, 3, dtype=np.int8), floats(4, 3), np.arange(4), None, TypeError,
        "accumulator has dtype int8; it must be float32 or float64",
    ),
    "narrower": (
        rows_accumulator, floats(4, 3, dtype=np.float64), np.arange(4), None, TypeError,
        "values has dtype float64, which is wider than that of accumulator, float32; use a float64 accumulator",
    ),
    "index type": (
        rows_accumulator, floats(4, 3), np.arange(4.0), None, TypeError,
        "indices has dtype float64; it must be int32 or int64",
    ),
    "no rows": (
        floats(), floats(4), np.arange(4), None, ValueError, "accumulator has shape (); it must have at least one axis",
    ),
    "index axes": (
        rows_accumulator, floats(4, 3), np.arange(4)[:, None], None, ValueError,
        "indices has shape (4, 1); it must have one axis",
    ),
    "count": (
        rows_accumulator, floats(5, 3), np.arange(4), None, ValueError,
        "values has shape (5, 3); it must have shape (4, 3): a row of accumulator, of shape (10, 3), for each of the",
    ),
    "columns": (
        rows_accumulator, floats(4, 2), np.arange(4), None, ValueError,
        "values has shape (4, 2); it must have shape (4, 3)",
    ),
    "flag type": (
        rows_accumulator, floats(4, 3), np.arange(4), np.ones(10, np.uint8), TypeError,
        "touched_rows has dtype uint8; it must be bool",
    ),
    "flag shape": (
        rows_accumulator, floats(4, 3), np.arange(4), np.ones(9, np.bool_), ValueError,
        "touched_rows has shape (9,); it must have shape (10,): a flag for each row of accumulator",
    ),
    "read-only flags": (
        rows_accumulator, floats(4, 3), np.arange(4), read_only(rows_touched), ValueError, "touched_rows is read-only"
    ),
    "strided flags": (
        rows_accumulator, floats(4, 3), np.arange(4), np.ones(20, np.bool_)[::2], ValueError,
        "touched_rows of shape (10,) is not",
    ),
    "strided indices": (
        rows_accumulator, floats(4, 3), np.arange(8)[::2], None, ValueError, "indices of shape (4,) is not",
    ),
    "unaligned indices": (
        rows_accumulator, floats(4, 3), unaligned(np.int32, 4), None, ValueError,
        "indices of shape (4,) is not C-contiguous",
    ),
    "strided values": (
        rows_accumulator, floats(3, 4).T, np.arange(4), None, ValueError, "values of shape (4, 3) is not C-contiguous"
    ),
    "read-only accumulator": (
        read_only(rows_accumulator), floats(4, 3), np.arange(4), None, ValueError, "accumulator is read-only",
    ),
    "values within accumulator": (
        rows_accumulator, rows_accumulator[:4], np.arange(4), None, ValueError, "values and accumulator share memory"
    ),
    "indices within accumulator": (
        rows_accumulator, floats(4, 3), rows_accumulator.ravel().view(np.int32)[:4], None, ValueError,
        "indices and accumulator share memory",
    ),
    "indices within flags": (
        rows_accumulator, floats(2, 3), rows_touched[:8].view(np.int32), rows_touched, ValueError,
        "indices and touched_rows share memory",
    ),
    "flags within accumulator": (
        rows_accumulator, floats(4, 3), np.arange(4), rows_accumulator.ravel().view(np.bool_)[:10], ValueError,
        "share memory",
    ),
    "mixed memory": (
        rows_accumulator, floats(1, 3), cuda_like(shape=(1,), typestr="<i4"), None, ValueError,
        "indices is in CUDA memory, but accumulator is in host memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_ERRORS.values(), ids=ROWS_ERRORS.keys())
def test_arrays_that_accumulate_rows_rejects(kernels, case):
    accumulator, values, indices, touched, error, message = case
    check_raises(
        lambda: kernels.accumulate_rows(accumulator, values, indices, touched_rows=touched, overwrite=True),
        [rows_accumulator, rows_touched], error, message,
    )  # fmt: skip


def test_all_finite_must_lie_apart(kernels):
    accumulator = floats(3)
    with pytest.raises(ValueError, match=r"share memory"):
        kernels.accumulate([accumulator], [floats(3)], all_finite=accumulator.view(np.bool_)[5:6])
    np.testing.assert_array_equal(accumulator, 1)


def test_cuda_arrays_where_cuda_is_missing(kernels):
    status = kernels.cuda_status()
    if status["device_count"] > 0:
        pytest.skip("there is a CUDA device")
    message = "no CUDA kernels" if not status["built"] else "CUDA|cuda"
    with pytest.raises(RuntimeError, match=message):
        kernels.accumulate([cuda_like()], [cuda_like(8192)])
    with pytest.raises(RuntimeError, match=message):
        kernels.accumulate_rows(cuda_like(), cuda_like(8192), cuda_like(16384, typestr="<i8"))


def test_an_address_that_is_not_on_the_gpu_is_found_before_the_launch(cuda):
    host = floats(3)
    with pytest.raises(ValueError, match=r"accumulators\[0\] .* its address is not in CUDA memory"):
        cuda.accumulate([cuda_like(host.ctypes.data)], [cuda.put(floats(3))])
    np.testing.assert_array_equal(host, 1)


def test_cupy_without_bfloat16_passes_its_bits(cuda):
    accumulator = cuda.put(floats(65536))
    cuda.accumulate([accumulator], [cuda.put(np.arange(65536, dtype=np.uint16))], overwrite=True)
    expected = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(cuda.get(accumulator), expected)


class OnlyInterface:
    def __init__(self, values):
        self.values = values

    @property
    def __array_interface__(self):
        return self.values.__array_interface__


@pytest.mark.parametrize(
    "wrap", [OnlyInterface, memoryview, lambda values: array.array("f", values), lambda v: (ctypes.c_float * 3)(*v)]
)
def test_whatever_numpy_can_view_is_an_array(kernels, wrap):
    accumulator, gradient = wrap(np.array([1, 2, 3], np.float32)), wrap(np.array([10, 20, 30], np.float32))
    kernels.accumulate([accumulator], [gradient], scale=2)
    seen = accumulator.values if isinstance(accumulator, OnlyInterface) else accumulator
    np.testing.assert_array_equal(seen, [21, 42, 63])
    np.testing.assert_array_equal(np.array(gradient), [10, 20, 30])


def test_one_gradient_may_serve_several_accumulators(kernels):
    accumulators, gradient = [floats(3), floats(3)], floats(3)
    kernels.accumulate(accumulators, [read_only(gradient)] * 2)
    np.testing.assert_array_equal(accumulators, 2)


def test_neighbours_in_one_buffer_do_not_overlap(kernels):
    buffer = floats(9)
    kernels.accumulate([buffer[:3], buffer[6:], buffer[3:3]], [buffer[3:6], buffer[3:6], buffer[4:4]])
    np.testing.assert_array_equal(buffer, [2, 2, 2, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("overwrite", [True, np.True_, np.array(True), np.array([True])], ids=repr)
def test_overwrite_is_any_bool(kernels, overwrite):
    accumulator = floats(3)
    kernels.accumulate([accumulator], [floats(3)], overwrite=overwrite)
    np.testing.assert_array_equal(accumulator, 1)


def test_a_list_that_changes_while_it_is_read(kernels):
    class Emptying(OnlyInterface):
        @property
        def __array_interface__(self):
            gradients.clear()
            return self.values.__array_interface__

    accumulators = [floats(3) for _ in range(50)]
    gradients = [Emptying(floats(3)) for _ in range(50)]
    kernels.accumulate(accumulators, gradients)
    assert gradients == []
    np.testing.assert_array_equal(accumulators, 2)


def test_errors_of_an_attribute_are_passed_on(kernels):
    class Failing:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("call detach() first")

    with pytest.raises(RuntimeError, match=r"call detach\(\) first"):
        kernels.accumulate([floats(3)], [Failing()])
