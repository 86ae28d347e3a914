"""Where to cut a graph of layers into segments, so that training keeps to a memory goal at the least recomputation.

Calls stand in the order in which they are made. A segment that is recomputed keeps those of its outputs that later
calls use; a call outside of such segments keeps what its gradient reads. What is kept adds up over segments, and the
gradient of a segment has to fit beside what the segments before it keep: what is kept behind it has been let go then.
So the cheapest segments for a goal are a shortest path over the positions of cuts. Its states are pairs of what is kept
so far and what is recomputed so far, of which only those matter that no other one beats in both.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from accumops.memory.layer_costs import ELSEWHERE, CallCosts
from accumops.memory.segments import Region, Segment

_STATES = 64  # pairs at a position
_CHEAP_SLACK = 1.1  # the last tenth of the memory would cost a fifth of the recomputation


class Plan(NamedTuple):
    """Segments, and what they are expected to take."""

    segments: list[list[Segment]]
    """The recomputed segments of each region, by positions in its graph."""
    peak: float
    """The most bytes of activations and their gradients at a time."""
    seconds: float
    """The time of the recomputation."""


class Taken(NamedTuple):
    """What a training step takes with some segments."""

    kept: float
    """The bytes of activations behind the forward pass."""
    peak: float
    """The most bytes of activations, gradients and what leads to them."""
    seconds: float
    """The time of the recomputation."""


class Costs:
    """What segments of a list of calls cost.

    Args:
        region: The region of the calls.
        calls: What each costs.
        seconds: The time of the forward pass of each.
        waiting: The bytes of the gradients of weights of the calls behind the region.
    """

    def __init__(
        self, region: Region, calls: Sequence[CallCosts], seconds: Sequence[float], waiting: float = 0
    ) -> None:
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
        self.handed_on = np.zeros(count)
        """What it keeps beside that if the call behind it is recomputed: what only that call uses."""
        for name, (made, used, size) in outputs.items():
            crossing[made, min(used, count)] += size
            if name not in calls[made].kept:
                (self.handed_on if used == made + 1 else self.plain)[made] += size if used > made else 0
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
        weights = waiting + np.cumsum([call.weight_gradients for call in reversed(calls)])[::-1]
        forward = np.array([call.forward for call in calls], float)
        beside = forward - [sum(each.size for each in call.kept.values()) for call in calls]
        self.gradient = np.maximum(weights + [call.backward for call in calls], beside)
        """The most bytes beside what is kept while each call, or its gradient, is computed."""
        # peak[p, q]: the most that a recomputed segment takes, in its first run, its second one, and its gradient
        arriving = np.array([*weights[1:], waiting]) + [call.arriving for call in calls]
        self.peak = np.zeros((count + 1, count + 1))
        for p in range(count):
            first = self.keep[p, p + 1 :] + np.maximum.accumulate(forward[p:])
            second = np.maximum.accumulate(work[p, p + 1 :] + beside[p:]) + arriving[p:]
            gradient = np.maximum.accumulate(work[p, p + 1 :] + self.gradient[p:])
            self.peak[p, p + 1 :] = np.maximum(np.maximum(first, second), gradient)
        self.times = np.array(seconds, float)
        self.last_use = last_use
        self.seconds = _between(self.times)
        """The time from one position to another."""

    def without_products(self, calls: Sequence[CallCosts], saved: Sequence[int]) -> "Costs":
        """The costs of segments in which the products of some calls are kept, and without other calls with products.

        Args:
            calls: The costs of the calls.
            saved: The positions of the calls whose products are kept.
        """
        result = copy.copy(self)
        result.keep, result.peak = self.keep.copy(), self.peak.copy()
        for i, call in enumerate(calls):
            if i in saved:
                # A segment that holds the call keeps the product beside its own outputs, unless it is one of them.
                unused = np.arange(self.count + 1) > (i if call.activates else max(self.last_use[i], i))
                for p in range(i + 1):
                    result.keep[p, unused] += call.outputs[0][1]
                    result.peak[p, i + 1 :] += np.where(unused[i + 1 :], call.outputs[0][1], 0)
            elif call.products:
                result.peak[: i + 1, i + 1 :] = np.inf
        # Nothing is gained by a segment of calls whose outputs are kept.
        positions = np.arange(self.count + 1)
        kept = [i in saved and not call.activates for i, call in enumerate(calls)]
        before = np.concatenate([[0], np.cumsum(kept)])
        result.peak[before[None, :] - before[:, None] == positions[None, :] - positions[:, None]] = np.inf
        times = self.times.copy()
        times[list(saved)] = 0
        result.seconds = _between(times)
        return result


def _between(times: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(times)])
    return total[None, :] - total[:, None]


def costs_by_region(
    regions: Sequence[Region], calls: Sequence[Sequence[CallCosts]], seconds: Sequence[Sequence[float]]
) -> list[Costs]:
    """Returns the costs of segments of each region.

    Args:
        regions: All regions of a graph.
        calls: The costs of the calls of each.
        seconds: The times of their forward passes.
    """
    weights = [sum(call.weight_gradients for call in each) for each in calls]
    waiting = [sum(weights[i + 1 :]) for i in range(len(weights))]
    return [Costs(*each) for each in zip(regions, calls, seconds, waiting, strict=True)]


def taken_by(
    costs: Sequence[Costs], calls: Sequence[Sequence[CallCosts]], segments: Sequence[Sequence[Segment]]
) -> Taken:
    """Returns what given segments take.

    Args:
        costs: Those of each region.
        calls: The costs of the calls of each region.
        segments: The recomputed segments of each region, by positions in its graph.
    """
    kept = peak = seconds = 0.0
    for each, of_region, chosen in zip(costs, calls, segments, strict=True):
        begin = each.region.begin
        saved = [position - begin for segment in chosen for position in segment.saved]
        if saved:
            each = each.without_products(of_region, saved)
        ends = {segment.begin - begin: segment.end - begin for segment in chosen}
        position = 0
        while position < each.count:
            end = ends.get(position)
            if end is None:
                handed_on = each.handed_on[position] if position + 1 in ends else 0.0
                kept += each.plain[position] + handed_on
                peak = max(peak, kept + each.gradient[position])
                position += 1
            else:
                peak = max(peak, kept + each.peak[position, end])
                kept += each.keep[position, end]
                seconds += each.seconds[position, end]
                position = end
    return Taken(float(kept), float(peak), float(seconds))


def plan_for(costs: Sequence[Costs], goal: float) -> Plan | None:
    """Returns the segments with the least recomputation whose peak keeps to a goal, or None if none does.

    Args:
        costs: Those of each region.
        goal: Bytes.
    """
    start = States.start()
    history: list[list[States]] = []
    for each in costs:
        # Two points for each position: any call may follow, or only one that is not recomputed.
        reached = [start, States.none()]
        for q in range(1, each.count + 1):
            kept, handed_on = each.plain[q - 1], each.handed_on[q - 1]
            points = (2 * q - 2, 2 * q - 1)
            peak = kept + each.gradient[q - 1]
            plain = [reached[i].moved(kept + handed_on, peak + handed_on, 0.0, goal, i, 0) for i in points]
            recomputed = [
                reached[2 * p].moved(each.keep[p, q], each.peak[p, q], each.seconds[p, q], goal, 2 * p, 1)
                for p in range(q - 1, -1, -1)
                if each.peak[p, q] <= goal
            ]
            before_plain = [reached[i].moved(kept, peak, 0.0, goal, i, 0) for i in points] if handed_on else []
            reached += [States.best([*plain, *recomputed]), States.best(before_plain)]
        history.append(reached)
        start = reached[-2]
    if not len(start.kept):
        return None
    best = int(np.lexsort((start.peak, start.seconds))[0])
    segments = [_path(each, reached, best_of) for each, reached, best_of in _ends(costs, history, best)]
    return Plan(segments, float(start.peak[best]), float(start.seconds[best]))


class States(NamedTuple):
    """Ways to reach a position, none of which another one beats in both what it keeps and how long it takes."""

    kept: np.ndarray
    seconds: np.ndarray
    peak: np.ndarray
    origin: np.ndarray
    """The point, the state there, and whether the calls from there on are recomputed."""

    @classmethod
    def start(cls) -> "States":
        """The one way to be at the first position."""
        return cls(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((1, 3), int))

    @classmethod
    def none(cls) -> "States":
        """No way."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros((0, 3), int))

    def moved(self, kept: float, peak: float, seconds: float, goal: float, point: int, recomputed: int) -> "States":
        """The states behind calls that keep, take and last so much, where that keeps to the goal."""
        index = np.flatnonzero(self.kept + peak <= goal)
        origin = np.column_stack([np.full(len(index), point), index, np.full(len(index), recomputed)])
        peaks = np.maximum(self.peak[index], self.kept[index] + peak)
        return States(self.kept[index] + kept, self.seconds[index] + seconds, peaks, origin)

    @classmethod
    def best(cls, candidates: "Sequence[States]") -> "States":
        """Those that no other one beats, or some of them, spread evenly."""
        if not candidates:
            return cls.none()
        kept, seconds, peak, origin = (np.concatenate(each) for each in zip(*candidates, strict=True))
        order = np.lexsort((peak, seconds, kept))
        fastest = np.minimum.accumulate(np.concatenate([[np.inf], seconds[order]]))[:-1]
        order = order[seconds[order] < fastest]
        if len(order) > _STATES:
            order = order[np.unique(np.linspace(0, len(order) - 1, _STATES).round().astype(int))]
        return cls(kept[order], seconds[order], peak[order], origin[order])


