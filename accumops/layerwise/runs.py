"""Runs of the pieces of a model for the micro-batches of one window: the first one, and those that have its bits."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from accumops.adapters.keras_layer import values_of
from accumops.layerwise.graph import Key
from accumops.layerwise.micro_batches import Carried, Index, Kept, MicroBatches
from accumops.layerwise.pieces import Piece, PiecesOfModel
from accumops.memory.recompute import Leaves
from accumops.memory.replay import Run
from accumops.window.coupling import Tensors

NUMBER = tf.TensorSpec([], tf.float64)
"""What losses of layers and what they count for are summed and kept in, whatever the model computes in."""
Values = dict[Key, Any]
"""The tensors of a micro-batch."""
Watch = Callable[[tf.Tensor], None]


def _nothing(tensor: tf.Tensor) -> None:
    """Watches nothing."""


class Runs:
    """The runs of one window.

    Args:
        model: The model in pieces.
        data: The micro-batches.
        inputs_of: Returns the inputs in the data of a micro-batch.
    """

    def __init__(self, model: PiecesOfModel, data: MicroBatches, inputs_of: Callable[[Any], Any]) -> None:
        self._model, self._data, self._inputs_of = model, data, inputs_of
        self._specs = model.check(inputs_of(data.example()))
        self.output_specs = self._specs.outputs
        """What the leaves of the outputs are like."""
        self.totals_specs = self._specs.totals
        """What the totals of each stage's coupled calls are like."""
        state = {id(each): each for piece in model.pieces for each in piece.stretch.variables}
        self._variables = list(state.values())
        self._state = dict(zip(state, values_of(self._variables), strict=True))
        """The values of the variables that calls assign, by the identity of the variable."""
        self._first: dict[int, Kept] = {}
        """The state that a piece began with in each micro-batch, by the number of the piece."""
        self._losses: dict[int, Kept] = {}
        """The sum of the losses that layers of a piece have added."""
        self._cuts: dict[int, Kept] = {}
        """The tensors at each cut, by its stage."""
        self.totals: dict[int, list[Tensors]] = {0: []}
        """The totals of each stage's coupled calls, once they are known."""
        self.sums: dict[int, list[Tensors]] = {}
        """The sums of each stage's coupled calls, once they are known."""

    # In the body of a loop over micro-batches

    def reach(self, stage: int, i: Index, data: Any, kept: dict[str, Kept]) -> Values:
        """Returns the tensors of a micro-batch where a stage begins.

        The tensors of the cut before it are let go if the loop has them among what it writes.
        """
        cut, between = self._model.path_to(stage)
        values: Values = {}
        if cut is not None:
            rest = iter((kept.get("cut before") or self._cuts[cut.stage]).read(i))
            if "cut before" in kept:
                kept["cut before"] = kept["cut before"].without(i)
            self._unpack(self._model.stages.crossing(cut.position), rest, values)
        for piece in between:
            self.again(piece, i, data, values)
        return values

    def first(
        self,
        piece: Piece,
        i: Index,
        data: Any,
        values: Values,
        kept: dict[str, Kept],
        carried: Carried,
        watch: Watch = _nothing,
    ) -> tuple[Run, list[Tensors]]:
        """Runs a piece for the first time, and keeps what running it again takes.

        Returns:
            The run, and the totals of the coupled calls behind the piece.
        """
        state = dict(zip(map(id, self._variables), carried["state"], strict=True))
        before = [state[id(each)] for each in piece.stretch.variables]
        kept[f"state {piece.number}"] = kept[f"state {piece.number}"].written(i, before)
        run = self._run(piece, before, data, values, collect_moments=True, measures=True, watch=watch)
        state |= dict(zip(map(id, piece.stretch.variables), run.state, strict=True))
        carried["state"] = [state[id(each)] for each in self._variables]
        if piece.adds_losses:
            total = tf.add_n([tf.cast(tf.reduce_sum(each), NUMBER.dtype) for each in run.losses])
            kept[f"losses {piece.number}"] = kept[f"losses {piece.number}"].written(i, [total])
        outputs, totals = run.outputs
        self._unpack(piece.gives, iter(outputs), values)
        return run._replace(outputs=outputs), totals

    def again(
        self, piece: Piece, i: Index, data: Any, values: Values, *, ties: bool = False, watch: Watch = _nothing
    ) -> tuple[Run, list[tf.Tensor]]:
        """Runs a piece again.

        Returns:
            The run, and with `ties` the ties of the coupled calls behind the piece.
        """
        tied = []
        if ties and not piece.is_last:
            tied = list(zip(self.totals[piece.stage + 1], self.sums[piece.stage + 1], strict=True))
        before = self._first[piece.number].read(i)
        run = self._run(piece, before, data, values, collect_moments=False, ties=tied, watch=watch)
        outputs, its_ties = run.outputs
        self._unpack(piece.gives, iter(outputs), values)
        return run._replace(outputs=outputs), its_ties

    def losses_before(self, i: Index) -> tf.Tensor | None:
        """The sum of what layers of earlier stages have added to a micro-batch, or None if they add nothing."""
        losses = [each.read(i)[0] for each in self._losses.values()]
        return tf.add_n(losses) if losses else None

    def _run(self, piece: Piece, state: list[tf.Tensor], data: Any, values: Values, **settings: Any) -> Run:
        begin = piece.coupled_before
        totals = self.totals[piece.stage][begin : begin + len(piece.coupled)] if piece.coupled else []
        return piece.stretch.run(state, self._inputs_of(data), leaves_of(piece.needs, values), totals, **settings)

    def _unpack(self, keys: Sequence[Key], tensors: Any, values: Values) -> None:
        for key in keys:
            leaves = self._model.leaves[key]
            values[key] = leaves.filled([next(tensors) for _ in leaves.tensors])

    # Around a loop

    def room(self, pieces: Sequence[Piece]) -> dict[str, Kept]:
        """Room for what the first runs of pieces keep."""
        room = {}
        for piece in pieces:
            specs = [tf.TensorSpec(each.shape, each.dtype) for each in piece.stretch.variables]
            room[f"state {piece.number}"] = self._data.room_for(specs, rows=False)
            if piece.adds_losses:
                room[f"losses {piece.number}"] = self._data.room_for([NUMBER], rows=False)
        return room

    def carried(self) -> Carried:
        """What first runs carry from one micro-batch to the next."""
        return {"state": list(self._state.values())}

    def take(self, pieces: Sequence[Piece], kept: dict[str, Kept], carried: Carried) -> None:
        """Takes what the first runs of pieces have kept and carried."""
        for piece in pieces:
            self._first[piece.number] = kept[f"state {piece.number}"]
            if piece.adds_losses:
                self._losses[piece.number] = kept[f"losses {piece.number}"]
        self._state = dict(zip(self._state, carried.pop("state"), strict=True))

    def keep_cut(self, stage: int, kept: Kept) -> None:
        """Keeps the tensors at the cut of a stage."""
        self._cuts[stage] = kept

    def last_use_of_cut(self, stage: int) -> dict[str, Kept]:
        """Returns the tensors that a stage is run from, for its loop to let go, if no other stage needs them."""
        cut, _ = self._model.path_to(stage)
        if cut is None or cut.stage != stage - 1:
            return {}
        return {"cut before": self._cuts.pop(cut.stage)}

    def specs_of(self, keys: Sequence[Key]) -> list[tf.TensorSpec]:
        """The specs of the leaves of tensors."""
        return [spec for key in keys for spec in self._specs.tensors[key]]

    def takes_gradient(self, key: Key) -> bool:
        """Whether a gradient flows to a tensor."""
        return key in self._model.trained and any(spec.dtype.is_floating for spec in self._specs.tensors[key])

    def assign_state(self) -> None:
        """Assigns what the calls would have assigned."""
        for variable in self._variables:
            variable.assign(self._state[id(variable)])


def leaves_of(keys: Sequence[Key], values: Values) -> list[tf.Tensor]:
    """The leaves of tensors: masks, and the parts of composite tensors, included."""
    return [leaf for key in keys for leaf in Leaves(values[key]).tensors]
