"""Batch normalization: forward, gradient and inference in every layout and type, against float64."""

import dataclasses
import functools
import zlib

import numpy as np
import pytest
from kernel_definitions import BatchNorm, assert_same_bits, excess, narrow

TYPES = ["float16", "bfloat16", "float32", "float64"]
EPSILON = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array's shape, the axis of its channels, and the share of places that its mask keeps, if it has one."""

    shape: tuple[int, ...]
    axis: int = -1
    mask: float | None = None

    def __str__(self):
        return f"{list(self.shape)} axis {self.axis}" + ("" if self.mask is None else f" mask {self.mask}")


# Numbers of channels around packs, tile widths and 512 columns; numbers of rows around chunks of 128 and the tiles of
# a GPU's block.
LAYOUTS = [
    Layout((1, 1)),
    Layout((127, 1)),
    Layout((1, 64)),
    Layout((2, 100)),
    Layout((128, 3)),
    Layout((129, 16), 1, mask=0.7),
    Layout((129, 17)),
    Layout((6145, 1)),
    Layout((4097, 3)),
    Layout((4097, 3), mask=0.5),
    Layout((4097, 64), mask=0.7),
    Layout((2049, 100)),
    Layout((128, 1001)),
    Layout((131, 1024)),
    Layout((40, 1536)),
    Layout((130, 2048), mask=0.6),
    Layout((700, 1024)),
    Layout((513, 513), mask=0.3),
    Layout((129, 515), mask=0.0),
    Layout((65, 8), mask=1.0),
    Layout((129,), 0),
    Layout((64, 129), 0),
    Layout((513, 127), -2),
    Layout((3, 4097), 0),
    Layout((1, 4097), 0),
    Layout((7, 33, 16), mask=0.7),
    Layout((2, 17, 129), 1),
    Layout((100, 3, 43), -3),
    Layout((2, 7, 9, 64)),
    Layout((2, 3, 64, 65), 1),
    Layout((3, 4, 17, 5), -2),
    Layout((9, 40, 7, 7), 1),
    Layout((2, 513, 3, 1), 1),
    Layout((6, 3, 1, 1), 1),
    Layout((3, 1, 4, 11, 31), 1),
    Layout((0, 5)),
    Layout((0, 5), mask=0.5),
    Layout((2, 5, 0), 1),
]


class Data:
    """Random inputs of a layout, and the expected results."""

    def __init__(self, layout, dtype, mean=0.5, deviation=2.0):
        rng = np.random.default_rng(zlib.crc32(str(layout).encode()))
        channels = layout.shape[layout.axis]
        self.layout, self.dtype = layout, dtype
        self.statistic = np.float64 if dtype == "float64" else np.float32
        self.x = narrow(rng.normal(mean, deviation, layout.shape), dtype)
        self.dy = narrow(rng.standard_normal(layout.shape) + 0.1, dtype)
        self.gamma = rng.uniform(0.25, 2, channels).astype(self.statistic)
        self.beta = rng.uniform(-2, 2, channels).astype(self.statistic)
        self.mean = rng.standard_normal(channels).astype(self.statistic)
        self.variance = rng.uniform(0.1, 4, channels).astype(self.statistic)
        self.mask = None if layout.mask is None else rng.random(layout.shape[:-1]) < layout.mask

    @functools.cached_property
    def training(self):
        return BatchNorm(self.x, self.gamma, self.beta, self.dy, axis=self.layout.axis, epsilon=EPSILON, mask=self.mask)

    @functools.cached_property
    def inference(self):
        moments = self.mean, self.variance
        return BatchNorm(
            self.x, self.gamma, self.beta, self.dy, axis=self.layout.axis, epsilon=EPSILON, moments=moments
        )


@functools.cache
def data_of(layout, dtype):
    return Data(layout, dtype)


