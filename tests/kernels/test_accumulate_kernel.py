"""accumulate() on a grid of sizes, types, layouts, instruction sets and thread counts."""

import numpy as np
import pytest
from kernel_definitions import assert_same_bits, values, wide, widen

# Sizes around the lengths of vectors and of the unrolled loop, and around the chunks of threads and CUDA blocks.
SIZES = [0, 1, 3, 15, 16, 17, 63, 64, 65, 555, 65535, 65536, 65537, 7777 * 77]
PAIRS = [
    (accumulator, gradient)
    for accumulator in ("float32", "float64")
    for gradient in ("float16", "bfloat16", "float32", "float64")
    if (accumulator, gradient) != ("float32", "float64")
]
SCALE = 1 / 3


def expected_sum(accumulator, gradient, scale=1.0, overwrite=False):
    """Returns NumPy's result, with product and sum rounded separately. A scale of 0 counts as nothing."""
    if accumulator.dtype.type(scale) == 0:
        return np.zeros_like(accumulator) if overwrite else accumulator
    with np.errstate(all="ignore"):
        product = accumulator.dtype.type(scale) * widen(gradient, accumulator.dtype)
        return product if overwrite else accumulator + product


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_size_and_type_equals_numpy(device, pair, overwrite):
    for size in SIZES:
        accumulator, gradient = values(pair[0], size, 1), values(pair[1], size, 2)
        expected = expected_sum(accumulator, gradient, SCALE, overwrite)
        on_device = device.put(accumulator.copy())
        device.accumulate([on_device], [device.put(gradient)], scale=SCALE, overwrite=overwrite)
        assert_same_bits(device.get(on_device), expected)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_views_at_any_offset_leave_their_neighbours_alone(device, pair, overwrite):
    for offset in range(1, 18):
        for size in (0, 1, 15, 17, 64, 555):
            accumulator, gradient = values(pair[0], size + 40, 1), values(pair[1], size + 40, 2)
            inside, other = slice(offset, offset + size), slice(18 - offset, 18 - offset + size)
            expected = accumulator.copy()
            expected[inside] = expected_sum(accumulator[inside], gradient[other], SCALE, overwrite)
            buffer = device.put(accumulator.copy())
            device.accumulate([buffer[inside]], [device.put(gradient)[other]], scale=SCALE, overwrite=overwrite)
            assert_same_bits(device.get(buffer), expected)


def mixed_list(sizes):
    """Makes accumulators and gradients that go through all pairs of types."""
    pairs = [PAIRS[i % len(PAIRS)] for i in range(len(sizes))]
    accumulators = [values(pair[0], size, 1) for pair, size in zip(pairs, sizes, strict=True)]
    return accumulators, [values(pair[1], size, 2) for pair, size in zip(pairs, sizes, strict=True)]


LISTS = {
    "none": [],
    "ascending": SIZES,
    "empty ones between": [0, 65537, 0, 0, 1, 0, 555, 0],
    "one huge beside 300 tiny": [7] * 150 + [5_000_011] + [5] * 150,
    "thousands": [3] * 5000,
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS.keys())
@pytest.mark.some_by_default(12)
def test_lists_of_mixed_sizes_and_types_with_any_number_of_threads(device, sizes, overwrite):
    accumulators, gradients = mixed_list(sizes)
    expected = [expected_sum(a, g, SCALE, overwrite) for a, g in zip(accumulators, gradients, strict=True)]
    gradients = [device.put(g) for g in gradients]
    for threads in (1, 2, 3, 7) if device.name == "cpu" else (None,):
        on_device = [device.put(a.copy()) for a in accumulators]
        device.accumulate(on_device, gradients, scale=SCALE, overwrite=overwrite, threads=threads)
        for result, wanted in zip(on_device, expected, strict=True):
            assert_same_bits(device.get(result), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_overwriting_past_the_caches(device, dtype):
    """The kernel stores many megabytes of accumulators in a different way, which must work from any alignment."""
    size = 2_100_000
    gradients = [values(dtype, size + offset, offset)[offset:] for offset in range(3)]
    accumulators = [np.full(size + 40, np.nan, np.float32) for _ in gradients]
    on_device = [device.put(a) for a in accumulators]
    views = [a[offset : offset + size] for offset, a in zip((0, 1, 17), on_device, strict=True)]
    device.accumulate(views, [device.put(g) for g in gradients], scale=SCALE, overwrite=True)
    for view, whole, gradient in zip(views, on_device, gradients, strict=True):
        assert_same_bits(device.get(view), expected_sum(np.zeros(1, np.float32), gradient, SCALE, True))
        assert np.isnan(device.get(whole)).sum() == 40


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (3, 0, 5), (7, 11, 13)], ids=str)
def test_shapes(device, shape):
    accumulator, gradient = (values("float32", int(np.prod(shape)), seed).reshape(shape) for seed in (1, 2))
    expected = expected_sum(accumulator, gradient)
    on_device = device.put(accumulator.copy())
    device.accumulate((on_device,), (device.put(gradient),))
    np.testing.assert_array_equal(device.get(on_device), expected)


