"""Runs the kernels on small, awkward cases, for compute-sanitizer, and compares the results with NumPy.

Each array has an allocation of its own, except in long lists: an access beyond the array's end is then out of bounds.
"""

import argparse

import check_accumulate
import check_batch_norm
import check_update
from backend import Cuda, open_device
from checker import Checker


def main() -> None:
    """Runs all cases. The exit status is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script without a GPU")
    device = open_device(parser.parse_args().device)
    if isinstance(device, Cuda):
        device.cupy.cuda.set_allocator(None)  # with a pool the sanitizer would not know where arrays end
    checker = Checker(device)
    check_accumulate.check(checker)
    check_update.check(checker)
    check_batch_norm.check(checker)
    print(f"{checker.calls} calls on {device.name}, {len(checker.failures)} wrong results")
    raise SystemExit(bool(checker.failures))


if __name__ == "__main__":
    main()
