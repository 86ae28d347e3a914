"""clip_units(): adaptive gradient clipping on shapes around tiles and blocks, against the formula in float64."""

import numpy as np
import pytest
from kernel_definitions import assert_same_bits, clipped_units

# Around a CPU's tiles of 1024 units and 65536 values, and a GPU's of 256 units and 16384 values.
SHAPES = [
    (), (1,), (7,), (70000,), (5, 3), (300, 17), (3, 3, 16, 32), (2000, 1), (1, 3000), (70, 1500), (0, 4), (4, 0),
    (2, 3, 0, 5), (129, 256), (65, 257), (1025, 64), (9000, 8), (5, 1, 1025),
]  # fmt: skip
SETTINGS = {"clip_factor": 0.25, "epsilon": 1e-3}


def draw(shapes, seed=0):
    """Weights, and gradients of which some units are large and some small."""
    rng = np.random.default_rng(seed)
    weights = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
    gradients = []
    for shape in shapes:
        units = shape[-1] if len(shape) > 1 else 1
        gradient = rng.standard_normal(shape) * np.exp(rng.uniform(-4, 2, units if len(shape) > 1 else ()))
        gradients.append(np.asarray(gradient, np.float32))
    return gradients, weights


def clip(device, gradients, weights, settings=SETTINGS, **options):
    outputs = [device.put(np.full(each.shape, np.nan, np.float32)) for each in gradients]
    arrays = [[device.put(each) for each in group] for group in (gradients, weights)]
    device.kernels.clip_units(*arrays, outputs, **settings, **options)
    return [device.get(each) for each in outputs]


def check(found, gradients, weights, settings=SETTINGS):
    for result, gradient, weight in zip(found, gradients, weights, strict=True):
        exact = clipped_units(gradient, weight, **settings)
        np.testing.assert_allclose(result, exact, rtol=2e-7, atol=0)
        same = exact == gradient  # units that are small enough keep their bits
        assert_same_bits(result[same], gradient[same])


def test_every_shape(device):
    gradients, weights = draw(SHAPES)
    found = clip(device, gradients, weights)
    check(found, gradients, weights)
    changed = [np.any(result != gradient) for result, gradient in zip(found, gradients, strict=True)]
    assert any(changed)
    assert not all(changed)


@pytest.mark.parametrize("count", [0, 1, 56, 57, 448, 449, 900])
def test_lists_of_any_length(device, count):
    gradients, weights = draw([SHAPES[i % 8] for i in range(count)], seed=count)
    gradients, weights = ([each[:3] if each.size > 60000 else each for each in group] for group in (gradients, weights))
    check(clip(device, gradients, weights), gradients, weights)


def test_the_same_bits_with_any_number_of_threads(device):
    gradients, weights = draw(SHAPES)
    first = clip(device, gradients, weights)
    for threads in (1, 2, 3, 7) if device.name == "cpu" else (None,):
        for one, other in zip(first, clip(device, gradients, weights, threads=threads), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of", ["gradient", "weights"])
def test_a_unit_that_is_not_finite_stays_as_it_is(device, value, of):
    gradient, weight = np.full((600, 40), 100, np.float32), np.ones((600, 40), np.float32)
    (gradient if of == "gradient" else weight)[599, 7] = value
    (result,) = clip(device, [gradient], [weight])
    np.testing.assert_array_equal(result[:, 7], gradient[:, 7])
    assert (np.delete(result, 7, 1) < 1).all()


def test_magnitudes_whose_squares_are_no_float32(device):
    gradient = np.tile(np.float32([3e38, 1e-30, 1e-44, 0]), (50, 1))
    weight = np.tile(np.float32([1e-30, 2e38, 1e-44, 1]), (50, 1))
    for clip_factor in (1e-6, 10):
        settings = {"clip_factor": clip_factor, "epsilon": 1e-37}
        (result,) = clip(device, [gradient], [weight], settings)
        exact = clipped_units(gradient, weight, **settings)
        np.testing.assert_allclose(result, exact, rtol=2e-7, atol=2e-45)


def test_weights_of_zeros_count_as_epsilon(device):
    gradient = np.full((4, 2), 1, np.float32)
    (result,) = clip(device, [gradient], [np.zeros_like(gradient)])
    np.testing.assert_allclose(np.linalg.norm(result, axis=0), 0.25 * 1e-3, rtol=1e-6)


def test_a_workspace_that_is_given(cuda):
    gradients, weights = draw(SHAPES)
    needed = cuda.kernels.clip_units_workspace([cuda.put(each) for each in gradients])
    workspace = cuda.put(np.full(needed, 0xFF, np.uint8))
    check(clip(cuda, gradients, weights, workspace=workspace), gradients, weights)
    with pytest.raises(ValueError, match=rf"workspace has {needed - 1} bytes; it must have at least {needed}"):
        clip(cuda, gradients, weights, workspace=workspace[: needed - 1])
