"""Compares update(), squared_norms() and clip_units() with NumPy, in small, awkward cases."""

import dataclasses
from typing import Any

import numpy as np
from backend import Host
from checker import Checker, Placed
from kernel_definitions import SLOTS, Settings, clipped_units, gradient_of, step, wide

# Sizes around packs and the chunks of rules with 4, 8 and 12 values a thread.
SIZES = [0, 1, 3, 17, 1023, 1024, 1025, 2047, 2048, 2049, 3073, 4097]
# Numbers of tensors around the capacities of the tensor tables, and more than two of the largest table hold.
UPDATE_COUNTS = [1, 43, 44, 352, 353, 750]
NORM_COUNTS = [1, 160, 161, 416, 417, 500, 501, 1280, 1281, 2600]
# Sizes around packs and chunks of 32 KB.
NORM_SIZES = [0, 1, 7, 8, 9, 555, 4095, 4096, 4097, 8193, 16385, 33000]
# Numbers of tensors around the capacities of the tables, and shapes around tiles of 256 units and 16384 values.
CLIP_COUNTS = [1, 56, 57, 448, 449]
CLIP_SHAPES = [(), (1,), (40000,), (5, 3), (300, 17), (0, 4), (4, 0), (129, 256), (65, 257), (3, 3, 16, 32), (2, 600)]
TYPES = ["float16", "bfloat16", "float32", "float64"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One value of an update, and the form of its gradient. `offset` counts elements from an alignment of 16 bytes."""

    shape: tuple[int, ...]
    latest: str | None
    accumulated: bool
    rows: bool
    offset: int


def item(i: int, shape: tuple[int, ...], rows: bool = False) -> Item:
    """Returns the i-th item. Successive items go through the forms of a gradient and the offsets."""
    latest = (None, "float32", "bfloat16", "float16")[i % 4]
    return Item(shape, latest, latest is None or i % 3 != 0, rows, i % 5 % 4)


def update(checker: Checker, name: str, settings: Settings, items: list[Item], *, together: bool = False) -> None:
    """Checks one call of update(). Scalars are numbers in one call and device arrays in the next."""
    checker.calls += 1
    device, rng = checker.device, checker.rng
    arrays = 1 + SLOTS[settings.rule]
    offsets = [each.offset for each in items]
    scales = rng.uniform(0.1, 1, len(items)).astype(np.float32)
    decays = [i % 2 == 0 for i in range(len(items))]
    sizes = [int(np.prod(each.shape)) for each in items]
    before = [[rng.standard_normal(size).astype(np.float32) for size in sizes] for _ in range(arrays)]
    before[2:] = [[np.abs(array) for array in each] for each in before[2:]]
    sums = [
        checker.numbers("float32", size) if each.accumulated else None for each, size in zip(items, sizes, strict=True)
    ]
    latest = [
        checker.numbers(each.latest, size) if each.latest else None for each, size in zip(items, sizes, strict=True)
    ]
    flags = [rng.random(each.shape[0]) < 0.5 if each.rows else None for each in items]

    placed = [Placed(device, each, offsets, together) for each in before]
    views = [shaped(each.views(), items) for each in placed]
    keywords: dict[str, Any] = {
        **settings.keywords(),
        "accumulators": shaped(place_some(device, sums, offsets, together), items),
        "latest": shaped(place_some(device, latest, offsets, together), items),
        "touched_rows": [None if each is None else device.put(each) for each in flags],
        "scales": device.put(scales),
        "decays": decays,
        "stream": device.stream(),
    }
    if checker.calls % 2:
        for key in ("rate", "decay", "weight"):
            keywords[key] = device.scalar(keywords[key], np.float32)
        for key in ("overwrite", "applies"):
            keywords[key] = device.scalar(keywords[key], np.bool_)
        if settings.iterations is not None:
            keywords["iterations"] = device.scalar(settings.iterations, np.int64)
    device.kernels.update(settings.rule, views[0], views[1:], **keywords)

    after: list[list[np.ndarray]] = [[] for _ in range(arrays)]
    for i, old in enumerate(zip(*before, strict=True)):
        gradient = gradient_of(settings, sums[i], latest[i], scales[i])
        value, slots = step(settings, old[0], gradient, old[1:], decays=decays[i])
        rows = flags[i]
        inside = np.repeat(rows, sizes[i] // len(rows)) if rows is not None and sizes[i] else True
        for k, new in enumerate((value, *slots)):
            after[k].append(np.where(inside, new, old[k]))
    for each, expected, what in zip(placed, after, ("values", "m", "v", "w"), strict=False):
        checker.expect(f"update, {name}, {settings}: {what}", each.hold(expected))


def shaped(arrays: list[Any], items: list[Item]) -> list[Any]:
    """Returns the arrays in the shapes of the values."""
    return [None if array is None else array.reshape(each.shape) for array, each in zip(arrays, items, strict=True)]


def place_some(device: Host, arrays: list[np.ndarray | None], offsets: list[int], together: bool) -> list[Any]:
    """Places the arrays that are not None on the device, and returns views of them."""
    there = [(array, offset) for array, offset in zip(arrays, offsets, strict=True) if array is not None]
    views = iter(Placed(device, [array for array, _ in there], [offset for _, offset in there], together).views())
    return [None if array is None else next(views) for array in arrays]


def norms(checker: Checker, name: str, arrays: list[np.ndarray], offset: int, *, together: bool = False) -> None:
    """Checks one call of squared_norms(). Every second call gets a workspace; the others make their own."""
    checker.calls += 1
    device = checker.device
    views = Placed(device, arrays, [offset] * len(arrays), together).views()
    sums = device.empty(len(arrays), np.float64)
    device.poison(sums)
    needed = device.kernels.squared_norms_workspace(views)
    workspace = device.empty(needed, np.uint8) if needed and checker.calls % 2 else None
    device.kernels.squared_norms(views, sums, workspace=workspace, stream=device.stream())
    expected = [float(np.sum(wide(array) ** 2)) for array in arrays]
    close = np.allclose(device.get(sums), expected, rtol=1e-13, atol=0)
    checker.expect(f"norms, {name}, offset {offset}", close)


def clip(checker: Checker, name: str, shapes: list[tuple[int, ...]], offset: int, *, together: bool = False) -> None:
    """Checks one call of clip_units(). Every second call gets a workspace; the others make their own."""
    checker.calls += 1
    device, rng = checker.device, checker.rng
    offsets = [offset] * len(shapes)
    sizes = [int(np.prod(shape)) for shape in shapes]
    gradients, weights = ([checker.numbers("float32", size) for size in sizes] for _ in range(2))
    for gradient in gradients:
        gradient *= np.float32(np.exp(rng.uniform(-4, 2)))
    outputs = Placed(device, [np.full(size, np.nan, np.float32) for size in sizes], offsets, together)
    views = [Placed(device, each, offsets, together).views() for each in (gradients, weights)] + [outputs.views()]
    arrays = [[view.reshape(shape) for view, shape in zip(each, shapes, strict=True)] for each in views]
    needed = device.kernels.clip_units_workspace(arrays[0])
    workspace = device.empty(needed, np.uint8) if needed and checker.calls % 2 else None
    settings = {"clip_factor": 0.25, "epsilon": 1e-3}
    device.kernels.clip_units(*arrays, **settings, workspace=workspace, stream=device.stream())
    found = [np.array(device.get(view)) for view in arrays[2]]
    expected = [
        clipped_units(gradient.reshape(shape), weight.reshape(shape), **settings)
        for gradient, weight, shape in zip(gradients, weights, shapes, strict=True)
    ]
    close = all(np.allclose(*each, rtol=3e-7, atol=2e-45) for each in zip(found, expected, strict=True))
    checker.expect(f"clipping, {name}, offset {offset}", close)
    checker.expect(f"clipping, {name}: writes beside", outputs.hold([each.ravel() for each in found]))


def check(checker: Checker) -> None:
    """Runs all checks of this file."""
    for rule in checker.some([*SLOTS], [*SLOTS], ["adam"]):
        items = [item(i, (size,)) for i, size in enumerate(2 * SIZES)]
        update(checker, "sizes", Settings(rule, decay=0.1, weight=0.7), items)
        update(checker, "sizes", Settings(rule, decay=0.1, overwrite=True, clip=0.3), items[::-1])
        update(checker, "does not apply", Settings(rule, decay=0.1, weight=0.7, applies=False), items)
        rows = [(1, 1), (700, 3), (300, 4), (129, 64), (40, 257), (3, 5000), (0, 5), (4, 0)]
        items = [item(i, shape, rows=True) for i, shape in enumerate(2 * rows + rows)]
        update(checker, "rows", Settings(rule, decay=0.1), items)
    items = [item(i, (size,)) for i, size in enumerate(SIZES[:4])]
    for iterations in (0, 2, 10**6):
        for rule in ("adam", "amsgrad"):
            update(checker, "corrected rate", Settings(rule, iterations=iterations), items)
    for count in checker.some(UPDATE_COUNTS, [44, 353], []):
        items = [item(i, ((5, 1, 4, 17, 3)[i % 5],)) for i in range(count)]
        items[count // 2] = item(1, (65537,))
        update(checker, f"a list of {count}", Settings("adam"), items, together=True)
    for dtype in checker.some(TYPES, TYPES, ["bfloat16"]):
        for offset in checker.some([0, 1, 3], [0, 1, 3], [1]):
            norms(checker, f"sizes, {dtype}", [checker.numbers(dtype, size) for size in NORM_SIZES], offset)
    for count in checker.some(NORM_COUNTS, [161, 501, 1281], []):
        arrays = [checker.numbers(TYPES[i % 4], (5, 1, 4, 17, 3)[i % 5]) for i in range(count)]
        arrays[count // 2] = checker.numbers("bfloat16", 65537)
        norms(checker, f"a list of {count}", arrays, 0, together=True)
    for offset in checker.some([0, 1, 3], [0, 3], [1]):
        clip(checker, "shapes", CLIP_SHAPES, offset)
    for count in checker.some(CLIP_COUNTS, [57, 449], []):
        clip(checker, f"a list of {count}", [((5,), (3, 2), (2, 3, 4))[i % 3] for i in range(count)], 0, together=True)
