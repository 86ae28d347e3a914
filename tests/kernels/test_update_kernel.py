"""update() on a grid of rules, sizes, types, layouts, rows, instruction sets and thread counts, against NumPy."""

import dataclasses

import numpy as np
import pytest
from kernel_definitions import SLOTS, Settings, assert_same_bits, gradient_of, narrow, noise, step, values

# Sizes around packs, the runs of 256 values and the blocks of 8192 on a CPU, and the chunks of 256 threads on a GPU.
SIZES = [0, 1, 3, 4, 5, 17, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 3073, 8191, 8192, 8193, 65537]
LATEST = ["float16", "bfloat16", "float32"]


@dataclasses.dataclass
class Item:
    """One value and the arguments that belong to it. `offset` counts elements from its buffer's alignment."""

    size: int
    latest_dtype: str | None = None
    accumulated: bool = True
    decays: bool = True
    scale: float = 1.0
    shape: tuple[int, ...] | None = None
    touched: np.ndarray | None = None
    offset: int = 0


class Problem:
    """Random arrays on a device, and the results expected of an update."""

    def __init__(self, device, settings, items):
        self.device, self.settings, self.items = device, settings, items
        self.margin = 20 if any(item.offset for item in items) else 0
        slots = SLOTS[settings.rule]
        self.before = [[self.draw(i, item, seed) for seed in range(1 + slots)] for i, item in enumerate(items)]
        for arrays in self.before:
            for variance in arrays[2:]:
                np.abs(variance, out=variance)
        self.sums = [self.draw(i, item, 7) if item.accumulated else None for i, item in enumerate(items)]
        self.latest = [
            narrow(self.draw(i, item, 8), item.latest_dtype) if item.latest_dtype else None
            for i, item in enumerate(items)
        ]

    def draw(self, i, item, seed):
        numbers = noise(item.size + self.margin, 100 * (i % 5) + seed).astype(np.float32)
        numbers[2:3] = -0.0
        return numbers

    def view(self, buffer, item):
        if buffer is None:
            return None
        view = buffer[item.offset : item.offset + item.size] if self.margin else buffer
        return view if item.shape is None else view.reshape(item.shape)

    def put(self, arrays):
        return [None if array is None else self.device.put(array.copy()) for array in arrays]

    def views(self, buffers):
        return [self.view(buffer, item) for buffer, item in zip(buffers, self.items, strict=True)]

    def run(self, **options):
        """Makes one call. Returns for each item what its value's and its slots' buffers hold afterwards."""
        targets = [self.put(arrays) for arrays in zip(*self.before, strict=True)]
        targets = targets or [[] for _ in range(1 + SLOTS[self.settings.rule])]
        flags = self.put([item.touched for item in self.items])
        sums, latest = self.put(self.sums), self.put(self.latest)
        arguments = {
            "scales": self.device.put(np.array([item.scale for item in self.items], np.float32)),
            "decays": [item.decays for item in self.items],
            "accumulators": self.views(sums),
            "latest": self.views(latest),
            "touched_rows": flags,
            **self.settings.keywords(),
            **options,
        }
        self.device.kernels.update(
            self.settings.rule, self.views(targets[0]), [self.views(each) for each in targets[1:]], **arguments
        )
        for given, now in ((self.sums, sums), (self.latest, latest)):
            for then, array in zip(given, now, strict=True):
                assert then is None or np.array_equal(self.device.get(array), then, equal_nan=then.dtype.kind == "f")
        return [[self.device.get(buffer) for buffer in each] for each in zip(*targets, strict=True)]

    def expected(self, dtype=np.float32):
        """Returns the same as run(), computed by the definition."""
        results = []
        for item, before, total, latest in zip(self.items, self.before, self.sums, self.latest, strict=True):
            inside = slice(item.offset, item.offset + item.size) if self.margin else slice(None)
            total, latest = (None if each is None else each[inside] for each in (total, latest))
            with np.errstate(all="ignore"):
                gradient = gradient_of(self.settings, total, latest, item.scale, dtype)
                value, slots = step(
                    self.settings,
                    before[0][inside],
                    gradient,
                    [slot[inside] for slot in before[1:]],
                    decays=item.decays,
                    dtype=dtype,
                )
            after = [array.astype(dtype) for array in before]
            touched = np.ones(item.size, np.bool_)
            if item.touched is not None and item.size:
                touched = np.repeat(item.touched, item.size // len(item.touched))
            for buffer, new in zip(after, (value, *slots), strict=True):
                buffer[inside] = np.where(touched, new, buffer[inside])
            results.append(after)
        return results

    def check(self, **options):
        for i, (actual, expected) in enumerate(zip(self.run(**options), self.expected(), strict=True)):
            for name, found, wanted in zip(("value", "m", "v", "w"), actual, expected, strict=False):
                try:
                    assert_same_bits(found, wanted)
                except AssertionError as error:
                    raise AssertionError(f"{name} of item {i}, {self.items[i]}: {error}") from None


def thread_counts(device):
    return (1, 2, 3, 7) if device.name == "cpu" else (None,)


def mixed(sizes):
    """Makes items that go through all forms of a gradient."""
    ways = [(True, None), (True, "float32"), (False, "float32"), (True, "bfloat16"), (False, "float16")]
    return [
        Item(size, ways[i % 5][1], ways[i % 5][0], decays=i % 3 != 0, scale=1 / (i % 7 + 1))
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("clip", [0.0, 0.3], ids=["free", "clipped"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("rule", SLOTS)
def test_every_rule_and_size_equals_numpy(device, rule, overwrite, clip):
    settings = Settings(rule, decay=0.1, weight=3.0, overwrite=overwrite, clip=clip)
    # The shift gives the sizes other forms of the gradient in other cases.
    shift = overwrite + 2 * bool(clip)
    Problem(device, settings, mixed([*SIZES[shift:], *SIZES[:shift]])).check()


@pytest.mark.parametrize("iterations", [0, 1, 2, 998, 10**6, 2**40])
@pytest.mark.parametrize("rule", ["adam", "amsgrad"])
def test_the_rate_is_corrected_for_the_bias_of_the_slots(device, rule, iterations):
    items = [Item(size, "float32") for size in (1, 555)]
    Problem(device, Settings(rule, iterations=iterations, decay=0.1, beta_2=0.999), items).check()


@pytest.mark.parametrize("latest", LATEST)
@pytest.mark.parametrize("accumulated", [False, True], ids=["latest alone", "both"])
@pytest.mark.parametrize("rule", SLOTS)
def test_latest_gradients_of_every_type(device, rule, accumulated, latest):
    items = [Item(size, latest, accumulated) for size in (1, 4, 555, 4096, 9001)]
    Problem(device, Settings(rule, weight=0.7, decay=0.01), items).check()


@pytest.mark.parametrize("rule", SLOTS)
def test_views_at_any_offset_leave_their_neighbours_alone(device, rule):
    items = [
        Item(size, latest, offset=offset, touched=touched)
        for offset in range(1, 9)
        for size, latest in ((1, None), (17, "float32"), (64, "float16"), (555, "bfloat16"))
        for touched in (None, np.arange(size) % 3 == 0)
    ]
    Problem(device, Settings(rule, decay=0.1), items).check()


LISTS = {
    "none": [],
    "one": [5],
    "a small table": [3] * 43,
    "one more than a small table": [3] * 44,
    "a large table": [5] * 352,
    "one more than a large table": [5] * 353,
    "empty ones between": [0, 65537, 0, 0, 1, 0, 555, 0],
    "one huge beside 300 tiny": [7] * 150 + [1_000_003] + [5] * 150,
}


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS.keys())
@pytest.mark.some_by_default(18)
def test_lists_of_any_length_with_any_number_of_threads(device, sizes, rule):
    problem = Problem(device, Settings(rule, decay=0.1), mixed(sizes))
    for threads in thread_counts(device):
        problem.check(threads=threads)


def rows(shape, touched, latest=None, **options):
    return Item(int(np.prod(shape)), latest, shape=shape, touched=touched, **options)


@pytest.mark.parametrize("rule", SLOTS)
@pytest.mark.some_by_default(9)
def test_rows_without_a_flag_stay_as_they_are(device, rule):
    rng = np.random.default_rng(0)
    items = []
    for count, columns in [(1, 1), (1000, 1), (700, 3), (300, 4), (129, 64), (40, 257), (9, 5000), (3, 20000), (0, 5)]:
        for share in (0, 0.02, 0.5, 1):
            touched = rng.random(count) < share
            items.append(rows((count, columns), touched, (None, *LATEST)[len(items) % 4], decays=len(items) % 2 == 0))
    items += [rows((7, 2, 3), np.arange(7) % 2 == 1), rows((5,), np.arange(5) > 2), rows((4, 0), np.ones(4, np.bool_))]
    problem = Problem(device, Settings(rule, decay=0.1, weight=0.5), items)
    for threads in thread_counts(device):
        problem.check(threads=threads)


@pytest.mark.parametrize("rule", SLOTS)
def test_what_is_not_finite_stays_where_it_is(device, rule):
    for clip in (0.0, 2.0):
        problem = Problem(device, Settings(rule, clip=clip, decay=0.1), [Item(600), Item(600, "bfloat16")])
        problem.sums[0][[0, 77, 300, 599]] = np.nan, np.inf, -np.inf, np.nan
        problem.latest[1][[5, 256]] = 0x7FC0, 0x7F80
        for arrays in problem.before:
            for i, array in enumerate(arrays):
                array[100 + i], array[200 + i] = np.nan, np.inf
        problem.check()
        value = problem.run()[0][0]
        assert np.isnan(value[[0, 599]]).all(), "NaN must not be lost"
        assert np.isfinite(value[[1, 76, 78, 299, 301, 598]]).all(), "neighbours must not change"


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("rule", SLOTS)
def test_latest_gradients_of_weight_0_count_as_nothing_whatever_they_are(device, rule, overwrite):
    items = [
        Item(size, latest, accumulated) for size in (17, 9001) for latest in LATEST for accumulated in (True, False)
    ]
    for weight in (0.0, -0.0):
        problem = Problem(device, Settings(rule, weight=weight, overwrite=overwrite, decay=0.1), items)
        for latest in problem.latest:
            latest[::3], latest[1::3] = (0x7FC0, 0x7F80) if latest.dtype == np.uint16 else (np.nan, np.inf)
        problem.check()
        assert all(np.isfinite(array).all() for arrays in problem.run() for array in arrays)


def test_overwritten_accumulators_are_not_read(device):
    problem = Problem(device, Settings("adam", overwrite=True), [Item(999, "float32"), Item(5000)])
    for total in problem.sums:
        total[:] = np.nan
    problem.check()
    assert all(np.isfinite(array).all() for arrays in problem.run() for array in arrays)


@pytest.mark.parametrize("scales", [0.25, np.float32(0.25), np.array(0.25), np.array([0.25], np.float32)], ids=repr)
def test_one_scale_for_all(device, scales):
    if isinstance(scales, np.ndarray) and scales.ndim:
        scales = device.put(scales)
    problem = Problem(device, Settings("momentum"), [Item(17, scale=0.25), Item(555, scale=0.25)])
    problem.check(scales=scales)


@pytest.mark.parametrize("rule", SLOTS)
def test_a_step_that_does_not_apply_writes_nothing(device, rule):
    items = [Item(9000, "float32"), Item(17), Item(0), Item(60, shape=(10, 6), touched=np.arange(10) % 3 == 0)]
    problem = Problem(device, Settings(rule, decay=0.1, weight=3.0, applies=False), items)
    for buffers, before in zip(problem.run(), problem.before, strict=True):
        for buffer, old in zip(buffers, before, strict=True):
            assert_same_bits(buffer, old)


def test_by_default_all_decay_and_nothing_else_is_done(device):
    x, g = values("float32", 333, 1), values("float32", 333, 2)
    value = device.put(x.copy())
    device.kernels.update("sgd", [value], accumulators=[device.put(g)], rate=0.5, decay=0.25)
    assert_same_bits(device.get(value), x - x * np.float32(0.25) - np.float32(0.5) * g)


@pytest.mark.parametrize("rule", SLOTS)
def test_many_steps_are_close_to_float64(device, rule):
    settings = Settings(rule, rate=2.0**-7, decay=2.0**-10, epsilon=1e-3)
    size, steps = 10_007, 20
    exact = [noise(size, 1), *(np.zeros(size) for _ in range(SLOTS[rule]))]
    exact[0] = exact[0].astype(np.float32).astype(np.float64)
    arrays = [device.put(array.astype(np.float32)) for array in exact]
    for i in range(steps):
        total = values("float32", size, 10 + i)
        gradient = gradient_of(settings, total, None, 0.25, np.float64)
        value, slots = step(settings, exact[0], gradient, exact[1:], dtype=np.float64)
        exact = [value, *slots]
        device.kernels.update(
            rule, arrays[:1], [[slot] for slot in arrays[1:]], accumulators=[device.put(total)], scales=0.25,
            **settings.keywords(),
        )  # fmt: skip
    wrong = ~np.isclose(device.get(arrays[0]), exact[0], rtol=1e-5, atol=3e-6)
    # Where rounding alone decides the direction, Lion's sign may differ.
    assert wrong.mean() < (1e-3 if rule == "lion" else 1e-9)


def test_scalars_in_device_memory(cuda):
    scalars = {"scales": 0.25, "rate": 0.1, "decay": 0.01, "weight": 3.0}
    problem = Problem(cuda, Settings("adam", rate=0.1, decay=0.01, weight=3.0), [Item(555, "float32", scale=0.25)])
    on_device = {name: cuda.put(np.array([value], np.float32)) for name, value in scalars.items()}
    flags = {"overwrite": False, "applies": True}
    on_device |= {name: cuda.put(np.array(value)) for name, value in flags.items()}
    for names in ([], ["rate"], ["scales", "overwrite"], ["applies"], list(on_device)):
        problem.check(**{name: on_device[name] if name in names else (scalars | flags)[name] for name in on_device})


def test_a_graph_takes_device_scalars_only(cuda):
    cupy = cuda.cupy
    value, total = cupy.zeros(99, cupy.float32), cupy.ones(99, cupy.float32)
    one, zero, no = cupy.ones(1, cupy.float32), cupy.zeros(1, cupy.float32), cupy.zeros(1, cupy.bool_)
    stream = cupy.cuda.Stream(non_blocking=True)
    flags = {"overwrite": no, "applies": cupy.ones(1, cupy.bool_)}
    scalars = {"scales": one, "rate": one, "decay": zero, "weight": one, **flags, "stream": stream.ptr}
    with stream:
        cuda.kernels.update("sgd", [cupy.zeros_like(total)], accumulators=[total], **scalars)  # loads the kernel
        stream.synchronize()
        stream.begin_capture()
        with pytest.raises(ValueError, match="must be device arrays while the stream is captured"):
            cuda.kernels.update("sgd", [value], accumulators=[total], **{**scalars, "rate": 1.0})
        cuda.kernels.update("sgd", [value], accumulators=[total], **scalars)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    assert (cupy.asnumpy(value) == -3).all()
