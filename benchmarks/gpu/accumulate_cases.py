"""The timed cases of accumulate() and accumulate_rows()."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from bench import (
    Bench,
    Calls,
    Case,
    Pattern,
    WrongResultError,
    lay_out,
    require_same_bits,
    shrink_sizes,
    verify_tensors,
)
from kernel_definitions import widen
from model_sizes import gpt2_xl_sizes, resnet50_sizes

SCALE = 0.3


def scalars(bench: Bench, overwrite: bool, check_finite: bool = False) -> dict[str, Any]:
    """Returns a call's arguments other than the arrays, in a form for which the module copies and launches nothing."""
    return {
        "scale": bench.device.scalar(SCALE, np.float32),
        "overwrite": bench.device.scalar(overwrite, np.bool_),
        "all_finite": bench.device.put(np.ones(1, np.bool_)) if check_finite else None,
        "stream": bench.device.stream(),
    }


@dataclasses.dataclass(frozen=True)
class Dense:
    """A case of accumulate() with float32 accumulators of these sizes."""

    name: str
    sizes: list[int]
    gradient: str = "float32"
    overwrite: bool = False
    check_finite: bool = False
    rotate: bool = True  # False: each call uses the same buffers, which then are in the L2 cache
    share: float | None = None  # the share of a copy's speed to reach
    microseconds: float | None = None  # the time to stay below

    def shrink(self) -> "Dense":
        """Returns a thousandth of the case."""
        return dataclasses.replace(self, sizes=shrink_sizes(self.sizes))

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        spans, total = lay_out(self.sizes)
        sums, numbers = bench.pattern(1, "float32"), bench.pattern(2, self.gradient)
        value_bytes = (4 if self.overwrite else 8) + numbers.host.itemsize
        footprint = total * (4 + numbers.host.itemsize)
        count = bench.sets(footprint) if self.rotate else 1
        bench.require_memory(count * footprint)
        calls: Calls = []
        for i in range(count):
            accumulator, gradient = sums.array(total), numbers.array(total)
            if self.overwrite:
                bench.device.poison(accumulator)
            arguments = scalars(bench, self.overwrite, self.check_finite)
            accumulators = [accumulator[begin:end] for begin, end in spans]
            gradients = [gradient[begin:end] for begin, end in spans]

            def call(accumulators=accumulators, gradients=gradients, arguments=arguments) -> None:
                bench.device.kernels.accumulate(accumulators, gradients, **arguments)

            call()
            if i in (0, count - 1):
                self._verify(bench, accumulator, spans, sums, numbers)
                if self.check_finite and not bench.device.get(arguments["all_finite"])[0]:
                    raise WrongResultError("all_finite became false")
            calls.append(call)
        return calls, sum(self.sizes) * value_bytes

    def _verify(self, bench: Bench, accumulator: Any, spans: list[tuple[int, int]], sums: Pattern,
                numbers: Pattern) -> None:  # fmt: skip
        def before(where: np.ndarray) -> np.ndarray:
            return np.full(where.size, 0xFFFFFFFF, np.uint32).view(np.float32) if self.overwrite else sums.at(where)

        def after(_: int, where: np.ndarray) -> np.ndarray:
            product = np.float32(SCALE) * widen(numbers.at(where), np.float32)
            return product if self.overwrite else before(where) + product

        verify_tensors(bench.device, accumulator, spans, before, after)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A case of accumulate_rows() into float32. With `touched` a call overwrites the rows that the last one touched."""

    name: str
    shape: tuple[int, int]
    count: int
    choose: Callable[[np.random.Generator, int, int], np.ndarray]  # makes `count` indices of these rows
    touched: bool = False
    share: float | None = None
    microseconds: float | None = None

    def shrink(self) -> "Rows":
        """Returns the case with a hundredth of the rows and a thousandth of the added values."""
        rows, columns = self.shape
        return dataclasses.replace(self, shape=(rows // 100, columns), count=self.count // 1000)

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        rows, columns = self.shape
        indices = self.choose(np.random.default_rng(3), rows, self.count).astype(np.int32)
        sums, numbers = bench.pattern(1, "float32"), bench.pattern(2, "float32")
        used = len(np.unique(indices)) * columns * 4
        value_bytes = self.count * columns * 4
        must_move = value_bytes + indices.nbytes + (used + rows if self.touched else 2 * used)
        count = bench.sets(value_bytes + used)
        bench.require_memory(count * (value_bytes + 4 * rows * columns))
        calls: Calls = []
        for i in range(count):
            accumulator = sums.array(rows * columns).reshape(self.shape)
            touched = None
            if self.touched:
                accumulator = bench.device.put(np.zeros(self.shape, np.float32))
                touched = bench.device.put(np.zeros(rows, np.bool_))
            values = numbers.array(self.count * columns).reshape(self.count, columns)
            positions = bench.device.put(indices)
            arguments = scalars(bench, self.touched)

            def call(arrays=(accumulator, values, positions), touched=touched, arguments=arguments) -> None:
                bench.device.kernels.accumulate_rows(*arrays, touched_rows=touched, **arguments)

            call()
            if self.touched:
                call()  # overwrites the rows that the first call touched
            if i in (0, count - 1):
                self._verify(bench, accumulator, indices, sums, numbers)
            calls.append(call)
        return calls, must_move

    def _verify(self, bench: Bench, accumulator: Any, indices: np.ndarray, sums: Pattern, numbers: Pattern) -> None:
        """Compares the most frequent rows, some others, and some that have no index."""
        frequency = np.bincount(indices, minlength=self.shape[0])
        by_frequency = np.argsort(frequency)
        columns = np.arange(self.shape[1])
        for row in {*by_frequency[-3:], *by_frequency[:: max(1, len(by_frequency) // 40)]}:
            entries = np.flatnonzero(indices == row)
            before = sums.at(row * self.shape[1] + columns) * np.float32(not self.touched)
            values = numbers.at(entries[:, None] * self.shape[1] + columns)
            terms = np.concatenate([before[None], np.float32(SCALE) * values])
            expected = np.add.accumulate(terms)[-1] + np.float32(0)  # adds one term after another
            require_same_bits(f"row {row}", bench.device.get(accumulator[row]) + np.float32(0), expected)


def uniform(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Makes indices that rarely repeat if there are many rows."""
    return rng.integers(0, rows, count)


