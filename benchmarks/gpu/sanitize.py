"""Drives the kernels over small, awkward cases, for compute-sanitizer, and compares with NumPy.

Each array lies in an allocation of its own unless a list is long, so a step over an end is a step out of bounds.
"""

import argparse

import check_accumulate
import check_batch_norm
import check_update
from backend import Cuda, open_device
from checker import Checker


def main() -> None:
    """Runs all cases; the exit status says whether any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script without a GPU")
    device = open_device(parser.parse_args().device)
    if isinstance(device, Cuda):
        device.cupy.cuda.set_allocator(None)  # a pool would hide from the sanitizer where arrays end
    checker = Checker(device)
    check_accumulate.check(checker)
    check_update.check(checker)
    check_batch_norm.check(checker)
    print(f"{checker.calls} calls on {device.name}, {len(checker.failures)} wrong results")
    raise SystemExit(bool(checker.failures))


if __name__ == "__main__":
    main()