class Run:
    """Calls the kernels on a device and returns NumPy arrays by name. `offset` misaligns the arrays as large as x."""

    def __init__(self, device, data, offset=0, **options):
        self.device, self.data, self.offset = device, data, offset
        self.options = {"axis": data.layout.axis, **options}
        self.mask = None if data.mask is None else device.put(data.mask)

    def place(self, array):
        buffer = np.full(array.size + 2 * self.offset, 0xFFFF if array.dtype == np.uint16 else np.nan, array.dtype)
        buffer[self.offset : self.offset + array.size] = array.reshape(-1)
        on_device = self.device.put(buffer)
        return on_device[self.offset : self.offset + array.size].reshape(array.shape), on_device

    def output(self):
        return self.place(narrow(np.full(self.data.layout.shape, np.nan), self.data.dtype))

    def channels(self, *names):
        return {name: self.device.put(np.full_like(self.data.gamma, np.nan)) for name in names}

    def get(self, outputs, view, buffer, name):
        whole = self.device.get(buffer)
        size = whole.size - 2 * self.offset
        outside = np.r_[whole[: self.offset], whole[self.offset + size :]]
        untouched = (outside == 0xFFFF) if outside.dtype == np.uint16 else np.isnan(outside)
        assert untouched.all(), f"{name} reaches beyond its array"
        return {name: self.device.get(view)} | {name: self.device.get(array) for name, array in outputs.items()}

    def forward(self):
        data, put = self.data, self.device.put
        y, buffer = self.output()
        outputs = self.channels("mean", "rest", "variance", "inverse")
        outputs["count"] = put(np.array([-1]))
        self.device.kernels.batch_norm(
            self.place(data.x)[0], put(data.gamma), put(data.beta), y=y, epsilon=EPSILON, mask=self.mask, **outputs,
            **self.options,
        )  # fmt: skip
        return self.get(outputs, y, buffer, "y")

    def gradient(self, statistics, count):
        """Calls the gradient with the statistics of forward(), or with those of inference and no count."""
        data, put = self.data, self.device.put
        dx, buffer = self.output()
        outputs = self.channels("dgamma", "dbeta")
        self.device.kernels.batch_norm_gradient(
            self.place(data.x)[0], self.place(data.dy)[0], put(data.gamma), dx=dx,
            count=None if count is None else put(count), mask=self.mask if count is not None else None,
            **{name: put(statistics[name]) for name in ("mean", "rest", "inverse")}, **outputs, **self.options,
        )  # fmt: skip
        return self.get(outputs, dx, buffer, "dx")

    def train(self):
        results = self.forward()
        return results | self.gradient(results, results["count"])

    def infer(self):
        data, put = self.data, self.device.put
        y, buffer = self.output()
        parameters = (put(each) for each in (data.gamma, data.beta, data.mean, data.variance))
        self.device.kernels.batch_norm_inference(
            self.place(data.x)[0], *parameters, y=y, epsilon=EPSILON, **self.options
        )
        inverse = (1 / np.sqrt(data.variance.astype(np.float64) + EPSILON)).astype(data.statistic)
        statistics = {"mean": data.mean, "rest": np.zeros_like(data.mean), "inverse": inverse}
        return self.get({}, y, buffer, "y") | self.gradient(statistics, None)


def check(results, expected, names, data, tolerance=None):
    for name in names:
        above = excess(results[name], getattr(expected, name), data.dtype, tolerance=tolerance)
        assert above <= 0, f"{name} of {data.layout}: {above} above the bound"


def check_training(results, data, tolerance=None):
    assert results["count"][0] == data.training.count
    exact_mean = results["mean"].astype(np.longdouble) + results["rest"]
    exactness = 1e-13 if data.dtype == "float64" else 1e-6
    assert excess(exact_mean, data.training.mean, "float64", tolerance=exactness) <= 0, f"mean of {data.layout}"
    check(results, data.training, ("variance", "inverse", "y", "dx", "dgamma", "dbeta"), data, tolerance)


