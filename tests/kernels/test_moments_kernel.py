"""merge_moments(), add_to_windows() and end_windows(): windows of ragged batches against all their values together, and
when moving statistics move."""

import numpy as np
import pytest

SIZES = [1, 17, 1, 5, 128, 3, 0, 64]
NEVER = 1 << 40


class Window:
    """A window's arrays on a device."""

    def __init__(self, device, channels, limit=NEVER, values=0, calls=0, moments=np.nan):
        self.device = device
        self.counters = device.put(np.array([values, calls, limit]))
        self.moments = device.put(np.full((2, channels), moments))

    @property
    def arrays(self):
        return self.counters, self.moments

    def read(self):
        return self.device.get(self.counters).tolist(), self.device.get(self.moments)


def batch_of(device, x, dtype="float32"):
    """Returns a batch's moments in `dtype`, as batch_norm() leaves them: with the mean in two parts."""
    exact = x.astype(np.float64)
    mean = exact.mean(0) if len(x) else np.zeros(x.shape[1])
    variance = exact.var(0) if len(x) else np.zeros(x.shape[1])
    rounded = mean.astype(dtype)
    moments = rounded, (mean - rounded).astype(dtype), variance.astype(dtype)
    return [device.put(np.array([len(x)])), *(device.put(each) for each in moments)]


def draw(channels, sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(i, 1 + i, (size, channels)).astype(np.float32) for i, size in enumerate(sizes)]


def moving_of(device, channels, dtype="float32"):
    return device.put(np.full(channels, 8, dtype)), device.put(np.full(channels, 2, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3, 1023, 1024, 1025, 2048, 5000])
