"""accumulate_rows(): duplicates and their order, touched rows, types, widths, thread counts."""

import numpy as np
import pytest

PAIRS = [
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float32", "float32"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("float64", "float32"),
    ("float64", "float64"),
]
SCALE = 1 / 3


def gradient_rows(rng, dtype, shape):
    rows = rng.standard_normal(shape)
    if dtype == "bfloat16":
        return (rows.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return rows.astype(dtype)


def expected_rows(accumulator, values, indices, scale=SCALE, overwrite=False):
    """Adds one row after another in the order of the indices, with product and sum rounded separately."""
    result = np.zeros_like(accumulator) if overwrite else accumulator.copy()
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    np.add.at(result, indices, accumulator.dtype.type(scale) * values.astype(accumulator.dtype))
    return result


def thread_counts(device):
    return (1, 2, 3, 7) if device.name == "cpu" else (None,)


INDICES = {
    "none": lambda rng, rows: np.zeros(0),
    "one": lambda rng, rows: np.array([rows - 1]),
    "each once": lambda rng, rows: rng.permutation(rows),
    "each many times": lambda rng, rows: rng.integers(0, rows, 20 * rows),
    "popular rows": lambda rng, rows: np.minimum(rng.zipf(1.3, 500), rows) - 1,
    "one row only": lambda rng, rows: np.full(700, rows // 2),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("choose", INDICES.values(), ids=INDICES.keys())
def test_equals_numpy_with_any_number_of_threads(device, choose, pair, overwrite):
    rng = np.random.default_rng(0)
    for rows, columns, index_dtype in [(50, 65, "int32"), (50, 64, "int64"), (7, 1, "int32"), (1, 3, "int64")]:
        indices = choose(rng, rows).astype(index_dtype)
        accumulator = rng.standard_normal((rows, columns)).astype(pair[0])
        values = gradient_rows(rng, pair[1], (len(indices), columns))
        expected = expected_rows(accumulator, values, indices, overwrite=overwrite)
        for threads in thread_counts(device):
            on_device = device.put(accumulator.copy())
            device.accumulate_rows(
                on_device, device.put(values), device.put(indices), scale=SCALE, overwrite=overwrite, threads=threads
            )
            np.testing.assert_array_equal(device.get(on_device), expected, strict=True)


@pytest.mark.parametrize("columns", [0, 1, 2, 15, 16, 17, 63, 64, 65, 555, 70001])
def test_widths(device, columns):
    rng = np.random.default_rng(columns)
    accumulator = rng.standard_normal((9, columns), np.float32)
    values = rng.standard_normal((40, columns), np.float32)
    indices = rng.integers(0, 9, 40)
    expected = expected_rows(accumulator, values, indices)
    for threads in thread_counts(device):
        on_device = device.put(accumulator.copy())
        device.accumulate_rows(on_device, device.put(values), device.put(indices), scale=SCALE, threads=threads)
        np.testing.assert_array_equal(device.get(on_device), expected)


@pytest.mark.parametrize("trailing", [(), (3, 5)], ids=str)
def test_any_number_of_axes(device, trailing):
    rng = np.random.default_rng(0)
    accumulator = rng.standard_normal((6, *trailing), np.float32)
    values = rng.standard_normal((20, *trailing), np.float32)
    indices = rng.integers(0, 6, 20).astype(np.int32)
    on_device = device.put(accumulator.copy())
    device.accumulate_rows(on_device, device.put(values), device.put(indices), scale=SCALE)
    np.testing.assert_array_equal(device.get(on_device), expected_rows(accumulator, values, indices))


def test_duplicates_add_up_in_their_order(device):
    """In this order the eight ones before 2**24 count; elsewhere 2**24 would swallow more or fewer ones."""
    values = np.array([1.0] * 8 + [2.0**24] + [1.0] * 8, np.float32)[:, None]
    accumulator = device.put(np.zeros((1, 1), np.float32))
    device.accumulate_rows(accumulator, device.put(values), device.put(np.zeros(17, np.int32)))
    assert device.get(accumulator)[0, 0] == 2.0**24 + 8


def test_views_leave_their_neighbours_alone(device):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 5, 12).astype(np.int32)
    for offset in range(1, 18):
        buffer = rng.standard_normal(5 * 9 + 40, np.float32)
        source = rng.standard_normal(12 * 9 + 40, np.float32)
        expected, values = buffer.copy(), source[offset : offset + 108].reshape(12, 9)
        inside = slice(18 - offset, 18 - offset + 45)
        expected[inside] = expected_rows(buffer[inside].reshape(5, 9), values, indices).ravel()
        on_device, values = device.put(buffer.copy()), device.put(source)[offset : offset + 108].reshape(12, 9)
        device.accumulate_rows(on_device[inside].reshape(5, 9), values, device.put(indices), scale=SCALE)
        np.testing.assert_array_equal(device.get(on_device), expected)


@pytest.mark.parametrize("columns", [1, 64, 1000])
@pytest.mark.some_by_default(2)
def test_overwrite_clears_touched_rows_only(device, columns):
    rng = np.random.default_rng(0)
    rows = 5000
    for threads in thread_counts(device):
        accumulator = device.put(np.zeros((rows, columns), np.float32))
        touched = device.put(np.zeros(rows, np.bool_))
        window = np.zeros((rows, columns), np.float32)
        seen = np.zeros(rows, np.bool_)
        for step in range(6):
            indices = rng.integers(0, rows, 300)
            values = rng.standard_normal((300, columns), np.float32)
            overwrite = step in (0, 3)
            window = expected_rows(window, values, indices, overwrite=overwrite)
            seen = (seen & (not overwrite)) | np.isin(np.arange(rows), indices)
            device.accumulate_rows(
                accumulator, device.put(values), device.put(indices), touched_rows=touched, scale=SCALE,
                overwrite=overwrite, threads=threads,
            )  # fmt: skip
            np.testing.assert_array_equal(device.get(accumulator), window)
            np.testing.assert_array_equal(device.get(touched), seen)


def test_rows_without_a_flag_are_not_visited(device):
    """Rows that the caller promises to be zero are neither read nor cleared, which saves the time."""
    accumulator = np.full((1000, 8), 7, np.float32)
    accumulator[[0, 500, 999]] = np.nan
    touched = np.zeros(1000, np.bool_)
    touched[[0, 500, 999]] = True
    on_device, flags = device.put(accumulator), device.put(touched)
    indices = np.array([500, 3], np.int32)
    device.accumulate_rows(
        on_device, device.put(np.ones((2, 8), np.float32)), device.put(indices), touched_rows=flags, overwrite=True
    )
    expected = np.full((1000, 8), 7, np.float32)
    expected[[0, 999]], expected[500], expected[3] = 0, 1, 8
    np.testing.assert_array_equal(device.get(on_device), expected)
    np.testing.assert_array_equal(np.flatnonzero(device.get(flags)), [3, 500])


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_scale_of_0_touches_no_row_whatever_the_values_are(device, pair, overwrite):
    rng = np.random.default_rng(0)
    for count in (5, 40_000):  # by one thread, and by several
        values = gradient_rows(rng, pair[1], (count, 9))
        values[::2] = 0x7FC0 if pair[1] == "bfloat16" else np.nan
        indices = rng.integers(3, 10, count)
        touched = np.arange(10) < 5
        accumulator = np.where(touched[:, None], rng.standard_normal((10, 9)), 0).astype(pair[0])
        for all_finite in (None, device.put(np.ones(1, np.bool_))):
            on_device, flags = device.put(accumulator.copy()), device.put(touched.copy())
            device.accumulate_rows(
                on_device, device.put(values), device.put(indices), touched_rows=flags, scale=-0.0, overwrite=overwrite,
                all_finite=all_finite,
            )  # fmt: skip
            np.testing.assert_array_equal(device.get(on_device), 0 * accumulator if overwrite else accumulator)
            np.testing.assert_array_equal(device.get(flags), touched & (not overwrite))
        assert not device.get(all_finite)[0], "values are looked at all the same"


@pytest.mark.parametrize("touched", [False, True])
def test_overwrite_with_no_values_clears(device, touched):
    accumulator = device.put(np.full((300, 5), np.nan))
    flags = device.put(np.ones(300, np.bool_)) if touched else None
    values, indices = device.put(np.zeros((0, 5), np.float32)), device.put(np.zeros(0, np.int64))
    device.accumulate_rows(accumulator, values, indices, touched_rows=flags, overwrite=True)
    assert not device.get(accumulator).any()
    assert flags is None or not device.get(flags).any()


def test_an_accumulator_without_rows(device):
    accumulator, values = device.put(np.zeros((0, 5), np.float32)), device.put(np.zeros((0, 5), np.float32))
    flags = device.put(np.zeros(0, np.bool_))
    all_finite = device.put(np.ones(1, np.bool_))
    device.accumulate_rows(
        accumulator,
        values,
        device.put(np.zeros(0, np.int32)),
        touched_rows=flags,
        overwrite=True,
        all_finite=all_finite,
    )
    assert device.get(all_finite)[0]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_inf_and_nan_are_found_wherever_they_are(device, pair, value):
    rng = np.random.default_rng(0)
    values = gradient_rows(rng, pair[1], (200, 37))
    indices = rng.integers(0, 10, 200)
    for position in [None, (0, 0), (0, 36), (57, 15), (57, 16), (199, 36)]:
        planted = values.copy()
        if position is not None:
            planted[position] = np.float32(value).view(np.uint32) >> 16 if pair[1] == "bfloat16" else value
        accumulator = np.full((10, 37), np.nan, pair[0])  # only the gradients are checked, not the accumulator
        all_finite = device.put(np.ones(1, np.bool_))
        device.accumulate_rows(
            device.put(accumulator), device.put(planted), device.put(indices), scale=1e308, all_finite=all_finite
        )
        assert device.get(all_finite)[0] == (position is None), position


def test_an_index_out_of_range_raises_before_anything_is_written(kernels):
    values = np.ones((4, 3), np.float32)
    for dtype in (np.int32, np.int64):
        for position, index in [(0, -1), (3, 10), (2, np.iinfo(dtype).max), (1, np.iinfo(dtype).min)]:
            accumulator, touched = np.full((10, 3), 5, np.float32), np.ones(10, np.bool_)
            indices = np.array([1, 2, 3, 4], dtype)
            indices[position] = index
            with pytest.raises(IndexError, match=rf"indices\[{position}\] is {index}; .* accumulator's 10 rows"):
                kernels.accumulate_rows(accumulator, values, indices, touched_rows=touched, overwrite=True)
            assert (accumulator == 5).all()
            assert touched.all()
    with pytest.raises(IndexError, match=r"indices\[0\] is 0; .* accumulator's 0 rows"):
        kernels.accumulate_rows(np.zeros((0, 3), np.float32), values, np.zeros(4, np.int32))


def test_on_a_gpu_a_row_that_does_not_exist_is_skipped(cuda):
    accumulator = cuda.put(np.zeros((4, 3), np.float32))
    for dtype in ("int32", "int64"):
        indices = np.array([1, -1, 4, np.iinfo(dtype).max, np.iinfo(dtype).min, 3], dtype)
        cuda.accumulate_rows(accumulator, cuda.put(np.ones((6, 3), np.float32)), cuda.put(indices))
    np.testing.assert_array_equal(cuda.get(accumulator)[:, 0], [0, 2, 0, 2])
