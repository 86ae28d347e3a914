"""Runs the kernels on small, awkward cases, for sanitizers, and compares the results with NumPy.

Each array has an allocation of its own, except in long lists: an access beyond the array's end is then out of bounds.
"""

import argparse
import time

import check_accumulate
import check_batch_norm
import check_noise
import check_update
from backend import Cuda, open_device
from checker import Checker

CHECKS = {
    "accumulate": check_accumulate.check,
    "update": check_update.check,
    "batch_norm": check_batch_norm.check,
    "noise": check_noise.check,
}


def main() -> None:
    """Runs all cases. The exit status is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "emulated", "cpu"), default="cuda", help="cpu tries the script")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which an emulated GPU runs threads")
    parser.add_argument("--subject", choices=sorted(CHECKS), action="append", help="by default all")
    parser.add_argument(
        "--cases", choices=("all", "few", "fewest"), default="all", help="how many cases of each kernel"
    )
    arguments = parser.parse_args()
    device = open_device(arguments.device, arguments.seed)
    if isinstance(device, Cuda):
        device.cupy.cuda.set_allocator(None)  # with a pool the sanitizer would not know where arrays end
    checker = Checker(device, cases=arguments.cases)
    for subject in arguments.subject or CHECKS:
        begin, calls = time.perf_counter(), checker.calls
        CHECKS[subject](checker)
        print(f"{subject}: {checker.calls - calls} calls, {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"{checker.calls} calls on {device.name}, {len(checker.failures)} wrong results")
    raise SystemExit(bool(checker.failures))


if __name__ == "__main__":
    main()