@pytest.mark.parametrize(
    "scale",
    [0.0, -0.0, 1e-300, -1.0, 2, 1e-30, 1e300, np.inf, np.nan, np.float32(0.1), np.float64(0.1), np.array(0.5)],
    ids=repr,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scales(device, scale, dtype):
    accumulator, gradient = values(dtype, 99, 1), values(dtype, 99, 2)
    gradient[:4] = np.inf, -np.inf, np.nan, -0.0
    with np.errstate(over="ignore"):
        expected = expected_sum(accumulator, gradient, float(scale))
    on_device = device.put(accumulator.copy())
    device.accumulate([on_device], [device.put(gradient)], scale=scale)
    assert_same_bits(device.get(on_device), expected)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("scale", [0.0, -0.0], ids=repr)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.some_by_default(28)
def test_a_scale_of_0_counts_as_nothing_whatever_the_gradient_holds(device, pair, scale, overwrite):
    sizes = [1, 17, 555, 65537]
    accumulators, gradients = (
        [values(dtype, size, seed) for size in sizes] for dtype, seed in zip(pair, (1, 2), strict=True)
    )
    for accumulator, gradient in zip(accumulators, gradients, strict=True):
        accumulator[::3] = -0.0
        if overwrite:
            accumulator[1::3] = np.nan
        for i, value in enumerate((np.nan, np.inf, -np.inf)):
            for position in range(i, len(gradient), 5):
                set_element(gradient, position, value, pair[1])
    for all_finite in (None, device.put(np.ones(1, np.bool_))):
        on_device = [device.put(each.copy()) for each in accumulators]
        device.accumulate(
            on_device, [device.put(each) for each in gradients], scale=scale, overwrite=overwrite, all_finite=all_finite
        )
        for found, before in zip(on_device, accumulators, strict=True):
            assert_same_bits(device.get(found), np.zeros_like(before) if overwrite else before)
    assert not device.get(all_finite)[0], "gradients are looked at all the same"


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_window_stays_within_ulps_of_the_accumulated_magnitude(device, pair):
    steps, size = 16, 10_007
    scale = float(np.float32(SCALE))
    exact, magnitude = np.zeros(size), np.zeros(size)
    accumulator = device.put(np.full(size, np.nan, pair[0]))
    for step in range(steps):
        gradient = values(pair[1], size, step)
        exact += scale * widen(gradient, np.dtype("float64"))
        magnitude += np.abs(scale * widen(gradient, np.dtype("float64")))
        device.accumulate([accumulator], [device.put(gradient)], scale=scale, overwrite=step == 0)
    error = np.abs(device.get(accumulator) - exact)
    # Half a unit for each product and each sum. For float64 the expected sum is as inexact as the result.
    assert (error <= (steps + 1) / 2 * np.finfo(pair[0]).eps * magnitude).all()


def all_bit_patterns(gradient):
    bits = np.arange(65536, dtype=np.uint16)
    return bits if gradient == "bfloat16" else bits.view(np.float16)


@pytest.mark.parametrize("accumulator", ["float32", "float64"])
@pytest.mark.parametrize("gradient", ["float16", "bfloat16"])
def test_every_half_precision_number_is_converted_exactly(device, gradient, accumulator):
    patterns = all_bit_patterns(gradient)
    expected = widen(patterns, np.dtype(accumulator))
    on_device, halves = device.put(np.empty(65536, accumulator)), device.put(patterns)
    device.accumulate([on_device], [halves], overwrite=True)
    assert_same_bits(device.get(on_device), expected)

    # Pieces shorter than a vector take the loop over single elements.
    pieces = [slice(i, i + 5) for i in range(0, 65536, 5)]
    on_device = device.put(np.empty(65536, accumulator))
    device.accumulate([on_device[p] for p in pieces], [halves[p] for p in pieces], overwrite=True)
    assert_same_bits(device.get(on_device), expected)


@pytest.mark.parametrize("writable", [True, False])
def test_bfloat16_of_ml_dtypes(kernels, writable):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    gradient = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    gradient.flags.writeable = writable
    accumulator = np.empty(65536, np.float32)
    kernels.accumulate([accumulator], [gradient], overwrite=True)
    assert_same_bits(accumulator, gradient.astype(np.float32))


def set_element(array, position, value, dtype):
    if dtype == "bfloat16":
        value = np.float32(value).view(np.uint32) >> 16
    array[position] = value


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_inf_and_nan_are_found_wherever_they_are(device, pair, value, overwrite):
    sizes = [65, 7777 * 9, 1, 555]
    accumulators = [device.put(values(pair[0], size, 1)) for size in sizes]
    for item, position in [
        (0, 0), (0, 15), (0, 16), (0, 63), (0, 64), (1, 0), (1, 65535), (1, 65536), (1, 7777 * 9 - 1), (2, 0), (3, 554)
    ]:  # fmt: skip
        gradients = [values(pair[1], size, 2) for size in sizes]
        clean = [device.put(g.copy()) for g in gradients]
        set_element(gradients[item], position, value, pair[1])
        for flag, planted in ((True, clean), (False, [device.put(g) for g in gradients])):
            all_finite = device.put(np.ones(1, np.bool_))
            device.accumulate(accumulators, planted, overwrite=overwrite, all_finite=all_finite)
            assert device.get(all_finite)[0] == flag, (item, position)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_only_gradients_that_are_not_finite_are_reported(device, pair):
    largest = {"float16": 65504.0, "bfloat16": 3.38e38}.get(pair[1]) or np.finfo(pair[1]).max
    gradient = values(pair[1], 999)
    for position in (0, 400, 998):
        set_element(gradient, position, largest, pair[1])
    accumulator = np.zeros(999, pair[0])
    accumulator[::7] = np.inf
    accumulator[1::7] = np.nan
    all_finite = device.put(np.ones((), np.bool_))
    device.accumulate([device.put(accumulator)], [device.put(gradient)], scale=1e308, all_finite=all_finite)
    assert device.get(all_finite)[()]

    all_finite = device.put(np.zeros((1, 1), np.bool_))
    device.accumulate([device.put(accumulator)], [device.put(gradient)], all_finite=all_finite)
    assert not device.get(all_finite)[0, 0], "it is never set to True"


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_overwrite_does_not_read_the_accumulator(device, pair):
    gradient = values(pair[1], 1000)
    for old in (np.nan, np.inf):
        on_device = device.put(np.full(1000, old, pair[0]))
        all_finite = device.put(np.ones(1, np.bool_))
        device.accumulate([on_device], [device.put(gradient)], overwrite=True, all_finite=all_finite)
        assert_same_bits(device.get(on_device), widen(gradient, np.dtype(pair[0])))
        assert device.get(all_finite)[0]


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS.keys())
@pytest.mark.some_by_default(8)
def test_squared_norms_of_gradients_and_accumulators(device, sizes, overwrite):
    """In the same pass, which leaves the same accumulators; the same bits with any number of threads."""
    accumulators, gradients = mixed_list(sizes)
    if overwrite:
        accumulators = [np.full_like(each, np.nan) for each in accumulators]
    after = [expected_sum(a, g, SCALE, overwrite) for a, g in zip(accumulators, gradients, strict=True)]
    wanted = np.array([[np.sum(wide(each) ** 2, dtype=np.longdouble) for each in part] for part in (gradients, after)])
    found = []
    for threads in (1, 2, 7) if device.name == "cpu" else (None, None):
        on_device = [device.put(a.copy()) for a in accumulators]
        norms = device.put(np.full([2, len(sizes)], np.nan))
        device.accumulate(
            on_device, [device.put(g) for g in gradients], scale=SCALE, overwrite=overwrite, threads=threads,
            squared_norms=norms,
        )  # fmt: skip
        for result, each in zip(on_device, after, strict=True):
            assert_same_bits(device.get(result), each)
        found.append(device.get(norms))
        assert_same_bits(found[-1], found[0])
    np.testing.assert_allclose(found[0], wanted.astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, -2.0])
