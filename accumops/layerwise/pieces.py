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
from accumops.normalization.window_moments import Measured, Sums, Supplied, Tied, WindowMoments, statistics_at_hand

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]


def couples(layer: Any) -> bool:
    """Whether a layer couples the samples of a window."""
    return bool(getattr(layer, "follows_window", False))


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
        self.coupled_before = sum(i < begin for i in stages.coupled[stage])
        """The coupled calls of its stage that are in other pieces before it."""
        self.is_last = end == len(stages.calls)
        behind = [] if self.is_last or end != stages.range_of(stage)[1] else stages.coupled[stage + 1]
        self.measures = [stages.calls[i] for i in behind]
        """The coupled calls at the end of the piece, which need its outputs of all samples."""
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
        self.supplied: list[Supplied] = []
        """The statistics of its coupled calls, as of its last run."""


class Specs(NamedTuple):
    """What the leaves of tensors are like for a micro-batch of some shape."""

    tensors: dict[Key, list[tf.TensorSpec]]
    """Those that pieces give."""
    outputs: list[tf.TensorSpec]
    """Those of the model's outputs."""


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
        self.stages = stages_of(graph_of_calls(model, couples), couples)
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
        moments: Sequence[WindowMoments],
        measures: bool = False,
        ties: Sequence[tuple[WindowMoments, Sums]] = (),
        watch: Callable[[tf.Tensor], None] = lambda tensor: None,
    ) -> list[tf.Tensor]:
        """Makes the calls of a piece.

        Args:
            piece: The piece.
            x: The inputs of the model.
            tensors: The leaves of what the piece needs.
            moments: The moments of its coupled calls.
            measures: Whether to return the moments of the coupled calls at its end.
            ties: For these calls, their moments and sums, to return ties.
            watch: Has a tape watch a tensor.

        Returns:
            The leaves of what it gives, or of the outputs for the last piece; and behind them moments or ties.
        """
        values, rest = dict[Key, Any](), iter(tensors)
        for key in piece.needs:
            values[key] = self.leaves[key].filled([next(rest) for _ in self.leaves[key].tensors])
        piece.supplied = [Supplied(each, watch) for each in moments]
        more: list[tf.Tensor] = []

        def run(inputs: list[Any], settings: dict[str, Any]) -> list[Any]:
            values.update(zip(self.stages.graph.inputs, inputs, strict=True))
            supplied = iter(piece.supplied)
            for i, call in enumerate(piece.calls):
                if i in piece.coupled:
                    with statistics_at_hand(next(supplied)):
                        call.run(values, settings)
                else:
                    call.run(values, settings)
            for call in piece.measures if measures else ():
                measured = Measured()
                with statistics_at_hand(measured):
                    call.run(dict(values), settings)
                assert measured.moments is not None
                more.extend(measured.moments)
            for call, (its_moments, sums) in zip(piece.measures if ties else (), ties, strict=True):
                tied = Tied(its_moments, sums)
                with statistics_at_hand(tied):
                    call.run(dict(values), settings)
                assert tied.tie is not None
                more.append(tied.tie)
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
            return [*self.outputs.tensors, *more]
        self.leaves.update({key: Leaves(values[key]) for key in piece.gives})
        return [*(leaf for key in piece.gives for leaf in self.leaves[key].tensors), *more]

    def check(self, x: Any) -> Specs:
        """Returns the specs for a micro-batch. Each shape of one is checked once."""
        kind = str([(leaf.shape, leaf.dtype) for leaf in keras.tree.flatten(x) if leaf is not None])
        if kind not in self._specs:
            specs, outputs = dict[Key, list[tf.TensorSpec]](), list[tf.TensorSpec]()
            for piece in self.pieces:
                moments = [
                    WindowMoments(*(tf.TensorSpec(shape, tf.float64) for shape in ([], [channels], [channels])))
                    for channels in (piece.calls[i].operation.moving_mean.shape[0] for i in piece.coupled)
                ]
                given, losses = piece.stretch.check(x, [spec for key in piece.needs for spec in specs[key]], moments)
                piece.adds_losses = piece.adds_losses or bool(losses)
                rest = iter(given)
                if piece.is_last:
                    outputs = given
                else:
                    specs.update({key: [next(rest) for _ in self.leaves[key].tensors] for key in piece.gives})
            self._specs[kind] = Specs(specs, outputs)
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
