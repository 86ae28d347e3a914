"""A model in pieces that can be run by themselves, each from the tensors that lead into it."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import graph_of, run_of, set_run
from accumops.layerwise.graph import Key, graph_of_calls
from accumops.layerwise.plan import Cut
from accumops.layerwise.stages import Stages, stages_of
from accumops.memory.recompute import Leaves
from accumops.memory.replay import Stretch
from accumops.window.coupling import Coupling, Supplying, Tensors, having_at_hand

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
Outputs = tuple[list[tf.Tensor], list[Any]]
"""The leaves of what a piece gives, or of the model's outputs; and totals or ties of the coupled calls behind it."""


class Piece:
    """Calls of a stage that follow each other, with no cut among them.

    Args:
        stages: The stages.
        number: The number of the piece.
        stage: The number of the stage.
        begin: The position of the first call.
        end: The position behind the last one.
        run: Runs the piece; see `PiecesOfModel`.
    """

    def __init__(self, stages: Stages, number: int, stage: int, begin: int, end: int, run: Callable[..., Any]) -> None:
        self.number, self.stage, self.begin, self.end = number, stage, begin, end
        self.calls = stages.calls[begin:end]
        self.coupled = [i - begin for i in stages.coupled[stage] if begin <= i < end]
        self.couplings: list[Coupling] = [self.calls[i].operation.coupling() for i in self.coupled]
        self.coupled_before = sum(i < begin for i in stages.coupled[stage])
        """The coupled calls of its stage that are in other pieces before it."""
        self.is_last = end == len(stages.calls)
        behind = [] if self.is_last or end != stages.range_of(stage)[1] else stages.coupled[stage + 1]
        self.measures = [stages.calls[i] for i in behind]
        """The coupled calls at the end of the piece, which need its outputs of all samples."""
        self.couplings_behind: list[Coupling] = [call.operation.coupling() for call in self.measures]
        made = {key for call in self.calls for key in call.outputs} | set(stages.graph.inputs)
        used = {key: None for call in [*self.calls, *self.measures] for key in call.inputs}
        used |= dict.fromkeys(stages.graph.outputs if self.is_last else ())
        self.needs = [key for key in used if key not in made]
        """The tensors from before that it uses."""
        used_behind = set() if self.is_last else set(stages.crossing(end))
        self.gives = [key for call in self.calls for key in call.outputs if key in used_behind]
        """The tensors that it makes and that are used behind it."""
        layers = {id(call.operation): call.operation for call in self.calls if not call.casts}
        self.layers = [each for each in layers.values() if isinstance(each, keras.Layer)]
        self.stretch = Stretch(self.layers, functools.partial(run, self))
        self.adds_losses = False
        """Whether its layers add losses, as found by `PiecesOfModel.check`."""
        self.supplied: list[Supplying] = []
        """What was at hand for its coupled calls, in its last run."""


class Specs(NamedTuple):
    """What the leaves of tensors are like for a micro-batch of some shape."""

    tensors: dict[Key, list[tf.TensorSpec]]
    """Those that pieces give."""
    outputs: list[tf.TensorSpec]
    """Those of the model's outputs."""
    totals: list[list[list[tf.TensorSpec]]]
    """The totals of each stage's coupled calls."""


