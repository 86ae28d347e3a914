"""The update of a Keras optimizer as one fused op over all variables.

The wrapped optimizer's own `apply` still runs, with its arithmetic replaced:

    optimizer.apply                     Keras's: learning rate, moving averages, constraints, count of updates
      ├─ unscale, clip, weight decay    replaced by nothing: the op does it
      └─ step                           replaced by `ops.update`: from the window's sums to variables and slots

The op reads the window's sums as they are: division by the sum of shares, unscaling and clipping by a norm are one
factor for each variable. Slots are the optimizer's own variables. Whether a window with gradients that are not finite
makes an update is a flag of the op, so that no step waits for a GPU to decide it.

Where a graph does not know whether a micro-batch ends its window, that is a flag of the op as well, and what stands
around the op is in conditions that capture a few scalars:

    condition                           the learning rate and what the op makes of it
    `ops.update(only_if=)`              in no condition, which would take time for each variable that it captures
    condition                           `optimizer.apply`, with its arithmetic replaced by nothing: it counts the update
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from accumops import ops
from accumops.adapters.conditional_steps import constraining_if, warn_of_missing_gradients
from accumops.adapters.keras_optimizer import (
    decays,
    index_of,
    replacing_arithmetic,
    rule_of,
    why_arithmetic_is_kept,
    without_arithmetic,
)
from accumops.ops import library
from accumops.ops.variables import tf_variable
from accumops.optimizer.nonfinite import apply_if_finite, decides_on_device, follow, scale_of_loss
from accumops.window.buckets import in_buckets
from accumops.window.connected_variables import Connected
from accumops.window.micro_batch import Window
from accumops.window.recorded_operations import Recording


@dataclasses.dataclass(frozen=True)
class FusedUpdate:
    """Whether an optimizer's update is one fused op; true where it is."""

    rule: str | None
    """The op's rule, as `accumops.ops.update` names it, or None."""
    reason: str | None
    """None, or why the optimizer's own `apply` makes the update."""

    def __bool__(self) -> bool:
        return self.rule is not None

    def __str__(self) -> str:
        return f"fused, by the rule '{self.rule}'" if self else f"not fused: {self.reason}"