def zipf(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Makes indices as frequent as words in a text: the k-th row in proportion to 1/k."""
    weights = 1 / np.arange(1, rows + 1)
    return rng.permutation(rows)[rng.choice(rows, count, p=weights / weights.sum())]


def one_row(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Makes indices that are all of one row."""
    return np.full(count, rng.integers(rows))


def cases() -> Iterator[Case]:
    """Yields the cases."""
    for count in (1, 137, 417):  # the cost of a launch with the smallest, the medium and the largest table
        yield Dense(f"launch, {count} x 1 value", [1] * count, rotate=False)
    yield Dense("300 x 1000, float32", [1000] * 300, microseconds=10)
    resnet50 = resnet50_sizes()
    for gradient in ("float32", "bfloat16", "float16"):
        yield Dense(f"ResNet-50, {gradient}", resnet50, gradient, share=0.9)
        yield Dense(f"ResNet-50, {gradient}, overwrite", resnet50, gradient, overwrite=True, share=0.9)
        yield Dense(f"ResNet-50, {gradient}, all_finite", resnet50, gradient, check_finite=True, share=0.9)
    for gradient in ("float32", "bfloat16"):
        yield Dense(f"GPT-2 XL, {gradient}", gpt2_xl_sizes(), gradient, share=0.9)
    yield Rows("rows, 8192 x 768 into 50257", (50257, 768), 8192, uniform)
    yield Rows("rows, 8192 x 768 into 50257, overwrite touched", (50257, 768), 8192, uniform, touched=True)
    yield Rows("rows, 1M x 64 zipf into 200000", (200000, 64), 1_000_000, zipf)
    yield Rows("rows, 262144 x 64 into one of 200000", (200000, 64), 262144, one_row)
