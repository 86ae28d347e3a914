"""100,000 windows of a small model in each mode, or as many as there is time for, in flat memory and without retracing.

python tests/harden/windows.py --seconds 60
"""

import gc
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from supervised import ROOT, Found, main

sys.path.append(str(ROOT / "tests" / "training"))
from many_windows import ManyWindows

WINDOWS, AT_ONCE = 100_000, 1000
SETTLED = 2000  # windows after which nothing new is needed
MOST_GROWTH = 8 << 20


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(mode, seconds):
    deadline = time.monotonic() + seconds
    training = ManyWindows(mode)
    training.train(SETTLED)
    traces, before, done = training.traces, resident_bytes(), 0
    while done < WINDOWS and (not done or time.monotonic() < deadline):
        training.train(AT_ONCE)
        done += AT_ONCE
        growth = resident_bytes() - before
        if growth > MOST_GROWTH:
            raise Found(f"{mode}: memory has grown by {growth / 2**20:.1f} MiB in {done} windows")
    if training.traces != traces:
        raise Found(f"{mode}: {training.traces - traces} more traces in {done} windows")
    if training.updates != SETTLED + done:
        raise Found(f"{mode}: {training.updates} updates in {SETTLED + done} windows")
    return {f"windows, {mode}": done, f"bytes of growth, {mode}": max(growth, 0)}


def part(seconds):
    counts = run("accum_steps", seconds / 2) | run("micro_batch_size", seconds / 2)
    return counts | {"windows": sum(count for name, count in counts.items() if name.startswith("windows"))}


if __name__ == "__main__":
    main(part)
