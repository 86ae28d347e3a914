"""The window's state, and the verbs that move it.

A window opens with the first micro-batch after the last close, whose gradients overwrite the accumulators:

                add (overwrites; limit = K)                         add
    EMPTY  step = 0 ────────────────────▶ OPEN  0 < step < limit ─────────────▶ FULL  step = limit, `ready`
      ▲                                     │                                     │
      └─────────────────────────────────────┴──── ending, ending_with, reset ─────┘

The state is one accumulator for each variable, the counters `step` and `limit`, the sum of shares `weight`, the counts
of micro-batches without a gradient, and which rows of tables were touched. Closing only sets `step` and these counts
back: what the accumulators hold between windows has no influence, and nothing clears it.

Under a mirroring `tf.distribute` strategy each replica has a state of its own. Accumulators and `weight` count, and are
saved, as their sum over the replicas; all other variables are the same on all replicas.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import keras
import tensorflow as tf

from accumops import ops
from accumops.adapters.untracked import Untracked
from accumops.arguments import Schedule, check_reduction, name_of
from accumops.window import replicas
from accumops.window.buckets import in_buckets
from accumops.window.cleared_sums import ClearedSums
from accumops.window.connected_variables import Connected, Connections
from accumops.window.counters import Counters
from accumops.window.members import Members
from accumops.window.micro_batch import CountedMicroBatch, MicroBatch, Window
from accumops.window.noise import Groups
from accumops.window.noise_schedule import NoiseScaleSchedule
from accumops.window.nonfinite import MAKES_UPDATE, NonfiniteGradients, Share, Verdict
from accumops.window.notes import Notes
from accumops.window.parts import Parts
from accumops.window.recorded_operations import Recording
from accumops.window.squared_norms import LastSliceReport, SquaredNorms
from accumops.window.state_variables import PER_REPLICA, new_accumulator, new_variable
from accumops.window.sums import Found, add_gradients, as_gradient, check_gradients, together
from accumops.window.touched_rows import TouchedRows


class WindowState(tf.Module):
    """The state of a window over a list of variables.

    Args:
        accum_steps: Micro-batches a window, a callable that gives them for a count of updates, or None.
        owner: What the state belongs to, for messages.
        reduction: `"mean"` if the window's gradient is the weighted mean over its micro-batches, `"sum"` if it is their
            weighted sum.
        nonfinite: What becomes of gradients that are not finite; see `accumops.window.nonfinite`.
    """

    def __init__(
        self, accum_steps: int | Schedule | None, owner: str, reduction: str = "mean", nonfinite: str = "propagate"
    ) -> None:
        super().__init__(name="window_state")
        self.counters = Counters(accum_steps)
        self.reduction = check_reduction(reduction)
        self.nonfinite = NonfiniteGradients(nonfinite)
        followed = accum_steps if isinstance(accum_steps, NoiseScaleSchedule) else None
        self.notes = Notes(owner, self.reduction, followed)
        """What is noted of windows for those who ask."""
        self.last_slice = LastSliceReport()
        self.built = False
        self._owner = owner
        self._untracked = Untracked(members=Members(owner), strategy=None, parts=set(), cleared=ClearedSums())

    def build(
        self,
        variables: Sequence[tf.Variable | keras.Variable],
        *,
        strategy: tf.distribute.Strategy | None,
        iterations: tf.Variable | None,
        jit_compile: bool | None,
        track_all_rows: bool,
    ) -> None:
        """Creates the state for variables, under the mirroring strategy that distributes them, if one does."""
        self._untracked.strategy = strategy
        mirrored = strategy is not None
        same, summed = (PER_REPLICA["same"], PER_REPLICA["summed"]) if mirrored else ({}, {})
        self._names = [name_of(variable) for variable in variables]
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            self.accumulators = [new_accumulator(variable, mirrored) for variable in variables]
            self.counters.build(iterations, jit_compile, **same)
            # Shares are counted in float64 for float64 gradients, which they scale.
            wide = any(accumulator.dtype == "float64" for accumulator in self.accumulators)
            self.weight = new_variable("weight", (), "float64" if wide else "float32", **summed)
            self.nonfinite.build(self.weight.dtype, mirrored=mirrored)
            self.connections = Connections(self._names, self._owner, self.counters, jit_compile, **same)
            self.parts = Parts(self._names, self._owner, self.counters, self.connections.gaps, mirrored=mirrored)
            self.touched_rows = TouchedRows(variables, self.accumulators, track_all=track_all_rows, mirrored=mirrored)
        self.notes.build(self._names, self.accumulators[0], self.counters, strategy)
        self.built = True

    @property
    def strategy(self) -> tf.distribute.Strategy | None:
        """The mirroring strategy that the state was built under, or None."""
        return self._untracked.strategy

    @property
    def members(self) -> Members:
        """What follows the windows, such as batch normalization."""
        members: Members = self._untracked.members
        return members

    @property
    def saved_variables(self) -> list[keras.Variable]:
        """What has to be saved to go on with the open window, in the order of Keras's files."""
        noise = [] if self.notes.noise is None else self.notes.noise.saved_variables
        return [*self.small_variables, *self.touched_rows.flags, *self.accumulators, *noise]

    @property
    def small_variables(self) -> list[keras.Variable]:
        """What says how far the open window is."""
        counters = self.counters
        limits = [counters.limit] if counters.closed is None else [counters.limit, counters.closed]
        nonfinite = [self.nonfinite.count, self.nonfinite.in_window]
        return [counters.step, self.weight, *limits, *nonfinite, self.connections.gaps]

    # A micro-batch on its way in

    def prepare(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        weight: float | tf.Tensor | Share,
        given: Sequence[int] | None = None,
        *,
        ends: bool | None = False,
    ) -> CountedMicroBatch:
        """Checks a micro-batch, and says what it does to the counters. Changes no variable.

        Args:
            gradients: A gradient or None for each variable.
            weight: Its share.
            given: The positions of the variables that the call gave; by default all.
            ends: Whether the window ends with it; None if it does when it is full.
        """
        starts = self.counters.starts
        batch = self.prepare_slice(gradients, weight, starts, given)
        checks = self.parts.check(batch.given, ends)
        limit, fills = self.counters.with_next(starts)
        # A new window starts from 0, whatever the sum of the last one's shares was, NaN included.
        before = tf.math.multiply_no_nan(tf.convert_to_tensor(self.weight), tf.cast(~starts, self.weight.dtype))
        return CountedMicroBatch(**vars(batch), fills=fills, limit=limit, total=before + batch.weight, checks=checks)

    def prepare_slice(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        weight: float | tf.Tensor | Share,
        starts: tf.Tensor | bool,
        given: Sequence[int] | None = None,
    ) -> MicroBatch:
        """Checks a micro-batch whose caller knows whether it is the window's first. Changes no variable."""
        if self.strategy is not None:
            replicas.check_in_replica(self.strategy, f"`accumulate` of {self._owner}")
        gradients = list(gradients)
        check_gradients(gradients, self._names, self.accumulators, self._owner)
        gradients = list(map(as_gradient, gradients, self.accumulators))
        share = self.nonfinite.share(gradients, weight)
        if checks := self.members.check():
            with tf.control_dependencies(checks):
                share = dataclasses.replace(share, weight=tf.identity(share.weight))
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self.connections.check(present)
        given = range(len(gradients)) if given is None else given
        return MicroBatch(gradients, present, given, self.touched_rows.prepare(gradients), share, starts)

    def add(self, batch: CountedMicroBatch, norms: bool | tf.Tensor = False) -> SquaredNorms | None:
        """Adds a micro-batch to the window, and counts it.

        Args:
            batch: The micro-batch.
            norms: Whether to report squared norms.

        Returns:
            The report, if there is one. Replicas make none: their sums are parts.
        """
        self.last_slice.clear()
        with Recording() as accumulation:
            reported = self._add(batch, norms)
            self.connections.add(batch.present, batch.given)
        # The counters wait: a micro-batch that fails does not count.
        with tf.control_dependencies(accumulation.operations):
            self.weight.assign(batch.total)
            self.counters.add(batch.limit)
        return reported

    def add_slice(self, batch: MicroBatch, norms: bool | tf.Tensor = False) -> None:
        """Adds a micro-batch to the window without counting it; `count` counts all of a window at once.

        Args:
            batch: The micro-batch.
            norms: Whether `last_slice` is to have its squared norms.
        """
        reported = self._add(batch, norms)
        self.last_slice.add(None if norms is False else reported, self.accumulators[0])
        self.connections.add_slice(batch.present, batch.given)

    def add_part(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices | None], starts: tf.Tensor | bool) -> None:
        """Adds gradients of a part of the variables, with a share of 1; `count_parts` counts all of a window.

        Args:
            gradients: A gradient or None for each variable.
            starts: Whether they are the first of their window.
        """
        gradients = list(map(as_gradient, gradients, self.accumulators))
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        share = Share(tf.ones([], self.weight.dtype), True)
        rows = self.touched_rows.prepare(gradients)
        self._untracked.parts.update(present)
        self._add(MicroBatch(gradients, present, range(len(gradients)), rows, share, starts))

    def count_parts(self, steps: int | tf.Tensor, weight: tf.Tensor) -> None:
        """As `count`, for a window that `add_part` has filled."""
        present = sorted(self._untracked.parts)
        self.connections.add_slice(present, range(len(self.accumulators)))
        self.count(steps, weight)

    def _add(self, batch: MicroBatch, norms: bool | tf.Tensor = False) -> SquaredNorms | None:
        noise = self.notes.noise
        with Recording() as accumulation:
            if self.strategy is None:
                positions = batch.present if batch.starts is False else range(len(self.accumulators))
                found = self.sum_gradients(batch, positions, norms if noise is None else True)
            else:
                found = self._sum_on_replica(self.strategy, batch)
        with tf.control_dependencies(accumulation.operations):
            self.nonfinite.add(batch.share, found.finite, batch.starts)
            if noise is not None and found.norms is not None:
                noise.add(found.norms, batch.weight, batch.starts)
            self.touched_rows.add(batch.gradients)
            if self.strategy is not None:
                self.touched_rows.set_all()
        return found.norms if self.strategy is None else None

    def filling(self) -> contextlib.AbstractContextManager[None]:
        """Encloses the `add_slice` or `add_part` of all of a window."""
        cleared: ClearedSums = self._untracked.cleared
        return cleared.within(self.accumulators) if self.built else contextlib.nullcontext()

    def count(self, steps: int | tf.Tensor, weight: tf.Tensor) -> None:
        """Opens a window that `add_slice` has filled: with this many micro-batches, and this sum of shares."""
        self.connections.count_slices()
        self.last_slice.count()
        self.weight.assign(tf.cast(weight, self.weight.dtype))
        self.counters.fill(steps)

    def sum_gradients(
        self,
        batch: MicroBatch,
        positions: Iterable[int],
        norms: bool | tf.Tensor = False,
        only_if: tf.Tensor | None = None,
    ) -> Found:
        """Adds the gradients at some positions to their accumulators; with `only_if` where it is true."""
        cleared: ClearedSums = self._untracked.cleared
        return together(
            [
                add_gradients(
                    self.accumulators,
                    batch,
                    group,
                    batch.weight,
                    overwrite=overwrite,
                    check_finite=self._checks_finite,
                    norms=norms,
                    only_if=only_if,
                )
                for chosen, overwrite in cleared.split(batch, list(positions))
                for group in in_buckets(chosen, batch.gradients, self.accumulators)
            ]
        )

    @property
    def _checks_finite(self) -> bool:
        return self.nonfinite.policy == "drop"

    def _sum_on_replica(self, strategy: tf.distribute.Strategy, batch: MicroBatch) -> Found:
        accumulators = [replicas.own(accumulator) for accumulator in self.accumulators]
        # Losses that are means are divided by the number of replicas. It is taken out again here: the sums are then
        # those of one device, and a saved window can go on under another strategy. The gradients of a replica without
        # samples are 0 / 0; its share is 0.
        factor = strategy.num_replicas_in_sync if self.reduction == "mean" else 1
        norms = self.notes.noise is not None
        found = add_gradients(
            accumulators,
            batch,
            range(len(accumulators)),
            batch.weight * factor,
            overwrite=batch.starts,
            check_finite=self._checks_finite,
            norms=norms,
        )
        if found.norms is None:
            return found
        report = found.norms.report * tf.constant([[factor**2], [1]], tf.float64)
        return Found(found.finite, SquaredNorms(found.norms.positions, report))

    # The window on its way out

    @contextlib.contextmanager
    def ending(
        self, last: MicroBatch | None = None, reported: SquaredNorms | None = None, *, by_trace: bool = False
    ) -> Iterator[Window]:
        """As `open`, and closes the window when the block has not failed."""
        with self.open(last, reported, by_trace=by_trace) as window, self._closing_with(window.verdict):
            yield window

    @contextlib.contextmanager
    def open(
        self, last: MicroBatch | None = None, reported: SquaredNorms | None = None, *, by_trace: bool = False
    ) -> Iterator[Window]:
        """Gives the open window to a block, and leaves it open.

        Args:
            last: The window's last micro-batch, if it is known.
            reported: What `add` has reported of it.
            by_trace: Whether a graph has to know the variables that have a gradient when it is traced.

        Raises:
            ValueError: If no window is open, when executing eagerly; in a graph `tf.errors.InvalidArgumentError`.
        """
        opened = self._check_open()
        with tf.control_dependencies(opened):
            connected, same = self._connected(last, by_trace)
        with tf.control_dependencies([*opened, *same]):
            yield Window(
                self.held(connected),
                connected,
                self.divisor(self.weight),
                self.touched_rows,
                verdict=self.verdict(),
                groups=self._groups(),
                reported=reported,
            )

    @contextlib.contextmanager
    def ending_across(self, strategy: tf.distribute.Strategy, last: MicroBatch | None) -> Iterator[list[Window]]:
        """As `ending`, but outside of the replicas, which are reduced first.

        Gives a window for each replica of this process, with the sums over all replicas in `latest`.
        """
        connected, _ = self._connected(last, by_trace=False)
        with tf.control_dependencies(self._check_open()):
            reduced = replicas.on_each_replica(strategy, lambda: self._reduced(connected))
            windows = [dataclasses.replace(window, replica=i) for i, window in enumerate(reduced)]
            with self._closing_with(windows[0].verdict):
                yield windows

    @contextlib.contextmanager
    def ending_on_replica(self, *, reduce_sums: bool) -> Iterator[Window]:
        """As `ending`, on each replica, with its own sums or those over all replicas in `latest`."""
        opened = self._check_open()
        with tf.control_dependencies(opened):
            connected, same = self._connected(None, by_trace=True)
        with tf.control_dependencies([*opened, *same]):
            window = self._reduced(connected, sums=reduce_sums)
            with self._closing_with(window.verdict):
                yield window

    def _reduced(self, connected: Connected, *, sums: bool = True) -> Window:
        """Reduces the window of a replica with those of all others, in one operation for each dtype."""
        accumulators = self.held(connected)
        held = [i for i, each in enumerate(accumulators) if each is not None]
        values = [tf.convert_to_tensor(self.accumulators[i]) for i in held]
        asked = [self.nonfinite.in_window] if self.nonfinite.acts else []
        # The noise of a gradient needs the sums over all replicas.
        noise = self.notes.noise if sums else None
        if noise is not None or asked:
            replicas.check_in_graph(f"a window of {self._owner} that notes the noise of gradients, or has `nonfinite`")
        parts = [tf.convert_to_tensor(each) for each in (self.weight, *asked)] + (values if sums else [])
        weight, *reduced = replicas.sum_over_replicas([*parts, *([] if noise is None else [noise.part()])])
        verdict = self.nonfinite.verdict(weight, reduced.pop(0) if asked else None)
        latest = dict(zip(held, reduced if sums else values, strict=False))
        divisor = self.divisor(weight)
        groups = None
        if noise is not None:
            norms = ops.squared_norms([latest[i] for i in held if i in noise.positions])
            groups = noise.groups(weight, reduced[-1], tf.reduce_sum(norms))
        return Window(
            accumulators, connected, divisor, self.touched_rows, latest, starts=True, verdict=verdict, groups=groups
        )

    def _groups(self) -> Groups | None:
        noise = self.notes.noise
        return None if noise is None else noise.groups(tf.convert_to_tensor(self.weight))

    def _connected(self, last: MicroBatch | None, by_trace: bool) -> tuple[Connected, list[tf.Operation]]:
        """The variables that the window has a gradient for, and checks for the graph; arguments as for `ending`."""
        if by_trace:
            return self.connections.at_end_by_trace()
        present, given = ((), ()) if last is None else (last.present, last.given)
        return self.connections.at_end(present, given), []

    @contextlib.contextmanager
    def ending_with(self, batch: CountedMicroBatch) -> Iterator[Window]:
        """As `ending`, with a last micro-batch that has not been added.

        Its dense gradients do not pass through the accumulators: the window has them in `latest`.
        """
        latest = {i: batch.gradients[i] for i in batch.present if not isinstance(batch.gradients[i], tf.IndexedSlices)}
        with Recording() as accumulation:
            finite = self.sum_gradients(batch, (i for i in range(len(self.accumulators)) if i not in latest)).finite
            if self._checks_finite:
                others = ops.all_finite(list(latest.values()))
                finite = others if finite is None else finite & others
            nonfinite = self.nonfinite.with_next(batch.share, finite, batch.starts)
            verdict = self.nonfinite.verdict(batch.total, nonfinite, last=batch.share)
        with tf.control_dependencies(accumulation.operations):
            self.connections.note(batch.present, batch.given)
            connected = self.connections.at_end(batch.present, batch.given)
            with self._closing_with(verdict):
                yield Window(
                    self.held(connected),
                    connected,
                    self.divisor(batch.total),
                    self.touched_rows,
                    latest,
                    batch.weight,
                    batch.starts,
                    verdict=verdict,
                )

    def verdict(self) -> Verdict:
        """Whether the open window, as it is on this replica, makes an update."""
        if not self.nonfinite.acts:
            return MAKES_UPDATE
        total, found = (tf.convert_to_tensor(each) for each in (self.weight, self.nonfinite.in_window))
        return self.nonfinite.verdict(total, found)

    def discard_full(self) -> None:
        """Drops the window if it is full and makes no update. Not for replicas, which know their own part only."""
        counters = self.counters

        def discard() -> None:
            self.nonfinite.count_more(self.verdict().uncounted)
            self._discard()

        def decide() -> None:
            keras.ops.cond(self.verdict().applies, lambda: None, discard)

        # Two conditions: only where the window is full does its verdict have to come from a GPU.
        keras.ops.cond(counters.ready, decide, lambda: None)

    def _check_open(self) -> list[tf.Operation]:
        empty = f"{self._owner} has no open window to close: call `accumulate` first."
        step = tf.convert_to_tensor(self.counters.step)
        if tf.executing_eagerly():
            if int(step) == 0:
                raise ValueError(empty)
            return []
        with self.counters.place():
            check = tf.debugging.assert_positive(step, message=empty)
        return [] if check is None else [check]

    @contextlib.contextmanager
    def _closing_with(self, verdict: Verdict) -> Iterator[None]:
        """Closes the window when a block, which makes the update, has not failed."""
        with Recording() as update:
            yield
        with tf.control_dependencies(update.effects):
            self.close(verdict)

    def divisor(self, weight: tf.Tensor | keras.Variable) -> tf.Tensor:
        """What turns the sums of a window with this sum of shares into its gradients."""
        total = tf.convert_to_tensor(weight)
        return total if self.reduction == "mean" else tf.ones_like(total)

    def held(self, connected: Connected) -> list[keras.Variable | None]:
        """The accumulators, None for those of variables that the window has no gradient for."""
        positions = set(connected.positions)
        return [accumulator if i in positions else None for i, accumulator in enumerate(self.accumulators)]

    def close(self, verdict: Verdict) -> None:
        """Counts the open window as closed, after its update; the next micro-batch opens another one."""
        self.counters.close()
        self.connections.clear()
        self.nonfinite.count_more(verdict.uncounted)
        if self.members and verdict.applies is not True:
            self.members.drop(unless=verdict.applies)  # what they close then is empty
        if self.strategy is not None and tf.distribute.in_cross_replica_context() and self.members:
            replicas.on_each_replica(self.strategy, self.members.close)
        else:
            self.members.close()

    def reset(self) -> None:
        """Drops the open window, if there is one."""
        self._untracked.parts.clear()
        self.parts.end()
        self._discard()

    def _discard(self) -> None:
        self.counters.drop()
        self.connections.clear()
        self.last_slice.clear()
        self.members.drop()
