"""Where to cut a graph of layers into segments, so that training keeps to a memory goal at the least recomputation.

Calls stand in the order in which they are made. A segment that is recomputed keeps those of its outputs that later
calls use; a call outside of such segments keeps what its gradient reads. What is kept adds up over segments, and the
gradient of a segment has to fit beside what the segments before it keep: what is kept behind it has been let go then.
So the cheapest segments for a goal are a shortest path over the positions of cuts. Its states are pairs of what is kept
so far and what is recomputed so far, of which only those matter that no other one beats in both.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from accumops.memory.layer_costs import ELSEWHERE, CallCosts
from accumops.memory.segments import Region, Segment

_STATES = 64  # pairs at a position


class Plan(NamedTuple):
    """Segments, and what they are expected to take."""

    segments: list[list[Segment]]
    """The recomputed segments of each region, by positions in its graph."""
    peak: float
    """The most bytes of activations and their gradients at a time."""
    seconds: float
    """The time of the recomputation."""


class Costs:
    """What segments of a list of calls cost.

    Args:
        region: The region of the calls.
        calls: What each costs.
        seconds: The time of the forward pass of each.
    """

    def __init__(self, region: Region, calls: Sequence[CallCosts], seconds: Sequence[float]) -> None:
        count = self.count = len(calls)
        self.region = region
        last_use = _last_uses(region)
        outputs: dict[str, tuple[int, int, int]] = {}  # where each is made, used last, and its size
        for i, call in enumerate(calls):
            for name, size in call.outputs:
                made, used, _ = outputs.get(name, (i, i, 0))
                outputs[name] = made, max(used, last_use[i]), size
        crossing = np.zeros((count + 1, count + 1))  # by position and last use
        self.plain = np.zeros(count)
        """What each call keeps if it is not recomputed."""
        for name, (made, used, size) in outputs.items():
            crossing[made, min(used, count)] += size
            if used > made + 1 and name not in calls[made].kept:
                self.plain[made] += size
        # keep[p, q]: outputs of the calls from p to q that are used from q on
        later = np.cumsum(crossing[:, ::-1], axis=1)[:, ::-1]
        self.keep = np.zeros((count + 1, count + 1))
        for q in range(1, count + 1):
            self.keep[:q, q] = np.cumsum(later[:q, q][::-1])[::-1]
        wanted = np.zeros((count + 1, count + 1))  # by position and the first call that wants it
        for i, call in enumerate(calls):
            for each in call.kept.values():
                self.plain[i] += each.size
                wanted[i, min(each.wanted_by, count)] += each.size
        # work[p, q]: what the gradient of the calls from p to q reads that they make
        work = np.zeros((count + 2, count + 1))
        work[:-1, 1:] = np.cumsum(wanted, axis=1)[:, :-1]
        work = np.cumsum(work[::-1], axis=0)[::-1]
        sizes = np.array([sum(size for _, size in call.outputs) for call in calls], float)
        made_by = {each: i for i, node in enumerate(region.nodes) for each in node.outputs}
        inputs = [sum(sizes[made_by[each]] for each in set(node.inputs) if each in made_by) for node in region.nodes]
        self.gradient = sizes + inputs
        """The gradients of each call's outputs and inputs."""
        # peak[p, q]: the most that the gradient of a recomputed segment takes
        self.peak = np.zeros((count + 1, count + 1))
        for p in range(count):
            within = np.maximum.accumulate(work[p, p + 1 :] + self.gradient[p:])
            self.peak[p, p + 1 :] = np.maximum(within, work[p, p + 1 :] + self.keep[p, p + 1 :] + sizes[p:])
        total = np.concatenate([[0], np.cumsum(seconds)])
        self.seconds = total[None, :] - total[:, None]
        """The time from one position to another."""


def plan_for(costs: Sequence[Costs], goal: float) -> Plan | None:
    """Returns the segments with the least recomputation whose peak keeps to a goal, or None if none does.

    Args:
        costs: Those of each region.
        goal: Bytes.
    """
    # States at a position: kept bytes, seconds, peak, and where each comes from.
    states = _States.start()
    history: list[list[_States]] = []
    for each in costs:
        reached = [states]
        for q in range(1, each.count + 1):
            plain = reached[q - 1].moved(
                each.plain[q - 1], each.plain[q - 1] + each.gradient[q - 1], 0.0, goal, q - 1, 0
            )
            recomputed = [
                reached[p].moved(each.keep[p, q], each.peak[p, q], each.seconds[p, q], goal, p, 1)
                for p in range(q - 1, -1, -1)
                if each.peak[p, q] <= goal
            ]
            reached.append(_States.best([plain, *recomputed]))
        history.append(reached)
        states = reached[-1]
    if not len(states.kept):
        return None
    best = int(np.lexsort((states.peak, states.seconds))[0])
    segments = [_path(each, reached, best_of) for each, reached, best_of in _ends(costs, history, best)]
    return Plan(segments, float(states.peak[best]), float(states.seconds[best]))


class _States(NamedTuple):
    kept: np.ndarray
    seconds: np.ndarray
    peak: np.ndarray
    origin: np.ndarray
    """The position, the state there, and whether the calls from there on are recomputed."""

    @classmethod
    def start(cls) -> "_States":
        return cls(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((1, 3), int))

    def moved(self, kept: float, peak: float, seconds: float, goal: float, position: int, recomputed: int) -> "_States":
        """The states behind calls that keep, take and last so much, where that keeps to the goal."""
        index = np.flatnonzero(self.kept + peak <= goal)
        origin = np.column_stack([np.full(len(index), position), index, np.full(len(index), recomputed)])
        peaks = np.maximum(self.peak[index], self.kept[index] + peak)
        return _States(self.kept[index] + kept, self.seconds[index] + seconds, peaks, origin)

    @classmethod
    def best(cls, candidates: "Sequence[_States]") -> "_States":
        """Those that no other one beats, or some of them, spread evenly."""
        kept, seconds, peak, origin = (np.concatenate(each) for each in zip(*candidates, strict=True))
        order = np.lexsort((peak, seconds, kept))
        fastest = np.minimum.accumulate(np.concatenate([[np.inf], seconds[order]]))[:-1]
        order = order[seconds[order] < fastest]
        if len(order) > _STATES:
            order = order[np.unique(np.linspace(0, len(order) - 1, _STATES).round().astype(int))]
        return cls(kept[order], seconds[order], peak[order], origin[order])


