"""The definition of optimizers' updates."""

from collections.abc import Sequence

import tensorflow as tf


def update(
    rule: str,
    variables: Sequence[tf.Variable],
    slots: Sequence[Sequence[tf.Variable]],
    *,
    accumulators: Sequence[tf.Variable] | None,
    latest: Sequence[tf.Tensor] | None,
    scales: tf.Tensor,
    rate: tf.Tensor,
    iterations: tf.Tensor | None = None,
    decay: tf.Tensor,
    decays: Sequence[bool],
    weight: tf.Tensor,
    overwrite: tf.Tensor,
    applies: tf.Tensor,
    touched_rows: Sequence[tf.Variable | None],
    beta_1: float,
    beta_2: float,
    epsilon: float,
    clip: float,
    only_if: tf.Tensor | None = None,
) -> None:
    """Defines `accumops.ops.update`. It takes the same arguments, all of them but `only_if`, and does not check them.

    A weight of 0 counts as no latest gradients, whatever they hold.
    """

    def make() -> None:
        factors = tf.broadcast_to(scales, [len(variables)])
        rate_of_step = rate if iterations is None else corrected_rate(rate, iterations, beta_1, beta_2)
        for i, variable in enumerate(variables):
            gradient = tf.zeros_like(variable)
            if accumulators is not None:
                gradient = tf.where(overwrite, gradient, accumulators[i])
            if latest is not None:
                gradient += tf.math.multiply_no_nan(tf.cast(latest[i], tf.float32), weight)
            gradient *= factors[i]
            if clip:
                gradient = tf.clip_by_value(gradient, -clip, clip)
            before = [tf.convert_to_tensor(each) for each in (variable, *(slot[i] for slot in slots))]
            value = before[0] - before[0] * decay if decays[i] else before[0]
            after = step(rule, value, before[1:], gradient, rate_of_step, beta_1, beta_2, epsilon)
            rows = touched_rows[i]
            for target, old, new in zip((variable, *(slot[i] for slot in slots)), before, after, strict=True):
                if rows is not None:
                    new = tf.where(tf.reshape(rows, [-1] + [1] * (new.shape.rank - 1)), new, old)
                target.assign(tf.where(applies, new, old))

    if only_if is None:
        make()
    else:
        tf.cond(only_if, make, lambda: None)


def corrected_rate(rate: tf.Tensor, iterations: tf.Tensor, beta_1: float, beta_2: float) -> tf.Tensor:
    """Returns the rate of Adam's step, corrected for the bias that the slots have from their start at zero.

    It is computed in the dtype of `rate` and in the order of Keras.

    Args:
        rate: The learning rate, a scalar float tensor.
        iterations: The number of updates before this one, a scalar integer tensor or variable.
        beta_1: The decay rate of m.
        beta_2: The decay rate of v.
    """
    number = tf.cast(iterations + 1, rate.dtype)
    bias_1, bias_2 = (1 - tf.cast(beta, rate.dtype) ** number for beta in (beta_1, beta_2))
    return rate * tf.sqrt(bias_2) / bias_1


def step(
    rule: str,
    value: tf.Tensor,
    slots: Sequence[tf.Tensor],
    gradient: tf.Tensor,
    rate: tf.Tensor,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> tuple[tf.Tensor, ...]:
    """Returns the value and the slots after one step of a rule.

    This is the one place where the rules SGD, momentum, nesterov, Adam, AMSGrad and Lion are written in Python;
    `accumops.ops.update` has their formulas and sources. Only the verifier and the tests have formulas of their own, to
    check these by. Each element is computed by itself, so the arguments may be rows of a variable as well.

    Args:
        rule: `"sgd"`, `"momentum"`, `"nesterov"`, `"adam"`, `"amsgrad"` or `"lion"`.
        value: A float tensor: the value, after its decay.
        slots: The slots of the rule, in the order m, v, w: tensors of the value's shape and dtype.
        gradient: The gradient, scaled and clipped: a tensor of the value's shape and dtype.
        rate: The learning rate, a scalar tensor of the value's dtype; for Adam with its bias corrections.
        beta_1: The momentum, or the first of two decay rates.
        beta_2: The second decay rate.
        epsilon: The number added to the root.

    Returns:
        The new value, then the new slots in their order.

    Raises:
        ValueError: If there is no such rule.

    Example:

    >>> value, momentum = accumops.ops.reference.step(
    ...     "momentum", tf.constant([1.0]), [tf.constant([0.0])], tf.constant([2.0]), tf.constant(0.5), 0.9, 0.0, 0.0
    ... )
    >>> value.numpy(), momentum.numpy()
    (array([0.], dtype=float32), array([-1.], dtype=float32))
    """
    if rule == "sgd":
        return (value - rate * gradient,)
    if rule in ("momentum", "nesterov"):
        descent = rate * gradient
        momentum = slots[0] * beta_1 - descent
        return value + (momentum * beta_1 - descent if rule == "nesterov" else momentum), momentum
    if rule == "lion":
        direction = slots[0] * beta_1 + gradient * (1 - beta_1)
        return value - rate * tf.sign(direction), slots[0] * beta_2 + gradient * (1 - beta_2)
    if rule not in ("adam", "amsgrad"):
        raise ValueError(
            f"`rule` must be one of 'sgd', 'momentum', 'nesterov', 'adam', 'amsgrad', 'lion'. Received: {rule!r}"
        )
    momentum = slots[0] + (gradient - slots[0]) * (1 - beta_1)
    velocity = slots[1] + (gradient * gradient - slots[1]) * (1 - beta_2)
    largest = (tf.maximum(slots[2], velocity),) if rule == "amsgrad" else ()
    under = largest[0] if largest else velocity
    return value - momentum * rate / (tf.sqrt(under) + epsilon), momentum, velocity, *largest