def test_ragged_batches_are_all_values_together(device, channels, dtype):
    batches = draw(channels, SIZES)
    window = Window(device, channels)
    for repeat in range(2):  # the second window starts on the first one's moments
        for batch in batches:
            device.kernels.merge_moments(batch_of(device, batch, dtype), window=window.arrays)
        together = np.concatenate(batches).astype(np.float64)
        counters, (mean, centred) = window.read()
        assert counters == [len(together), len(SIZES), NEVER], repeat
        # The batches' variances are rounded to their type.
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        np.testing.assert_allclose(mean, together.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(centred, together.var(0) * len(together), rtol=tolerance)
        window.counters[:2] = 0


@pytest.mark.parametrize("moving_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moving_statistics_move_at_the_limit(device, dtype, moving_dtype):
    batches = draw(2000, (4, 7, 3))
    window, moving = Window(device, 2000, limit=3), moving_of(device, 2000, moving_dtype)
    expected = [np.full(2000, 8.0), np.full(2000, 2.0)]
    for _ in range(2):
        for i, batch in enumerate(batches):
            for array, wanted in zip(moving, expected, strict=True):
                np.testing.assert_allclose(device.get(array), wanted, rtol=1e-5, atol=1e-5)
            device.kernels.merge_moments(
                batch_of(device, batch, dtype), window=window.arrays, moving=moving, momentum=0.25
            )
            assert window.read()[0][1] == (i + 1) % 3
        together = np.concatenate(batches).astype(np.float64)
        expected = [
            each * 0.25 + now * 0.75 for each, now in zip(expected, (together.mean(0), together.var(0)), strict=True)
        ]
    assert window.read()[0] == [0, 0, 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_a_window_the_batch_is_all_of_it(device, dtype):
    batch = draw(33, [50])[0]
    moving = moving_of(device, 33, dtype)
    arrays = batch_of(device, batch, dtype)
    device.kernels.merge_moments(arrays, moving=moving, momentum=0.99)
    type_of = np.dtype(dtype).type
    for array, before, now in zip(moving, (8, 2), (device.get(arrays[1]), device.get(arrays[3])), strict=True):
        wanted = type_of(before) * type_of(0.99) + now * type_of(1 - 0.99)
        np.testing.assert_allclose(device.get(array), wanted, rtol=4 * np.finfo(dtype).eps)


def test_without_a_batch_the_window_ends(device):
    window, moving = Window(device, 3, limit=100, values=10, calls=2, moments=5.0), moving_of(device, 3)
    for _ in range(2):  # the second call ends an empty window
        device.kernels.merge_moments(None, window=window.arrays, moving=moving, momentum=0.25)
        np.testing.assert_allclose(device.get(moving[0]), 8 * 0.25 + 5 * 0.75)
        np.testing.assert_allclose(device.get(moving[1]), 2 * 0.25 + 0.5 * 0.75)
        assert window.read()[0] == [0, 0, 100]


def test_a_window_without_values_moves_nothing(device):
    window, moving = Window(device, 2, limit=2), moving_of(device, 2)
    nothing = [device.put(np.array([0])), *(device.put(np.full(2, np.nan, np.float32)) for _ in range(3))]
    for calls in (1, 0):
        device.kernels.merge_moments(nothing, window=window.arrays, moving=moving)
        assert window.read()[0] == [0, calls, 2]
    device.kernels.merge_moments(nothing, moving=moving)
    assert (device.get(moving[0]) == 8).all()
    assert (device.get(moving[1]) == 2).all()


def test_the_limit_is_read_when_it_runs(device):
    window, moving = Window(device, 2, limit=3), moving_of(device, 2)
    batch = batch_of(device, np.ones((4, 2), np.float32))
    device.kernels.merge_moments(batch, window=window.arrays, moving=moving, momentum=0.25)
    window.counters[2] = 2
    device.kernels.merge_moments(batch, window=window.arrays, moving=moving, momentum=0.25)
    np.testing.assert_allclose(device.get(moving[0]), 8 * 0.25 + 0.75)
    assert window.read()[0] == [0, 0, 2]


def test_the_rest_of_a_mean_counts(device):
    window = Window(device, 1)
    one, rest = np.ones(1, np.float32), np.full(1, 1e-9, np.float32)
    device.kernels.merge_moments([device.put(each) for each in (np.array([5]), one, rest, one)], window=window.arrays)
    np.testing.assert_allclose(window.read()[1][0], 1 + np.float64(rest[0]), rtol=1e-15)


def test_what_is_not_finite_stays_in_its_channel(device):
    window = Window(device, 1500)
    for i, batch in enumerate(draw(1500, [5, 6])):
        batch[i, 7 + 700 * i] = np.nan
        with np.errstate(invalid="ignore"):
            device.kernels.merge_moments(batch_of(device, batch), window=window.arrays)
    wrong = ~np.isfinite(window.read()[1])
    assert np.flatnonzero(wrong.any(0)).tolist() == [7, 707]


def test_no_channels(device):
    window = Window(device, 0)
    device.kernels.merge_moments(batch_of(device, np.zeros((4, 0), np.float32)), window=window.arrays)
    assert window.read()[0] == [4, 1, NEVER]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", [1, 3], ids=["mean", "variance"])
def test_a_batch_that_is_not_finite_counts_as_none(device, wrong, dtype):
    good = batch_of(device, draw(2000, [6])[0], dtype)
    values = device.get(good[wrong]).copy()
    values[1999] = np.inf if wrong == 1 else np.nan
    bad = [*good[:wrong], device.put(values), *good[wrong + 1 :]]
    window = Window(device, 2000)
    for batch, counters in ((bad, [0, 1]), (good, [6, 2]), (bad, [6, 3])):
        device.kernels.merge_moments(batch, window=window.arrays, only_finite=True)
        assert window.read()[0][:2] == counters
    assert np.isfinite(window.read()[1]).all()


class Ending:
    """Windows of 1, 2, … channels with moving statistics, each of other moments; every third one is empty."""

    def __init__(self, device, count, dtype="float32"):
        self.device = device
        self.windows = [
            Window(device, i + 1, limit=9, values=10 * (i % 3), calls=2, moments=float(i) if i % 3 else np.nan)
            for i in range(count)
        ]
        self.moving = [moving_of(device, i + 1, dtype) for i in range(count)]
        self.momenta = [i / count for i in range(count)]

    def run(self, *, moves=True, **settings):
        if moves:
            settings |= {"moving_means": [each for each, _ in self.moving], "momenta": self.momenta}
            settings["moving_variances"] = [each for _, each in self.moving]
        counters, moments = zip(*(each.arrays for each in self.windows), strict=True)
        self.device.kernels.end_windows(counters, moments, **settings)

    def check(self, *, ended, moved):
        for i, (window, moving, momentum) in enumerate(zip(self.windows, self.moving, self.momenta, strict=True)):
            values, share = 10 * (i % 3), 1 - momentum if moved and i % 3 else 0
            assert window.read()[0] == ([0, 0, 9] if ended else [values, 2, 9]), i
            for array, old, new in zip(moving, (8, 2), (i, i / (values or 1)), strict=True):
                np.testing.assert_allclose(self.device.get(array), old + (new - old) * share, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 48, 49, 130])
def test_many_windows_end_at_once(device, count, dtype):
    ending = Ending(device, count, dtype)
    for _ in range(2):  # the second call ends empty windows
        ending.run()
        ending.check(ended=True, moved=True)


class Momenta:
    """A sequence that keeps none of its items alive."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)
        return Number(i / self.count)


class Number:
    """A number whose memory other objects have as soon as nobody holds it."""

    def __init__(self, value):
        self.value = value

    def __del__(self):
        self.value = "gone"

    def __float__(self):
        return self.value


@pytest.mark.parametrize("momenta", [Momenta, lambda count: np.arange(count) / count], ids=["a sequence", "an array"])
def test_momenta_may_be_any_sequence(device, momenta):
    ending = Ending(device, 9)
    ending.momenta = momenta(9)
    ending.run()
    ending.momenta = [i / 9 for i in range(9)]
    ending.check(ended=True, moved=True)


def test_windows_that_are_dropped_move_nothing(device):
    ending = Ending(device, 50)
    ending.run(moves=False)
    ending.check(ended=True, moved=False)


@pytest.mark.parametrize("moves", [True, False])
def test_windows_stay_where_the_flag_says_so(device, moves):
    ending = Ending(device, 50)
    for flag in (False, device.put(np.array([False]))) if device.name == "cuda" else (False,):
        ending.run(moves=moves, applies=flag)
        ending.check(ended=False, moved=False)
    ending.run(moves=moves, applies=True)
    ending.check(ended=True, moved=moves)


def test_no_windows(device):
    assert device.kernels.end_windows([], []) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 36, 37, 80])
def test_many_windows_are_added_to_as_one_after_another(device, count, dtype):
    def windows():
        return [
            Window(device, i + 1, values=10 * (i % 3), calls=2, moments=float(i) if i % 3 else np.nan)
            for i in range(count)
        ]

    batches = [batch_of(device, draw(i + 1, [3 * (i % 4)], seed=i)[0], dtype) for i in range(count)]
    single, together = windows(), windows()
    for batch, window in zip(batches, single, strict=True):
        device.kernels.merge_moments(batch, window=window.arrays)
    before = [window.read() for window in together]
    for applies, wanted in ((False, before), (True, [window.read() for window in single])):
        device.kernels.add_to_windows(batches, [window.arrays for window in together], applies=applies)
        for window, (counters, moments) in zip(together, wanted, strict=True):
            found = window.read()
            assert found[0] == counters
            np.testing.assert_array_equal(found[1], moments)
