"""Where to keep tensors for a window that runs layer by layer.

Tensors that are kept lead from one stage to the next for all samples of the window. A stage whose inputs are not kept
is reached by running the stages before it again, from the tensors that were kept last. With k stages from one cut to
the next, each of them runs k + 1 times forward on average, and once backward.

A stage is cut where the fewest bytes cross: at the end of a residual block one tensor leads on, and within it two or
more do. So the cut lies anywhere in the stage, and not always at its coupled layer.

For a memory goal the cuts are a shortest path, as the segments of recompute are (`memory/cuts.py`): what cuts keep adds
up, and the gradient of a stage has to fit beside what the cuts before it keep.
"""

import math
from typing import NamedTuple

import keras
import numpy as np

from accumops.adapters.keras_functional import graph_of
from accumops.layerwise.stages import Stages
from accumops.memory.cuts import States
from accumops.memory.recompute_layers import fixed_bytes, measured
from accumops.memory.segments import regions_of
from accumops.sizes import readable


class Cut(NamedTuple):
    """A position where tensors are kept."""

    stage: int
    """The stage that it lies in. The stages behind it are run from here."""
    position: int
    """The position in the list of calls, behind the calls that make the tensors."""
    bytes: int
    """What is kept of a sample."""


def cuts_of(stages: Stages) -> list[Cut]:
    """Returns the position in each stage but the last where the fewest bytes cross, and the latest of such."""
    cuts = []
    for stage in range(len(stages) - 1):
        begin, end = stages.range_of(stage)
        positions = range(begin + 1, end + 1) or [end]
        smallest, at = min((stages.size(stages.crossing(at)), -at) for at in positions)
        cuts.append(Cut(stage, -at, smallest))
    return cuts


def plan_every(stages: Stages, every: int) -> list[Cut]:
    """Returns the cuts that keep the fewest bytes, with at most `every` stages from one to the next."""
    nothing: tuple[int, list[Cut]] = (0, [])
    best: list[tuple[int, list[Cut]]] = []  # for each stage: what is kept, if its cut is the last one so far

    def reaching(stage: int) -> tuple[int, list[Cut]]:
        before = ([nothing] if stage < every else []) + best[max(0, stage - every) : stage]
        return min(before, key=lambda each: each[0])

    for cut in cuts_of(stages):
        kept, chosen = reaching(cut.stage)
        best.append((kept + cut.bytes, [*chosen, cut]))
    return reaching(len(stages) - 1)[1]


class StageCosts(NamedTuple):
    """What stages cost."""

    seconds: list[float]
    """The time of the forward pass of each."""
    work: list[float]
    """The bytes that the gradient of each works on, for a micro-batch."""
    led_on: list[int]
    """The bytes of a sample that lead into each."""


def costs_of_stages(model: keras.Model, stages: Stages, micro_batch_size: int) -> StageCosts:
    """Measures what stages cost.

    Args:
        model: The model.
        stages: Its stages.
        micro_batch_size: Samples a micro-batch.
    """
    regions = regions_of(graph_of(model))
    calls, costs = measured(model, regions, micro_batch_size)
    by_node = {
        id(node.keras_node): (call, seconds)
        for region, of_region, cost in zip(regions, calls, costs, strict=True)
        for node, call, seconds in zip(region.nodes, of_region, cost.times, strict=True)
    }
    seconds, work, led_on = [], [], []
    for stage in range(len(stages)):
        begin, end = stages.range_of(stage)
        own = [by_node[id(call.node.keras_node)] for call in stages.calls[begin:end] if not call.casts]
        seconds.append(float(sum(each for _, each in own)))
        kept = sum(each.size for call, _ in own for each in call.kept.values())
        work.append(float(kept + max((max(call.backward, call.forward) for call, _ in own), default=0)))
        led_on.append(stages.size(stages.crossing(begin)))
    return StageCosts(seconds, work, led_on)


def plan_for_memory(model: keras.Model, stages: Stages, samples: int, micro_batch_size: int, goal: int) -> list[Cut]:
    """Returns the cuts with the least recomputation whose peak keeps to a goal.

    Args:
        model: The model.
        stages: Its stages.
        samples: Samples a window.
        micro_batch_size: Samples a micro-batch.
        goal: Bytes for weights, a batch, and all that the window keeps and works on.

    Raises:
        ValueError: If no cuts keep to the goal; the message has the smallest one that some keep to.
    """
    costs = costs_of_stages(model, stages, micro_batch_size)
    fixed = fixed_bytes(model, samples)
    found = _fastest(stages, costs, samples, goal - fixed)
    if found is None:
        low, high = float(goal - fixed), 2.0 * _most(stages, costs, samples)
        while high - low > 0.01 * abs(high):
            middle = (low + high) / 2
            low, high = (middle, high) if _fastest(stages, costs, samples, middle) is None else (low, middle)
        raise ValueError(
            f"No window of {samples} samples of '{model.name}' keeps to memory={readable(goal)} in micro-batches of "
            f"{micro_batch_size}. The smallest goal that one keeps to is {readable(math.ceil(high) + fixed)}, "
            f"{readable(fixed)} of which are the weights and the batch. Give more memory, or a smaller batch."
        )
    return found


def _most(stages: Stages, costs: StageCosts, samples: int) -> float:
    return samples * (sum(cut.bytes for cut in cuts_of(stages)) + max(costs.led_on)) + max(costs.work)


def _fastest(stages: Stages, costs: StageCosts, samples: int, goal: float) -> list[Cut] | None:
    """The cuts with the least recomputation that keep to a goal."""
    cuts, last = cuts_of(stages), len(stages) - 1
    led_on = [*costs.led_on, 0]

    def segment(behind: int, end: int) -> tuple[float, float]:
        """The peak of the stages behind one stage up to another, apart from what is kept, and the time of replays."""
        own = range(behind + 1, end + 1)
        peak = max(samples * max(led_on[stage], led_on[stage + 1]) + costs.work[stage] for stage in own)
        again = sum(costs.seconds[stage] * (2 * (end - stage) - (end == last and stage < last)) for stage in own)
        return peak, again

    # The point of a stage is its number + 1; point 0 is the window's data.
    reached = [States.start()]
    for end in range(last + 1):
        ways = []
        for behind in range(-1, end):
            peak, again = segment(behind, end)
            kept = 0.0 if end == last else float(cuts[end].bytes * samples)
            ways.append(reached[behind + 1].moved(kept, max(peak, kept), again, goal, behind + 1, 0))
        reached.append(States.best(ways))
    if not len(reached[-1].kept):
        return None
    chosen: list[Cut] = []
    point, index = last + 1, int(np.lexsort((reached[-1].peak, reached[-1].seconds))[0])
    while point > 0:
        if 0 < point <= last:
            chosen.append(cuts[point - 1])
        point, index = (int(each) for each in reached[point].origin[index][:2])
    return chosen[::-1]
