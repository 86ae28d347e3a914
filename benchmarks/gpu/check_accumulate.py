"""Compares accumulate() and accumulate_rows() with NumPy bit for bit, in small, awkward cases."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from checker import Arena, Checker
from kernel_definitions import narrow, wide, widen

PAIRS = [
    (accumulator, gradient)
    for accumulator in ("float32", "float64")
    for gradient in ("float16", "bfloat16", "float32", "float64")
    if (accumulator, gradient) != ("float32", "float64")
]
# Sizes around a pack, a chunk of float64 (2048), a chunk of float32 (4096) and many chunks.
SIZES = [0, 1, 3, 17, 2047, 2048, 2049, 4095, 4096, 4097, 65537]
VIEWS = [(accumulator, gradient) for accumulator in range(4) for gradient in range(4)]
# Numbers of tensors around the capacities of the tensor tables, and more than two of the largest table hold.
COUNTS = [1, 136, 137, 416, 417, 1120, 1121, 2300]
SCALE = 1 / 3


@dataclass(frozen=True)
class Tensor:
    """One accumulator and its gradient. Offsets count elements from an alignment of 16 bytes."""

    pair: tuple[str, str]
    size: int
    accumulator_offset: int = 0
    gradient_offset: int = 0


class AccumulateChecker:
    """Makes the calls, and reports their results to a checker."""

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        self.device, self.rng, self.expect = checker.device, checker.rng, checker.expect

    def scalars(self, overwrite: bool) -> tuple[float, dict[str, Any]]:
        """Returns scale and overwrite: as arrays of each type that the kernel reads, every fifth time as numbers."""
        self.checker.calls += 1
        if self.checker.calls % 5 == 0:
            return SCALE, {"scale": SCALE, "overwrite": overwrite}
        dtype = ("float32", "float64")[self.checker.calls % 2]
        scalar = self.device.scalar
        arguments = {"scale": scalar(SCALE, dtype), "overwrite": scalar(overwrite, np.bool_)}
        return float(np.dtype(dtype).type(SCALE)), arguments

    def dense(self, name: str, tensors: list[Tensor], *, overwrite: bool, together: bool = False) -> None:
        """Checks one call of accumulate(). Every third call has an Inf in the last gradient."""
        plant = self.checker.calls % 3 == 0 and tensors[-1].size > 0
        scale, scalars = self.scalars(overwrite)
        groups = []
        for group in [tensors] if together else [[tensor] for tensor in tensors]:
            gradients = [self.checker.numbers(t.pair[1], t.size) for t in group]
            if plant and group[-1] is tensors[-1]:
                gradients[-1][-1:] = narrow(np.array([np.inf]), group[-1].pair[1])
            # Accumulators to overwrite hold NaN, so that any use of it shows.
            fill = [self.rng.standard_normal(t.size) if not overwrite else np.full(t.size, np.nan) for t in group]
            accumulators = [values.astype(t.pair[0]) for values, t in zip(fill, group, strict=True)]
            groups.append(
                (
                    Arena(accumulators, [t.accumulator_offset for t in group]),
                    Arena(gradients, [t.gradient_offset for t in group]),
                )
            )
        buffers = [(self.device.put(a.bytes), self.device.put(g.bytes)) for a, g in groups]
        all_finite = self.device.put(np.ones(1, np.bool_))
        norms = self.device.put(np.zeros([2, len(tensors)])) if self.checker.calls % 2 else None
        self.device.kernels.accumulate(
            [view for (a, _), (buffer, _) in zip(groups, buffers, strict=True) for view in a.views(buffer)],
            [view for (_, g), (_, buffer) in zip(groups, buffers, strict=True) for view in g.views(buffer)],
            all_finite=all_finite,
            squared_norms=norms,
            stream=self.device.stream(),
            **scalars,
        )
        same = True
        squares: list[list[float]] = [[], []]
        for (a, g), (buffer, _) in zip(groups, buffers, strict=True):
            for accumulator, gradient in zip(a.views(a.bytes), g.views(g.bytes), strict=True):
                product = accumulator.dtype.type(scale) * widen(gradient, accumulator.dtype)
                accumulator[:] = product if overwrite else accumulator + product
                for each, values in zip(squares, (gradient, accumulator), strict=True):
                    each.append(float(np.sum(wide(values) ** 2)))
            same &= np.array_equal(self.device.get(buffer), a.bytes)
        self.expect(f"{name}, overwrite={overwrite}: values", same)
        self.expect(f"{name}, overwrite={overwrite}: all_finite", self.device.get(all_finite)[0] != plant)
        if norms is not None:
            close = np.allclose(self.device.get(norms), squares, rtol=2e-6, atol=0)
            self.expect(f"{name}, overwrite={overwrite}: squared_norms", close)

    def rows(self, name: str, pair: tuple[str, str], shape: tuple[int, int], indices: np.ndarray, *, overwrite: bool,
             touched: bool, offset: int) -> None:  # fmt: skip
        """Checks one call of accumulate_rows()."""
        rows, columns = shape
        scale, scalars = self.scalars(overwrite)
        in_range = (indices >= 0) & (indices < rows)
        if self.device.name == "cpu":  # on a CPU an index out of range is an error
            indices, in_range = indices[in_range], in_range[in_range]
        flags = self.rng.random(rows) < 0.3
        accumulator = self.rng.standard_normal(shape).astype(pair[0])
        if touched:
            accumulator[~flags] = 0
        values = self.checker.numbers(pair[1], len(indices) * columns).reshape(-1, columns)
        target = Arena([accumulator.ravel()], [offset])
        source = Arena([values.ravel()], [offset])
        buffer, marks = self.device.put(target.bytes), self.device.put(flags)
        all_finite = self.device.put(np.ones(1, np.bool_))
        self.device.kernels.accumulate_rows(
            target.views(buffer)[0].reshape(shape),
            source.views(self.device.put(source.bytes))[0].reshape(values.shape),
            self.device.put(indices),
            touched_rows=marks if touched else None,
            all_finite=all_finite,
            stream=self.device.stream(),
            **scalars,
        )
        expected = target.views(target.bytes)[0].reshape(shape)
        if overwrite:
            expected[flags if touched else slice(None)] = 0
        products = expected.dtype.type(scale) * widen(values, expected.dtype)
        np.add.at(expected, indices[in_range], products[in_range])  # adds one row after another
        if touched:
            flags &= not overwrite
            flags[indices[in_range]] = True
        name = f"{name}, {'+'.join(pair)}, overwrite={overwrite}, touched={touched}"
        self.expect(f"{name}: values", np.array_equal(self.device.get(buffer), target.bytes))
        self.expect(f"{name}: flags", np.array_equal(self.device.get(marks), flags))
        self.expect(f"{name}: all_finite", bool(self.device.get(all_finite)[0]))


def check_dense(checker: AccumulateChecker) -> None:
    """Checks accumulate(): sizes, types, alignments, and lists of any length."""
    some = checker.checker.some
    for overwrite in (False, True):
        for pair in some(PAIRS, PAIRS, PAIRS[1:2]):
            sizes = some(SIZES, SIZES, [0, 3, 4097])
            checker.dense(f"sizes, {'+'.join(pair)}", [Tensor(pair, size) for size in sizes], overwrite=overwrite)
            offsets = some(VIEWS, VIEWS, VIEWS[::5])
            views = [Tensor(pair, size, a, g) for a, g in offsets for size in (1, 17, 300, 4097)]
            checker.dense(f"views, {'+'.join(pair)}", views, overwrite=overwrite)
        for count in some(COUNTS, [137, 417, 1121], []):
            tensors = [Tensor(PAIRS[i % 7], (5, 1, 4, 17, 3)[i % 5], i % 3, i % 4) for i in range(count)]
            tensors[count // 2] = Tensor(("float32", "bfloat16"), 65537, 1, 1)
            checker.dense(f"a list of {count}", tensors, overwrite=overwrite, together=True)


def row_cases(checker: Checker) -> Iterator[tuple[str, tuple[int, int], np.ndarray]]:
    """Yields the name of a case, the accumulator's shape and the indices."""
    rng = checker.rng
    yield "no rows", (40, 17), np.zeros(0, np.int64)
    yield "duplicates", (50, 65), rng.integers(0, 50, 700).astype(np.int32)
    yield "one column", (7, 1), rng.integers(0, 7, 200)
    for dtype in (np.int32, np.int64):
        indices = rng.integers(-9, 59, 300).astype(dtype)
        indices[[0, 150, 299]] = np.iinfo(dtype).min, np.iinfo(dtype).max, -1
        yield f"out of range, {dtype.__name__}", (50, 64), indices
    # More entries of one row than a block lists at once.
    hot, columns = checker.some((15000, 36), (8200, 36), (4500, 12))
    yield "hot row", (300, columns), np.where(rng.random(hot) < 0.8, 123, rng.integers(0, 300, hot)).astype(np.int32)


def check_rows(checker: AccumulateChecker) -> None:
    """Checks accumulate_rows(): duplicates, a hot row, indices out of range, touched rows."""
    some = checker.checker.some
    offset = 0
    modes = [(False, False), (False, True), (True, False), (True, True)]
    for name, shape, indices in row_cases(checker.checker):
        pairs = PAIRS if len(indices) < 4000 else PAIRS[1:4:2]
        for pair in some(pairs, pairs[offset::4], pairs[1:2]):
            for overwrite, touched in some(modes, modes[offset::2], modes[3:]):
                checker.rows(name, pair, shape, indices, overwrite=overwrite, touched=touched, offset=offset)
            offset ^= 1


def check(checker: Checker) -> None:
    """Runs all checks of this file."""
    check_dense(AccumulateChecker(checker))
    check_rows(AccumulateChecker(checker))
