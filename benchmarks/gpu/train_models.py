"""Times windows of 8 micro-batches of 32 in ResNet-50 and a transformer on a GPU, beside their floor and other ways.

The floor is forward and backward of the micro-batches. The target for a window is at most 1.03 times the floor; the
script prints whether it is met, and missing it is no error. `--device CPU --small` tries the script without a GPU; its
times mean nothing.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

from types import ModuleType
from typing import Any

from accumops.benchmark import window
from accumops.benchmark.contender import time_contenders
from accumops.benchmark.models import CLASSES, Problem, transformer
from accumops.benchmark.result import Result
from accumops.cli.bench import print_result
from accumops.cli.info import describe
from accumops.cli.report import write_json

TARGET = 1.03
OWN = ("accumops, accum_steps", "accumops, micro_batch_size", "accumops, optimizer in a custom loop")


def resnet50(size: int) -> Any:
    """Returns a function that makes ResNet-50 for images of `size` pixels a side."""

    def build(library: ModuleType) -> Any:
        shape = (size, size, 3)
        return library.applications.ResNet50(
            weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
        )

    return build


def problems(small: bool) -> list[Problem]:
    """Returns the models to train, with their data."""
    if small:
        return [
            Problem("ResNet-50", resnet50(32), (32, 32, 3)),
            Problem("transformer", transformer(100, 16, 8, 2, 1), (8,), vocabulary=100),
        ]
    return [
        Problem("ResNet-50", resnet50(224), (224, 224, 3)),
        Problem("transformer", transformer(32_000, 768, 256, 12, 12), (256,), vocabulary=32_000),
    ]


def main() -> None:
    """Measures both models, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["CPU", "GPU"], default="GPU")
    parser.add_argument("--rounds", type=int, default=10, help="how often each contender is timed")
    parser.add_argument("--small", action="store_true", help="small models and micro-batches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    arguments = parser.parse_args()
    steps, micro = (2, 2) if arguments.small else (8, 32)
    rows = []
    for problem in problems(arguments.small):
        contenders = window.contenders(problem, arguments.device, steps=steps, micro=micro)
        rows += time_contenders(
            problem.name, contenders, device=arguments.device, rounds=arguments.rounds, warmup=problem.warmup
        )
    settings = {"accum_steps": steps, "micro_batch_size": micro}
    result = Result(f"windows of {steps} micro-batches of {micro} and their update", tuple(rows), settings=settings)
    print_result(result)
    for row in rows:
        if row.name in OWN and (ratio := result.ratio(row)) is not None:
            print(
                f"{row.case}, {row.name}: {ratio:.3f} of the floor, {'met' if ratio <= TARGET else 'MISSED'}: {TARGET}"
            )
    if arguments.json:
        facts = {"accumops": describe(), "suite": "models", "device": arguments.device, "rounds": arguments.rounds}
        write_json(arguments.json, {**facts, "result": result.as_json()})
    sys.exit(int(any(row.note for row in rows)))


if __name__ == "__main__":
    main()
