"""Runs a window stage by stage.

Forward, for each stage but the last:

    for each micro-batch: run the stage; keep what its cut keeps; merge the totals of the coupled calls that follow
    the totals of the window are known

The last stage has the loss. Its gradient, and in reverse order the gradients of the stages before it:

    for each micro-batch: run the stage again, and backward from the gradients that the stage behind it has left
    the sums of the coupled calls are known

A stage is run from the tensors that were kept last before it. The stages between are run again. That is local to a
micro-batch, whatever coupled calls are between: their totals are known. Second runs have the bits of the first
(`memory/replay.py`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from accumops.layerwise.graph import Call, Key
from accumops.layerwise.micro_batches import Carried, Index, Kept, MicroBatches
from accumops.layerwise.pieces import Piece, PiecesOfModel
from accumops.layerwise.runs import NUMBER, Runs, Values, leaves_of
from accumops.memory.recompute import Leaves
from accumops.window import replicas
from accumops.window.coupling import Coupling, Tensors

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
Add = Callable[[Gradients, Sequence[keras.Variable], "tf.Tensor | bool"], None]
WindowLoss = Callable[[Any, "tf.Tensor | None"], tf.Tensor]


class Loss(Protocol):
    """The loss of a micro-batch."""

    def __call__(
        self, data: Any, outputs: Any, losses: Sequence[tf.Tensor], before: tf.Tensor | None, carried: Carried
    ) -> Any:
        """Returns the loss, times what it counts for in the window, and the factor in it of losses that layers add.

        Args:
            data: The data of the micro-batch.
            outputs: The model's outputs.
            losses: What layers of the last stage have added.
            before: The sum of what layers of other stages have added, for the logs; None if they add nothing.
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
        self._model, self._stages, self._data, self._add = model, model.stages, data, add
        self._runs = Runs(model, data, inputs_of)
        self._trainable = list(variables)
        self._factor: Callable[[Index], tf.Tensor] = lambda i: tf.zeros([])
        """What the losses that layers have added to a micro-batch count for."""
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

        Raises:
            ValueError: If an output does not have a row for each sample.
        """
        _check_rows(self._model.outputs)
        last = len(self._stages) - 1
        for stage in range(last):
            self._forward(stage)
        outputs = self._forward(last)
        adds_losses = any(piece.adds_losses for piece in self._model.pieces)
        samples = tf.cast(self._data.slices.count, dtype)
        added = tf.zeros([], dtype)
        with tf.GradientTape() as tape:
            rows = [self._data.all_rows(outputs, number) for number in range(len(outputs.arrays))]
            tape.watch([each for each in rows if each.dtype.is_floating])
            if adds_losses:
                added += self._sum_of_losses(dtype) / samples
                tape.watch(added)
            value = loss(self._model.outputs.filled(rows), added if adds_losses else None)
        of_variables, of_rows, of_added = tape.gradient(value, (self._trainable, rows, added))
        self._add(of_variables, self._trainable, True)
        if of_added is not None:
            self._factor = lambda i: of_added / samples * tf.cast(self._data.samples(i), dtype)
        self._backward(last, [None if each is None else tf.convert_to_tensor(each) for each in of_rows])
        for stage in reversed(range(last)):
            self._backward(stage)
        self._finish()

    def _sum_of_losses(self, dtype: tf.DType) -> tf.Tensor:
        """The sum of what layers have added to the micro-batches, each times its samples."""

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            losses = tf.cast(self._runs.losses_before(i), dtype)
            carried["sum"] = [carried["sum"][0] + tf.cast(self._data.samples(i), dtype) * losses]

        _, carried = self._data.each(body, {}, {"sum": [tf.zeros([], dtype)]})
        return carried["sum"][0]

    def _finish(self) -> None:
        """Assigns what the calls would have assigned, and has the coupled layers take their totals."""
        self._runs.assign_state()
        calls = [piece.calls[i] for piece in self._model.pieces for i in piece.coupled]
        totals = [each for _, known in sorted(self._runs.totals.items()) for each in known]
        of_call = {id(call): each for call, each in zip(calls, totals, strict=True)}
        of_layer: dict[int, list[Call]] = {}
        for call in self._stages.graph.calls:  # in the order in which Keras makes them
            if id(call) in of_call:
                of_layer.setdefault(id(call.operation), []).append(call)
        for of_one in of_layer.values():
            of_calls = [of_call[id(call)] for call in of_one]
            of_one[0].operation.coupling().end(of_calls, pooled=replicas.running() is not None)

    # Forward

    def _forward(self, stage: int) -> Kept:
        """Runs a stage for all micro-batches, and finds the totals of the coupled calls that follow.

        Returns:
            For the last stage, the leaves of the outputs.
        """
        own = self._model.pieces_of(stage)
        cut = next((cut for cut in self._model.cuts if cut.stage == stage), None)
        keys = [] if cut is None else self._stages.crossing(cut.position)
        specs = [] if own[-1].is_last else self._runs.totals_specs[stage + 1]

        def unflattened(totals: Tensors) -> list[Tensors]:
            rest = iter(totals)
            return [[next(rest) for _ in each] for each in specs]

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            values = self._runs.reach(stage, i, data, kept)
            for piece in own:
                run, totals = self._runs.first(piece, i, data, values, kept, carried)
                if cut is not None and cut.position == piece.end:
                    kept["cut"] = kept["cut"].written(i, leaves_of(keys, values))
            if own[-1].is_last:
                kept["outputs"] = kept["outputs"].written(i, run.outputs)
            known = unflattened(carried["totals"])
            merged = [
                coupling.merged(a, b) for coupling, a, b in zip(own[-1].couplings_behind, known, totals, strict=True)
            ]
            carried["totals"] = list(itertools.chain(*merged))

        room = self._runs.room(own) | {
            "cut": self._data.room_for(self._runs.specs_of(keys)),
            "outputs": self._data.room_for(self._runs.output_specs if own[-1].is_last else []),
        }
        none = [tf.zeros(spec.shape, spec.dtype) for each in specs for spec in each]
        kept, carried = self._data.each(body, room, self._runs.carried() | {"totals": none})
        self._runs.take(own, kept, carried)
        if cut is not None:
            self._runs.keep_cut(stage, kept["cut"])
        self._runs.totals[stage + 1] = _over_replicas(own[-1].couplings_behind, unflattened(carried["totals"]))
        return kept["outputs"]

    def _last_stage(self, loss: Loss, carried: Carried) -> Carried:
        """Runs the last stage and its gradient."""
        own = self._model.pieces_of(len(self._stages) - 1)
        gradient = _StageGradient(self._runs, self._data, own, self._gradients)

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            values = self._runs.reach(own[0].stage, i, data, kept)
            with tf.GradientTape() as tape:
                tape.watch(gradient.sources(values))
                for piece in own:
                    run, _ = self._runs.first(piece, i, data, values, kept, carried, tape.watch)
                outputs, before = self._model.outputs.filled(run.outputs), self._runs.losses_before(i)
                value, factor = loss(data, outputs, run.losses, before, carried)
            kept["factors"] = kept["factors"].written(i, [factor])
            found = gradient.of(tape, [value], None, self._trainable, i, values, kept, carried)
            self._add(found, self._trainable, self._data.is_first(i))

        room = self._runs.room(own) | {"factors": self._data.room_for([NUMBER], rows=False)}
        kept, carried = gradient.each(body, room, self._runs.carried() | carried)
        self._runs.take(own, kept, carried)
        self._factor = lambda i: kept["factors"].read(i)[0]
        return carried

    # Backward

    def _backward(self, stage: int, of_outputs: Sequence[tf.Tensor | None] | None = None) -> None:
        """Runs a stage again, and its gradient.

        Args:
            stage: The stage.
            of_outputs: For the last stage, the gradients of the leaves of the window's outputs.
        """
        own = self._model.pieces_of(stage)
        gradient = _StageGradient(self._runs, self._data, own, self._gradients)
        given = [key for piece in own for key in piece.gives if key in self._gradients]
        trainable = [each for piece in own for each in piece.stretch.trainable]
        trainable += [each for call in own[-1].measures for each in call.operation.trainable_variables]
        variables = list({id(each): each for each in trainable}.values())

        def body(i: Index, data: Any, kept: dict[str, Kept], carried: Carried) -> None:
            values = self._runs.reach(stage, i, data, kept)
            losses: list[tf.Tensor] = []
            with tf.GradientTape() as tape:
                tape.watch(gradient.sources(values))
                for piece in own:
                    run, ties = self._runs.again(piece, i, data, values, ties=piece is own[-1], watch=tape.watch)
                    losses += run.losses
            targets, upstream = [*_floating(given, values), *ties], []
            for number in range(len(given)):
                upstream += kept[f"given {number}"].read(i)
                kept[f"given {number}"] = kept[f"given {number}"].without(i)
            upstream += [tf.ones_like(each) for each in ties]
            for output, of_output in zip(run.outputs if of_outputs else [], of_outputs or [], strict=True):
                if of_output is not None:
                    targets.append(output)
                    upstream.append(self._data.rows_of(of_output, i))
            if losses:
                factor = self._factor(i)
                targets += losses
                upstream += [tf.fill(tf.shape(each), tf.cast(factor, each.dtype)) for each in losses]
            found = gradient.of(tape, targets, upstream, variables, i, values, kept, carried)
            if any(each is not None for each in found):
                self._add(found, variables, False)

        gradient.each(body, {f"given {number}": self._gradients.pop(key) for number, key in enumerate(given)}, {})


class _StageGradient:
    """The gradient of a stage: of its variables, of the tensors that lead into it, and of its coupled calls.

    Args:
        runs: The runs of the window.
        data: The micro-batches.
        own: The pieces of the stage.
        gradients: The gradients of tensors that lead into this stage or a later one, which it adds to.
    """

    def __init__(self, runs: Runs, data: MicroBatches, own: list[Piece], gradients: dict[Key, Kept]) -> None:
        self._runs, self._data, self._own, self._gradients = runs, data, own, gradients
        made = {key for piece in own for key in piece.gives}
        needs = {key: None for piece in own for key in piece.needs if key not in made}
        self._received = [key for key in needs if runs.takes_gradient(key)]
        specs = runs.totals_specs[own[0].stage]
        couplings = [each for piece in own for each in piece.couplings]
        self._factors = [coupling.factor_specs(each) for coupling, each in zip(couplings, specs, strict=True)]

    def sources(self, values: Values) -> list[tf.Tensor]:
        """The tensors that lead into the stage and take a gradient.

        Each becomes a tensor of its own: a layer may return its input, and their gradients are not the same.
        """
        for key in self._received:
            leaves = Leaves(values[key])
            values[key] = leaves.filled([tf.identity(each) for each in leaves.tensors])
        return _floating(self._received, values)

    def each(self, body: Any, room: dict[str, Kept], carried: Carried) -> tuple[dict[str, Kept], Carried]:
        """Runs a body that calls `of` for each micro-batch, and takes what it has left."""
        for number, key in enumerate(self._received):
            known = self._gradients.get(key)
            specs = [spec for spec in self._runs.specs_of([key]) if spec.dtype.is_floating]
            room[f"gradient {number}"] = self._data.room_for(specs) if known is None else known
        carried["sums"] = [tf.zeros(spec.shape, spec.dtype) for each in self._factors for spec in each]
        kept, carried = self._data.each(body, room | self._runs.last_use_of_cut(self._own[0].stage), carried)
        self._gradients.update({key: kept[f"gradient {number}"] for number, key in enumerate(self._received)})
        sums = carried.pop("sums")
        if sums and replicas.running() is not None:
            sums = replicas.sum_over_replicas(sums)
        rest = iter(sums)
        self._runs.sums[self._own[0].stage] = [[next(rest) for _ in each] for each in self._factors]
        return kept, carried

    def of(
        self,
        tape: tf.GradientTape,
        targets: list[tf.Tensor],
        upstream: list[tf.Tensor] | None,
        variables: Sequence[keras.Variable],
        i: Index,
        values: Values,
        kept: dict[str, Kept],
        carried: Carried,
    ) -> Gradients:
        """Returns the gradients of variables, and keeps the others."""
        factors = [each for piece in self._own for supplied in piece.supplied for each in supplied.factors]
        sources = _floating(self._received, values)
        of_variables, of_sources, of_factors = tape.gradient(
            targets, (variables, sources, factors), output_gradients=upstream
        )
        rest = map(_or_zeros, of_sources, sources)
        for number, key in enumerate(self._received):
            name = f"gradient {number}"
            found = [next(rest) for _ in kept[name].arrays]
            if key in self._gradients:  # later stages use the tensor as well
                found = [a + b for a, b in zip(kept[name].read(i), found, strict=True)]
            kept[name] = kept[name].written(i, found)
        sums = map(_or_zeros, of_factors, factors)
        carried["sums"] = [total + each for total, each in zip(carried["sums"], sums, strict=True)]
        return list(of_variables)


def _check_rows(outputs: Leaves) -> None:
    for each in keras.tree.flatten(outputs.filled(outputs.tensors)):
        if not isinstance(each, tf.Tensor) or each.shape.rank == 0:
            raise ValueError(
                "A loss over the window needs outputs that are dense tensors with a row for each sample. "
                f"Received: {each}"
            )


def _floating(keys: Sequence[Key], values: Values) -> list[tf.Tensor]:
    return [leaf for leaf in leaves_of(keys, values) if leaf.dtype.is_floating]


def _or_zeros(gradient: tf.Tensor | None, like: tf.Tensor) -> tf.Tensor:
    return tf.zeros_like(like) if gradient is None else tf.cast(gradient, like.dtype)


def _over_replicas(couplings: Sequence[Coupling], totals: Sequence[Tensors]) -> list[Tensors]:
    """The totals of all replicas."""
    pooled = list(totals)
    if replicas.running() is None:
        return pooled
    for kind in dict.fromkeys(map(type, couplings)):
        alike = [i for i, coupling in enumerate(couplings) if type(coupling) is kind]
        for i, each in zip(alike, couplings[alike[0]].over_replicas([totals[i] for i in alike]), strict=True):
            pooled[i] = each
    return pooled
