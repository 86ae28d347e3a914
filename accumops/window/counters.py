"""How many micro-batches the open window holds, and how many make it full.

`limit` is what `accum_steps` was when the window started: a K that changes does so with the next window.
"""

import contextlib

import keras
import tensorflow as tf

from accumops.adapters.untracked import Untracked
from accumops.arguments import Schedule, check_accum_steps
from accumops.ops.variables import tf_variable
from accumops.window.state_variables import counter_device, new_variable


class Counters(tf.Module):
    """The counters of a window.

    Args:
        accum_steps: Micro-batches a window, a callable that gives them for a count of updates, or None.
    """

    def __init__(self, accum_steps: int | Schedule | None) -> None:
        super().__init__(name="counters")
        self._accum_steps = check_accum_steps(accum_steps)
        # AutoGraph, as in any tf.function: the callable may say `4 if updates < 100 else 8`.
        self._schedule = tf.function(accum_steps) if callable(accum_steps) else None
        # `accum_steps` as a variable, so that traced functions see it change. It is not saved: a process that goes on
        # with another one's window takes it from its own arguments.
        self._untracked = Untracked(next_limit=None, followed=None)

    def build(self, iterations: tf.Variable | None, jit_compile: bool | None, **distribution: str) -> None:
        """Creates the variables.

        Args:
            iterations: The count of updates that a callable `accum_steps` is given; by default, of closed windows.
            jit_compile: See `counter_device`.
            **distribution: How the variables are distributed; see `PER_REPLICA`.
        """
        with counter_device(jit_compile):
            self.step = new_variable("step", (), "int64", **distribution)
            self.limit = new_variable("limit", (), "int64", initializer="ones", **distribution)
            steps = self._accum_steps if isinstance(self._accum_steps, int) else 1
            self._untracked.next_limit = new_variable(
                "next_limit", (), "int64", keras.initializers.Constant(steps), **distribution
            )
            counts_itself = self._schedule is not None and iterations is None
            self.closed = new_variable("closed", (), "int64", **distribution) if counts_itself else None
        self._iterations = self.closed if counts_itself else iterations

    def follow(self, steps: keras.Variable) -> None:
        """Has windows to come take their size from a variable, instead of the callable."""
        self._untracked.followed = steps

    @property
    def accum_steps(self) -> int | Schedule | None:
        """Micro-batches a window, a callable that gives them, or None."""
        return self._accum_steps

    def set_accum_steps(self, accum_steps: int, *, built: bool) -> None:
        """Changes an int, for the next window on."""
        if self._accum_steps is None:
            raise ValueError(
                "`accum_steps` cannot be set where it is None: windows end when they are closed, and with "
                f"`micro_batch_size` at each step. Received: {accum_steps!r}"
            )
        if not isinstance(self._accum_steps, int) or accum_steps is None or callable(accum_steps):
            raise ValueError(
                f"`accum_steps` can be changed from one int to another. Received: {accum_steps!r} instead of "
                f"{self._accum_steps!r}"
            )
        self._accum_steps = check_accum_steps(accum_steps)
        if built:
            self._untracked.next_limit.assign(self._accum_steps)

    def place(self) -> contextlib.AbstractContextManager[None]:
        """The device of the counters, for what is computed from them."""
        return tf.device(self.step.value.device)

    @property
    def starts(self) -> tf.Tensor:
        """Whether the next micro-batch is the first of its window: a bool scalar."""
        with self.place():
            return tf.equal(self.step, 0)

    @property
    def open(self) -> tf.Tensor:
        """Whether a window has begun and waits for `close`, full or not: a bool scalar."""
        with self.place():
            return tf.greater(self.step, 0)

    @property
    def ready(self) -> tf.Tensor:
        """Whether the window is full: a bool scalar."""
        with self.place():
            return tf.greater_equal(self.step, self.limit)

    def next_ends(self, ends: bool) -> tf.Tensor:
        """Whether the next micro-batch makes the window full, or does not, as `ends` says: a bool scalar."""
        remaining = self.remaining
        with self.place():
            return tf.less_equal(remaining, 1) if ends else tf.greater(remaining, 1)

    @property
    def remaining(self) -> tf.Tensor:
        """How many micro-batches are missing; before a window of unknown size 1, the least there can be."""
        with self.place():
            unknown = not isinstance(self._accum_steps, int)
            following = tf.constant(1, tf.int64) if unknown else tf.convert_to_tensor(self._untracked.next_limit)
            return _choose(tf.equal(self.step, 0), following, self.limit - self.step)

    def missing(self) -> int | None:
        """As `remaining`, read now. None where the variables alone do not say it."""
        if not isinstance(self._accum_steps, int):
            return None
        step = int(tf_variable(self.step).numpy())
        return self._accum_steps if step == 0 else int(tf_variable(self.limit).numpy()) - step

    def with_next(self, starts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """What one more micro-batch does.

        Args:
            starts: Whether it is the first of its window.

        Returns:
            The window's limit, and whether the micro-batch makes the window full. The limit is an int32, the one type
            that TensorFlow leaves on the host where it goes through a condition.
        """
        with self.place():
            limit = self._limit_of_window(starts)
            never = self._accum_steps is None
            fills = tf.constant(False) if never else tf.greater_equal(self.step + 1, limit)
            return tf.cast(limit, tf.int32), fills

    def _limit_of_window(self, starts: tf.Tensor) -> tf.Tensor:
        schedule = self._schedule
        if schedule is None:
            return _choose(starts, tf.convert_to_tensor(self._untracked.next_limit), tf.convert_to_tensor(self.limit))

        def scheduled() -> tf.Tensor:
            followed = self._untracked.followed
            if followed is not None:
                return tf.convert_to_tensor(followed)
            limit = schedule(tf.cast(self._iterations, tf.int64))
            if limit.shape.rank != 0 or not limit.dtype.is_integer:
                raise TypeError(f"The callable `accum_steps` must return an int. Received: {limit}")
            # XLA drops the assertion: there a limit below 1 becomes 1.
            tf.debugging.assert_positive(limit, message="The callable `accum_steps` must return at least 1.")
            return tf.maximum(tf.cast(limit, tf.int64), 1)

        # A condition, as the count of updates may have to come from a GPU.
        return tf.cond(starts, scheduled, lambda: tf.identity(self.limit))

    # Keras computes what it assigns: where the counters are, as elsewhere it would take them to a GPU and back.

    def add(self, limit: tf.Tensor) -> None:
        """Counts a micro-batch, of a window with this limit."""
        with self.place():
            self.limit.assign(tf.cast(limit, tf.int64))
            self.step.assign_add(1)

    def fill(self, steps: int | tf.Tensor) -> None:
        """Opens a window that has this many micro-batches."""
        with self.place():
            self.step.assign(tf.cast(steps, tf.int64))

    def drop(self) -> None:
        """Empties the window."""
        with self.place():
            self.step.assign(0)

    def close(self) -> None:
        """Counts a closed window; the next one is empty."""
        self.drop()
        if self.closed is not None:
            with self.place():
                self.closed.assign_add(1)


def _choose(condition: tf.Tensor, chosen: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """`tf.where` for integer scalars, as arithmetic, which TensorFlow runs at once: it hands `tf.where` to a thread."""
    return other + tf.cast(condition, other.dtype) * (chosen - other)