class PiecesOfModel:
    """A model in pieces.

    Args:
        model: The functional or Sequential model, built.
        call: Calls it with a micro-batch of inputs, in training.
        plan: Returns the cuts of the model's stages.

    Raises:
        ValueError: If the model cannot be cut at a layer that couples samples.
    """

    def __init__(self, model: keras.Model, call: Callable[[Any], Any], plan: Callable[[Stages], list[Cut]]) -> None:
        self._graph = graph_of(model)
        self._call = call
        self.stages = stages_of(graph_of_calls(model))
        self.cuts = plan(self.stages)
        self.pieces = list(self._cut_in_pieces())
        """The pieces, in their order."""
        self.leaves: dict[Key, Leaves] = {}
        self.outputs = Leaves(None)
        self._specs: dict[str, Specs] = {}
        self.trained = _behind_trained(self.stages)

    # A piece

    def _run(
        self,
        piece: Piece,
        x: Any,
        tensors: Sequence[tf.Tensor],
        totals: Sequence[Tensors],
        measures: bool = False,
        ties: Sequence[tuple[Tensors, Tensors]] = (),
        watch: Callable[[tf.Tensor], None] = lambda tensor: None,
    ) -> Outputs:
        """Makes the calls of a piece.

        Args:
            piece: The piece.
            x: The inputs of the model.
            tensors: The leaves of what the piece needs.
            totals: The totals of its coupled calls.
            measures: Whether to return the totals of the coupled calls at its end.
            ties: For these calls, their totals and sums, to return ties.
            watch: Has a tape watch a tensor.
        """
        values, rest = dict[Key, Any](), iter(tensors)
        for key in piece.needs:
            values[key] = self.leaves[key].filled([next(rest) for _ in self.leaves[key].tensors])
        piece.supplied = [
            coupling.supplying(each, watch) for coupling, each in zip(piece.couplings, totals, strict=True)
        ]
        more: list[Any] = []

        def run(inputs: list[Any], settings: dict[str, Any]) -> list[Any]:
            values.update(zip(self.stages.graph.inputs, inputs, strict=True))
            supplied = iter(piece.supplied)
            for i, call in enumerate(piece.calls):
                if i in piece.coupled:
                    with having_at_hand(next(supplied)):
                        call.run(values, settings)
                else:
                    call.run(values, settings)
            behind = list(zip(piece.measures, piece.couplings_behind, strict=True))
            for call, coupling in behind if measures else ():
                measuring = coupling.measuring()
                with having_at_hand(measuring):
                    call.run(dict(values), settings)
                more.append(list(measuring.totals))
            for (call, coupling), (its_totals, sums) in zip(behind if ties else (), ties, strict=True):
                tying = coupling.tying(its_totals, sums)
                with having_at_hand(tying):
                    call.run(dict(values), settings)
                more.append(tying.tie)
            if piece.is_last:
                return [values[key] for key in self.stages.graph.outputs]
            return [tf.zeros([1]) for _ in self.stages.graph.outputs]

        before = run_of(self._graph)
        set_run(self._graph, run)
        try:
            outputs = self._call(x)
        finally:
            set_run(self._graph, before)
        if piece.is_last:
            self.outputs = Leaves(outputs)
            return list(self.outputs.tensors), more
        self.leaves.update({key: Leaves(values[key]) for key in piece.gives})
        return [leaf for key in piece.gives for leaf in self.leaves[key].tensors], more

    def check(self, x: Any) -> Specs:
        """Returns the specs for a micro-batch. Each shape of one is checked once."""
        kind = str([(leaf.shape, leaf.dtype) for leaf in keras.tree.flatten(x) if leaf is not None])
        if kind not in self._specs:
            specs, outputs = dict[Key, list[tf.TensorSpec]](), list[tf.TensorSpec]()
            totals: list[list[list[tf.TensorSpec]]] = [[] for _ in range(len(self.stages))]
            for piece in self.pieces:
                known = totals[piece.stage][piece.coupled_before :][: len(piece.coupled)]
                needs = [spec for key in piece.needs for spec in specs[key]]
                (given, behind), losses = piece.stretch.check(x, needs, known, measures=True)
                piece.adds_losses = piece.adds_losses or bool(losses)
                rest = iter(given)
                if piece.is_last:
                    outputs = given
                else:
                    specs.update({key: [next(rest) for _ in self.leaves[key].tensors] for key in piece.gives})
                if piece.measures:
                    totals[piece.stage + 1] = behind
            self._specs[kind] = Specs(specs, outputs, totals)
        return self._specs[kind]

    def _cut_in_pieces(self) -> Iterator[Piece]:
        number = itertools.count()
        for stage in range(len(self.stages)):
            begin, end = self.stages.range_of(stage)
            inside = [cut.position for cut in self.cuts if cut.stage == stage and begin < cut.position < end]
            for each in itertools.pairwise([begin, *inside, end]):
                yield Piece(self.stages, next(number), stage, *each, self._run)

    def pieces_of(self, stage: int) -> list[Piece]:
        """The pieces of a stage."""
        return [piece for piece in self.pieces if piece.stage == stage]

    def path_to(self, stage: int) -> tuple[Cut | None, list[Piece]]:
        """The cut that a stage is run from, and the pieces between that cut and the stage."""
        cut = max((cut for cut in self.cuts if cut.stage < stage), default=None)
        begin = 0 if cut is None else cut.position
        return cut, [piece for piece in self.pieces if begin <= piece.begin and piece.stage < stage]


def _behind_trained(stages: Stages) -> set[Key]:
    """The tensors that trainable variables lead to."""
    found: set[Key] = set()
    for call in stages.calls:
        trains = isinstance(call.operation, keras.Layer) and bool(call.operation.trainable_variables) and not call.casts
        if trains or found.intersection(call.inputs):
            found.update(call.outputs)
    return found
