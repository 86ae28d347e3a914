"""Compares contenders by their times on a machine where other work disturbs the measurement."""

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
    """The measurements of one contender, one for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, divided by the median: it shows how far the median can be trusted."""
        first, _, third = statistics.quantiles(self.values, n=4)
        return (third - first) / self.median if self.median else 0.0


def stopwatch(finish: Callable[[], object] = lambda: None) -> Callable[[Callable[[], object]], float]:
    """Returns a function that runs a contender and returns the seconds it took.

    Args:
        finish: Waits until all work is done. A device needs it if calls return before their work is done.
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
    """Measures all contenders in turn, round after round, so that a disturbance hits all of them alike.

    The order changes each round, so that a contender does not always find the same other one's data in the caches.

    Args:
        contenders: The contenders, by name or another key.
        sample: A function that measures a contender once, such as `stopwatch()`.
        rounds: How often each contender is measured, at least 2.
        warmup: The number of rounds before these, whose measurements are thrown away.
        progress: Called after each round, including the warm-up rounds.

    Returns:
        The measurements of each contender.

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
