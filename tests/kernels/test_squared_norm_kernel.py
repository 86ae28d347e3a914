"""squared_norms() on a grid of sizes, types, alignments and list lengths, against float64."""

import numpy as np
import pytest
from kernel_definitions import assert_same_bits, storage, values, wide

TYPES = ["float16", "bfloat16", "float32", "float64"]
# Sizes around packs, the blocks of 32768 values on a CPU and the chunks of 32 KB on a GPU.
SIZES = [0, 1, 3, 7, 8, 9, 31, 32, 33, 555, 2048, 4095, 4096, 4097, 8192, 8193, 16383, 16385, 32767, 32769, 99991]


def norms(device, arrays, **options):
    sums = device.put(np.full(len(arrays), np.nan))
    device.kernels.squared_norms(arrays, sums, **options)
    return device.get(sums)


def expected(arrays):
    return np.array([float(np.sum(wide(array) ** 2)) for array in arrays])


def thread_counts(device):
    return (1, 2, 3, 7) if device.name == "cpu" else (None,)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_size_and_type(device, dtype):
    arrays = [values(dtype, size, 1) for size in SIZES]
    found = norms(device, [device.put(array) for array in arrays])
    np.testing.assert_allclose(found, expected(arrays), rtol=1e-13)


LISTS = {
    "none": [],
    "one": [5],
    "a small table": [3] * 160,
    "one more than a small table": [3] * 161,
    "a medium table": [3] * 416,
    "one more than a medium table": [3] * 417,
    "tensors of two grids": [3] * 501,
    "a large table": [3] * 1280,
    "more than a large table": [3] * 2600,
    "empty ones between": [0, 65537, 0, 0, 1, 0, 555, 0],
    "one huge beside 300 tiny": [7] * 150 + [2_000_003] + [5] * 150,
}


@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS.keys())
def test_the_same_bits_for_lists_of_any_length_and_any_number_of_threads(device, sizes):
    arrays = [values(TYPES[i % 4], size, i % 3) for i, size in enumerate(sizes)]
    on_device = [device.put(array) for array in arrays]
    found = norms(device, on_device)
    np.testing.assert_allclose(found, expected(arrays), rtol=1e-13)
    for threads in thread_counts(device):
        for _ in range(3):
            assert_same_bits(norms(device, on_device, threads=threads), found)
    alone = np.array([norms(device, [array])[0] for array in on_device[:200]])
    assert_same_bits(alone, found[:200])


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_at_any_offset(device, dtype):
    for size in (0, 1, 17, 555, 9001):
        array = values(dtype, size, 1)
        found = norms(device, [device.put(array)])
        for offset in range(1, 9):
            # The values beside the array are NaN, so that reading them shows.
            buffer = np.full(size + 20, 0x7FC0 if dtype == "bfloat16" else np.nan, storage(dtype))
            buffer[offset : offset + size] = array
            assert_same_bits(norms(device, [device.put(buffer)[offset : offset + size]]), found)


def test_instruction_sets_add_in_the_same_order(kernels):
    before = kernels.instruction_set()
    arrays = [values(dtype, size, 1) for dtype in TYPES for size in SIZES]
    found = []
    for name in kernels.instruction_sets():
        kernels.use_instruction_set(name)
        sums = np.empty(len(arrays))
        kernels.squared_norms(arrays, sums)
        found.append(sums)
    kernels.use_instruction_set(before)
    for sums in found[1:]:
        assert_same_bits(sums, found[0])


def test_sums_are_finite_where_the_values_are(device):
    largest = np.finfo(np.float32).max
    arrays = [
        np.full(40_000, largest, np.float32),
        np.array([1.0] * 20 + [np.nan], np.float32),
        np.array([np.inf] + [1.0] * 20, np.float32),
        np.array([1e-30], np.float32),
        np.array([0x7F80], np.uint16),
        np.array([65504] * 1000, np.float16),
        np.array([1e-40], np.float32),
    ]
    found = norms(device, [device.put(array) for array in arrays])
    assert np.isfinite(found).tolist() == [True, False, False, True, False, True, True]
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 3, 5, 6]], expected([arrays[i] for i in (0, 3, 5, 6)]), rtol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.inf, np.nan], ids=str)
def test_what_is_not_finite_is_found_wherever_it_is(device, dtype, value):
    arrays = [values(dtype, size, 1) for size in (65, 40_001, 1)]
    for item, position in [(0, 0), (0, 31), (0, 64), (1, 0), (1, 8191), (1, 32768), (1, 40_000), (2, 0)]:
        planted = [array.copy() for array in arrays]
        planted[item][position] = (0x7F80 if value == np.inf else 0x7FC0) if dtype == "bfloat16" else value
        found = norms(device, [device.put(array) for array in planted])
        assert np.isfinite(found).tolist() == [i != item for i in range(3)], (item, position)


def test_a_workspace_that_is_given(cuda):
    arrays = [values("float32", size, 1) for size in SIZES]
    on_device = [cuda.put(array) for array in arrays]
    needed = cuda.kernels.squared_norms_workspace(on_device)
    assert needed > 0
    workspace = cuda.put(np.full(needed, 0xFF, np.uint8))
    assert_same_bits(norms(cuda, on_device, workspace=workspace), norms(cuda, on_device))
    with pytest.raises(ValueError, match=rf"workspace has {needed - 1} bytes; it must have at least {needed}"):
        norms(cuda, on_device, workspace=workspace[: needed - 1])
    with pytest.raises(ValueError, match="workspace is not aligned to 256 bytes"):
        norms(cuda, on_device, workspace=workspace[1:])
