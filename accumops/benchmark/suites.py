"""All suites by name, and the function that runs one."""

import dataclasses
import os
from collections.abc import Callable
from types import ModuleType

import tensorflow as tf

from accumops.benchmark import (
    accumulate,
    batch_norm,
    goals,
    limit,
    memory,
    plan,
    recompute,
    update,
    window,
    window_loss,
    window_norm,
)
from accumops.benchmark.result import Result
from accumops.verification.runner import backend, no_retracing_warnings

SUITES: dict[str, ModuleType] = {
    "accumulate": accumulate,
    "update": update,
    "batch-norm": batch_norm,
    "window": window,
    "window-loss": window_loss,
    "window-norm": window_norm,
    "recompute": recompute,
    "goals": goals,
    "limit": limit,
    "plan": plan,
    "memory": memory,
}


def default_rounds(suite: str) -> int:
    """Returns how often a suite measures each contender by default."""
    return SUITES[suite].ROUNDS


def turns(suite: str, rounds: int) -> int:
    """How often `run` calls `progress`."""
    return SUITES[suite].turns(rounds)


def run(
    suite: str, *, device: str = "CPU", rounds: int | None = None, progress: Callable[[], object] = lambda: None
) -> Result:
    """Runs a suite, with the fused ops.

    Args:
        suite: The name of one of `SUITES`.
        device: The device that does the work, `"CPU"` or `"GPU"`.
        rounds: How often each contender is measured, at least 2; by default `default_rounds`.
        progress: Called after each step of the work, `turns` times in all.

    Raises:
        LibraryError: If the compiled libraries cannot be loaded.
    """
    with no_retracing_warnings(), backend("fused"), tf.device(f"{device}:0"):
        result = SUITES[suite].run(device=device, rounds=rounds or default_rounds(suite), progress=progress)
    threads = tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))
    return dataclasses.replace(result, settings={**result.settings, "threads": threads})
