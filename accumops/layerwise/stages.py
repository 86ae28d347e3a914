"""A graph in stages: what lies between layers that couple samples.

A layer that couples samples, such as batch normalization, needs all samples of the window before it can go on. The
graph is cut there, and each stage is run for all micro-batches before the next one. Coupled calls that do not depend on
each other stand at the same cut. So the number of stages is the number of coupled calls on the longest path.

Each call is made as late as it can be: in the backward pass, gradients of what comes late are let go early.
"""

import dataclasses
from collections.abc import Sequence

from accumops.layerwise.graph import Call, Graph, Key
from accumops.window.coupling import couples


@dataclasses.dataclass(frozen=True)
class Stages:
    """The calls of a graph, in stages.

    A stage begins with its coupled calls, except for the first one, which has none.
    """

    calls: list[Call]
    """All calls, in an order in which they can be made."""
    begins: list[int]
    """The position of the first call of each stage."""
    coupled: list[list[int]]
    """For each stage the positions of its coupled calls."""
    graph: Graph

    def __post_init__(self) -> None:
        made = dict.fromkeys(self.graph.inputs, -1)
        last = dict.fromkeys(self.graph.inputs, -1)
        for i, call in enumerate(self.calls):
            made |= dict.fromkeys(call.outputs, i)
            last |= dict.fromkeys(call.inputs, i)
        last |= {key: len(self.calls) for key in self.graph.outputs}
        object.__setattr__(self, "_made", made)
        object.__setattr__(self, "_last", last)

    def __len__(self) -> int:
        return len(self.begins)

    def range_of(self, stage: int) -> tuple[int, int]:
        """The position of the first call of a stage, and the position behind its last one."""
        return self.begins[stage], self.begins[stage + 1] if stage + 1 < len(self) else len(self.calls)

    def crossing(self, position: int) -> list[Key]:
        """The tensors that calls before a position make and calls from there on, or outputs, use."""
        made: dict[Key, int] = self._made  # type: ignore[attr-defined]
        last: dict[Key, int] = self._last  # type: ignore[attr-defined]
        return [key for key, at in made.items() if 0 <= at < position <= last.get(key, -1)]

    def size(self, keys: Sequence[Key]) -> int:
        """The bytes of a sample in some tensors."""
        return sum(self.graph.bytes_of.get(key, 0) for key in keys)


def stages_of(graph: Graph) -> Stages:
    """Returns a graph in stages.

    Args:
        graph: The graph.
    """
    calls = graph.calls
    coupled = [not call.casts and couples(call.operation) for call in calls]
    maker = {key: i for i, call in enumerate(calls) for key in call.outputs}
    behind = [0] * len(calls)  # the coupled calls that have to follow each call
    for i in reversed(range(len(calls))):
        for key in calls[i].inputs:
            if key in maker:
                before = maker[key]
                behind[before] = max(behind[before], behind[i] + coupled[i])
    depth = max((each + is_coupled for each, is_coupled in zip(behind, coupled, strict=True)), default=0)
    stage = [depth - each for each in behind]
    # The coupled calls of a stage come first: the stage begins when their totals are known.
    order = sorted(range(len(calls)), key=lambda i: (stage[i], not coupled[i], i))
    ordered, of_order = [calls[i] for i in order], [stage[i] for i in order]
    begins = [
        next((at for at, each in enumerate(of_order) if each >= number), len(order)) for number in range(depth + 1)
    ]
    positions: list[list[int]] = [[] for _ in range(depth + 1)]
    for at, i in enumerate(order):
        if coupled[i]:
            positions[stage[i]].append(at)
    return Stages(ordered, begins, positions, graph)