def _ends(
    costs: Sequence[Costs], history: Sequence[list[States]], best: int
) -> Iterator[tuple[Costs, list[States], int]]:
    """Each region with its states and the state that the best path has at its end, in their order."""
    ends = []
    for each, reached in zip(reversed(costs), reversed(history), strict=True):
        ends.append((each, reached, best))
        point = 2 * each.count
        while point > 1:
            point, best, _ = map(int, reached[point].origin[best])
    return reversed(ends)


def _path(costs: Costs, reached: Sequence[States], state: int) -> list[Segment]:
    segments, point, begin = [], 2 * costs.count, costs.region.begin
    while point > 1:
        before, state, recomputed = map(int, reached[point].origin[state])
        if recomputed:
            segments.append(Segment(begin + before // 2, begin + point // 2, True))
        point = before
    return segments[::-1]


def smallest_goal(costs: Sequence[Costs]) -> float:
    """Returns the smallest goal, in bytes, that a plan can keep to."""
    return _smallest(costs, None)


def plan_of_count(costs: Sequence[Costs], count: int) -> Plan:
    """Returns at most so many recomputed segments, with the smallest peak.

    Args:
        costs: Those of each region.
        count: The largest number of segments.
    """
    goal = _smallest(costs, count)
    tables = _least_kept(costs, goal, count)
    segments: list[list[Segment]] = []
    seconds, k = 0.0, count
    for each, table in zip(reversed(costs), reversed(tables), strict=True):
        own: list[Segment] = []
        point = 2 * each.count
        while point > 1:
            before, recomputed = _step_back(each, table, goal, k, point)
            if recomputed:
                p, q = before // 2, point // 2
                own.append(Segment(each.region.begin + p, each.region.begin + q, True))
                seconds, k = seconds + float(each.seconds[p, q]), k - 1
            point = before
        segments.append(own[::-1])
    return Plan(segments[::-1], goal, seconds)


def _smallest(costs: Sequence[Costs], count: int | None) -> float:
    def most(each: Costs) -> float:
        return float(each.plain.sum() + each.handed_on.sum() + each.gradient.max(initial=0))

    low, high = 0.0, sum(map(most, costs)) + 1
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        fits = np.isfinite(_least_kept(costs, middle, count)[-1][-1, -2])
        low, high = (low, middle) if fits else (middle, high)
    return high


def _least_kept(costs: Sequence[Costs], goal: float, count: int | None) -> list[np.ndarray]:
    """The least that can be kept at each point, by the number of recomputed segments so far; one table a region.

    Points are those of `plan_for`. Without `count` a table has one row, for any number.
    """
    rows = 1 if count is None else count + 1
    start = np.zeros(rows)
    tables = []
    for each in costs:
        table = np.full((rows, 2 * each.count + 2), np.inf)
        table[:, 0] = start
        for q in range(1, each.count + 1):
            before = table[:, 2 * q - 2 : 2 * q].min(axis=1)
            kept, handed_on = each.plain[q - 1], each.handed_on[q - 1]
            fits = before + kept + each.gradient[q - 1] <= goal
            if handed_on:
                table[:, 2 * q + 1] = np.where(fits, before + kept, np.inf)
                fits &= before + kept + each.gradient[q - 1] + handed_on <= goal
            table[:, 2 * q] = np.where(fits, before + kept + handed_on, np.inf)
            source = table[:, : 2 * q : 2] if count is None else table[:-1, : 2 * q : 2]
            moved = np.where(source + each.peak[:q, q] <= goal, source + each.keep[:q, q], np.inf).min(axis=1)
            target = table if count is None else table[1:]
            target[:, 2 * q] = np.minimum(target[:, 2 * q], moved)
        tables.append(table)
        start = table[:, -2]
    return tables


def _step_back(costs: Costs, table: np.ndarray, goal: float, k: int, point: int) -> tuple[int, bool]:
    """The point from which the least is reached, and whether the calls between are recomputed."""
    q = point // 2
    if k > 0 and point % 2 == 0:
        source = table[k - 1, : 2 * q : 2]
        moved = np.where(source + costs.peak[:q, q] <= goal, source + costs.keep[:q, q], np.inf)
        if moved.min() <= table[k, point]:
            return 2 * int(np.argmin(moved)), True
    return (2 * q - 2 if table[k, 2 * q - 2] <= table[k, 2 * q - 1] else 2 * q - 1), False


def cheap_plan(costs: Sequence[Costs], calls: Sequence[Sequence[CallCosts]]) -> list[list[Segment]]:
    """Returns segments in which no convolution or matrix product is computed again, with about the smallest peak.

    A call with one product keeps a tensor behind it: what the activation function gets if there is one, and else the
    output. Without an activation function, a call whose gradient reads other tensors behind the product is not
    recomputed. Nor is a call with several products, such as attention.

    Args:
        costs: Those of each region.
        calls: The costs of the calls of each region.
    """
    saved = [[i for i, call in enumerate(of_region) if _product_can_be_kept(i, call)] for of_region in calls]
    cheap = [
        each.without_products(of_region, positions)
        for each, of_region, positions in zip(costs, calls, saved, strict=True)
    ]
    plan = plan_for(cheap, _CHEAP_SLACK * smallest_goal(cheap))
    assert plan is not None
    result = []
    for region, positions, segments in zip([each.region for each in costs], saved, plan.segments, strict=True):
        kept = [region.begin + i for i in positions]
        result.append(
            [segment._replace(saved=tuple(i for i in kept if segment.begin <= i < segment.end)) for segment in segments]
        )
    return result


def _product_can_be_kept(position: int, call: CallCosts) -> bool:
    behind = [each for each in call.kept.values() if each.behind_product and each.wanted_by <= position]
    return call.products == 1 and len(call.outputs) == 1 and (call.activates or not behind)


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
