"""Random calls of the kernels with each instruction set and many numbers of threads: all give the same bits.

python tests/harden/same_bits.py --seconds 60
python tests/harden/same_bits.py --case SEED NUMBER     runs one case, to look into it
"""

import random
import sys
import time

import numpy as np
from supervised import ROOT, Found, load_kernels, main, repeat

sys.path.append(str(ROOT / "tests" / "kernels"))
from kernel_definitions import SLOTS

THREADS = (1, 2, 3, 5, 8)
CASES_OF_A_PROCESS = 5000


class Case:
    """A call of a kernel: the arrays that it is given, and those that it writes."""

    def __init__(self, seed, number):
        self._random = random.Random(seed << 40 | number)
        self._rng = np.random.default_rng([seed, number])
        self.name = self._random.choice(("accumulate", "accumulate_rows", "update", "squared_norms", "batch_norm"))
        self.arrays, self.call = getattr(self, self.name)()

    def size(self, most=300_000):
        return int(most ** self._random.random())

    def numbers(self, *shape, dtype=np.float32):
        values = self._rng.standard_normal(shape) * 10.0 ** self._random.randrange(-3, 4)
        if self._random.random() < 0.1 and values.size:
            values.flat[self._rng.integers(values.size)] = self._random.choice((np.inf, -np.inf, np.nan))
        return values.astype(dtype)

    def list_of(self, make):
        return [make() for _ in range(self._random.randrange(1, 8))]

    def accumulate(self):
        sums = self.list_of(lambda: self.numbers(self.size()))
        dtypes = (np.float16, np.float32)
        gradients = [self.numbers(*each.shape, dtype=self._random.choice(dtypes)) for each in sums]
        scale, overwrite = self._random.choice((0.0, 1.0, 0.3)), self._random.random() < 0.3
        finite = np.ones(1, np.bool_)
        return [*sums, finite], lambda kernels, written, threads: kernels.accumulate(
            written[:-1], gradients, scale=scale, overwrite=overwrite, all_finite=written[-1], threads=threads
        )

    def accumulate_rows(self):
        rows, width = self.size(5000), self._random.choice((1, 3, 16, 33, 128))
        indices = self._rng.integers(0, rows, self.size(5000))
        values, flags = self.numbers(len(indices), width), self._rng.integers(0, 2, rows).astype(np.bool_)
        overwrite = self._random.random() < 0.5
        table = self.numbers(rows, width)
        return [table, flags], lambda kernels, written, threads: kernels.accumulate_rows(
            written[0], values, indices, touched_rows=written[1], scale=0.7, overwrite=overwrite, threads=threads
        )

    def update(self):
        rule = self._random.choice(tuple(SLOTS))
        values = self.list_of(lambda: self.numbers(self.size()))
        slots = [[np.abs(self.numbers(*each.shape)) for each in values] for _ in range(SLOTS[rule])]
        sums, latest = ([self.numbers(*each.shape) for each in values] for _ in range(2))
        clip = self._random.choice((0.0, 0.5))
        count = len(values)

        def call(kernels, written, threads):
            lists = [written[i : i + count] for i in range(0, len(written), count)]
            kernels.update(
                rule, lists[0], lists[1:], accumulators=sums, latest=latest, scales=0.25, rate=0.01, decay=0.001,
                weight=0.5, beta_1=0.9, beta_2=0.99, epsilon=1e-7, clip=clip, threads=threads,
            )  # fmt: skip

        return [*values, *(each for slot in slots for each in slot)], call

    def squared_norms(self):
        arrays = self.list_of(lambda: self.numbers(self.size(), dtype=self._random.choice((np.float32, np.float64))))
        sums = np.zeros(len(arrays))
        return [sums], lambda kernels, written, threads: kernels.squared_norms(arrays, written[0], threads=threads)

    def batch_norm(self):
        rows, channels = 1 + self.size(3000), self._random.choice((1, 3, 8, 17, 64, 200))
        x, gamma, beta = self.numbers(rows, channels), self.numbers(channels), self.numbers(channels)
        written = [np.zeros((rows, channels), np.float32), np.zeros(1, np.int64)]
        written += [np.zeros(channels, np.float32) for _ in range(4)]
        names = ("y", "count", "mean", "rest", "variance", "inverse")
        return written, lambda kernels, arrays, threads: kernels.batch_norm(
            x, gamma, beta, **dict(zip(names, arrays, strict=True)), threads=threads
        )

    def bits(self, kernels, threads):
        written = [each.copy() for each in self.arrays]
        self.call(kernels, written, threads)
        for each in written:
            if each.dtype.kind == "f":
                each[np.isnan(each)] = np.nan  # which NaN it is does not count
        return [each.tobytes() for each in written]


def run(kernels, seed, number):
    """Runs a case in all ways, and returns how many there were."""
    case, first, ways = Case(seed, number), None, 0
    for name in kernels.instruction_sets():
        kernels.use_instruction_set(name)
        for threads in THREADS:
            bits = case.bits(kernels, threads)
            first = first or bits
            if bits != first:
                raise Found(f"case {number} of seed {seed}, {case.name}, {name} with {threads} threads: other bits")
            ways += 1
    return ways


def work(seed, deadline, progress):
    kernels, ways = load_kernels(), 0
    for number in range(CASES_OF_A_PROCESS):
        progress.value = number
        ways += run(kernels, seed, number)
        if time.time() > deadline:
            break
    return {"cases": number + 1, "calls that were compared": ways}


def part(seconds):
    return repeat(work, seconds, preload=["numpy"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(run(load_kernels(), *map(int, sys.argv[2:4])))
    else:
        main(part)
