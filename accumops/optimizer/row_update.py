"""Updates of the touched rows of tables, such as embeddings, and of no other rows, by the wrapped optimizer's rule.

Keras's own update of a variable with a sparse gradient reads and writes all of the variable and of its slots. For SGD
without momentum and for Adagrad a row without gradient stays what it is, so updating the touched rows is the whole
update. For the others it is another algorithm, the lazy one: the slots of a row decay only when it has a gradient.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from accumops import ops
from accumops.adapters.keras_optimizer import (
    Rule,
    index_of,
    rule_of,
    slots_of_rmsprop,
    stepping_by,
    steps_like,
    sums_of_adagrad,
)
from accumops.ops.variables import tf_variable


def knows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether rows can be updated by the optimizer's rule."""
    return _step_of(optimizer) is not None


def known_optimizers() -> list[str]:
    """The names of the optimizers whose rules are known."""
    return ["Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD"]


def leaves_other_rows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a row without gradient stays what it is in the optimizer's own update."""
    if steps_like(optimizer, keras.optimizers.Adagrad):
        return True
    return steps_like(optimizer, keras.optimizers.SGD) and optimizer.momentum == 0


def updating_rows(
    optimizer: keras.optimizers.Optimizer, rows: Mapping[int, tf.Tensor], *, lazy_weight_decay: bool
) -> contextlib.AbstractContextManager[None]:
    """Has the optimizer's `apply` update only these rows of these variables.

    Args:
        optimizer: An optimizer that `knows` accepts.
        rows: Indices of rows by the variable's position in the optimizer, each row once. The variable's gradient has
            these rows, in this order.
        lazy_weight_decay: Whether the weights of other rows do not decay.
    """
    step_rows = _step_of(optimizer)
    assert step_rows is not None, "checked by `knows`"

    def step(
        gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable, learning_rate: tf.Tensor, decays: bool
    ) -> bool:
        i = index_of(optimizer, variable)
        if i not in rows:
            return False
        touched = _Rows(rows[i])
        values = touched.read(variable)
        rate = tf.cast(learning_rate, variable.dtype)
        if lazy_weight_decay and optimizer.weight_decay is not None and decays:
            values -= values * tf.cast(optimizer.weight_decay, variable.dtype) * rate
        gradient = tf.cast(touched.of(gradient), variable.dtype)
        touched.write(variable, step_rows(i, touched, values, gradient, rate))
        return True

    def decays_as_a_whole(variable: tf.Variable) -> bool:
        return not (lazy_weight_decay and index_of(optimizer, variable) in rows)

    return stepping_by(optimizer, step, decays_as_a_whole)


class _Rows:
    """Some rows, each once, of a variable and of its slots."""

    def __init__(self, indices: tf.Tensor) -> None:
        self._indices = indices

    def read(self, variable: tf.Variable | keras.Variable) -> tf.Tensor:
        return tf.gather(tf_variable(variable), self._indices)

    def write(self, variable: tf.Variable | keras.Variable, values: tf.Tensor) -> tf.Tensor:
        tf_variable(variable).scatter_update(tf.IndexedSlices(values, self._indices))
        return values

    def of(self, gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
        # Clipping by value makes a gradient dense. Nothing changes the order of a sparse gradient's rows.
        return gradient.values if isinstance(gradient, tf.IndexedSlices) else tf.gather(gradient, self._indices)


# Takes the position of a variable, its rows, their values, their gradient and the learning rate. Returns the next
# values of the rows, and moves the rows of the slots.
_Step = Callable[[int, _Rows, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def _step_of(optimizer: keras.optimizers.Optimizer) -> _Step | None:
    """How the optimizer updates rows; None if that is not known."""
    if steps_like(optimizer, keras.optimizers.Adagrad):
        return functools.partial(_adagrad, optimizer)
    if steps_like(optimizer, keras.optimizers.RMSprop):
        return functools.partial(_rmsprop, optimizer)
    rule = rule_of(optimizer)
    return None if rule is None else functools.partial(_by_rule, rule)


def _by_rule(rule: Rule, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
    slots = [slot[i] for slot in rule.slots]
    before = [rows.read(slot) for slot in slots]
    settings = {"beta_1": 0.0, "beta_2": 0.0, "epsilon": 0.0, **rule.settings}
    if rule.iterations is not None:
        rate = ops.reference.corrected_rate(rate, rule.iterations, settings["beta_1"], settings["beta_2"])
    value, *after = ops.reference.step(rule.name, values, before, gradient, rate, **settings)
    for slot, moved in zip(slots, after, strict=True):
        rows.write(slot, moved)
    return value


def _adagrad(
    optimizer: keras.optimizers.Adagrad, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    sums = sums_of_adagrad(optimizer)[i]
    total = rows.write(sums, rows.read(sums) + gradient**2)
    return values - rate * gradient / tf.sqrt(total + optimizer.epsilon)


def _rmsprop(
    optimizer: keras.optimizers.RMSprop, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    squares, means, momentums = slots_of_rmsprop(optimizer)

    def average(variable: keras.Variable, value: tf.Tensor) -> tf.Tensor:
        return rows.write(variable, optimizer.rho * rows.read(variable) + (1 - optimizer.rho) * value)

    variance = average(squares[i], gradient**2)
    if optimizer.centered:
        variance -= average(means[i], gradient) ** 2
    increment = rate * gradient / tf.sqrt(variance + optimizer.epsilon)
    if optimizer.momentum > 0:
        increment = rows.write(momentums[i], optimizer.momentum * rows.read(momentums[i]) + increment)
    return values - increment
