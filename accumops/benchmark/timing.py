"""Timing contenders against each other on a machine that is not quiet."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one contender took, in seconds, over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median: how far this median can be trusted."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Runs all contenders in turn, round after round, so that what disturbs one disturbs all.

    Each round has its own order: what one leaves in the caches is not always found by the same other one.

    Args:
        contenders: Functions that return when their work is done.
        rounds: Timed runs of each, at least 2.
        warmup: Untimed runs of each before.
        progress: Called after each round, the warm-up rounds included.

    Returns:
        For each contender its times.

    Example:

    >>> from accumops.benchmark.timing import interleave
    >>> times = interleave({"sum": lambda: sum(range(1000)), "len": lambda: len("")}, rounds=5)
    >>> times["len"].median < times["sum"].median
    True
    """
    if rounds < 2:
        raise ValueError(f"`rounds` must be at least 2. Received: {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    shuffle = random.Random(0).shuffle
    for turn in range(warmup + rounds):
        shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
        progress()
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
