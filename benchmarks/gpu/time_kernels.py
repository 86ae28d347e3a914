"""Times both kernels with device events, against the bytes they must move and a copy of as many bytes.

Calls are captured into a graph and replayed, as Python takes longer to make one than the GPU to run it. They rotate
over sets of buffers: between two uses of a set lie twice the L2 cache's bytes. First, results are compared with NumPy.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from backend import Cuda, Host, narrow, open_device, widen

SCALE = 0.3
ALIGNMENT = 64  # elements between the starts of tensors: TensorFlow aligns to 64 bytes, CUDA's own allocator to 256
PATTERN_SIZE = (1 << 22) - 3  # odd, so that no two tensors begin alike
REPEATS = 30
GRAPH_SECONDS = 2e-3  # at least, so that starting a replay does not count
GRAPH_CALLS = 512  # at most

Calls = list[Callable[[], None]]


class WrongResultError(Exception):
    """A kernel computed something else than NumPy."""


def resnet50_sizes() -> list[int]:
    """The sizes of the trainable variables of keras.applications.ResNet50: 214, with 25,583,592 values."""

    def layer(kernel: int, inputs: int, outputs: int) -> list[int]:
        return [kernel * kernel * inputs * outputs, outputs, outputs, outputs]  # kernel, bias, gamma, beta

    sizes = layer(7, 3, 64)
    inputs = 64
    for blocks, filters in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            sizes += layer(1, inputs, filters) + layer(3, filters, filters)
            if block == 0:
                sizes += layer(1, inputs, 4 * filters)
            sizes += layer(1, filters, 4 * filters)
            inputs = 4 * filters
    return [*sizes, 2048 * 1000, 1000]


def gpt2_xl_sizes() -> list[int]:
    """The sizes of GPT-2 XL's parameters: 580, with 1,557,611,200 values."""
    width = 1600
    block = [width, width]
    for inputs, outputs in ((1, 3), (1, 1)):
        block += [inputs * outputs * width * width, outputs * width]
    block += [width, width]
    for inputs, outputs in ((1, 4), (4, 1)):
        block += [inputs * outputs * width * width, outputs * width]
    return [50257 * width, 1024 * width, *(block * 48), width, width]


@dataclasses.dataclass(frozen=True)
class Dense:
    """accumulate() over float32 accumulators of these sizes."""

    name: str
    sizes: list[int]
    gradient: str = "float32"
    overwrite: bool = False
    check_finite: bool = False
    rotate: bool = True  # False: the same buffers each time, which then are in the L2 cache
    share: float | None = None  # of a copy's speed: what to reach
    microseconds: float | None = None  # what to stay below


@dataclasses.dataclass(frozen=True)
class Rows:
    """accumulate_rows() into float32; with `touched`, overwriting the rows that the call before touched."""

    name: str
    shape: tuple[int, int]
    count: int
    choose: Callable[[np.random.Generator, int, int], np.ndarray]  # indices from the rows and the count
    touched: bool = False
    share: float | None = None
    microseconds: float | None = None


