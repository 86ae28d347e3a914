"""The update of a Keras optimizer as one fused op over all variables, where the op has the optimizer's mathematics.

The wrapped optimizer's `apply` still runs: moving averages, constraints, the count of updates and what a
`LossScaleOptimizer` decides are its own. What is replaced is the arithmetic between, from the window's sums to the
variables: division by the weight, unscaling, clipping, weight decay and step, in the optimizer's own variables.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops import ops
from accumops.adapters.overriding import overriding
from accumops.ops import library
from accumops.ops.variables import tf_variable
from accumops.window.handover import Window
from accumops.window.recording import Recording


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


@dataclasses.dataclass(frozen=True)
class _Rule:
    name: str
    slots: list[list[keras.Variable]]
    settings: dict[str, float]
    rate: Callable[[tf.Tensor], tf.Tensor]  # from the learning rate to the op's


def _sgd(optimizer: keras.optimizers.SGD) -> _Rule:
    if optimizer.momentum == 0:
        return _Rule("sgd", [], {}, tf.identity)
    name = "nesterov" if optimizer.nesterov else "momentum"
    return _Rule(name, [_of(optimizer, "momentums")], {"beta_1": optimizer.momentum}, tf.identity)


def _adam(optimizer: keras.optimizers.Adam) -> _Rule:
    def rate(learning_rate: tf.Tensor) -> tf.Tensor:
        # Of the dtype and in the order that Keras computes it in.
        step = tf.cast(optimizer.iterations + 1, learning_rate.dtype)
        beta_1, beta_2 = (tf.cast(beta, learning_rate.dtype) for beta in (optimizer.beta_1, optimizer.beta_2))
        return learning_rate * tf.sqrt(1 - beta_2**step) / (1 - beta_1**step)

    slots = [_of(optimizer, "_momentums"), _of(optimizer, "_velocities")]
    if optimizer.amsgrad:
        slots.append(_of(optimizer, "_velocity_hats"))
    settings = {"beta_1": optimizer.beta_1, "beta_2": optimizer.beta_2, "epsilon": optimizer.epsilon}
    return _Rule("amsgrad" if optimizer.amsgrad else "adam", slots, settings, rate)


def _lion(optimizer: keras.optimizers.Lion) -> _Rule:
    settings = {"beta_1": optimizer.beta_1, "beta_2": optimizer.beta_2}
    return _Rule("lion", [_of(optimizer, "_momentums")], settings, tf.identity)


def _of(optimizer: keras.optimizers.Optimizer, name: str) -> list[keras.Variable]:
    return list(getattr(optimizer, name)) if optimizer.built else []


# AdamW's step is Adam's; its weight decay every optimizer has.
_RULES: dict[type[keras.optimizers.Optimizer], Callable[[Any], _Rule]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Lion: _lion,
}
# What the op stands in for: a subclass that has its own may do anything in it.
_REPLACED = ("apply", "_backend_apply_gradients", "_backend_update_step", "_clip_gradients", "_apply_weight_decay")


def describe(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> FusedUpdate:
    """Says whether `apply` is to be used for an optimizer and these variables.

    Args:
        optimizer: The optimizer, or a `LossScaleOptimizer` around it.
        variables: The variables that it updates.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    reason = _reason(optimizer, inner, variables)
    if reason is not None:
        return FusedUpdate(None, reason)
    return FusedUpdate(_rule_of(inner).name, None)


