"""Finds the micro-batch, and what to recompute, with which training within a memory limit is fastest.

Micro-batches are measured from small to large. Two lines go through the measurements: memory and time over the
micro-batch. They say which size to measure next: none that is expected to be over the limit, and none where a larger
one is expected to save less than `_WORTH` of the time. So a search ends at the limit, or where larger micro-batches are
no faster. The plan is one of the micro-batches that were measured: the lines decide where to look, and nothing else.

Recompute is looked at where the limit is what ends the search. What it costs is predicted first (`cuts.py`), for
larger and larger micro-batches. It is traced and measured only where it is expected to be faster than the best so far,
or where no micro-batch fits without it.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np

from accumops.adapters.keras_functional import graph_of
from accumops.adapters.tensorflow import without_strategy
from accumops.memory.cuts import plan_for, smallest_goal, taken_by
from accumops.memory.recompute_layers import measured as costs_for
from accumops.memory.segments import Segment, regions_of, running_in, segments_by_region
from accumops.planning.loaded_pass import Point
from accumops.planning.measuring import Measurer
from accumops.planning.traced_pass import TracedPass

_WORTH = 0.02
_AT_LEAST = 3  # sizes, before times end a search: a single time may be off
_ALIKE = 0.04
_NEAR = 1.25
_GROWTH = 4  # how many times larger the next micro-batch may be
_SECONDS = 45.0
_RECOMPUTED = (2, 4, 8)  # micro-batches with recompute, in multiples of the largest one without
_TRIES = 2  # sizes with recompute that are measured
_SMALLEST = 1.05  # the smallest goal costs the most time
_BACKWARD = 2.0  # the time of a backward pass, in forward passes

Chosen = tuple[tuple[Segment, ...], ...]


class Try(NamedTuple):
    """A micro-batch that was tried."""

    micro_batch_size: int
    segments: Chosen
    point: Point | None
    """What it takes; None if it takes more than is allowed."""


class Subject(NamedTuple):
    """What is searched for."""

    net: keras.Model
    """The model, without a wrapper."""
    traced: TracedPass
    """The pass as the model is."""
    trace: Callable[[], TracedPass]
    """Traces the pass anew, for a model that recomputes now."""
    measurer: Callable[[TracedPass], Measurer]
    effective_batch_size: int
    allowed: int
    """The bytes that a micro-batch may take."""
    recompute: bool
    report: Callable[[Try], None]
    """Is called after each try."""


class Searched(NamedTuple):
    """What a search has found."""

    tries: list[Try]
    measured_by: str
    notes: list[str]


def search(subject: Subject) -> Searched:
    """Measures micro-batches with and without recompute."""
    start = time.perf_counter()
    notes: list[str] = []
    allowed = subject.allowed
    with subject.measurer(subject.traced) as measurer:
        measured_by = measurer.measured_by
        plain = _explore(subject, measurer, (), allowed, start)
        tries = _timed_again(subject, measurer, plain.tries, allowed, start)
    plain = plain._replace(tries=tries)
    if plain.no_time:
        notes.append("There was no time to measure a larger micro-batch.")
    if not plain.at_limit or not subject.recompute or allowed <= 0:
        return Searched(tries, measured_by, notes)
    graph = graph_of(subject.net)
    if graph is None:
        notes.append(f"'{subject.net.name}' is no graph that Keras knows, so that recompute was not planned.")
        return Searched(tries, measured_by, notes)
    regions = regions_of(graph)
    if any(segments_by_region(regions)):
        notes.append("The model recomputes already. Its segments were kept as they are.")
        return Searched(tries, measured_by, notes)
    points = [each.point for each in tries if each.point is not None]
    promising = _faster(subject, points, allowed) if points else _smaller(subject, allowed)
    for sizes, segments in promising:
        if points and time.perf_counter() - start > _SECONDS:
            notes.append("There was no time to measure more of what is recomputed.")
            break
        with running_in(regions, segments):
            traced = subject.trace()
        with subject.measurer(traced) as measurer:
            found = _explore(subject, measurer, tuple(tuple(each) for each in segments), allowed, start, sizes).tries
        tries += found
        if not points and any(each.point for each in found):
            break
    return Searched(tries, measured_by, notes)


def window_seconds(point: Point, per_micro_batch: float, effective_batch_size: int) -> float:
    """The time of a window's micro-batches.

    Args:
        point: What one micro-batch takes.
        per_micro_batch: The part of its time that does not depend on its size, in seconds.
        effective_batch_size: Samples a window.
    """
    whole, rest = divmod(effective_batch_size, point.micro_batch_size)
    fixed = min(per_micro_batch, point.seconds)
    last = fixed + (point.seconds - fixed) * rest / point.micro_batch_size if rest else 0.0
    return whole * point.seconds + last


def fastest(tries: Sequence[Try], effective_batch_size: int) -> tuple[Try, Point, float]:
    """The try to plan with, what it takes, and the time of its window in seconds.

    Where several are about as fast as the fastest, the largest micro-batch wins: it has the fewest calls, and layers
    that look at a batch have more samples to look at.

    Args:
        tries: The tries, at least one of which fits.
        effective_batch_size: Samples a window.
    """
    fitting = [(each, each.point) for each in tries if each.point is not None]
    plain = [point for each, point in fitting if not each.segments]
    rest = per_micro_batch(plain) if plain else 0.0
    times = [window_seconds(point, rest, effective_batch_size) for _, point in fitting]
    alike = [i for i, seconds in enumerate(times) if seconds <= (1 + _ALIKE) * min(times)]
    chosen = max(alike, key=lambda i: (fitting[i][0].micro_batch_size, -times[i]))
    return (*fitting[chosen], times[chosen])


def per_micro_batch(points: Sequence[Point]) -> float:
    """The part of a micro-batch's time that does not depend on its size, in seconds."""
    return max(0.0, _line([(point.micro_batch_size, point.seconds) for point in points])[0])