def uniform(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Rows that rarely repeat where there are many of them."""
    return rng.integers(0, rows, count)


def zipf(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Rows as frequent as words in a text: the k-th in proportion to 1/k."""
    weights = 1 / np.arange(1, rows + 1)
    return rng.permutation(rows)[rng.choice(rows, count, p=weights / weights.sum())]


def one_row(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """The same row every time."""
    return np.full(count, rng.integers(rows))


def cases() -> Iterator[Dense | Rows]:
    """What is timed."""
    for count in (1, 137, 417):  # what a launch costs, with the smallest, the medium and the largest table
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


def shrink(case: Dense | Rows) -> Dense | Rows:
    """A thousandth of a case."""
    if isinstance(case, Dense):
        return dataclasses.replace(case, sizes=[-(-size // 1000) for size in case.sizes])
    rows, columns = case.shape
    return dataclasses.replace(case, shape=(rows // 100, columns), count=case.count // 1000)


class Pattern:
    """Random numbers that fill buffers over and over, so that the host knows every element without a copy."""

    def __init__(self, device: Host, seed: int, dtype: str) -> None:
        numbers = np.random.default_rng(seed).standard_normal(PATTERN_SIZE, np.float32)
        self.host = narrow(numbers, dtype)
        self._device = device
        self._pattern = device.put(self.host)

    def array(self, size: int) -> Any:
        """A flat array on the device, filled."""
        result = self._device.empty(size, self.host.dtype)
        for begin in range(0, size, PATTERN_SIZE):
            part = result[begin : begin + PATTERN_SIZE]
            self._device.copy(part, self._pattern[: part.size])
        return result

    def at(self, indices: np.ndarray) -> np.ndarray:
        """What the array holds there."""
        return self.host[indices % PATTERN_SIZE]


def require_same_bits(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Compares arrays of float32."""
    wrong = np.flatnonzero(actual.view(np.uint32) != expected.view(np.uint32))
    if len(wrong):
        found, wanted = actual[wrong[0]], expected[wrong[0]]
        raise WrongResultError(f"{what}: {len(wrong)} of {actual.size} wrong, the first {found} instead of {wanted}")


class Bench:
    """Prepares, verifies and times on one device."""

    def __init__(self, device: Host) -> None:
        self.device = device
        self.small = device.name == "cpu"
        self.cupy = device.cupy if isinstance(device, Cuda) else None
        self.cache_bytes = 1 << 20
        if self.cupy:
            self.cache_bytes = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.Device().id)["l2CacheSize"]
        self._patterns: dict[tuple[int, str], Pattern] = {}
        self._copies: dict[int, float] = {}
        self.launch_seconds = 2e-6
        self.copy_rate = self.measure_copy_rate()

    def pattern(self, seed: int, dtype: str) -> Pattern:
        """Made once."""
        if (seed, dtype) not in self._patterns:
            self._patterns[seed, dtype] = Pattern(self.device, seed, dtype)
        return self._patterns[seed, dtype]

    def sets(self, touched_bytes: int) -> int:
        """How many sets of buffers to rotate over, that between two uses of one lie twice the cache's bytes."""
        return min(1 + math.ceil(2 * self.cache_bytes / touched_bytes), GRAPH_CALLS)

    def free_bytes(self) -> int:
        """Device memory that can be had."""
        gc.collect()
        if not self.cupy:
            return 1 << 30
        self.cupy.get_default_memory_pool().free_all_blocks()
        return self.cupy.cuda.runtime.memGetInfo()[0]

    def require_memory(self, needed: int) -> None:
        """Raises MemoryError unless there is so much, and some to spare."""
        free = self.free_bytes()
        if needed > 0.95 * free:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free")

    def time(self, calls: Calls, estimate: float, *, graph: bool = True) -> list[float]:
        """Seconds a call, of each repeat. All calls have been made before, and take about `estimate` seconds each."""
        rounds = math.ceil(GRAPH_SECONDS / (len(calls) * estimate))
        calls = calls * max(1, min(rounds, GRAPH_CALLS // len(calls)))

        def run() -> None:
            for call in calls:
                call()

        if not self.cupy:
            clock = time.perf_counter
            starts = [(clock(), run(), clock()) for _ in range(5)]
            return [(end - begin) / len(calls) for begin, _, end in starts]
        cuda = self.cupy.cuda
        stream = cuda.get_current_stream()
        if graph:
            stream.begin_capture()
            try:
                run()
            finally:
                captured = stream.end_capture()
            run = captured.launch
        for _ in range(3):
            run()
        events = [(cuda.Event(), cuda.Event()) for _ in range(REPEATS)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        stream.synchronize()
        return [cuda.get_elapsed_time(begin, end) / 1e3 / len(calls) for begin, end in events]

    def copy_seconds(self, total_bytes: int) -> float:
        """The time of a copy that reads and writes so many bytes together; of a graph and plain calls the better."""
        half = max(1, total_bytes // 2)
        if half not in self._copies:
            count = self.sets(2 * half)
            self.require_memory(2 * half * count)
            buffers = [(self.device.empty(half, np.uint8), self.device.empty(half, np.uint8)) for _ in range(count)]
            for pair in buffers:
                for buffer in pair:
                    self.device.poison(buffer)
            calls = [lambda pair=pair: self.device.copy(*pair) for pair in buffers]
            estimate = 2e-6 + 2 * half / 4e12
            times = [self.time(calls, estimate, graph=graph) for graph in (True, False)]
            self._copies[half] = min(statistics.median(t) for t in times)
        return self._copies[half]

    def measure_copy_rate(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        total = 1 << 26 if self.small else min(1 << 32, self.free_bytes() // 8)
        return total / self.copy_seconds(total)

    def arguments(self, overwrite: bool, check_finite: bool = False) -> dict[str, Any]:
        """What a call has beside its arrays; nothing for which the module would have to copy or launch anything."""
        return {
            "scale": self.device.scalar(SCALE, np.float32),
            "overwrite": self.device.scalar(overwrite, np.bool_),
            "all_finite": self.device.put(np.ones(1, np.bool_)) if check_finite else None,
            "stream": self.device.stream(),
        }

    def dense(self, case: Dense) -> tuple[Calls, int]:
        """Verified calls, and the bytes that each has to move."""
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in case.sizes)])
        total = int(starts[-1])
        spans = [(int(start), int(start) + size) for start, size in zip(starts, case.sizes, strict=False)]
        sums, numbers = self.pattern(1, "float32"), self.pattern(2, case.gradient)
        value_bytes = (4 if case.overwrite else 8) + numbers.host.itemsize
        footprint = total * (4 + numbers.host.itemsize)
        count = self.sets(footprint) if case.rotate else 1
        self.require_memory(count * footprint)
        calls: Calls = []
        for i in range(count):
            accumulator, gradient = sums.array(total), numbers.array(total)
            if case.overwrite:
                self.device.poison(accumulator)
            arguments = self.arguments(case.overwrite, case.check_finite)
            accumulators = [accumulator[begin:end] for begin, end in spans]
            gradients = [gradient[begin:end] for begin, end in spans]

            def call(accumulators=accumulators, gradients=gradients, arguments=arguments) -> None:
                self.device.kernels.accumulate(accumulators, gradients, **arguments)

            call()
            if i in (0, count - 1):
                self.verify_dense(case, accumulator, spans, sums, numbers)
                if case.check_finite and not self.device.get(arguments["all_finite"])[0]:
                    raise WrongResultError("all_finite became false")
            calls.append(call)
        return calls, sum(case.sizes) * value_bytes

    def verify_dense(self, case: Dense, accumulator: Any, spans: list[tuple[int, int]], sums: Pattern,
                     numbers: Pattern) -> None:  # fmt: skip
        """Compares the beginning, the middle and the end of up to 200 tensors, and what lies behind them."""
        for k in np.unique(np.linspace(0, len(spans) - 1, 200).astype(int)):
            begin, end = spans[k]
            for at in {begin, max(begin, (begin + end) // 2), max(begin, end - 256)}:
                found = self.device.get(accumulator[at : at + 300])
                where = np.arange(at, at + found.size)
                before = np.full(found.size, 0xFFFFFFFF, np.uint32).view(np.float32)
                if not case.overwrite:
                    before = sums.at(where)
                product = np.float32(SCALE) * widen(numbers.at(where), np.float32)
                after = product if case.overwrite else before + product
                inside = where < end
                known = inside | (where < -(-end // ALIGNMENT) * ALIGNMENT)  # what follows is the next tensor's
                expected = np.where(inside, after, before)
                require_same_bits(f"tensor {k}", found[known], expected[known])

    def rows(self, case: Rows) -> tuple[Calls, int]:
        """Verified calls, and the bytes that each has to move."""
        rows, columns = case.shape
        indices = case.choose(np.random.default_rng(3), rows, case.count).astype(np.int32)
        sums, numbers = self.pattern(1, "float32"), self.pattern(2, "float32")
        used = len(np.unique(indices)) * columns * 4
        value_bytes = case.count * columns * 4
        must_move = value_bytes + indices.nbytes + (used + rows if case.touched else 2 * used)
        count = self.sets(value_bytes + used)
        self.require_memory(count * (value_bytes + 4 * rows * columns))
        calls: Calls = []
        for i in range(count):
            accumulator = sums.array(rows * columns).reshape(case.shape)
            touched = None
            if case.touched:
                accumulator = self.device.put(np.zeros(case.shape, np.float32))
                touched = self.device.put(np.zeros(rows, np.bool_))
            values = numbers.array(case.count * columns).reshape(case.count, columns)
            positions = self.device.put(indices)
            arguments = self.arguments(case.touched)

            def call(arrays=(accumulator, values, positions), touched=touched, arguments=arguments) -> None:
                self.device.kernels.accumulate_rows(*arrays, touched_rows=touched, **arguments)

            call()
            if case.touched:
                call()  # clears what the first added
            if i in (0, count - 1):
                self.verify_rows(case, accumulator, indices, sums, numbers)
            calls.append(call)
        return calls, must_move

    def verify_rows(self, case: Rows, accumulator: Any, indices: np.ndarray, sums: Pattern, numbers: Pattern) -> None:
        """Compares the most frequent rows, some others and some that are not in the list."""
        frequency = np.bincount(indices, minlength=case.shape[0])
        by_frequency = np.argsort(frequency)
        columns = np.arange(case.shape[1])
        for row in {*by_frequency[-3:], *by_frequency[:: max(1, len(by_frequency) // 40)]}:
            entries = np.flatnonzero(indices == row)
            before = sums.at(row * case.shape[1] + columns) * np.float32(not case.touched)
            values = numbers.at(entries[:, None] * case.shape[1] + columns)
            terms = np.concatenate([before[None], np.float32(SCALE) * values])
            expected = np.add.accumulate(terms)[-1] + np.float32(0)  # one after the other
            require_same_bits(f"row {row}", self.device.get(accumulator[row]) + np.float32(0), expected)

    def measure(self, case: Dense | Rows) -> dict[str, Any]:
        """One case: what is needed, foreseen and found."""
        calls, must_move = self.dense(case) if isinstance(case, Dense) else self.rows(case)
        predicted = must_move / self.copy_rate + self.launch_seconds
        times = self.time(calls, predicted)
        lower, median, upper = statistics.quantiles(times, n=4)
        sets = len(calls)
        del calls
        copy = self.copy_seconds(must_move)
        targets = [] if case.share is None else [copy / median >= case.share]
        targets += [] if case.microseconds is None else [1e6 * median < case.microseconds]
        return {
            "case": case.name,
            "bytes": must_move,
            "buffer_sets": sets,
            "predicted_us": 1e6 * predicted,
            "measured_us": 1e6 * median,
            "quartiles_us": [1e6 * lower, 1e6 * upper],
            "bytes_per_second": must_move / median,
            "copy_us": 1e6 * copy,
            "share_of_copy": copy / median,
            "target": target_text(case),
            "target_met": all(targets) if targets else None,
        }


def target_text(case: Dense | Rows) -> str:
    """What a case has to reach."""
    if case.share is not None:
        return f">= {case.share:.2f}"
    return "" if case.microseconds is None else f"< {case.microseconds:g} us"


def nvidia_smi() -> dict[str, str]:
    """The state of the GPUs as the driver tells it."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
              "power.draw", "power.limit"]  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(fields, map(str.strip, found.splitlines()[0].split(",")), strict=False))


def machine(bench: Bench) -> dict[str, Any]:
    """The machine, and versions."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "build": bench.device.kernels.build_info(),
        "cuda_status": bench.device.kernels.cuda_status(),
    }
    build_info = Path(os.environ.get("ACCUMOPS_KERNELS_DIR", ".")) / "build_info.json"
    if build_info.is_file():
        facts["cmake"] = json.loads(build_info.read_text())
    if bench.cupy:
        properties = bench.cupy.cuda.runtime.getDeviceProperties(bench.cupy.cuda.Device().id)
        facts |= {
            "gpu": properties["name"].decode(),
            "multiprocessors": properties["multiProcessorCount"],
            "l2_bytes": properties["l2CacheSize"],
            "memory_bytes": properties["totalGlobalMem"],
            "cupy": bench.cupy.__version__,
            "cupy_cuda_runtime": bench.cupy.cuda.runtime.runtimeGetVersion(),
        }
    return facts


def print_table(results: list[dict[str, Any]]) -> None:
    """The results, one a line; in colour and lines where rich is installed."""
    header = ["case", "MB", "predicted us", "measured us", "quartiles", "GB/s", "of a copy", "target"]
    lines = []
    for r in results:
        if problem := r.get("problem"):
            lines.append([r["case"], "", "", "", "", "", "", problem])
            continue
        quartiles = "-".join(f"{q:.2f}" for q in r["quartiles_us"])
        met = {None: "", True: f"{r['target']} met", False: f"{r['target']} MISSED"}[r["target_met"]]
        lines.append([r["case"], f"{r['bytes'] / 1e6:.2f}", f"{r['predicted_us']:.2f}", f"{r['measured_us']:.2f}",
                      quartiles, f"{r['bytes_per_second'] / 1e9:.0f}", f"{r['share_of_copy']:.3f}", met])  # fmt: skip
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in [header, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*header)
    for column in table.columns[1:7]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)


def run(bench: Bench, only: str) -> list[dict[str, Any]]:
    """Measures the cases whose names match; one that fails does not keep the others from running."""
    results = []
    for case in cases():
        if not re.search(only, case.name):
            continue
        begin = time.perf_counter()
        try:
            result = bench.measure(shrink(case) if bench.small else case)
        except MemoryError as error:
            result = {"case": case.name, "problem": f"skipped: {error}", "failed": False}
        except Exception as error:
            traceback.print_exc()
            result = {"case": case.name, "problem": f"FAILED: {error}", "failed": True}
        if case.name == "launch, 1 x 1 value" and "problem" not in result:
            bench.launch_seconds = result["measured_us"] / 1e6
        results.append(result)
        print(f"{case.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return results


def main() -> None:
    """Measures, prints and writes; the exit status says whether a result was wrong, not whether a target was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases whose names match")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script without a GPU")
    arguments = parser.parse_args()
    device = open_device(arguments.device)
    if isinstance(device, Cuda):
        stream = device.cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        stream.use()
    idle = nvidia_smi()
    bench = Bench(device)
    results = run(bench, arguments.only)
    report = {
        "machine": machine(bench),
        "nvidia_smi": {"before": idle, "after": nvidia_smi()},
        "copy_bytes_per_second": bench.copy_rate,
        "launch_us": 1e6 * bench.launch_seconds,
        "cases": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in ("machine", "nvidia_smi")}, indent=1))
    print(f"copy: {bench.copy_rate / 1e9:.0f} GB/s, read and written; launch: {1e6 * bench.launch_seconds:.2f} us")
    print_table(results)
    failed = sum(result.get("failed", False) for result in results)
    skipped = sum("problem" in result for result in results) - failed
    missed = sum(result.get("target_met") is False for result in results)
    print(f"{len(results)} cases, {failed} failed, {skipped} skipped, {missed} targets missed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