def _reason(
    optimizer: keras.optimizers.Optimizer, inner: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> str | None:
    if inner is not optimizer and (
        not isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or hasattr(inner, "inner_optimizer")
    ):
        return f"{type(optimizer).__name__} is not known"
    if type(inner).update_step not in [kind.update_step for kind in _RULES] or "update_step" in vars(inner):
        return f"{type(inner).__name__} is none of SGD, Adam, AdamW and Lion"
    unknown = [name for name in _REPLACED if not hasattr(keras.optimizers.Optimizer, name)]
    if unknown:
        return f"the optimizers of Keras {keras.__version__} have no `{unknown[0]}`"
    own = [name for name in _REPLACED if getattr(type(inner), name) is not getattr(keras.optimizers.Optimizer, name)]
    if own:
        return f"{type(inner).__name__} has its own `{own[0]}`"
    wrong = [variable for variable in variables if tf.as_dtype(variable.dtype) != tf.float32]
    if wrong:
        return f"'{wrong[0].path}' is {wrong[0].dtype}, and the op is for float32"
    if ops.get_backend() == "reference":
        return "the backend is 'reference'"
    if library.fused_ops([tf_variable(variable) for variable in variables]) is None:
        return library.load()[1] or library.gpu_problem()
    return None


def _rule_of(optimizer: keras.optimizers.Optimizer) -> _Rule:
    return next(rule for kind, rule in _RULES.items() if type(optimizer).update_step is kind.update_step)(optimizer)


def needs_norms(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the update needs the norm of the window's gradients before it can start."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner is not optimizer or bool(inner.clipnorm or inner.global_clipnorm)


def apply(
    optimizer: keras.optimizers.Optimizer,
    windows: Sequence[Window],
    variables: Sequence[keras.Variable],
    given: Sequence[int],
    *,
    lazy: bool,
) -> None:
    """Has the optimizer make its update of a window, as `optimizer.apply` does with the window's mean gradients.

    Args:
        optimizer: One that `describe` says is fused.
        windows: The window; under a strategy that of each replica of this process, with the same sums.
        variables: All variables of the optimizer, in the order of the window's.
        given: The positions of those that were given without gradient, for Keras to warn of.
        lazy: Whether rows without gradient stay as they are, whatever the rule would do.
    """
    positions = [i for i, held in enumerate(windows[0].accumulators) if held is not None or i in given]
    norms: list[tf.Tensor | None] = [None] * len(windows)
    if needs_norms(optimizer):
        for each, window in enumerate(windows):
            with window.place(variables[0]):
                norms[each] = _squared_norms(window)
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = optimizer.loss_scale_factor
        _apply_to(optimizer, windows, variables, positions, 1.0 if scale is None else 1 / scale, norms, lazy)
        return
    inner = optimizer.inner_optimizer
    finite = tf.reduce_all(tf.math.is_finite(norms[0]))

    def apply_unscaled(*unused: Any, **unused_too: Any) -> None:
        _apply_to(inner, windows, variables, positions, 1 / tf.convert_to_tensor(optimizer.dynamic_scale), norms, lazy)

    # It passes gradients on that are None as they are, and looks at no others.
    own: dict[str, Any] = {"check_finite": lambda gradients: finite}
    if windows[0].replica is not None:
        own["_tf_apply"] = optimizer._common_apply  # this is outside of the replicas already
    with overriding(optimizer, **own), overriding(inner, apply=apply_unscaled):
        optimizer.apply([None] * len(positions), [variables[i] for i in positions])


def _apply_to(
    optimizer: keras.optimizers.Optimizer,
    windows: Sequence[Window],
    variables: Sequence[keras.Variable],
    positions: Sequence[int],
    factor: float | tf.Tensor,
    norms: Sequence[tf.Tensor | None],
    lazy: bool,
) -> None:
    def scales_of(window: Window, squares: tf.Tensor | None) -> tf.Tensor:
        """A factor for the sum of each variable's gradients."""
        scale = tf.cast(factor, tf.float32) * tf.math.divide_no_nan(1.0, window.weight)
        clips = None if squares is None else _clipping(optimizer, tf.cast(scale, tf.float64) ** 2 * squares)
        return scale if clips is None else scale * clips

    places = {optimizer._var_key(variable): i for i, variable in enumerate(variables)}

    after_update = contextlib.ExitStack()

    def update(unused: Any, updated: Sequence[keras.Variable], learning_rate: tf.Tensor) -> None:
        indices = [places[optimizer._var_key(variable)] for variable in updated]
        with Recording() as recording:
            for window, scales in zip(windows, all_scales, strict=True):
                for folded in (True, False):
                    chosen = [i for i in indices if (i in window.latest) == folded]
                    if chosen:
                        with window.place(variables[0]):
                            _update(optimizer, window, variables, chosen, scales, learning_rate, lazy and not folded)
        # What the optimizer does next, such as to count the update, waits for it: one that fails is none.
        after_update.enter_context(tf.control_dependencies(recording.effects))

    all_scales = []
    for window, squares in zip(windows, norms, strict=True):
        with window.place(variables[0]):
            all_scales.append(scales_of(window, squares))

    # Stands for a gradient; nobody looks at it.
    some = tf.constant(0.0)
    own = overriding(
        optimizer,
        loss_scale_factor=None,
        _clip_gradients=lambda gradients: gradients,
        _apply_weight_decay=lambda decaying: None,
        _backend_update_step=update,
    )
    with own, after_update:
        type(optimizer).apply(
            optimizer,
            [None if windows[0].accumulators[i] is None else some for i in positions],
            [variables[i] for i in positions],
        )


def _update(
    optimizer: keras.optimizers.Optimizer,
    window: Window,
    variables: Sequence[keras.Variable],
    chosen: Sequence[int],
    scales: tf.Tensor,
    learning_rate: tf.Tensor,
    lazy: bool,
) -> None:
    rule = _rule_of(optimizer)
    # It may have been built for more variables, or in another order.
    in_slots = [optimizer._get_variable_index(variables[i]) for i in chosen]
    rate = tf.cast(learning_rate, tf.float32)
    decay = optimizer.weight_decay
    decays = [decay is not None and optimizer._use_weight_decay(variables[i]) for i in chosen]
    latest = [window.latest[i] for i in chosen if i in window.latest]
    rows: list[keras.Variable | None] = [None] * len(chosen)
    if not latest:
        # Without momentum a row without gradient stays as it is anyway.
        rows = [
            window.touched_rows(i) if lazy or (rule.name == "sgd" and not decaying) else None
            for i, decaying in zip(chosen, decays, strict=True)
        ]
    ops.update(
        rule.name,
        [window.own(variables[i]) for i in chosen],
        [[window.own(slot[i]) for i in in_slots] for slot in rule.slots],
        accumulators=None if latest and window.starts is True else [window.accumulators[i] for i in chosen],
        latest=latest or None,
        scales=tf.gather(scales, chosen) if scales.shape.rank else scales,
        rate=rule.rate(rate),
        decay=0.0 if decay is None else decay * rate,
        decays=decays,
        weight=window.latest_weight if latest else 1.0,
        overwrite=window.starts if latest else False,
        touched_rows=rows,
        clip=_clip_value(optimizer),
        **rule.settings,
    )


def _squared_norms(window: Window) -> tf.Tensor:
    """Those of what the accumulators hold, or of the latest gradients alone; zero for a variable that has neither."""
    held = [i for i, accumulator in enumerate(window.accumulators) if accumulator is not None]
    norms = ops.squared_norms([tf.convert_to_tensor(window.latest.get(i, window.accumulators[i])) for i in held])
    if len(held) == len(window.accumulators):
        return norms
    return tf.scatter_nd([[i] for i in held], norms, [len(window.accumulators)])


def _clipping(optimizer: keras.optimizers.Optimizer, squares: tf.Tensor) -> tf.Tensor | None:
    """What clips gradients of these squared norms, by the formulas of Keras: a factor for each, or for all, or None."""
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
    """The limit of values, which Keras heeds where there is none of norms."""
    return 0.0 if optimizer.clipnorm or optimizer.global_clipnorm else float(optimizer.clipvalue or 0)
