"""The window's state machine: what sums the gradients of K micro-batches, and knows when the window is full.

A window opens with the first micro-batch after the last close, whose gradients overwrite the accumulators, and is
closed by whoever applies the update:

                      accumulate (overwrites)                    accumulate (adds)
    EMPTY  step = 0 ────────────────────────▶ OPEN  0 < step < K ───────────────▶ FULL  step = K, `ready`
      ▲                                         │                                   │
      └─────────────────────────────────────────┴──────────── close ────────────────┘

The state is one accumulator a variable, `step` and `weight`; `GradientAccumulator` is their one owner. Closing only
sets `step` back: what the accumulators hold between windows has no influence, and nothing clears it.
"""

import numbers
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops import ops


class GradientAccumulator(tf.Module):
    """Sums the gradients of `accum_steps` micro-batches, for custom training loops.

    The gradient that `close` returns is the weighted mean over the window, `sum(weight * gradient) / sum(weight)`: with
    equal micro-batches and the default weight, the gradient of the whole window's mean loss. Accumulators are float32
    whatever the variables are, and float64 for float64 variables. Sparse gradients (`tf.IndexedSlices`, from
    embeddings) touch only their rows.

    Args:
        accum_steps: Micro-batches a window, an int of at least 1, or None: then a window is never `ready` and ends when
            `close` is called.
        name: The name of the accumulator, in messages and checkpoints.

    Raises:
        TypeError: If `accum_steps` is not an int.
        ValueError: If `accum_steps` is less than 1.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> variables = model.trainable_variables
    >>> optimizer = keras.optimizers.SGD(0.1)
    >>> optimizer.build(variables)
    >>> accumulator = accumops.GradientAccumulator(accum_steps=4)
    >>> accumulator.build(variables)
    >>> @tf.function
    ... def train_step(x, y):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    ...     accumulator.accumulate(tape.gradient(loss, variables))
    ...     if accumulator.ready:
    ...         optimizer.apply(accumulator.close(), variables)
    ...     return loss
    >>> for _ in range(8):
    ...     loss = train_step(tf.random.normal([16, 3]), tf.random.normal([16, 1]))
    >>> int(optimizer.iterations)
    2
    """

    def __init__(self, accum_steps: int | None, name: str = "gradient_accumulator") -> None:
        super().__init__(name=name)
        self._accum_steps = check_accum_steps(accum_steps)
        self.built = False

    def build(self, variables: Sequence[tf.Variable]) -> None:
        """Creates the accumulators; `accumulate` does it where it is given `variables`.

        Args:
            variables: The trainable variables (`tf.Variable` or `keras.Variable`), of floating-point dtypes.

        Raises:
            ValueError: If there are none, one is not of a floating-point dtype, or `build` was called before.
        """
        if self.built:
            raise ValueError(f"{self.name} is already built; make a new one for other variables.")
        variables = list(variables)
        if not variables:
            raise ValueError(f"{self.name} needs at least one variable to accumulate gradients for. Received none.")
        for variable in variables:
            if not tf.as_dtype(variable.dtype).is_floating:
                raise ValueError(
                    f"Gradients of '{_name(variable)}' cannot be accumulated: its dtype must be floating-point. "
                    f"Received: {tf.as_dtype(variable.dtype).name}."
                )
        self._names = [_name(variable) for variable in variables]
        self._accumulators = [_new_accumulator(variable) for variable in variables]
        self._step = keras.Variable(0, dtype="int64", trainable=False, name="step")
        self._weight = keras.Variable(0.0, dtype="float32", trainable=False, name="weight")
        # Row flags (see ops.accumulate) of the accumulators that have met a sparse gradient, by their position.
        self._touched_rows: dict[str, tf.Variable] = {}
        # The variables that have had a gradient; the others close with None, as they would without accumulation.
        self._connected: set[int] = set()
        self.built = True

    @property
    def accum_steps(self) -> int | None:
        """Micro-batches a window, or None."""
        return self._accum_steps

    @property
    def accumulators(self) -> list[keras.Variable]:
        """The variables that hold the open window's sum of weighted gradients, in the order of `build`'s variables."""
        self._check_built()
        return list(self._accumulators)

    @property
    def variables(self) -> list[keras.Variable]:
        """All of the window's state, to save and to restore: step, weight and accumulators."""
        self._check_built()
        return [self._step, self._weight, *self._accumulators]

    @property
    def step(self) -> tf.Tensor:
        """How many micro-batches the open window holds: an int64 scalar, 0 when none is open."""
        self._check_built()
        return tf.convert_to_tensor(self._step)

    @property
    def ready(self) -> tf.Tensor:
        """Whether the window is full and waits for `close`: a bool scalar."""
        return tf.constant(False) if self._accum_steps is None else self.step >= self._accum_steps

    def accumulate(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        variables: Sequence[tf.Variable] | None = None,
        *,
        weight: float | tf.Tensor = 1.0,
    ) -> None:
        """Adds the gradients of one micro-batch to the window. One op for all variables.

        Args:
            gradients: One for each variable, in the order of `build`: tensors or `tf.IndexedSlices`. None counts as
                zero, and a variable that has had nothing but None closes with None.
            variables: What to build with on the first call; it is not needed later.
            weight: This micro-batch's share in the window, a number or scalar tensor, not negative. For micro-batches
                of different sizes whose loss is a mean, the number of samples.

        Raises:
            ValueError: If it is not built and `variables` is not given, if all gradients are None, or if their number,
                a shape or a dtype does not fit.
        """
        if not self.built:
            if variables is None:
                raise ValueError(f"{self.name} is not built: call `build(variables)` first, or pass `variables`.")
            self.build(variables)
        gradients = list(gradients)
        self._check_gradients(gradients)
        weight = _as_weight(weight)
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._connected.update(present)
        for i in present:
            if isinstance(gradients[i], tf.IndexedSlices):
                self._track_rows(i)
        starts = tf.equal(self._step, 0)
        ops.accumulate(
            self._accumulators,
            [
                _no_change(accumulator) if gradient is None else gradient
                for accumulator, gradient in zip(self._accumulators, gradients, strict=True)
            ],
            scale=weight,
            overwrite=starts,
            touched_rows=[self._touched_rows.get(str(i)) for i in range(len(gradients))],
        )
        for i in present:
            if str(i) in self._touched_rows and not isinstance(gradients[i], tf.IndexedSlices):
                _flag_all(self._touched_rows[str(i)])
        self._weight.assign(tf.where(starts, weight, self._weight + weight))
        self._step.assign_add(1)

    def close(self) -> list[tf.Tensor | None]:
        """Ends the window, full or not, and returns its gradient.

        Returns:
            For each variable the weighted mean of its gradients, a tensor of the accumulator's dtype, or None where it
            had none. If the weights add up to zero, so do the gradients.

        Raises:
            ValueError: If no window is open, when executing eagerly. In a graph, `tf.errors.InvalidArgumentError`,
                which a function that XLA compiles does not check.
        """
        self._check_built()
        empty = f"{self.name} has no open window to close: call `accumulate` first."
        if tf.executing_eagerly():
            if int(self._step) == 0:
                raise ValueError(empty)
        else:
            tf.debugging.assert_positive(self.step, message=empty)
        # Before the first `accumulate` nothing is known: the window was restored, and holds what it holds.
        connected = self._connected or range(len(self._accumulators))
        gradients = [
            tf.math.divide_no_nan(tf.convert_to_tensor(accumulator), tf.cast(self._weight, accumulator.dtype))
            if i in connected
            else None
            for i, accumulator in enumerate(self._accumulators)
        ]
        self._step.assign(0)
        return gradients

    def reset(self) -> None:
        """Drops the open window, if there is one: the next micro-batch starts a new one."""
        self._check_built()
        self._step.assign(0)

    def forget_touched_rows(self) -> None:
        """Has the next window clear all rows: to be called after the accumulators were assigned from outside."""
        for flags in self._touched_rows.values():
            _flag_all(flags)

    def _track_rows(self, i: int) -> None:
        if str(i) not in self._touched_rows:
            with tf.init_scope():  # a variable that a first trace makes has to outlive it
                rows = self._accumulators[i].shape[0]
                self._touched_rows[str(i)] = tf.Variable(tf.ones([rows], tf.bool), trainable=False, name="touched_rows")

    def _check_built(self) -> None:
        if not self.built:
            raise ValueError(f"{self.name} is not built: call `build(variables)` first.")

    def _check_gradients(self, gradients: list[tf.Tensor | tf.IndexedSlices | None]) -> None:
        if len(gradients) != len(self._accumulators):
            raise ValueError(
                f"{self.name} was built for {len(self._accumulators)} variables. Received: {len(gradients)} gradients."
            )
        if all(gradient is None for gradient in gradients):
            raise ValueError(f"No gradients provided for any variable: {self._names}.")
        for name, accumulator, gradient in zip(self._names, self._accumulators, gradients, strict=True):
            shape = getattr(gradient, "shape", None)
            if shape is not None and not tf.TensorShape(shape).is_compatible_with(accumulator.shape):
                raise ValueError(
                    f"The gradient of '{name}' must have its shape, {tuple(accumulator.shape)}. "
                    f"Received: {tf.TensorShape(shape)}."
                )


