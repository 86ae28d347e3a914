"""add_noise_group() and end_noise_window(): against NumPy, and what they reject."""

import numpy as np
import pytest
from malformed import NO_ARRAY, check_raises, floats, read_only


def statistics(device, averages=(0.0, 0.0, 0.0)):
    return [device.put(np.array(each)) for each in (averages, [0.0], [0, 0])]


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("share", [0.75, 0.0])
def test_a_window_of_micro_batches(device, count, share):
    """Against the formulas; the first micro-batch starts on what another window has left."""
    rng = np.random.default_rng(count)
    norms = rng.uniform(1, 2, (3, 2, count))
    if share == 0:
        norms[1, 0] = np.nan
    shares = [1.0, share, 2.0]
    window = device.put(np.array([np.nan, np.nan, np.nan, 5]))
    for i, each in enumerate(norms):
        device.kernels.add_noise_group(window, device.put(each), share=shares[i], starts=i == 0)
    weighted = sum(weight * each[0].sum() for weight, each in zip(shares, norms, strict=True) if weight)
    sums = norms[2, 1].sum()
    np.testing.assert_allclose(device.get(window), [weighted, 3 - (share == 0), sums, 8 + share], rtol=1e-13)

    kept, total = statistics(device, (1.0, 1.0, 1.0)), sum(shares)
    device.kernels.end_noise_window(window, kept, shares=total, steps=3, decay=0.5)
    mean = sums / total**2
    trace = (weighted - total * mean) / (2 - (share == 0))
    averages, norm, ended = (device.get(each) for each in kept)
    np.testing.assert_allclose(averages, [(1 + trace) / 2, (1 + mean - trace / total) / 2, 1], rtol=1e-12)
    np.testing.assert_allclose(norm, [np.sqrt(mean)], rtol=1e-13)
    assert ended.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("window", "norm"),
    [([9, 1, 4, 1], 2.0), ([np.nan, 2, 4, 1], 2.0), ([9, 2, np.inf, 1], np.nan), ([9, 2, np.nan, 1], np.nan)],
)
def test_windows_that_tell_nothing(device, window, norm):
    kept = statistics(device, (1.0, 2.0, 3.0))
    device.kernels.end_noise_window(device.put(np.array(window, float)), kept, shares=1.0, steps=2, decay=0.5)
    averages, found, ended = (device.get(each) for each in kept)
    assert averages.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(found, [norm])
    assert ended.tolist() == [1, 2]


def test_steps_may_be_any_whole_number(device):
    for steps in (3, np.int64(4), True):
        kept = statistics(device)
        device.kernels.end_noise_window(device.put(np.ones(4)), kept, shares=1.0, steps=steps, decay=0.5)
        assert device.get(kept[2]).tolist() == [1, int(steps)]


def test_a_window_without_an_update(device):
    kept = statistics(device, (1.0, 2.0, 3.0))
    window = device.put(np.array([9.0, 2, 4, 1]))
    device.kernels.end_noise_window(window, kept, shares=1.0, steps=2, decay=0.5, applies=False)
    assert device.get(kept[0]).tolist() == [1, 2, 3]
    assert np.isnan(device.get(kept[1])[0])
    assert device.get(kept[2]).tolist() == [1, 2]


def doubles(*shape):
    return floats(*shape, dtype=np.float64)


ADD_ERRORS = {
    "no array": ({"window": None}, TypeError, "window " + NO_ARRAY.format("NoneType")),
    "a short window": ({"window": doubles(3)}, ValueError, "window has shape (3,); it must have shape (4,)"),
    "a window of float32": ({"window": floats(4)}, TypeError, "window"),
    "a read-only window": ({"window": read_only(doubles(4))}, ValueError, "window is read-only"),
    "norms of one row": ({"norms": doubles(3)}, ValueError, "norms has shape (3,)"),
    "norms of three rows": ({"norms": doubles(3, 2)}, ValueError, "norms has shape (3, 2); it must have shape (2, 2)"),
    "norms of float32": ({"norms": floats(2, 3)}, TypeError, "norms"),
    "no share": ({"share": None}, TypeError, "share must be a number"),
    "a number for a flag": ({"starts": 1}, TypeError, "starts must be a bool"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADD_ERRORS.values(), ids=ADD_ERRORS.keys())
def test_what_add_noise_group_rejects(kernels, case):
    changes, error, message = case
    given = {"window": doubles(4), "norms": doubles(2, 3), "share": 1.0} | changes
    written = [given["window"]] if isinstance(given["window"], np.ndarray) else []
    check_raises(lambda: kernels.add_noise_group(**given), written, error, message)


def kept(**changes):
    return list(({"averages": doubles(3), "norm": doubles(1), "ended": np.zeros(2, np.int64)} | changes).values())


END_ERRORS = {
    "two statistics": ({"statistics": kept()[:2]}, ValueError, "statistics has 2 items; it must have 3"),
    "short averages": ({"statistics": kept(averages=doubles(2))}, ValueError, "statistics[0] has shape (2,)"),
    "a norm of float32": ({"statistics": kept(norm=floats(1))}, TypeError, "statistics[1]"),
    "counts of float64": ({"statistics": kept(ended=doubles(2))}, TypeError, "statistics[2]"),
    "a read-only norm": ({"statistics": kept(norm=read_only(doubles(1)))}, ValueError, "statistics[1] is read-only"),
    "one array for two": (
        {"statistics": [shared := doubles(3), shared[:1], kept()[2]]}, ValueError, "share memory",
    ),
    "a window of five": ({"window": doubles(5)}, ValueError, "window has shape (5,); it must have shape (4,)"),
    "half a step": ({"steps": 1.5}, TypeError, "steps must be a whole number, got float"),
    "too many steps": ({"steps": 1 << 70}, OverflowError, "int too big"),
    "a decay of text": ({"decay": "0.5"}, TypeError, "decay must be a number"),
    "no scale": ({"scale": None}, TypeError, "scale must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", END_ERRORS.values(), ids=END_ERRORS.keys())
def test_what_end_noise_window_rejects(kernels, case):
    changes, error, message = case
    given = {"window": doubles(4), "statistics": kept(), "shares": 1.0, "steps": 2, "decay": 0.5} | changes
    check_raises(lambda: kernels.end_noise_window(**given), given["statistics"], error, message)
