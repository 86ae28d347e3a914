"""Runs a window stage by stage.

Forward, for each stage but the last:

    for each micro-batch: run the stage; keep what its cut keeps; add the moments of the coupled calls that follow
    the moments of the window are known

The last stage has the loss. Its gradient, and in reverse order the gradients of the stages before it:

    for each micro-batch: run the stage again, and backward from the gradients that the stage behind it has left
    the sums of the coupled calls are known

A stage is run from the tensors that were kept last before it. The stages between are run again. That is local to a
micro-batch, whatever coupled calls are between: their moments are known. Second runs have the bits of the first
(`memory/replay.py`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import values_of
from accumops.layerwise.graph import Key
from accumops.layerwise.micro_batches import Carried, Index, Kept, MicroBatches
from accumops.layerwise.pieces import Piece, PiecesOfModel
from accumops.memory.recompute import Leaves
from accumops.memory.replay import Run
from accumops.normalization import replica_moments
from accumops.normalization.window_moments import Sums, WindowMoments
from accumops.window import replicas

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
Add = Callable[[Gradients, Sequence[keras.Variable], "tf.Tensor | bool"], None]


Watch = Callable[[tf.Tensor], None]
WindowLoss = Callable[[Any, "tf.Tensor | None"], tf.Tensor]


_NUMBER = tf.TensorSpec([], tf.float64)
"""What losses of layers and what they count for are summed and kept in, whatever the model computes in."""


def _nothing(tensor: tf.Tensor) -> None:
    """Watches nothing."""


class Loss(Protocol):
    """The loss of a micro-batch."""

    def __call__(
        self, data: Any, outputs: Any, losses: Sequence[tf.Tensor], before: tf.Tensor, carried: Carried
    ) -> Any:
        """Returns the loss, times what it counts for in the window, and the factor in it of losses that layers add.

        Args:
            data: The data of the micro-batch.
            outputs: The model's outputs.
            losses: What layers of the last stage have added.
            before: The sum of what layers of other stages have added, for the logs.
            carried: Tensors that go from one micro-batch to the next.
        """


class LayerwiseWindow:
    """One window that runs.

    Args:
        model: The model in pieces.
        data: The micro-batches.
        inputs_of: Returns the inputs in the data of a micro-batch.
        add: Takes gradients, their variables, and whether they are the window's first.
        variables: The trainable variables.
    """

    def __init__(
        self,
        model: PiecesOfModel,
        data: MicroBatches,
        inputs_of: Callable[[Any], Any],
        add: Add,
        variables: Sequence[keras.Variable],
    ) -> None:
        self._model, self._stages, self._data, self._inputs_of, self._add = model, model.stages, data, inputs_of, add
        self._trainable = list(variables)
        self._specs = model.check(inputs_of(data.example()))
        state = {id(each): each for piece in model.pieces for each in piece.stretch.variables}
        self._state_variables = list(state.values())
        self._state = dict(zip(state, values_of(self._state_variables), strict=True))
        """The values of the variables that calls assign, by the identity of the variable."""
        self._first: dict[int, Kept] = {}
        """The state that a piece began with in each micro-batch, by the piece's number."""
        self._losses: dict[int, Kept] = {}
        """The sum of the losses that layers of a piece have added."""
        self._cut_at: dict[int, Kept] = {}
        """The tensors at each cut, by its stage."""
        self._adds_losses = False
        self._factors: Kept | None = None
        """What each micro-batch's added losses count for."""
        self._factor_of_sample: tf.Tensor | None = None
        """Where the loss is one of the window: what they count for, by sample."""
        self._outputs = data.room_for([])
        """The leaves of the outputs, where the loss is one of the window."""
        self._moments: dict[int, list[WindowMoments]] = {0: []}
        """The moments of each stage's coupled calls."""
        self._sums: dict[int, list[Sums]] = {}
        self._gradients: dict[Key, Kept] = {}
        """The gradients of tensors that lead from an earlier stage into the one in hand or a later one."""

    def run(self, loss: Loss, carried: Carried) -> Carried:
        """Adds up the gradients of the micro-batches' losses.

        Args:
            loss: The loss.
            carried: The tensors that its first call gets.

        Returns:
            The tensors that its last call has left.
        """
        last = len(self._stages) - 1
        for stage in range(last):
            self._forward(stage)
        carried = self._last_stage(loss, carried)
        for stage in reversed(range(last)):
            self._backward(stage)
        self._finish()
        return carried

    def run_over_window(self, loss: WindowLoss, dtype: tf.DType) -> None:
        """Adds up the gradients of one loss of the whole window.

        Args:
            loss: Takes the outputs of the window, and the mean over its samples of the losses that layers have added,
                or None if none do. Returns the loss.
            dtype: The dtype to add layers' losses in.
        """
        for stage in range(len(self._stages)):
            self._forward(stage)
        slices = self._data.slices
        samples = tf.cast(slices.count, dtype)
        added = tf.zeros([], dtype)
        with tf.GradientTape() as tape:
            rows = [self._data.all_rows(self._outputs, number) for number in range(len(self._outputs.arrays))]
            tape.watch([each for each in rows if each.dtype.is_floating])
            if self._adds_losses:
                added += self._sum_of_losses(dtype) / samples
                tape.watch(added)
            value = loss(self._model.outputs.filled(rows), added if self._adds_losses else None)
        of_variables, of_rows, of_added = tape.gradient(value, (self._trainable, rows, added))
        self._add(of_variables, self._trainable, True)
        self._factor_of_sample = None if of_added is None else of_added / samples
        upstream = [None if each is None else tf.convert_to_tensor(each) for each in of_rows]
        for stage in reversed(range(len(self._stages))):
            self._backward(stage, upstream if stage == len(self._stages) - 1 else None)
        self._finish()

    def _finish(self) -> None:
        """Assigns what the calls would have assigned."""
        for variable in self._state_variables:
            variable.assign(self._state[id(variable)])
        self._move_statistics()

    def _sum_of_losses(self, dtype: tf.DType) -> tf.Tensor:
        """The sum of what layers have added to the micro-batches, each times its samples."""

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            samples = tf.cast(self._data.samples(i), dtype)
            losses = [tf.cast(each.read(i)[0], dtype) for each in self._losses.values()]
            carried["sum"] = [carried["sum"][0] + samples * tf.add_n(losses)]

        _, carried = self._data.each(body, {}, {"sum": [tf.zeros([], dtype)]})
        return carried["sum"][0]

    # Forward

    def _forward(self, stage: int) -> None:
        """Runs a stage for all micro-batches, and finds the moments of the coupled calls that follow."""
        own = self._model.pieces_of(stage)
        cut = next((cut for cut in self._model.cuts if cut.stage == stage), None)
        keys = [] if cut is None else self._stages.crossing(cut.position)
        channels = [call.operation.moving_mean.shape[0] for call in own[-1].measures]

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            x = self._inputs_of(data)
            values = self._reach(stage, i, x, kept)
            for piece in own:
                run, moments = self._first_run(piece, i, x, values, kept, carried)
                if cut is not None and cut.position == piece.end:
                    kept["cut"] = kept["cut"].written(i, self._packed(keys, values))
            if own[-1].is_last:
                kept["outputs"] = kept["outputs"].written(i, run.outputs)
            merged = [a.merged(b) for a, b in zip(_in_threes(carried["moments"]), moments, strict=True)]
            carried["moments"] = list(itertools.chain(*merged))

        room = self._room(own) | {"cut": self._data.room_for(self._specs_of(keys))}
        if own[-1].is_last:
            room["outputs"] = self._data.room_for(self._model.output_specs)
        carried = self._carried_state(own)
        carried["moments"] = [part for each in channels for part in WindowMoments.none(each)]
        kept, carried = self._data.each(body, room, carried)
        self._take(own, kept, carried)
        if cut is not None:
            self._cut_at[stage] = kept["cut"]
        self._outputs = kept.get("outputs", self._outputs)
        self._moments[stage + 1] = _over_replicas(_in_threes(carried["moments"]))

    def _last_stage(self, loss: Loss, carried: Carried) -> Carried:
        """Runs the last stage and its gradient."""
        stage = len(self._stages) - 1
        own = self._model.pieces_of(stage)
        needs = self._needs(own)
        received = [key for key in needs if self._takes_gradient(key)]

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            x = self._inputs_of(data)
            values = self._reach(stage, i, x, kept)
            with tf.GradientTape() as tape:
                tape.watch(self._floating(received, values))
                for piece in own:
                    run, _ = self._first_run(piece, i, x, values, kept, carried, tape.watch)
                before = tf.add_n([_no_loss(), *(each.read(i)[0] for each in self._losses.values() if each.arrays)])
                value, factor = loss(data, self._model.outputs.filled(run.outputs), run.losses, before, carried)
            kept["factors"] = kept["factors"].written(i, [factor])
            self._add_gradients(tape, [value], None, own, self._trainable, received, i, values, kept, carried)

        room = self._room(own) | {"factors": self._data.room_for([_NUMBER], rows=False)}
        kept, carried = self._with_gradients(body, own, received, room, self._carried_state(own) | carried)
        self._take(own, kept, carried)
        self._factors = kept["factors"]
        return carried

    # Backward

    def _backward(self, stage: int, of_outputs: Sequence[tf.Tensor | None] | None = None) -> None:
        """Runs a stage again, and its gradient.

        Args:
            stage: The stage.
            of_outputs: For the last stage, the gradients of the leaves of the window's outputs.
        """
        own = self._model.pieces_of(stage)
        received = [key for key in self._needs(own) if self._takes_gradient(key)]
        given = [key for piece in own for key in piece.gives if key in self._gradients]
        variables = list({id(each): each for piece in own for each in piece.stretch.trainable}.values())

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            x = self._inputs_of(data)
            values = self._reach(stage, i, x, kept)
            with tf.GradientTape() as tape:
                tape.watch(self._floating(received, values))
                losses: list[tf.Tensor] = []
                ties: list[tf.Tensor] = []
                outputs: list[tf.Tensor] = []
                for piece in own:
                    run, ties = self._again(piece, i, x, values, ties=piece is own[-1], watch=tape.watch)
                    losses += run.losses
                    outputs = run.outputs
            targets = [*self._floating(given, values), *losses, *ties]
            upstream = [leaf for number in range(len(given)) for leaf in kept[f"given {number}"].read(i)]
            for number in range(len(given)):
                kept[f"given {number}"] = kept[f"given {number}"].without(i)
            factor = self._factor(i) if losses else tf.zeros([])
            upstream += [tf.fill(tf.shape(each), tf.cast(factor, each.dtype)) for each in losses]
            upstream += [tf.ones_like(each) for each in ties]
            for output, gradient in zip(outputs, of_outputs or [], strict=False):
                if gradient is not None:
                    targets.append(output)
                    upstream.append(self._data.rows_of(gradient, i))
            self._add_gradients(tape, targets, upstream, own, variables, received, i, values, kept, carried)

        room = {f"given {number}": self._gradients.pop(key) for number, key in enumerate(given)}
        self._with_gradients(body, own, received, room, {})

    def _factor(self, i: Index) -> tf.Tensor:
        """What the losses count for that layers have added to a micro-batch."""
        if self._factors is not None:
            return self._factors.read(i)[0]
        if self._factor_of_sample is None:
            return tf.zeros([])
        return self._factor_of_sample * tf.cast(self._data.samples(i), self._factor_of_sample.dtype)

    def _with_gradients(
        self, body: Any, own: list[Piece], received: list[Key], room: dict[str, Kept], carried: Carried
    ) -> tuple[dict[str, Kept], Carried]:
        """Runs a body that calls `_add_gradients` for each micro-batch, and takes what it has left."""
        coupled = [piece.calls[i].operation for piece in own for i in piece.coupled]
        for number, key in enumerate(received):
            known = self._gradients.get(key)
            room[f"gradient {number}"] = self._data.room_for(self._float_specs(key)) if known is None else known
        dtypes = [tf.float64 if self._is_wide(piece, i) else tf.float32 for piece in own for i in piece.coupled]
        carried["sums"] = [
            tf.zeros([layer.moving_mean.shape[0]], dtype)
            for layer, dtype in zip(coupled, dtypes, strict=True)
            for _ in range(2)
        ]
        cut, _ = self._model.path_to(own[0].stage)
        if cut is not None and cut.stage == own[0].stage - 1:
            room["cut before"] = self._cut_at.pop(cut.stage)  # no other stage is run from it any more
        kept, carried = self._data.each(body, room, carried)
        self._gradients.update({key: kept[f"gradient {number}"] for number, key in enumerate(received)})
        sums = carried.pop("sums")
        if sums and replicas.running() is not None:
            sums = replicas.sum_over_replicas(sums)
        self._sums[own[0].stage] = [Sums(*sums[i : i + 2]) for i in range(0, len(sums), 2)]
        return kept, carried

    def _add_gradients(
        self,
        tape: tf.GradientTape,
        targets: list[tf.Tensor],
        upstream: list[tf.Tensor] | None,
        own: list[Piece],
        variables: list[keras.Variable],
        received: list[Key],
        i: Index,
        values: dict[Key, Any],
        kept: dict[str, Kept],
        carried: Carried,
    ) -> None:
        """Adds the gradients of a stage's variables, and keeps those of the tensors that lead into it."""
        factors = [each for piece in own for supplied in piece.supplied for each in supplied.factors or ()]
        leaves = self._floating(received, values)
        of_variables, of_leaves, of_factors = tape.gradient(
            targets, (variables, leaves, factors), output_gradients=upstream
        )
        rest = iter(zip(leaves, of_leaves, strict=True))
        for number, key in enumerate(received):
            name = f"gradient {number}"
            found = [_or_zeros(gradient, leaf) for leaf, gradient in (next(rest) for _ in self._float_specs(key))]
            if key in self._gradients:  # later stages use the tensor as well
                found = [a + b for a, b in zip(kept[name].read(i), found, strict=True)]
            kept[name] = kept[name].written(i, found)
        pairs = zip(carried["sums"], factors, of_factors, strict=True)
        carried["sums"] = [total + _or_zeros(gradient, factor) for total, factor, gradient in pairs]
        first = upstream is None
        starts: tf.Tensor | bool = False
        if first:
            starts = self._data.is_first(i)
        if first or any(each is not None for each in of_variables):
            self._add(of_variables, variables, starts)

    # Runs of pieces

    def _reach(self, stage: int, i: Index, x: Any, kept: dict[str, Kept]) -> dict[Key, Any]:
        """Returns the tensors of a micro-batch where a stage begins.

        The tensors of the cut before it are let go if the loop has them among what it writes.
        """
        cut, between = self._model.path_to(stage)
        values: dict[Key, Any] = {}
        if cut is not None:
            rest = iter((kept.get("cut before") or self._cut_at[cut.stage]).read(i))
            if "cut before" in kept:
                kept["cut before"] = kept["cut before"].without(i)
            for key in self._stages.crossing(cut.position):
                leaves = self._model.leaves[key]
                values[key] = leaves.filled([next(rest) for _ in leaves.tensors])
        for piece in between:
            self._again(piece, i, x, values)
        return values

    def _first_run(
        self,
        piece: Piece,
        i: Index,
        x: Any,
        values: dict[Key, Any],
        kept: dict[str, Kept],
        carried: Carried,
        watch: Watch = _nothing,
    ) -> tuple[Run, list[WindowMoments]]:
        """Runs a piece for the first time, and keeps what running it again takes."""
        state = dict(zip(map(id, self._state_variables), carried["state"], strict=True))
        before = [state[id(each)] for each in piece.stretch.variables]
        kept[f"state {piece.begin}"] = kept[f"state {piece.begin}"].written(i, before)
        run = self._run(piece, before, x, values, collect_moments=True, measures=True, watch=watch)
        state |= dict(zip(map(id, piece.stretch.variables), run.state, strict=True))
        carried["state"] = [state[id(each)] for each in self._state_variables]
        self._adds_losses = self._adds_losses or bool(run.losses)
        name = f"losses {piece.begin}"
        total = tf.add_n([_no_loss(), *(tf.cast(tf.reduce_sum(each), _NUMBER.dtype) for each in run.losses)])
        kept[name] = kept[name].written(i, [total])
        count = 3 * len(piece.measures)
        end = len(run.outputs) - count
        outputs, moments = run.outputs[:end], run.outputs[end:]
        self._unpack(piece, outputs, values)
        return run._replace(outputs=outputs), _in_threes(moments)

    def _again(
        self,
        piece: Piece,
        i: Index,
        x: Any,
        values: dict[Key, Any],
        *,
        ties: bool = False,
        watch: Watch = _nothing,
    ) -> tuple[Run, list[tf.Tensor]]:
        """Runs a piece again."""
        tied = []
        if ties and not piece.is_last:
            tied = list(zip(self._moments[piece.stage + 1], self._sums[piece.stage + 1], strict=True))
        run = self._run(
            piece, self._first[piece.begin].read(i), x, values, collect_moments=False, ties=tied, watch=watch
        )
        end = len(run.outputs) - len(tied)
        self._unpack(piece, run.outputs[:end], values)
        return run, run.outputs[end:]

    def _run(self, piece: Piece, state: list[tf.Tensor], x: Any, values: dict[Key, Any], **settings: Any) -> Run:
        moments = self._moments[piece.stage] if piece.coupled else []
        return piece.stretch.run(state, x, self._packed(piece.needs, values), moments, **settings)

    def _unpack(self, piece: Piece, tensors: Sequence[tf.Tensor], values: dict[Key, Any]) -> None:
        if not piece.is_last:
            rest = iter(tensors)
            for key in piece.gives:
                values[key] = self._model.leaves[key].filled([next(rest) for _ in self._model.leaves[key].tensors])

    # What is kept

    def _room(self, pieces: Sequence[Piece]) -> dict[str, Kept]:
        """Room for what the first runs of pieces keep."""
        room = {}
        for piece in pieces:
            specs = [tf.TensorSpec(each.shape, each.dtype) for each in piece.stretch.variables]
            room[f"state {piece.begin}"] = self._data.room_for(specs, rows=False)
            room[f"losses {piece.begin}"] = self._data.room_for([_NUMBER], rows=False)
        return room

    def _carried_state(self, pieces: Sequence[Piece]) -> Carried:
        return {"state": list(self._state.values())}

    def _take(self, pieces: Sequence[Piece], kept: dict[str, Kept], carried: Carried) -> None:
        """Takes what the first runs of pieces have kept."""
        for piece in pieces:
            self._first[piece.begin] = kept[f"state {piece.begin}"]
            self._losses[piece.begin] = kept[f"losses {piece.begin}"]
        self._state = dict(zip(self._state, carried.pop("state"), strict=True))

    def _packed(self, keys: Sequence[Key], values: dict[Key, Any]) -> list[tf.Tensor]:
        return [leaf for key in keys for leaf in Leaves(values[key]).tensors]

    def _specs_of(self, keys: Sequence[Key]) -> list[tf.TensorSpec]:
        return [spec for key in keys for spec in self._specs[key]]

    def _float_specs(self, key: Key) -> list[tf.TensorSpec]:
        return [spec for spec in self._specs[key] if spec.dtype.is_floating]

    def _floating(self, keys: Sequence[Key], values: dict[Key, Any]) -> list[tf.Tensor]:
        return [leaf for leaf in self._packed(keys, values) if leaf.dtype.is_floating]

    def _needs(self, pieces: Sequence[Piece]) -> list[Key]:
        """What a stage uses from before it."""
        made = {key for piece in pieces for key in piece.gives}
        return list({key: None for piece in pieces for key in piece.needs if key not in made})

    def _takes_gradient(self, key: Key) -> bool:
        return key in self._model.trained and bool(self._float_specs(key))

    def _is_wide(self, piece: Piece, i: int) -> bool:
        """Whether a coupled call computes statistics in float64."""
        return bool(piece.calls[i].operation.compute_dtype == "float64")

    def _move_statistics(self) -> None:
        """Has the windows of the coupled layers take the moments."""
        calls = [piece.calls[i] for piece in self._model.pieces for i in piece.coupled]
        moments = [each for stage in sorted(self._moments) for each in self._moments[stage]]
        for call, each in zip(calls, moments, strict=True):
            call.operation.add_to_window(each.as_batch(), pooled=replicas.running() is not None)


def _no_loss() -> tf.Tensor:
    return tf.zeros(_NUMBER.shape, _NUMBER.dtype)


def _or_zeros(gradient: tf.Tensor | None, like: tf.Tensor) -> tf.Tensor:
    return tf.zeros_like(like) if gradient is None else tf.cast(gradient, like.dtype)


def _in_threes(tensors: Sequence[tf.Tensor]) -> list[WindowMoments]:
    return [WindowMoments(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def _over_replicas(moments: list[WindowMoments]) -> list[WindowMoments]:
    """The moments of all replicas."""
    if replicas.running() is None or not moments:
        return moments
    return [WindowMoments.of(each) for each in replica_moments.pool(moments)]
