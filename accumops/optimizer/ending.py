"""How a window ends: with one update of the wrapped optimizer, in the first of these ways that fits.

    way           function              when
    folded        `_fold`               the last micro-batch is at hand, the update is fused, and nothing needs the
                                        window's whole gradient before it (no `gradient_clipping`, no clipping by norm,
                                        no LossScaleOptimizer, nothing tracked): the op adds the last gradients while it
                                        updates
    on replicas   `_end_across`         under a mirroring strategy: outside of the replicas, once for all of them
    unfused       `_unfused`            the op cannot make the update: the optimizer's own `apply` gets the mean
                                        gradients, clipped; of tables only the touched rows, if that is enough
    clipped       `_fused(_clip(…))`    fused, with `gradient_clipping`: the op gets the clipped mean gradients
    fused         `_fused`              fused: the op reads the sums in the accumulators

`FusedUpdate` says whether, and why, an update is fused or not.

The graph of Keras's own `fit` does not know whether a micro-batch ends its window. Then the end is in a condition,
which takes time for each gradient, accumulator, variable and slot that goes through it; or, where nothing but the two
ops uses these, flags of the ops decide (`_flags_decide`). That is so for windows that would be folded and for those
that are clipped by norm, unless

    a gradient may be missing, or is that of single rows and has to be clipped by norm;
    XLA compiles the graph, which copies what a flag leaves alone;
    moving averages, constraints, a scaled loss, notes or what is not finite act on variables where the window ends.

Where the norms of the sums are needed, the op that adds the window's last gradients reports them. In bytes a value:

    20      the last gradients are added (12), the sums are read for their norms (4), and by the update (4)
    16      the addition reports the norms, in the same pass
    16      folded: sums and last gradients are read for the norms of what they add up to (8), and by the update (8)

The third way takes as long as the first one (`benchmarks/clipping.py`, with figures in docs/benchmarks.md), so a window
that clips by norm, unscales its loss or notes norms is not folded. The sums are still read for their norms

    with a loss over the window, with statistics="window" of batch normalization, and where `flush` or a `close` without
    gradients ends a window: nothing knows that an addition is the last one;
    under XLA, which would compute the norms of each addition;
    on replicas, whose sums are parts.

A variable that the window has no gradient for is left out of each of them. In a graph this may be known only when it
runs (`Connected.maybe`): then the update of such a variable is in a condition.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.conditional_steps import stepping_if, steps_singly
from accumops.adapters.keras_optimizer import index_of, innermost, scaling_learning_rate, without_reduction
from accumops.adapters.overriding import LOCK
from accumops.adapters.tensorflow import xla_compiles_this
from accumops.arguments import name_of
from accumops.optimizer import fused_update, row_update
from accumops.optimizer.checks import check_goes_with_lazy_rows, check_no_constraints
from accumops.optimizer.fused_update import FusedUpdate, warn_of_missing
from accumops.optimizer.nonfinite import decides_on_device, scale_of_loss, update_if_it_applies
from accumops.optimizer.window_record import WindowRecord
from accumops.window import replicas
from accumops.window.connected_variables import Connected
from accumops.window.flags import end_if_full
from accumops.window.micro_batch import CountedMicroBatch, MicroBatch, Window
from accumops.window.noise_schedule import NoiseScaleSchedule
from accumops.window.squared_norms import SquaredNorms
from accumops.window.state import WindowState

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
Clipping = Callable[[Gradients, Sequence[keras.Variable]], Gradients]


@dataclasses.dataclass(frozen=True)
class Ending:
    """Ends windows of a state with updates of an optimizer."""

    optimizer: keras.optimizers.Optimizer
    """The wrapped optimizer."""
    state: WindowState
    variables: Sequence[keras.Variable]
    """The variables that the state is built for, in its order."""
    gradient_clipping: Clipping | None
    lazy_sparse: bool
    record: WindowRecord | None = None
    """What notes each window that ends, or None."""

    @property
    def fused_update(self) -> FusedUpdate:
        """Whether the update is one fused op, and why not."""
        if self.gradient_clipping is not None and self.lazy_sparse:
            return FusedUpdate(None, "`gradient_clipping` goes over rows with `lazy_sparse=True`")
        with LOCK:
            return fused_update.describe(self.optimizer, self.variables)

    @property
    def folds(self) -> bool:
        """Whether a window's last gradients can go straight into the update."""
        if self.state.strategy is not None:
            return False  # they are summed over the replicas first
        if self.record is not None or self.state.notes.look_at_sums:
            return False
        needs_all = self.gradient_clipping is not None or fused_update.needs_norms(self.optimizer)
        return not needs_all and bool(self.fused_update)

    def add(self, batch: CountedMicroBatch, *, ends: bool | None) -> None:
        """Adds a micro-batch to the window.

        Args:
            batch: The micro-batch.
            ends: Whether it ends the window; None if it does when the window is full.
        """
        state, strategy = self.state, self.state.strategy
        with tf.control_dependencies(batch.checks):
            if ends is False:
                state.add(batch)
            elif strategy is not None:
                state.add(batch)
                # Replicas cannot communicate inside a condition, but the condition can be inside of what they do
                # together.
                replicas.across_replicas(
                    strategy,
                    lambda: _if(ends or state.counters.ready, lambda: self._end_across(strategy, batch)),
                )
            elif ends is None and self._flags_decide(batch):
                self._add_or_end(batch)
            elif self.folds:
                _if(ends or batch.fills, lambda: self._fold(batch), lambda: self._add(batch))
            else:
                reported = state.add(batch, self._asks_for_norms(batch, ends))
                _if(ends or state.counters.ready, lambda: self._end(batch, reported))

    def _add(self, batch: CountedMicroBatch) -> None:
        self.state.add(batch)

    def _flags_decide(self, batch: CountedMicroBatch) -> bool:
        """Whether flags of the ops can decide, when a graph runs, if a micro-batch ends the window."""
        if tf.executing_eagerly() or xla_compiles_this():
            return False
        # What looks at a window that ends, or at gradients that are not finite, does so in the condition.
        if self.record is not None or self.state.notes.look_at_sums or self.state.nonfinite.acts:
            return False
        if self.gradient_clipping is not None or isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return False
        if not self.fused_update or not decides_on_device(self.optimizer, self.variables):
            return False
        # Nothing reports the norm of a table's sum: only the end of a window has to read it.
        has_rows = any(isinstance(each, tf.IndexedSlices) for each in batch.gradients)
        return len(batch.present) == len(self.variables) and (self.folds or not has_rows)

    def _add_or_end(self, batch: CountedMicroBatch) -> None:
        """Adds a micro-batch, or ends the window with it, by flags of the ops."""

        def update(window: Window) -> Callable[[], None]:
            return fused_update.apply_if(batch.fills, self.optimizer, window, self.variables, lazy=self.lazy_sparse)

        with LOCK:
            end_if_full(self.state, batch, update, folds=self.folds)

    def _asks_for_norms(self, batch: CountedMicroBatch, ends: bool | None) -> bool | tf.Tensor:
        """Whether the op that adds a micro-batch is to report squared norms: if it is the window's last one.

        XLA makes no pass of its own for norms, and would compute those of each micro-batch.
        """
        return self._reports_norms and (ends or batch.fills)

    def add_slice(self, batch: MicroBatch, *, last: bool | tf.Tensor) -> None:
        """Adds one of the micro-batches that a step splits its batch into, without counting it.

        Args:
            batch: The micro-batch.
            last: Whether it is the last one of its batch, if that is known.
        """
        self.state.add_slice(batch, self._reports_norms and last)

    @property
    def _reports_norms(self) -> bool:
        return self._needs_norms and self.state.strategy is None and not xla_compiles_this()

    @property
    def _needs_norms(self) -> bool:
        """Whether the norms of a window's sums are needed where it ends: to be noted, or for the update."""
        noted = self.state.notes.norms is not None or (self.record is not None and self.record.norms)
        needed = self.gradient_clipping is None and fused_update.needs_norms(self.optimizer)
        return noted or (needed and bool(self.fused_update))

    def end(self) -> None:
        """Ends the window, whose micro-batches have all been added."""
        self.state.parts.end()
        self._end(None, self.state.last_slice.take())

    def end_if_open(self) -> None:
        """Ends the window, if there is one."""
        state, strategy = self.state, self.state.strategy
        state.parts.end()
        if strategy is None:
            _if(state.counters.open, lambda: self._end(None))
        else:
            replicas.across_replicas(
                strategy, lambda: _if(state.counters.open, lambda: self._end_across(strategy, None))
            )

    def update_alone(self) -> None:
        """Makes the update of the window, whose micro-batches have all been added, and leaves it open."""
        with LOCK, self.state.open() as window:
            self._make(window, lambda: self._end_with_sums(window))

    def close_alone(self) -> None:
        """Notes and closes the window, whose update has been made."""
        self.state.parts.end()
        with LOCK, self.state.ending() as window:
            self._note(window)

    def _end(self, last: CountedMicroBatch | None, reported: SquaredNorms | None = None) -> None:
        strategy = self.state.strategy
        if strategy is not None:
            replicas.across_replicas(strategy, lambda: self._end_across(strategy, last))
            return
        with LOCK, self.state.ending(last, reported) as window:
            self._update(window, lambda: self._end_with_sums(window))

    def _update(self, window: Window, update: Callable[[], None]) -> None:
        """Notes a window, and makes its update."""
        self._note(window)
        self._make(window, update)

    def _make(self, window: Window, update: Callable[[], None]) -> None:
        """Makes the update of a window, unless gradients that are not finite keep it from making one."""
        with self._rate_of_window():
            if self.fused_update and decides_on_device(self.optimizer, self.variables):
                update()  # with the verdict for a flag of the op
            else:
                update_if_it_applies(self.optimizer, window.verdict, update)

    def _rate_of_window(self) -> contextlib.AbstractContextManager[None]:
        """Has the learning rate follow the window's size, if a schedule says so."""
        schedule = self.state.counters.accum_steps
        if not isinstance(schedule, NoiseScaleSchedule) or schedule.learning_rate == "none":
            return contextlib.nullcontext()
        return scaling_learning_rate(innermost(self.optimizer), schedule.factor(self.state.counters.step))

    def _note(self, window: Window) -> None:
        """Notes a window for those who ask."""
        with window.place(self.variables[0]):
            self.state.notes.end(window, scale_of_loss(self.optimizer))
            if self.record is not None:
                self.record.note(window, scale_of_loss(self.optimizer))

    def _end_with_sums(self, window: Window) -> None:
        clip = self.gradient_clipping
        if not self.fused_update:
            self._by_own_apply([window], lambda windows: self._unfused(windows[0]))
        elif clip is not None:
            self._fused(self._clip(window, clip))
        else:
            self._fused(window)

    def _fold(self, batch: CountedMicroBatch) -> None:
        with LOCK, self.state.ending_with(batch) as window:
            self._update(window, lambda: self._fused(window))

    def _fused(self, window: Window) -> None:
        if self.lazy_sparse:
            in_rows = [
                variable
                for i, variable in enumerate(self.variables)
                if i not in window.latest and window.accumulators[i] is not None and window.touched_rows(i) is not None
            ]
            check_no_constraints(in_rows)
        fused_update.apply(self.optimizer, [window], self.variables, lazy=self.lazy_sparse)

    def _by_own_apply(self, windows: Sequence[Window], update: Callable[[Sequence[Window]], None]) -> None:
        """Has `update` end windows, of which a graph may not know the variables that have a gradient.

        Keras's optimizers take one step for each variable, and each step can be in a condition. Of an optimizer with
        an `apply` of its own this is not known: it gets the variables that surely have a gradient, or all.

        Args:
            windows: As for `fused_update.apply`.
            update: Makes an update of the optimizer's own, for windows like these.
        """
        connected = windows[0].connected
        if not connected.maybe or steps_singly(self.optimizer):
            update(windows)
            return
        flags = list(connected.maybe.values())
        sure = [i for i in connected.positions if i not in connected.maybe]
        names = ", ".join(name_of(self.variables[i]) for i in connected.maybe)
        kind = type(innermost(self.optimizer)).__name__
        message = (
            f"{kind} has an `apply` of its own. In a graph it updates all variables, "
            f"or those of the window's last call. This window has gradients of some of {names}, but not of all. Give "
            "zeros instead of None for a variable that has a gradient in some calls only, or run eagerly."
        )

        def of(positions: Sequence[int]) -> list[Window]:
            chosen = Connected(positions, without=[i for i in connected.without if i not in positions])
            return [window.of(chosen) for window in windows]

        def update_all() -> None:
            with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(flags), [message])]):
                update(of(list(connected.positions)))

        if sure:
            tf.cond(tf.reduce_any(flags), update_all, lambda: update(of(sure)))
        else:
            update_all()

    def _on_conditions(self, connected: Connected) -> contextlib.AbstractContextManager[None]:
        """Has the wrapped optimizer leave out the variables that a window turns out to have no gradient for."""
        if not connected.maybe:
            return contextlib.nullcontext()
        inner = innermost(self.optimizer)
        warn_of_missing(inner, self.variables, connected)
        return stepping_if(inner, [(self.variables[i], flag) for i, flag in connected.maybe.items()])

    def _unfused(self, window: Window) -> None:
        inner = innermost(self.optimizer)
        if self.lazy_sparse:
            check_goes_with_lazy_rows(self.optimizer)
        rows_suffice = row_update.leaves_other_rows(inner) and inner.loss_scale_factor is None
        means: Gradients = window.means(sparse=self.lazy_sparse or rows_suffice)
        touched = {i: mean.indices for i, mean in enumerate(means) if isinstance(mean, tf.IndexedSlices)}
        if self.lazy_sparse:
            check_no_constraints([self.variables[i] for i in touched])
        if self.gradient_clipping is not None:
            means = self._clipped(means, self.gradient_clipping)
        connected = window.connected
        pairs = [
            (mean, variable)
            for i, (mean, variable) in enumerate(zip(means, self.variables, strict=True))
            if mean is not None or i in connected.without
        ]
        # The optimizer may have been built for more variables, or in another order.
        in_optimizer = {index_of(inner, self.variables[i]): indices for i, indices in touched.items()}
        with contextlib.ExitStack() as replaced:
            if in_optimizer:
                replaced.enter_context(
                    row_update.updating_rows(inner, in_optimizer, lazy_weight_decay=self.lazy_sparse)
                )
            if window.replica is None:
                # Outside of what replaces the steps of rows, whose conditions these are, too.
                replaced.enter_context(self._on_conditions(connected))
            self.optimizer.apply([mean for mean, _ in pairs], [variable for _, variable in pairs])

    def _end_across(self, strategy: tf.distribute.Strategy, last: CountedMicroBatch | None) -> None:
        """Ends the window of all replicas, which make the same update. Runs outside of the replicas."""
        with LOCK, self.state.ending_across(strategy, last) as windows:
            self._update(windows[0], lambda: self._end_on_replicas(strategy, windows))

    def _end_on_replicas(self, strategy: tf.distribute.Strategy, windows: Sequence[Window]) -> None:
        clip = self.gradient_clipping
        if not self.fused_update:
            self._by_own_apply(windows, lambda windows: self._unfused_on_each(strategy, windows))
        elif clip is not None:
            clipped = replicas.on_each_replica(strategy, lambda: self._clip(windows[replicas.local_replica()], clip))
            fused_update.apply(self.optimizer, clipped, self.variables, lazy=False)
        else:
            fused_update.apply(self.optimizer, windows, self.variables, lazy=False)

    def _unfused_on_each(self, strategy: tf.distribute.Strategy, windows: Sequence[Window]) -> None:
        # The threads of replicas cannot replace anything themselves: they would wait for the lock that this one has.
        with without_reduction(innermost(self.optimizer), replicas.own), self._on_conditions(windows[0].connected):
            replicas.on_each_replica(strategy, lambda: self._unfused(windows[replicas.local_replica()]))

    def _clip(self, window: Window, clip: Clipping) -> Window:
        """Returns a window whose gradients are the clipped means, for a fused update."""
        clipped = self._clipped(window.means(sparse=False), clip)
        latest = {i: tf.cast(each, tf.float32) for i, each in enumerate(clipped) if each is not None}
        return dataclasses.replace(
            window, weight=tf.constant(1.0), latest=latest, latest_weight=1.0, starts=True, reported=None
        )

    def _clipped(self, gradients: Gradients, clip: Clipping) -> Gradients:
        """Clips gradients without the factor of a scaled loss, and puts the factor back for the wrapped optimizer."""
        scale = scale_of_loss(self.optimizer)
        if scale is not None:
            scale = tf.convert_to_tensor(scale, tf.float32)
            gradients = [_times(gradient, 1 / scale) for gradient in gradients]
        clipped = clip(gradients, self.variables)
        if not isinstance(clipped, list | tuple) or len(clipped) != len(gradients):
            raise ValueError(
                f"`gradient_clipping` must return a list of one gradient for each of {len(gradients)} variables. "
                f"Received: {len(clipped) if isinstance(clipped, list | tuple) else clipped!r}"
            )
        for before, after, variable in zip(gradients, clipped, self.variables, strict=True):
            if isinstance(after, tf.IndexedSlices) and after.indices is not getattr(before, "indices", None):
                raise ValueError(
                    f"`gradient_clipping` must keep the indices of tf.IndexedSlices. For '{variable.path}' it returned "
                    "others."
                )
        return clipped if scale is None else [_times(gradient, scale) for gradient in clipped]


def _if(condition: bool | tf.Tensor, do: Callable[[], None], otherwise: Callable[[], None] = lambda: None) -> None:
    """Does something on a condition, which may be known already."""
    if condition is True:
        do()
    else:
        keras.ops.cond(condition, do, otherwise)


def _times(gradient: tf.Tensor | tf.IndexedSlices | None, factor: tf.Tensor) -> tf.Tensor | tf.IndexedSlices | None:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)
