"""Where to cut: against every way to cut a short list of calls."""

import itertools
import types

import numpy as np
import pytest

from accumops.memory.cuts import Costs, plan_for, plan_of_count, smallest_goal

CALLS = 6


def random_costs(rng):
    """What segments of some calls cost: any numbers, as the planner asks for no others."""
    costs = object.__new__(Costs)
    costs.region = types.SimpleNamespace(begin=3)
    costs.count = CALLS
    costs.plain = rng.integers(0, 9, CALLS).astype(float)
    costs.handed_on = rng.integers(0, 3, CALLS) * rng.integers(0, 2, CALLS).astype(float)
    costs.handed_on[-1] = 0  # no call of the region follows
    costs.gradient = rng.integers(0, 5, CALLS).astype(float)
    costs.keep = rng.integers(0, 9, (CALLS + 1, CALLS + 1)).astype(float)
    costs.peak = costs.keep + rng.integers(0, 9, costs.keep.shape)
    costs.seconds = rng.integers(1, 9, costs.keep.shape).astype(float)
    return costs


def ways(costs):
    """Each way to cut: the segments, their peak and their time."""
    for marks in itertools.product(["plain", "begin", "inside"], repeat=CALLS):
        segments, position, kept, peak, seconds = [], 0, 0.0, 0.0, 0.0
        while position < CALLS and marks[position] != "inside":
            if marks[position] == "plain":
                recomputed_next = position + 1 < CALLS and marks[position + 1] == "begin"
                more = costs.plain[position] + (costs.handed_on[position] if recomputed_next else 0)
                peak = max(peak, kept + more + costs.gradient[position])
                kept, position = kept + more, position + 1
                continue
            end = position + 1
            while end < CALLS and marks[end] == "inside":
                end += 1
            peak, kept = max(peak, kept + costs.peak[position, end]), kept + costs.keep[position, end]
            seconds += costs.seconds[position, end]
            segments.append((position, end))
            position = end
        if position == CALLS:
            yield segments, peak, seconds


def as_pairs(plan):
    return [[(segment.begin - 3, segment.end - 3) for segment in segments] for segments in plan.segments]


@pytest.mark.parametrize("seed", range(6))
def test_the_least_time_for_each_goal_and_the_least_peak(seed):
    costs = random_costs(np.random.default_rng(seed))
    known = {tuple(segments): (peak, seconds) for segments, peak, seconds in ways(costs)}
    least = min(peak for peak, _ in known.values())
    assert smallest_goal([costs]) == pytest.approx(least, rel=2e-3)
    assert plan_for([costs], least - 1) is None
    for goal in range(int(least), int(least) + 20):
        plan = plan_for([costs], goal)
        assert plan.seconds == min(seconds for peak, seconds in known.values() if peak <= goal)
        assert plan.peak <= goal
        assert known[tuple(as_pairs(plan)[0])] == (plan.peak, plan.seconds)
    for count in range(4):
        plan = plan_of_count([costs], count)
        (chosen,) = as_pairs(plan)
        assert len(chosen) <= count
        assert plan.peak == pytest.approx(min(p for cut, (p, _) in known.items() if len(cut) <= count), rel=2e-3)
        assert known[tuple(chosen)][0] <= plan.peak
        assert known[tuple(chosen)][1] == plan.seconds


def test_regions_share_a_goal():
    rng = np.random.default_rng(0)
    costs = [random_costs(rng), random_costs(rng)]
    one, two = ([list(way) for way in ways(each)] for each in costs)

    def kept(each, segments):
        inside = {i for begin, end in segments for i in range(begin, end)}
        plain = [i for i in range(CALLS) if i not in inside]
        begins = {begin for begin, _ in segments}
        handed_on = sum(each.handed_on[i] for i in plain if i + 1 in begins)
        return sum(each.keep[pair] for pair in segments) + sum(each.plain[plain]) + handed_on

    pairs = [
        (max(first[1], kept(costs[0], first[0]) + second[1]), first[2] + second[2])
        for first, second in itertools.product(one, two)
    ]
    least = min(peak for peak, _ in pairs)
    for goal in range(int(least), int(least) + 15):
        assert plan_for(costs, goal).seconds == min(seconds for peak, seconds in pairs if peak <= goal)