def describe(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> FusedUpdate:
    """Says whether `apply` can be used for an optimizer and these variables.

    Args:
        optimizer: The optimizer, or a `LossScaleOptimizer` around it.
        variables: The variables that it updates.
    """
    inner = _unscaled(optimizer)
    if inner is not optimizer and (
        not isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or hasattr(inner, "inner_optimizer")
    ):
        return FusedUpdate(None, f"{type(optimizer).__name__} is not known")
    rule = rule_of(inner)
    if rule is None:
        return FusedUpdate(None, f"{type(inner).__name__} is none of SGD, Adam, AdamW and Lion")
    reason = why_arithmetic_is_kept(inner) or _why_op_cannot_run(variables)
    return FusedUpdate(rule.name if reason is None else None, reason)


def _why_op_cannot_run(variables: Sequence[keras.Variable]) -> str | None:
    wrong = next((variable for variable in variables if tf.as_dtype(variable.dtype) != tf.float32), None)
    if wrong is not None:
        return f"'{wrong.path}' is {wrong.dtype}, and the op is for float32"
    if ops.get_backend() == "reference":
        return "the backend is 'reference'"
    if library.fused_ops([tf_variable(variable) for variable in variables]) is None:
        return library.load()[1] or library.gpu_problem()
    return None


def needs_norms(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the norms of the window's gradients have to be known before the update can start."""
    inner = _unscaled(optimizer)
    return inner is not optimizer or bool(inner.clipnorm or inner.global_clipnorm)


def apply(
    optimizer: keras.optimizers.Optimizer,
    windows: Sequence[Window],
    variables: Sequence[keras.Variable],
    *,
    lazy: bool,
) -> None:
    """Has the optimizer make its update of a window, as `optimizer.apply` does with the window's mean gradients.

    Args:
        optimizer: One that `describe` says is fused.
        windows: The window; under a strategy one for each replica of this process, with the same sums.
        variables: All variables of the optimizer, in the order of the window's.
        lazy: Whether rows without gradient stay as they are, whatever the rule would do.
    """
    connected = windows[0].connected
    positions = [i for i, held in enumerate(windows[0].accumulators) if held is not None or i in connected.without]
    updated = [variables[i] for i in positions]
    squared_norms: list[tf.Tensor | None] = [None] * len(windows)
    if needs_norms(optimizer):
        for each, window in enumerate(windows):
            with window.place(variables[0]):
                squared_norms[each] = window.squared_norms

    def update(applies: Sequence[tf.Tensor | bool]) -> None:
        warn_of_missing(_unscaled(optimizer), variables, connected)
        unscale = _unscale(optimizer)
        _Update(_unscaled(optimizer), windows, variables, unscale, squared_norms, lazy, applies).run(positions)

    on_device = decides_on_device(optimizer, variables)
    applies = [window.verdict.applies if on_device else True for window in windows]
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        update(applies)
        return
    finite = []
    for window, norms in zip(windows, squared_norms, strict=True):
        with window.place(variables[0]):
            finite.append(tf.reduce_all(tf.math.is_finite(norms)))
    if not on_device:
        outside = windows[0].replica is not None
        apply_if_finite(optimizer, finite[0], lambda: update(applies), updated, outside_replicas=outside)
        return
    with Recording() as recording:
        update([fine if each is True else each & fine for each, fine in zip(applies, finite, strict=True)])
    with tf.control_dependencies(recording.effects):
        follow(optimizer, windows[0].verdict, finite[0])


def apply_if(
    full: tf.Tensor,
    optimizer: keras.optimizers.Optimizer,
    window: Window,
    variables: Sequence[keras.Variable],
    *,
    lazy: bool,
) -> Callable[[], None]:
    """As `apply`, in a graph that knows only when it runs whether there is an update to make.

    Args:
        full: Whether there is, a bool scalar on the host.
        optimizer: One that `describe` says is fused, and no LossScaleOptimizer.
        window: The window, with a gradient for each variable.
        variables: As for `apply`.
        lazy: As for `apply`.

    Returns:
        What is left to be done where there is an update, in a condition: `optimizer.apply` counts it.
    """
    squared_norms = [window.squared_norms if needs_norms(optimizer) else None]
    update = _Update(optimizer, [window], variables, _unscale(optimizer), squared_norms, lazy, [True])
    return update.run_if(full)


class _Factors(NamedTuple):
    """The scalars of an update."""

    scales: tf.Tensor
    """From sums of gradients to what a step takes: one, or one for each variable."""
    rate: tf.Tensor
    decay: tf.Tensor


class _Update:
    """One update of an optimizer that scales no losses itself, on each replica of this process."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        windows: Sequence[Window],
        variables: Sequence[keras.Variable],
        unscale: float | tf.Tensor,
        squared_norms: Sequence[tf.Tensor | None],
        lazy: bool,
        applies: Sequence[tf.Tensor | bool],
    ) -> None:
        rule = rule_of(optimizer)
        assert rule is not None, "checked by `describe`"
        self._optimizer, self._rule, self._lazy = optimizer, rule, lazy
        self._windows, self._variables, self._applies = windows, variables, applies
        self._unscale, self._squared_norms = unscale, squared_norms

    def run(self, positions: Sequence[int]) -> None:
        """Calls the optimizer's `apply` for the variables at these positions."""
        variables, window = self._variables, self._windows[0]
        places = {id(variable): i for i, variable in enumerate(variables)}
        some = tf.constant(0.0)  # stands for a gradient; nothing reads it
        gradients = [None if window.accumulators[i] is None else some for i in positions]
        after_update = contextlib.ExitStack()

        def update(unused: object, updated: Sequence[keras.Variable], learning_rate: tf.Tensor) -> None:
            with Recording() as recording:
                self._step([places[id(variable)] for variable in updated], self._factors(learning_rate))
            # What follows in `apply`, such as incrementing `iterations`, waits for the op: a failed update is not
            # counted.
            after_update.enter_context(tf.control_dependencies(recording.effects))

        maybe = window.connected.maybe
        conditions = [(variables[i], flag) for i, flag in maybe.items()]
        with replacing_arithmetic(self._optimizer, update), constraining_if(conditions), after_update:
            type(self._optimizer).apply(self._optimizer, gradients, [variables[i] for i in positions])
            if self._applies[0] is not True:
                iterations = self._optimizer.iterations  # `apply` has counted an update that may be none
                iterations.assign_sub(tf.cast(~self._applies[0], iterations.dtype))

    def run_if(self, full: tf.Tensor) -> Callable[[], None]:
        """Makes the update of all variables where a flag is true, and returns what is left to be done there."""
        optimizer, variables = self._optimizer, self._variables

        def unread() -> _Factors:
            return _Factors(
                tf.zeros([len(variables)] if optimizer.clipnorm else []), tf.constant(0.0), tf.constant(0.0)
            )

        factors = tf.cond(full, lambda: self._factors(optimizer.learning_rate)[0], unread)
        self._step_all(range(len(variables)), [factors], only_if=full)

        def count() -> None:
            some = tf.constant(0.0)  # stands for a gradient; nothing reads it
            with without_arithmetic(optimizer):
                type(optimizer).apply(optimizer, [some] * len(variables), list(variables))

        return count

    def _factors(self, learning_rate: float | tf.Tensor) -> list[_Factors]:
        """The scalars of the update, on each replica."""
        factors = []
        for window, squares in zip(self._windows, self._squared_norms, strict=True):
            with window.place(self._variables[0]):
                rate = tf.cast(learning_rate, tf.float32)
                decay = self._optimizer.weight_decay
                scales = _scales(self._optimizer, window, self._unscale, squares)
                decay_of_step = tf.constant(0.0) if decay is None else decay * rate
                factors.append(_Factors(scales, rate, decay_of_step))
        return factors

    def _step(self, positions: Sequence[int], factors: Sequence[_Factors]) -> None:
        maybe = {i: flag for i, flag in self._windows[0].connected.maybe.items() if i in positions}
        self._step_all([i for i in positions if i not in maybe], factors)
        if not maybe:
            return
        flags = list(maybe.values())

        def step_each() -> None:
            for i, flag in maybe.items():
                tf.cond(flag, lambda i=i: self._step_all([i], factors), lambda: None)

        # Usually all of them have a gradient, or none has.
        tf.cond(
            tf.reduce_all(flags),
            lambda: self._step_all(list(maybe), factors),
            lambda: tf.cond(tf.reduce_any(flags), step_each, lambda: None),
        )

    def _step_all(
        self, positions: Sequence[int], factors: Sequence[_Factors], only_if: tf.Tensor | None = None
    ) -> None:
        for window, applies, own in zip(self._windows, self._applies, factors, strict=True):
            # One op for the variables whose last gradient is folded in, or a few, and one for the others.
            folded = [i for i in positions if i in window.latest]
            others = [i for i in positions if i not in window.latest]
            latest = [window.latest.get(i) for i in range(len(self._variables))]
            with window.place(self._variables[0]):
                for chosen in in_buckets(folded, latest, self._variables):
                    self._step_in_one_op(window, chosen, own, applies, only_if, folded=True)
                if others:
                    self._step_in_one_op(window, others, own, applies, only_if, folded=False)

    def _step_in_one_op(
        self,
        window: Window,
        chosen: Sequence[int],
        factors: _Factors,
        applies: tf.Tensor | bool,
        only_if: tf.Tensor | None,
        *,
        folded: bool,
    ) -> None:
        optimizer, rule = self._optimizer, self._rule
        # The optimizer may have been built for more variables, or in another order.
        in_slots = [index_of(optimizer, self._variables[i]) for i in chosen]
        has_decay = optimizer.weight_decay is not None
        decaying = [has_decay and decays(optimizer, self._variables[i]) for i in chosen]
        rows = [None if folded else self._rows(window, i, each) for i, each in zip(chosen, decaying, strict=True)]
        ops.update(
            rule.name,
            [window.own(self._variables[i]) for i in chosen],
            [[window.own(slot[i]) for i in in_slots] for slot in rule.slots],
            accumulators=None if folded and window.starts is True else [window.accumulators[i] for i in chosen],
            latest=[window.latest[i] for i in chosen] if folded else None,
            scales=tf.gather(factors.scales, chosen) if factors.scales.shape.rank else factors.scales,
            rate=factors.rate,
            iterations=self._rule.iterations,
            decay=factors.decay,
            decays=decaying,
            weight=window.latest_weight if folded else 1.0,
            overwrite=window.starts if folded else False,
            applies=applies,
            touched_rows=rows,
            clip=_clip_value(optimizer),
            only_if=only_if,
            **rule.settings,
        )

    def _rows(self, window: Window, i: int, decaying: bool) -> keras.Variable | None:
        """The flags of the rows to update; None for all rows."""
        # Without momentum and decay, a row without gradient stays as it is anyway.
        return window.touched_rows(i) if self._lazy or (self._rule.name == "sgd" and not decaying) else None


def warn_of_missing(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable], connected: Connected
) -> None:
    """Has Keras warn of variables that were given without a gradient, where the optimizer's `apply` will not do it.

    Args:
        optimizer: The optimizer within all others.
        variables: All variables.
        connected: Those that the window has a gradient for.
    """
    missing = [variables[i] for i in connected.without if i in connected.maybe]
    if missing:
        warn_of_missing_gradients(optimizer, missing)


def _unscale(optimizer: keras.optimizers.Optimizer) -> float | tf.Tensor:
    """What takes the factor of scaled losses out of gradients."""
    scale = scale_of_loss(optimizer)
    return 1.0 if scale is None else 1 / scale


def _scales(
    optimizer: keras.optimizers.Optimizer, window: Window, unscale: float | tf.Tensor, squares: tf.Tensor | None
) -> tf.Tensor:
    """The factor that turns the sum of a variable's gradients into what its step takes: one, or one a variable."""
    scale = tf.cast(unscale, tf.float32) * tf.math.divide_no_nan(1.0, window.weight)
    clips = None if squares is None else _clipping(optimizer, tf.cast(scale, tf.float64) ** 2 * squares)
    return scale if clips is None else scale * clips


def _clipping(optimizer: keras.optimizers.Optimizer, squares: tf.Tensor) -> tf.Tensor | None:
    """The factor that clips gradients of these squared norms, by Keras's formulas: one each, one for all, or None."""
    if optimizer.clipnorm:
        return tf.cast(optimizer.clipnorm / tf.maximum(tf.sqrt(squares), optimizer.clipnorm), tf.float32)
    if optimizer.global_clipnorm:
        norm = tf.sqrt(tf.reduce_sum(squares))
        limit = tf.constant(optimizer.global_clipnorm, norm.dtype)
        # The difference is NaN for a norm that is not finite, as the gradients then are.
        factor = limit * tf.minimum(1 / norm, 1 / limit) + (norm - norm)
        return tf.cast(factor, tf.float32)
    return None


def _clip_value(optimizer: keras.optimizers.Optimizer) -> float:
    """The limit of single values. Keras ignores it if there is a limit of norms."""
    return 0.0 if optimizer.clipnorm or optimizer.global_clipnorm else float(optimizer.clipvalue or 0)


def _unscaled(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer within a LossScaleOptimizer, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)