def test_squared_norms_are_finite_where_the_values_are(device, scale, overwrite):
    """A scale of 0 counts as nothing for the accumulator, and the gradient's norm is that of what is given."""
    largest, bad = np.full(5000, np.float32(1e18)), values("float32", 5000)
    bad[4321] = np.nan
    sizes = [5000, 5000]
    on_device = [device.put(np.ones(size, np.float32)) for size in sizes]
    norms = device.put(np.zeros([2, 2]))
    gradients = [device.put(largest), device.put(bad)]
    device.accumulate(on_device, gradients, scale=scale, overwrite=overwrite, squared_norms=norms)
    found = device.get(norms)
    np.testing.assert_allclose(found[0, 0], 5000 * np.float64(largest[0]) ** 2, rtol=2e-6)
    assert np.isnan(found[0, 1])
    left = 0.0 if overwrite else 5000.0
    if scale == 0:
        assert found[1].tolist() == [left, left]
    else:
        assert np.isfinite(found[1, 0])
        assert np.isnan(found[1, 1])


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("magnitude", [3e38, 1e30, 2e19, 1e15, 1e-15, 1e-19, 1e-22, 1e-30])
def test_squared_norms_where_squares_leave_the_range_of_float32(device, magnitude, overwrite):
    """Of runs of such values, a rest after the last run, and one such value among others."""
    gradient = (values("float32", 5000) / np.abs(values("float32", 5000)).max() * magnitude).astype("float32")
    single = np.ones(5000, np.float32)
    single[1234] = magnitude
    accumulators = [device.put(np.zeros(5000, np.float32)) for _ in range(2)]
    norms = device.put(np.zeros([2, 2]))
    device.accumulate(
        accumulators, [device.put(each) for each in (gradient, single)], overwrite=overwrite, squared_norms=norms
    )
    wanted = [np.sum(wide(each) ** 2) for each in (gradient, single)]
    np.testing.assert_allclose(device.get(norms), [wanted, wanted], rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squared_norms_past_the_caches(device, dtype):
    """Accumulators that are stored past the caches have the norms of what they hold."""
    gradient = values(dtype, 4_200_000, 3)
    accumulator = device.put(np.full(gradient.size, np.nan, np.float32))
    norms = device.put(np.zeros([2, 1]))
    device.accumulate([accumulator], [device.put(gradient)], scale=SCALE, overwrite=True, squared_norms=norms)
    wanted = [np.sum(wide(each) ** 2) for each in (gradient, device.get(accumulator))]
    np.testing.assert_allclose(device.get(norms)[:, 0], wanted, rtol=2e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "float64"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_scalars_in_device_memory(cuda, pair, scale_dtype, overwrite):
    accumulator, gradient = values(pair[0], 555, 1), values(pair[1], 555, 2)
    on_device = cuda.put(accumulator.copy())
    scale = cuda.put(np.array([SCALE], scale_dtype))
    cuda.accumulate([on_device], [cuda.put(gradient)], scale=scale, overwrite=cuda.put(np.array(overwrite)))
    expected = expected_sum(accumulator, gradient, float(np.dtype(scale_dtype).type(SCALE)), overwrite)
    assert_same_bits(cuda.get(on_device), expected)


def test_streams_are_ordered_with_those_of_the_arrays(cuda):
    """A call on another stream waits for the arrays' busy stream, whose later work then sees the call's result."""
    cupy = cuda.cupy
    producer, consumer = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with producer:
        accumulator = cupy.zeros(1 << 22, cupy.float32)
        for _ in range(200):
            accumulator += 1
        gradient = cupy.ones(1 << 22, cupy.float32)
        cuda.accumulate([accumulator], [gradient], stream=consumer.ptr)
        result = accumulator.copy()
        producer.synchronize()
    assert (cupy.asnumpy(result) == 201).all()


def test_a_graph_takes_device_scalars_only(cuda):
    cupy = cuda.cupy
    accumulator, gradient = cupy.zeros(99, cupy.float32), cupy.ones(99, cupy.float32)
    scale, overwrite = cupy.ones(1, cupy.float32), cupy.zeros(1, cupy.bool_)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cuda.accumulate([cupy.zeros_like(gradient)], [gradient], stream=stream.ptr)  # loads the kernel
        stream.begin_capture()
        with pytest.raises(ValueError, match="must be device arrays while the stream is captured"):
            cuda.accumulate([accumulator], [gradient], stream=stream.ptr)
        cuda.accumulate([accumulator], [gradient], scale=scale, overwrite=overwrite, stream=stream.ptr)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    assert (cupy.asnumpy(accumulator) == 3).all()