def assert_same_results(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert_same_bits(found[name], expected[name])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.some_by_default(3)
def test_training(device, dtype):
    for layout in LAYOUTS:
        data = data_of(layout, dtype)
        check_training(Run(device, data).train(), data)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.some_by_default(6)
def test_inference(device, dtype):
    for layout in LAYOUTS:
        if layout.mask is None:
            data = data_of(layout, dtype)
            check(Run(device, data).infer(), data.inference, ("y", "dx", "dgamma", "dbeta"), data)


@pytest.mark.parametrize("dtype", TYPES)
def test_views_at_any_offset_leave_their_neighbours_alone(device, dtype):
    for layout in (Layout((40, 16)), Layout((37, 17), mask=0.5), Layout((3, 5, 8), 1)):
        data = data_of(layout, dtype)
        for offset in range(1, 9):
            run = Run(device, data, offset)
            check_training(run.train(), data)
            if layout.mask is None:
                check(run.infer(), data.inference, ("y", "dx", "dgamma", "dbeta"), data)


DETERMINED = [Layout((4097, 64), mask=0.7), Layout((2049, 100)), Layout((4097, 3)), Layout((9, 40, 7, 7), 1)]
DETERMINED += [Layout((40, 1536)), Layout((130, 2048), mask=0.6)]  # several threads take these in panels


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_on_every_run_and_with_any_number_of_threads(device, dtype):
    for layout in DETERMINED:
        data = data_of(layout, dtype)
        expected = Run(device, data).train()
        for threads in (1, 2, 3, 7) if device.name == "cpu" else [None] * 5:
            assert_same_results(Run(device, data, threads=threads).train(), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_mean_that_is_large_beside_the_deviation(device, dtype):
    """No digits cancel: the results are as exact as for data around zero."""
    scale = {"float16": 1000, "bfloat16": 100, "float32": 1e5}[dtype]
    for layout in (Layout((4097, 3)), Layout((513, 64)), Layout((4, 6, 30, 31), 1)):
        data = Data(layout, dtype, mean=scale, deviation=1.0)
        results = Run(device, data).train()
        check(results, data.training, ("variance", "inverse"), data)
        check(results, data.training, ("y", "dgamma", "dbeta"), data, tolerance=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_channel(device, value):
    for layout in (Layout((600, 20)), Layout((300, 65)), Layout((3, 9, 11, 5), 1)):
        data = Data(layout, "float32")
        channel = 4
        places = np.moveaxis(data.x, layout.axis, 0)
        places[channel].reshape(-1)[:1] = value
        np.moveaxis(data.x, layout.axis, 0)[channel][(0,) * (data.x.ndim - 1)] = value
        clean = Data(layout, "float32")
        results, expected = Run(device, data).train(), Run(device, clean).train()
        for name in ("y", "dx"):
            found, wanted = (np.moveaxis(each[name], layout.axis, 0) for each in (results, expected))
            assert np.isnan(found[channel]).any(), name
            others = np.arange(len(found)) != channel
            assert_same_bits(found[others].copy(), wanted[others].copy())
        for name in ("mean", "variance", "inverse", "dgamma", "dbeta"):
            others = np.arange(len(results[name])) != channel
            assert_same_bits(results[name][others], expected[name][others])


def test_masked_places_have_no_influence(device):
    """Whatever masked places hold, the moments and the other places' outputs stay the same."""
    for layout in (Layout((513, 33), mask=0.5), Layout((300, 64), mask=0.9)):
        data, other = Data(layout, "float32"), Data(layout, "float32")
        other.x[~data.mask] = 1e30
        results, expected = Run(device, other).forward(), Run(device, data).forward()
        for name in ("mean", "rest", "variance", "inverse", "count"):
            assert_same_bits(results[name], expected[name])
        assert_same_bits(results["y"][data.mask], expected["y"][data.mask])


def test_a_constant_has_no_variance(device):
    data = Data(Layout((3000, 5)), "float32")
    data.x[...] = np.float32(1.1)
    results = Run(device, data).forward()
    assert (results["mean"] == np.float32(1.1)).all()
    assert not results["variance"].any()
    np.testing.assert_allclose(results["inverse"], EPSILON**-0.5)
    np.testing.assert_allclose(results["y"], np.broadcast_to(data.beta, data.x.shape), rtol=1e-6)


def test_instruction_sets_give_the_same_bits(kernels):
    class Host:
        name = "cpu"

        def __init__(self):
            self.kernels = kernels

        def put(self, array):
            return array.copy()

        def get(self, array):
            return array

    before = kernels.instruction_set()
    for dtype in TYPES:
        for layout in DETERMINED:
            found = []
            for name in kernels.instruction_sets():
                kernels.use_instruction_set(name)
                found.append(Run(Host(), data_of(layout, dtype)).train())
            for results in found[1:]:
                assert_same_results(results, found[0])
    kernels.use_instruction_set(before)


def test_a_workspace_that_is_given(cuda):
    data = data_of(Layout((4097, 64), mask=0.7), "float32")
    needed = cuda.kernels.batch_norm_workspace(cuda.put(data.x))
    assert needed > 0
    workspace = cuda.put(np.full(needed, 0xFF, np.uint8))
    assert_same_results(Run(cuda, data, workspace=workspace).train(), Run(cuda, data).train())
    with pytest.raises(ValueError, match=rf"workspace has {needed - 1} bytes; it must have at least {needed}"):
        Run(cuda, data, workspace=workspace[: needed - 1]).train()
