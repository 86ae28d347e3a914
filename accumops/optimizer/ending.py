"""How a window ends: with one update of the wrapped optimizer, in the first of these ways that fits.

    way           function              when
    folded        `_fold`               the last micro-batch is at hand, the update is fused, and nothing needs the
                                        window's whole gradient before it (no `gradient_clipping`, no clipping by norm,
                                        no LossScaleOptimizer): the op adds the last gradients while it updates
    on replicas   `_on_replicas`        under a mirroring strategy: outside of the replicas, once for all of them
    unfused       `_unfused`            the op cannot make the update: the optimizer's own `apply` gets the mean
                                        gradients, clipped; of tables only the touched rows, if that is enough
    clipped       `_fused(_clip(…))`    fused, with `gradient_clipping`: the op gets the clipped mean gradients
    fused         `_fused`              fused: the op reads the sums in the accumulators

`FusedUpdate` says whether, and why, an update is fused or not.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import index_of, innermost, without_reduction
from accumops.adapters.overriding import LOCK
from accumops.optimizer import fused_update, row_update
from accumops.optimizer.checks import check_goes_with_lazy_rows, check_no_constraints
from accumops.optimizer.fused_update import FusedUpdate
from accumops.optimizer.nonfinite import scale_of_loss, update_if_it_applies
from accumops.window import replicas
from accumops.window.micro_batch import CountedMicroBatch, Window
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
        needs_all = self.gradient_clipping is not None or fused_update.needs_norms(self.optimizer)
        return not needs_all and bool(self.fused_update)

    def end_with(self, batch: CountedMicroBatch, given: Sequence[int]) -> None:
        """Ends the window with a micro-batch that has not been added to it.

        Args:
            batch: The last micro-batch.
            given: As for `end`.
        """
        if self.folds:
            self._fold(batch, given)
        else:
            self.state.add(batch)
            self.end(given)

    def end(self, given: Sequence[int] = ()) -> None:
        """Ends the window, whose micro-batches have all been added.

        Args:
            given: The positions of variables that were given with the last micro-batch. Those without gradient go
                along to the wrapped optimizer, for Keras to warn of.
        """
        strategy = self.state.strategy
        if strategy is not None:
            replicas.across_replicas(strategy, lambda: self._on_replicas(strategy, given))
            return
        with LOCK, self.state.ending() as window:
            self._update(window, lambda: self._end(window, given))

    def _update(self, window: Window, update: Callable[[], None]) -> None:
        """Makes the update of a window, unless gradients that are not finite keep it from making one."""
        update_if_it_applies(self.optimizer, window.verdict, update)

    def _end(self, window: Window, given: Sequence[int]) -> None:
        clip = self.gradient_clipping
        if not self.fused_update:
            self._unfused(window, given)
        elif clip is not None:
            self._fused(self._clip(window, clip), given)
        else:
            self._fused(window, given)

    def _fold(self, batch: CountedMicroBatch, given: Sequence[int]) -> None:
        with LOCK, self.state.ending_with(batch) as window:
            self._update(window, lambda: self._fused(window, given))

    def _fused(self, window: Window, given: Sequence[int]) -> None:
        if self.lazy_sparse:
            in_rows = [
                variable
                for i, variable in enumerate(self.variables)
                if i not in window.latest and window.accumulators[i] is not None and window.touched_rows(i) is not None
            ]
            check_no_constraints(in_rows)
        fused_update.apply(self.optimizer, [window], self.variables, given, lazy=self.lazy_sparse)

    def _unfused(self, window: Window, given: Sequence[int]) -> None:
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
        pairs = [
            (mean, variable)
            for i, (mean, variable) in enumerate(zip(means, self.variables, strict=True))
            if mean is not None or i in given
        ]
        # The optimizer may have been built for more variables, or in another order.
        in_optimizer = {index_of(inner, self.variables[i]): indices for i, indices in touched.items()}
        in_rows: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if in_optimizer:
            in_rows = row_update.updating_rows(inner, in_optimizer, lazy_weight_decay=self.lazy_sparse)
        with in_rows:
            self.optimizer.apply([mean for mean, _ in pairs], [variable for _, variable in pairs])

    def _on_replicas(self, strategy: tf.distribute.Strategy, given: Sequence[int]) -> None:
        """Ends the window of all replicas, which make the same update. Runs outside of the replicas."""
        with LOCK, self.state.ending_across(strategy) as windows:
            self._update(windows[0], lambda: self._end_on_replicas(strategy, windows, given))

    def _end_on_replicas(
        self, strategy: tf.distribute.Strategy, windows: Sequence[Window], given: Sequence[int]
    ) -> None:
        def own_window() -> Window:
            return windows[replicas.local_replica()]

        clip = self.gradient_clipping
        if not self.fused_update:
            with without_reduction(innermost(self.optimizer), replicas.own):
                replicas.on_each_replica(strategy, lambda: self._unfused(own_window(), given))
        elif clip is not None:
            clipped = replicas.on_each_replica(strategy, lambda: self._clip(own_window(), clip))
            fused_update.apply(self.optimizer, clipped, self.variables, given, lazy=False)
        else:
            fused_update.apply(self.optimizer, windows, self.variables, given, lazy=False)

    def _clip(self, window: Window, clip: Clipping) -> Window:
        """Returns a window whose gradients are the clipped means, for a fused update."""
        clipped = self._clipped(window.means(sparse=False), clip)
        latest = {i: tf.cast(each, tf.float32) for i, each in enumerate(clipped) if each is not None}
        return dataclasses.replace(window, weight=tf.constant(1.0), latest=latest, latest_weight=1.0, starts=True)

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


def _times(gradient: tf.Tensor | tf.IndexedSlices | None, factor: tf.Tensor) -> tf.Tensor | tf.IndexedSlices | None:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)
