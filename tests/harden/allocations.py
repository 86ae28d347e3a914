"""Has allocations of a training step fail, one at a time, in random order: the step is made again, and ends with the
bits of a step in which none has failed.

    python tests/harden/allocations.py --seconds 60
"""

import ast
import os
import re
import subprocess
import sys
import tempfile

from supervised import ROOT, Found, main

HERE = ROOT / "tests" / "training"
OPTIMIZERS = ("adam", "clipped", "averaged", "scaled", "adagrad")


def run(library, optimizer, seconds):
    """Runs allocation_failures.py for so long, and returns how its steps ended."""
    environment = {"LD_PRELOAD": library, "TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, HERE / "allocation_failures.py", library, optimizer, "1", str(seconds)],
        env={**os.environ, **environment, "ACCUMOPS_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^(\d+) (\{.*\})$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or found is None:
        raise Found(f"{optimizer}: the process ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}")
    return int(found[1]), ast.literal_eval(found[2])


def part(seconds):
    counts = {"allocations that failed": 0}
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/failing_allocations.so"
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library]
        subprocess.run([*compiler, HERE / "failing_allocations.cc", "-ldl"], check=True)
        for optimizer in OPTIMIZERS:
            of_a_step, outcomes = run(library, optimizer, seconds / len(OPTIMIZERS))
            wrong = {outcome: count for outcome, count in outcomes.items() if "right" not in outcome}
            if wrong:
                raise Found(f"{optimizer}: {wrong} of {outcomes}")
            counts[f"allocations of a step, {optimizer}"] = of_a_step
            counts["allocations that failed"] += sum(outcomes.values())
    return counts


if __name__ == "__main__":
    main(part)
