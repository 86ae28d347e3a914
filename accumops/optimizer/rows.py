"""Updates of the rows of tables that have gradients, and of no others, by the mathematics of Keras's optimizers.

Keras's own update of a variable with a sparse gradient reads and writes all of it, and all of its momentums. For SGD
without momentum and for Adagrad a row without gradient stays what it is, and updating the others is the whole update.
For the others it is another algorithm, the lazy one: a row's momentums decay only when it has a gradient.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import keras
import tensorflow as tf

from accumops.adapters.overriding import overriding
from accumops.ops.variables import tf_variable


class _Rows:
    """Some rows, each once, of a variable and of the optimizer's variables beside it."""

    def __init__(self, indices: tf.Tensor) -> None:
        self._indices = indices

    def read(self, variable: tf.Variable | keras.Variable) -> tf.Tensor:
        return tf.gather(tf_variable(variable), self._indices)

    def write(self, variable: tf.Variable | keras.Variable, values: tf.Tensor) -> tf.Tensor:
        tf_variable(variable).scatter_update(tf.IndexedSlices(values, self._indices))
        return values

    def of(self, gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
        # Clipping by value makes it dense, and nothing changes the order of its rows.
        return gradient.values if isinstance(gradient, tf.IndexedSlices) else tf.gather(gradient, self._indices)


# What `update_step` does, on rows: (optimizer, position of the variable, rows, its rows, their gradient, learning rate)
# to the rows' next values. Written beside that of each optimizer in Keras.
_Rule = Callable[[keras.optimizers.Optimizer, int, _Rows, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def _sgd(
    optimizer: keras.optimizers.SGD, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    if optimizer.momentum == 0:
        return values - rate * gradient
    momentum = rows.read(optimizer.momentums[i]) * optimizer.momentum - rate * gradient
    rows.write(optimizer.momentums[i], momentum)
    return values + (momentum * optimizer.momentum - rate * gradient if optimizer.nesterov else momentum)


def _adagrad(
    optimizer: keras.optimizers.Adagrad, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    sums = optimizer._accumulators[i]
    total = rows.write(sums, rows.read(sums) + gradient**2)
    return values - rate * gradient / tf.sqrt(total + optimizer.epsilon)


def _rmsprop(
    optimizer: keras.optimizers.RMSprop, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    def average(variable: keras.Variable, value: tf.Tensor) -> tf.Tensor:
        return rows.write(variable, optimizer.rho * rows.read(variable) + (1 - optimizer.rho) * value)

    variance = average(optimizer._velocities[i], gradient**2)
    if optimizer.centered:
        variance -= average(optimizer._average_gradients[i], gradient) ** 2
    increment = rate * gradient / tf.sqrt(variance + optimizer.epsilon)
    if optimizer.momentum > 0:
        momentums = optimizer._momentums[i]
        increment = rows.write(momentums, optimizer.momentum * rows.read(momentums) + increment)
    return values - increment


def _adam(
    optimizer: keras.optimizers.Adam, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    step = tf.cast(optimizer.iterations + 1, values.dtype)
    correction = tf.sqrt(1 - tf.cast(optimizer.beta_2, values.dtype) ** step) / (
        1 - tf.cast(optimizer.beta_1, values.dtype) ** step
    )

    def average(variable: keras.Variable, value: tf.Tensor, beta: float) -> tf.Tensor:
        before = rows.read(variable)
        return rows.write(variable, before + (value - before) * (1 - beta))

    momentum = average(optimizer._momentums[i], gradient, optimizer.beta_1)
    variance = average(optimizer._velocities[i], gradient**2, optimizer.beta_2)
    if optimizer.amsgrad:
        largest = optimizer._velocity_hats[i]
        variance = rows.write(largest, tf.maximum(rows.read(largest), variance))
    return values - momentum * (rate * correction) / (tf.sqrt(variance) + optimizer.epsilon)


def _lion(
    optimizer: keras.optimizers.Lion, i: int, rows: _Rows, values: tf.Tensor, gradient: tf.Tensor, rate: tf.Tensor
) -> tf.Tensor:
    momentum = rows.read(optimizer._momentums[i])
    rows.write(optimizer._momentums[i], momentum * optimizer.beta_2 + gradient * (1 - optimizer.beta_2))
    return values - rate * tf.sign(momentum * optimizer.beta_1 + gradient * (1 - optimizer.beta_1))


# Adam's is AdamW's too; a subclass with an `update_step` of its own has none.
_RULES: dict[type[keras.optimizers.Optimizer], _Rule] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Lion: _lion,
}


def rule_of(optimizer: keras.optimizers.Optimizer) -> _Rule | None:
    """How the optimizer updates rows, or None where that is not known."""
    if "update_step" in vars(optimizer):
        return None
    return next((rule for kind, rule in _RULES.items() if type(optimizer).update_step is kind.update_step), None)


def names_of_optimizers() -> list[str]:
    """The names of the optimizers that have a rule."""
    return sorted([kind.__name__ for kind in _RULES] + [keras.optimizers.AdamW.__name__])


def leaves_other_rows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a row without gradient stays what it is in the optimizer's own update."""
    rule = rule_of(optimizer)
    return rule is _adagrad or (rule is _sgd and optimizer.momentum == 0)


@contextlib.contextmanager
def updating_rows(
    optimizer: keras.optimizers.Optimizer, rows: Mapping[int, tf.Tensor], lazy_weight_decay: bool
) -> Iterator[None]:
    """Has the optimizer's `apply` update only these rows of these variables.

    Args:
        optimizer: The optimizer, one that has a rule.
        rows: Indices of rows by the variable's position, each once; the gradients are of these rows, in this order.
        lazy_weight_decay: Whether the weights of other rows do not decay.
    """
    rule = rule_of(optimizer)
    decays = optimizer._use_weight_decay
    update_step = optimizer.update_step

    def update(gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        i = optimizer._get_variable_index(variable)
        if rule is None or i not in rows:
            update_step(gradient, variable, learning_rate)
            return
        touched = _Rows(rows[i])
        values = touched.read(variable)
        rate = tf.cast(learning_rate, variable.dtype)
        if lazy_weight_decay and optimizer.weight_decay is not None and decays(variable):
            values -= values * tf.cast(optimizer.weight_decay, variable.dtype) * rate
        values = rule(optimizer, i, touched, values, tf.cast(touched.of(gradient), variable.dtype), rate)
        touched.write(variable, values)

    def decays_as_a_whole(variable: tf.Variable) -> bool:
        in_rows = lazy_weight_decay and optimizer._get_variable_index(variable) in rows
        return not in_rows and decays(variable)

    with overriding(optimizer, update_step=update, _use_weight_decay=decays_as_a_whole):
        yield
