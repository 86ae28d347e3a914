"""Where to keep tensors for a window that runs layer by layer.

Tensors that are kept lead from one stage to the next for all samples of the window. A stage whose inputs are not kept
is reached by running the stages before it again, from the tensors that were kept last. With k stages from one kept
position to the next, each of them runs k + 1 times forward on average, and once backward.

A stage is cut where the fewest bytes cross: at the end of a residual block one tensor leads on, and within it two or
more do. So the cut lies anywhere in the stage, and not always at its coupled layer.
"""

from typing import NamedTuple

from accumops.layerwise.stages import Stages


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
        sizes = [(stages.size(stages.crossing(at)), -at) for at in range(begin + 1, end + 1)]
        smallest, at = min(sizes)
        cuts.append(Cut(stage, -at, smallest))
    return cuts


def plan_every(stages: Stages, every: int) -> list[Cut]:
    """Returns the cuts that keep the fewest bytes, with at most `every` stages from one to the next."""
    cuts = cuts_of(stages)
    best: list[
        tuple[int, list[Cut]]
    ] = []  # for each stage: what the cuts before it keep, if it is the last that is cut
    for cut in cuts:
        before: list[tuple[int, list[Cut]]] = [(0, [])] if cut.stage < every else []
        before += best[max(0, cut.stage - every) : cut.stage]
        kept, chosen = min(before, key=lambda each: each[0])
        best.append((kept + cut.bytes, [*chosen, cut]))
    last = len(stages) - 1
    none: list[tuple[int, list[Cut]]] = [(0, [])] if last < every else []
    ends = none + best[max(0, last - every) : last]
    return min(ends, key=lambda each: each[0])[1]