def _ends(
    costs: Sequence[Costs], history: Sequence[list[_States]], best: int
) -> Iterator[tuple[Costs, list[_States], int]]:
    """Each region with its states and the state that the best path has at its end, in their order."""
    ends = []
    for each, reached in zip(reversed(costs), reversed(history), strict=True):
        ends.append((each, reached, best))
        position = each.count
        while position:
            position, best, _ = map(int, reached[position].origin[best])
    return reversed(ends)


def _path(costs: Costs, reached: Sequence[_States], state: int) -> list[Segment]:
    segments, position, begin = [], costs.count, costs.region.begin
    while position:
        before, state, recomputed = map(int, reached[position].origin[state])
        if recomputed:
            segments.append(Segment(begin + before, begin + position, True))
        position = before
    return segments[::-1]


def smallest_goal(costs: Sequence[Costs]) -> float:
    """Returns the smallest goal, in bytes, that a plan can keep to."""
    low, high = 0.0, sum(float(each.plain.sum() + each.gradient.max(initial=0)) for each in costs) + 1
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if np.isfinite(_least_kept(costs, middle, None)[-1][-1, -1]) else (middle, high)
    return high


def plan_of_count(costs: Sequence[Costs], count: int) -> Plan:
    """Returns at most so many recomputed segments, with the smallest peak.

    Args:
        costs: Those of each region.
        count: The largest number of segments.
    """
    low, high = 0.0, sum(float(each.plain.sum() + each.gradient.max(initial=0)) for each in costs) + 1
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if np.isfinite(_least_kept(costs, middle, count)[-1][-1, -1]) else (middle, high)
    tables = _least_kept(costs, high, count)
    segments: list[list[Segment]] = []
    seconds = 0.0
    k = count
    for each, table in zip(reversed(costs), reversed(tables), strict=True):
        own: list[Segment] = []
        q = each.count
        while q:
            p = _step_back(each, table, high, k, q)
            if p is None:
                q -= 1
            else:
                own.append(Segment(each.region.begin + p, each.region.begin + q, True))
                seconds += float(each.seconds[p, q])
                q, k = p, k - 1
        segments.append(own[::-1])
    return Plan(segments[::-1], high, seconds)


def _least_kept(costs: Sequence[Costs], goal: float, count: int | None) -> list[np.ndarray]:
    """The least that can be kept at each position, by the number of recomputed segments so far; one table a region.

    Without `count` a table has one row, for any number.
    """
    rows = 1 if count is None else count + 1
    start = np.zeros(rows)
    tables = []
    for each in costs:
        table = np.full((rows, each.count + 1), np.inf)
        table[:, 0] = start
        for q in range(1, each.count + 1):
            before = table[:, q - 1]
            fits = before + each.plain[q - 1] + each.gradient[q - 1] <= goal
            table[:, q] = np.where(fits, before + each.plain[q - 1], np.inf)
            source = table[:, :q] if count is None else table[:-1, :q]
            moved = np.where(source + each.peak[:q, q] <= goal, source + each.keep[:q, q], np.inf).min(axis=1)
            target = table if count is None else table[1:]
            target[:, q] = np.minimum(target[:, q], moved)
        tables.append(table)
        start = table[:, -1]
    return tables


def _step_back(costs: Costs, table: np.ndarray, goal: float, k: int, q: int) -> int | None:
    """The position at which the segment that ends at q begins, or None if the call before q is not recomputed."""
    value = table[k, q]
    before = table[k, q - 1] + costs.plain[q - 1]
    if before <= value and before + costs.gradient[q - 1] <= goal:
        return None
    source = table[k - 1, :q]
    moved = np.where(source + costs.peak[:q, q] <= goal, source + costs.keep[:q, q], np.inf)
    return int(np.argmin(moved))


def cheap_segments(costs: Costs, calls: Sequence[CallCosts]) -> list[Segment]:
    """Returns segments in which no convolution or matrix product is computed again.

    A segment ends in a call with one product, of which nothing is kept but its output, or before a call with others.
    """
    segments: list[Segment] = []
    begin = costs.region.begin
    p = 0
    for i, call in enumerate([*calls, CallCosts({}, [], 1)]):
        if not call.products:
            continue
        own = [each for each in call.kept.values() if each.behind_product and each.wanted_by <= i]
        q = i + 1 if i < costs.count and call.products == 1 and not own else i
        if i > p and i < costs.count and costs.plain[p:q].sum() > costs.keep[p, q]:
            segments.append(Segment(begin + p, begin + q, True))
        p = i + 1
    return segments


def _last_uses(region: Region) -> list[int]:
    """The position of the last call that uses an output of each call; behind the region's end if it is elsewhere."""
    end = len(region.nodes)
    made_by = {each: i for i, node in enumerate(region.nodes) for each in node.outputs}
    used = list(range(end))
    for i, node in enumerate(region.nodes):
        for each in node.inputs:
            if each in made_by:
                used[made_by[each]] = max(used[made_by[each]], i)
    for each in region.used_elsewhere:
        if each in made_by:
            used[made_by[each]] = ELSEWHERE
    return used