class _Explored(NamedTuple):
    tries: list[Try]
    at_limit: bool
    """Whether the limit ended the search, and not that larger micro-batches are no faster."""
    no_time: bool = False
    """Whether there was no time to measure a larger one."""


def sizes_of(effective_batch_size: int) -> list[int]:
    """The sizes worth a look: the smallest one for each number of micro-batches."""
    return sorted({-(-effective_batch_size // steps) for steps in range(1, effective_batch_size + 1)})


def _explore(
    subject: Subject,
    measurer: Measurer,
    segments: Chosen,
    allowed: int,
    start: float,
    sizes: Sequence[int] | None = None,
) -> _Explored:
    """Measures micro-batches of some sizes, or of all, from small to large."""
    sizes = sizes_of(subject.effective_batch_size) if sizes is None else sizes
    tries: list[Try] = []
    points: list[Point] = []
    size, too_large = sizes[0], sizes[-1] + 1
    while True:
        point = measurer.measure(size, allowed) if allowed > 0 else None
        tries.append(Try(size, segments, point))
        subject.report(tries[-1])
        if point is None:
            too_large = size
        else:
            points.append(point)
        if not points:
            return _Explored(tries, True)
        following, fits_more = _next_size(subject, points, sizes, too_large, allowed)
        if following is None:
            return _Explored(tries, not fits_more)
        size = following
        if time.perf_counter() - start + 2 * _at(points, size) > _SECONDS and len(points) > 1:
            return _Explored(tries, False, no_time=True)


def _timed_again(subject: Subject, measurer: Measurer, tries: Sequence[Try], allowed: int, start: float) -> list[Try]:
    """Measures those once more that are nearly the fastest, the largest first: the first time of each may be off."""
    points = [each.point for each in tries if each.point is not None]
    if len(points) < 2:
        return list(tries)
    rest = per_micro_batch(points)
    best = min(window_seconds(each, rest, subject.effective_batch_size) for each in points)
    better: dict[int, Point] = {}
    for point in reversed(points):
        near = window_seconds(point, rest, subject.effective_batch_size) <= _NEAR * best
        if near and time.perf_counter() - start + 2 * point.seconds < _SECONDS:
            once_more = measurer.measure(point.micro_batch_size, allowed)
            if once_more is not None:
                # Its memory is not looked at: a process keeps what larger micro-batches took.
                better[point.micro_batch_size] = point._replace(seconds=min(point.seconds, once_more.seconds))
    return [each._replace(point=better.get(each.micro_batch_size, each.point)) for each in tries]


def _next_size(
    subject: Subject, points: list[Point], sizes: Sequence[int], too_large: int, allowed: int
) -> tuple[int | None, bool]:
    """The size to measure next or None, and whether a larger one would fit."""
    largest = points[-1].micro_batch_size
    larger = [size for size in sizes if largest < size < too_large]
    if len(points) == 1:
        fitting = [size for size in larger if points[0].peak * size / largest <= allowed] or larger[:1]
    else:
        base, slope = _line([(point.micro_batch_size, point.peak) for point in points[-2:]])
        fitting = [size for size in larger if base + slope * size <= allowed]
    if not fitting:
        return None, too_large == sizes[-1] + 1 and not larger
    steps = [size for size in fitting if size <= _GROWTH * largest] or fitting[:1]
    if len(points) >= _AT_LEAST:
        fixed = per_micro_batch(points)
        best = min(window_seconds(point, fixed, subject.effective_batch_size) for point in points)
        expected = min(
            window_seconds(Point(size, 0, _at(points, size)), fixed, subject.effective_batch_size) for size in fitting
        )
        if expected > (1 - _WORTH) * best:
            return None, True
    return steps[-1], True


def _at(points: Sequence[Point], size: int) -> float:
    """The expected time of a micro-batch, in seconds."""
    base, slope = _line([(point.micro_batch_size, point.seconds) for point in points])
    return base + slope * size


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a line through points begins, and its slope. Differences count in proportion to the values."""
    if len(points) == 1:
        return 0.0, points[0][1] / points[0][0]
    x, y = (np.array(each, float) for each in zip(*points, strict=True))
    weights = 1 / np.maximum(y, 1e-12)
    slope, base = np.polyfit(x, y, 1, w=weights)
    return float(base), max(0.0, float(slope))


Candidates = list[tuple[list[int], list[list[Segment]]]]
"""Sizes to measure, and the segments of each region."""


def _faster(subject: Subject, points: Sequence[Point], allowed: int) -> Candidates:
    """Larger micro-batches with recompute that are expected to be faster than all without, the fastest first."""
    regions = regions_of(graph_of(subject.net))
    effective = subject.effective_batch_size
    largest = points[-1].micro_batch_size
    sizes = [size for size in sizes_of(effective) if size > largest]
    candidates = sorted({max(below) for factor in _RECOMPUTED if (below := _up_to(sizes, factor * largest))})
    fixed = per_micro_batch(points)
    best = min(window_seconds(each, fixed, effective) for each in points)
    base, slope = _line([(each.micro_batch_size, each.peak) for each in points[-2:]])
    found: list[tuple[float, int, list[list[Segment]]]] = []
    for size in candidates:
        calls, costs = without_strategy(functools.partial(costs_for, subject.net, regions, size))
        # A step may take more than its tensors: what was measured without recompute says how much.
        predicted = taken_by(costs, calls, [[] for _ in regions]).peak
        plan = plan_for(costs, allowed / max(1.0, (base + slope * size) / predicted))
        if plan is None:
            break
        forward = sum(float(each.times.sum()) for each in costs)
        again = 1 + plan.seconds / forward / (1 + _BACKWARD) if forward else 1.0
        expected = window_seconds(Point(size, 0, _at(points, size) * again), fixed * again, effective)
        if expected < (1 - _WORTH) * best:
            found.append((expected, size, plan.segments))
    return [([size], segments) for _, size, segments in sorted(found, key=lambda each: each[:2])[:_TRIES]]


def _smaller(subject: Subject, allowed: int) -> Candidates:
    """What to recompute where not one sample fits without: first what should suffice, then all that saves memory."""
    regions = regions_of(graph_of(subject.net))
    calls, costs = without_strategy(functools.partial(costs_for, subject.net, regions, 1))
    most, least = taken_by(costs, calls, [[] for _ in regions]).peak, _SMALLEST * smallest_goal(costs)
    plans = [plan_for(costs, max(least, min(allowed, (most + least) / 2))), plan_for(costs, least)]
    segments = [plan.segments for plan in plans if plan is not None and any(plan.segments)]
    return [(sizes_of(subject.effective_batch_size), each) for each in segments]


def _up_to(sizes: Sequence[int], most: int) -> list[int]:
    return [size for size in sizes if size <= most]