def check_accum_steps(accum_steps: int | None) -> int | None:
    """Returns `accum_steps` if it is an int of at least 1 or None, or raises what the user should read."""
    if accum_steps is None:
        return None
    if isinstance(accum_steps, bool) or not isinstance(accum_steps, numbers.Integral):
        raise TypeError(f"`accum_steps` must be an int, the number of micro-batches. Received: {accum_steps!r}")
    if accum_steps < 1:
        raise ValueError(f"`accum_steps` must be at least 1. Received: {accum_steps}")
    return int(accum_steps)


def _name(variable: tf.Variable | keras.Variable) -> str:
    return getattr(variable, "path", variable.name)


def _new_accumulator(variable: tf.Variable | keras.Variable) -> keras.Variable:
    return keras.Variable(
        initializer="zeros",
        shape=tuple(variable.shape),
        dtype="float64" if tf.as_dtype(variable.dtype) == tf.float64 else "float32",
        trainable=False,
        name=f"{_name(variable).replace('/', '_').replace(':', '_')}_accumulator",
    )


def _as_weight(weight: float | tf.Tensor) -> tf.Tensor:
    if isinstance(weight, numbers.Real) and not float(weight) >= 0:
        raise ValueError(f"`weight` must not be negative. Received: {weight}")
    tensor = tf.cast(weight, tf.float32)
    if tensor.shape.rank not in (0, None):
        raise ValueError(f"`weight` must be a number or a scalar tensor. Received shape: {tensor.shape}")
    return tensor


def _no_change(accumulator: keras.Variable) -> tf.Tensor | tf.IndexedSlices:
    """A gradient of zero that costs nothing to add and still clears where a window starts: no rows at all."""
    if len(accumulator.shape) == 0:
        return tf.zeros([], accumulator.dtype)
    values = tf.zeros([0, *accumulator.shape[1:]], accumulator.dtype)
    return tf.IndexedSlices(values, tf.zeros([0], tf.int32))


def _flag_all(flags: tf.Variable) -> None:
    flags.assign(tf.ones_like(flags))
