"""Times the kernels with device events, and compares them with a copy of as many bytes as they must move.

Calls are captured into a graph and replayed, because Python takes longer to make a call than the GPU to run it. The
calls rotate over sets of buffers: twice the L2 cache's bytes lie between two uses of a set. Before the timing, results
are compared with NumPy.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accumulate_cases
import batch_norm_cases
import numpy as np
import update_cases
from backend import Cuda, open_device
from bench import Bench, Case


def cases() -> Iterator[Case]:
    """Yields all cases. The first one gives the cost of a launch."""
    yield from accumulate_cases.cases()
    yield from update_cases.cases()
    yield from batch_norm_cases.cases()


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """Times one case. Returns the bytes to move, the predicted and the measured time, and the target."""
    calls, must_move = case.prepare(bench)
    predicted = must_move / bench.copy_rate + bench.launch_seconds
    times = bench.time(calls, predicted)
    lower, median, upper = statistics.quantiles(times, n=4)
    sets = len(calls)
    del calls
    copy = bench.copy_seconds(must_move)
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


def target_text(case: Case) -> str:
    """Returns the target of a case as text."""
    if case.share is not None:
        return f">= {case.share:.2f}"
    return "" if case.microseconds is None else f"< {case.microseconds:g} us"


def nvidia_smi() -> dict[str, str]:
    """Returns the state of the first GPU as the driver reports it."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
              "power.draw", "power.limit"]  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(fields, map(str.strip, found.splitlines()[0].split(",")), strict=False))


def machine(bench: Bench) -> dict[str, Any]:
    """Returns facts about the machine and versions."""
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
    """Prints the results, one a line; as a table with borders if rich is installed."""
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
    """Measures the cases whose names match. If one fails, the others still run."""
    results = []
    for case in cases():
        if not re.search(only, case.name):
            continue
        begin = time.perf_counter()
        try:
            result = measure(bench, case.shrink() if bench.small else case)
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
    """Measures, prints and writes. The exit status is 1 if a case failed; a missed target does not change it."""
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
