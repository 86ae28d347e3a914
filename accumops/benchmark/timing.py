"""Measuring contenders against each other on a machine that is not quiet."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Subject = TypeVar("Subject")


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was measured of one contender over all rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median: how far this median can be trusted."""
        first, _, third = statistics.quantiles(self.values, n=4)
        return (third - first) / self.median if self.median else 0.0


def stopwatch(finish: Callable[[], object] = lambda: None) -> Callable[[Callable[[], object]], float]:
    """Returns a function that runs a contender and returns how long that took, in seconds.

    Args:
        finish: Returns when all work that was begun is done; for devices that work on after a call has returned.
    """

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        finish()
        return time.perf_counter() - start

    return seconds


def interleave(
    contenders: Mapping[Key, Subject],
    *,
    sample: Callable[[Subject], float],
    rounds: int = 30,
    warmup: int = 3,
    progress: Callable[[], object] = lambda: None,
) -> dict[Key, Samples]:
    """Measures all contenders in turn, round after round, so that what disturbs one disturbs all.

    Each round has its own order: what one leaves in the caches is not always found by the same other one.

    Args:
        contenders: What is given to `sample`, by name or another key.
        sample: Measures a contender once, such as `stopwatch()`.
        rounds: How often each one is measured, at least 2.
        warmup: How often before, for nothing.
        progress: Called after each round, the warm-up rounds included.

    Returns:
        What was measured of each contender.

    Raises:
        ValueError: If there are fewer than 2 rounds.

    Example:

    >>> from accumops.benchmark.timing import interleave, stopwatch
    >>> contenders = {"sum": lambda: sum(range(1000)), "len": lambda: len("")}
    >>> times = interleave(contenders, sample=stopwatch(), rounds=5)
    >>> times["len"].median < times["sum"].median
    True
    """
    if rounds < 2:
        raise ValueError(f"`rounds` must be at least 2. Received: {rounds}")
    values: dict[Key, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    shuffle = random.Random(0).shuffle
    for turn in range(warmup + rounds):
        shuffle(order)
        for name, contender in order:
            value = sample(contender)
            if turn >= warmup:
                values[name].append(value)
        progress()
    return {name: Samples(tuple(measured)) for name, measured in values.items()}
