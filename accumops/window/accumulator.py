"""The window's state machine: what sums the gradients of K micro-batches, and knows when the window is full.

A window opens with the first micro-batch after the last close, whose gradients overwrite the accumulators, and is
closed by whoever applies the update:

                accumulate (overwrites; limit = K)                  accumulate (adds)
    EMPTY  step = 0 ────────────────────▶ OPEN  0 < step < limit ─────────────▶ FULL  step = limit, `ready`
      ▲                                     │                                     │
      └─────────────────────────────────────┴──────────── close ──────────────────┘

The state is one accumulator a variable, `step`, `limit`, `weight`, `connected` and, for tables, the flags of touched
rows; `GradientAccumulator` is their one owner. Closing only sets `step` back: what the accumulators hold between
windows has no influence, and nothing clears it. `limit` is what `accum_steps` was when the window started: a K that
changes does so with the next one.

Under a mirroring `tf.distribute` strategy each replica has a state of its own. Of accumulators and weight the sum over
the replicas is what counts, and what is saved; the rest is the same on all.
"""

import contextlib
import math
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from accumops import ops
from accumops.arguments import Schedule, as_weight, check_accum_steps, check_bool, check_variables, is_variable, name_of
from accumops.ops.variables import tf_variable
from accumops.window import replicas
from accumops.window.handover import CountedMicroBatch, MicroBatch, Window
from accumops.window.recording import Recording


class WindowMember(Protocol):
    """What has a state of its own that a window's end settles, such as batch normalization."""

    def check_window(self, accum_steps: Any) -> None:
        """Raises if the member's windows are of another number of micro-batches."""

    def join_window(self, accumulator: "GradientAccumulator") -> None:
        """Is called for a member of whose variables one is among those that the accumulator is built for."""

    @classmethod
    def close_windows(cls, members: Sequence[Any]) -> None:
        """Is called where a window ends, after the update, for all members of the class together.

        Under a mirroring strategy on each replica, in a replica context where all replicas are together and no
        condition is open: it may communicate.
        """

    def drop_window(self) -> None:
        """Is called where a window is dropped; under a strategy where `reset` is, once or on each replica."""


class GradientAccumulator(tf.Module):
    """Sums the gradients of `accum_steps` micro-batches, for custom training loops.

    The gradient that `close` returns is the weighted mean over the window, `sum(weight * gradient) / sum(weight)`: with
    equal micro-batches and the default weight, the gradient of the whole window's mean loss. Accumulators are float32
    whatever the variables are, and float64 for float64 variables. Sparse gradients (`tf.IndexedSlices`, from
    embeddings) touch only their rows.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) build it within `strategy.scope()`, accumulate
    in a function that `strategy.run` calls, which does not communicate, and close in one as well. As everywhere in
    `tf.distribute`, gradients are summed over the replicas: with R replicas the window's gradient is
    `R * sum(weight * gradient) / sum(weight)` over the micro-batches of all replicas. It is that of the whole window's
    mean loss where a replica's loss is `mean / R`, as Keras's trainer and `tf.nn.scale_regularization_loss` do it, and
    micro-batches are of one size or weighted by their size; or where it is that of `tf.nn.compute_average_loss`, with
    the default weight. A micro-batch of weight 0, such as one without samples, counts as nothing, whatever its
    gradients are. Sparse gradients become dense.

    Args:
        accum_steps: Micro-batches a window, an int of at least 1; or a callable that gives it for a count of updates,
            an int64 scalar; or None: then a window is never `ready` and ends when `close` is called. An int can be
            changed, by setting the attribute, and holds from the next window on.
        name: The name of the accumulator, in messages and checkpoints.

    Raises:
        TypeError: If `accum_steps` is not an int, and no callable that returns one.
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

    def __init__(self, accum_steps: int | Schedule | None, name: str = "gradient_accumulator") -> None:
        super().__init__(name=name)
        self._accum_steps = check_accum_steps(accum_steps)
        # AutoGraph, as in any tf.function: the callable may say `4 if updates < 100 else 8`.
        self._schedule = tf.function(accum_steps) if callable(accum_steps) else None
        self.built = False
        # What is no state, in a namespace where checkpoints do not find it.
        self._setting = types.SimpleNamespace(next_limit=None, members=[], strategy=None)

    def build(
        self,
        variables: Sequence[tf.Variable],
        *,
        iterations: tf.Variable | None = None,
        jit_compile: bool | None = None,
        track_all_rows: bool = False,
    ) -> None:
        """Creates the accumulators; `accumulate` does it where it is given `variables`.

        Args:
            variables: The trainable variables (`tf.Variable` or `keras.Variable`), of floating-point dtypes.
            iterations: The count of updates that a callable `accum_steps` is given; by default, of closed windows.
            jit_compile: Whether XLA will compile the functions that accumulate; by default, whether it will compile the
                one that is being traced. The counters of functions that it will not live on the host, where they
                decide without waiting for a GPU. XLA needs them on the GPU, as does who cannot say.
            track_all_rows: Whether `close(keep_sparse=True)` is to know the touched rows of small tables too.

        Raises:
            TypeError: If `variables` are not variables, or another argument is of a wrong type.
            ValueError: If there are none, one is given twice or not of a floating-point dtype, or `build` was called
                before, or a `tf.distribute` strategy is in the way.
        """
        if self.built:
            raise ValueError(f"{self.name} is already built; make a new one for other variables.")
        variables = check_variables(variables)
        check_bool("track_all_rows", track_all_rows)
        check_bool("jit_compile", False if jit_compile is None else jit_compile)
        members = {id(member): member for member in map(_member_of, variables) if member is not None}
        for member in members.values():
            member.check_window(self._accum_steps)
        if iterations is not None and not (is_variable(iterations) and tf.as_dtype(iterations.dtype).is_integer):
            raise TypeError(f"`iterations` must be an integer variable. Received: {iterations!r}")
        self._setting.strategy = strategy = replicas.strategy_of(variables, self.name)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            self._create_state(variables, iterations, jit_compile, track_all_rows)
        self.built = True
        for member in members.values():
            if not self.has_member(member):
                member.join_window(self)

    def _create_state(
        self,
        variables: list[tf.Variable | keras.Variable],
        iterations: tf.Variable | None,
        jit_compile: bool | None,
        track_all_rows: bool,
    ) -> None:
        mirrored = self._setting.strategy is not None
        self._names = [name_of(variable) for variable in variables]
        self._accumulators = [_new_accumulator(variable, mirrored) for variable in variables]
        same, summed = (_PER_REPLICA["same"], _PER_REPLICA["summed"]) if mirrored else ({}, {})
        with _counter_device(jit_compile):
            self._step = _new_variable("step", (), "int64", **same)
            self._limit = _new_variable("limit", (), "int64", initializer="ones", **same)
            # What `accum_steps` is, for functions that are traced: a process that goes on with another one's window
            # takes it from its own arguments.
            steps = self._accum_steps if isinstance(self._accum_steps, int) else 1
            self._setting.next_limit = _new_variable(
                "next_limit", (), "int64", keras.initializers.Constant(steps), **same
            )
            counts_itself = self._schedule is not None and iterations is None
            self._closed = _new_variable("closed", (), "int64", **same) if counts_itself else None
        self._iterations = self._closed if counts_itself else iterations
        self._weight = _new_variable("weight", (), "float32", **summed)
        # The variables that have had a gradient when a call was made or traced; the others close with None, as they
        # would without accumulation. Once a gradient was None, `connected` keeps this for a process that goes on with a
        # restored window. Where it holds nothing, the window has gradients of all variables.
        self._connected = _new_variable("connected", (len(variables),), "bool", **same)
        self._seen: set[int] | None = None
        self._has_gaps = False
        self._closed_without: set[int] = set()
        # Row flags, see ops.accumulate, by the accumulator's position. They start set: any row may be other than zero.
        self._touched_rows = {
            str(i): _new_touched_rows(variable, accumulator, mirrored)
            for i, (variable, accumulator) in enumerate(zip(variables, self._accumulators, strict=True))
            if _may_be_table(accumulator) or (track_all_rows and len(accumulator.shape) >= 1)
        }
        # For which of them sparse gradients rely on the flags. A call that was traced with a dense gradient before does
        # not set them: from then on the accumulator is cleared as a whole.
        self._tracked: set[int] = set()
        self._untracked: set[int] = set(range(len(variables))) if mirrored else set()

    @property
    def accum_steps(self) -> int | Schedule | None:
        """Micro-batches a window, a callable that gives them, or None. An int can be set, for the next window on."""
        return self._accum_steps

    @accum_steps.setter
    def accum_steps(self, accum_steps: int) -> None:
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
        if self.built:
            self._setting.next_limit.assign(self._accum_steps)

    @property
    def strategy(self) -> tf.distribute.Strategy | None:
        """The mirroring strategy that it was built under, or None."""
        return self._setting.strategy

    @property
    def accumulators(self) -> list[keras.Variable]:
        """The variables that hold the open window's sum of weighted gradients, in the order of `build`'s variables."""
        self._check_built()
        return list(self._accumulators)

    @property
    def variables(self) -> list[keras.Variable]:
        """All of the window's state, to save and to restore: counters, weight, flags and accumulators."""
        self._check_built()
        counters = [self._limit] if self._closed is None else [self._limit, self._closed]
        flags = [self._connected, *self._touched_rows.values()]
        return [self._step, self._weight, *counters, *flags, *self._accumulators]

    @property
    def step(self) -> tf.Tensor:
        """How many micro-batches the open window holds: an int64 scalar, 0 when none is open."""
        self._check_built()
        return tf.convert_to_tensor(self._step)

    @property
    def remaining(self) -> tf.Tensor:
        """How many micro-batches are missing until the window, or the next one, is full: an int64 scalar.

        It is 1, the least there can be, where the next window's number comes from a callable or is not known.
        """
        self._check_built()
        with tf.device(self._step.value.device):
            unknown = not isinstance(self._accum_steps, int)
            following = tf.constant(1, tf.int64) if unknown else tf.convert_to_tensor(self._setting.next_limit)
            return _choose(tf.equal(self._step, 0), following, self._limit - self._step)

    def missing(self) -> int | None:
        """As `remaining`, read now, where no function is traced; None where the variables alone do not say it."""
        if not self.built or not isinstance(self._accum_steps, int):
            return None
        step = int(self._step.numpy())
        return self._accum_steps if step == 0 else int(self._limit.numpy()) - step

    @property
    def open(self) -> tf.Tensor:
        """Whether a window has begun and waits for `close`, full or not: a bool scalar."""
        self._check_built()
        with tf.device(self._step.value.device):
            return tf.greater(self._step, 0)

    @property
    def ready(self) -> tf.Tensor:
        """Whether the window is full and waits for `close`: a bool scalar."""
        if self._accum_steps is None:
            return tf.constant(False)
        self._check_built()
        with tf.device(self._step.value.device):
            return tf.greater_equal(self._step, self._limit)

    @tf.autograph.experimental.do_not_convert
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
            ValueError: If it is not built and `variables` is not given, if all gradients are None, if their number, a
                shape or a dtype does not fit, or under a strategy outside of its replicas.
        """
        self._add(self._prepare(gradients, variables, weight))

    def _prepare(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        variables: Sequence[tf.Variable] | None,
        weight: float | tf.Tensor,
    ) -> CountedMicroBatch:
        """Checks what `accumulate` is given, and says what it does to the counters."""
        if not self.built:
            if variables is None:
                raise ValueError(f"{self.name} is not built: call `build(variables)` first, or pass `variables`.")
            self.build(variables)
        with tf.device(self._step.value.device):
            starts = tf.equal(self._step, 0)
        batch = self._prepare_slice(gradients, weight, starts)
        with tf.device(self._step.value.device):
            limit = self._window_limit(starts)
            fills = tf.constant(False) if self._accum_steps is None else tf.greater_equal(self._step + 1, limit)
        # What an earlier window's weights came to, NaN included, is nothing to this one.
        before = tf.math.multiply_no_nan(tf.convert_to_tensor(self._weight), tf.cast(~starts, tf.float32))
        return CountedMicroBatch(**vars(batch), fills=fills, limit=limit, total=before + batch.weight)

    def _prepare_slice(
        self, gradients: Sequence[tf.Tensor | tf.IndexedSlices | None], weight: float | tf.Tensor, starts: tf.Tensor
    ) -> MicroBatch:
        """Checks a micro-batch of which somebody else knows whether it is the window's first."""
        if self.strategy is not None:
            replicas.check_in_replica(self.strategy, f"`accumulate` of {self.name}")
        gradients = list(gradients)
        self._check_gradients(gradients)
        gradients = list(map(_as_gradient, gradients, self._accumulators))
        weight = as_weight(weight)
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._seen_gradients()  # before the step says that a window is open
        self._check_connections(present)
        return MicroBatch(gradients, present, self._choose_tracking(gradients), weight, starts)

    def _add(self, batch: CountedMicroBatch) -> None:
        with Recording() as accumulation:
            self._add_slice(batch)
        # Counted when it is done: a micro-batch that fails is none.
        with tf.control_dependencies(accumulation.operations):
            self._weight.assign(batch.total)
            self._limit.assign(batch.limit)
            self._step.assign_add(1)

    def _add_slice(self, batch: MicroBatch) -> None:
        """Adds a micro-batch that is not counted by itself: `_count` does it for all of a window."""
        with Recording() as accumulation:
            if self.strategy is None:
                self._sum(batch, range(len(self._accumulators)))
            else:
                self._sum_on_replica(self.strategy, batch)
        with tf.control_dependencies(accumulation.operations):
            for i in self._tracked.intersection(batch.present):
                if not isinstance(batch.gradients[i], tf.IndexedSlices):
                    flags = self._touched_rows[str(i)]
                    flags.assign(tf.ones(flags.shape, tf.bool))
            if self.strategy is not None:
                for flags in self._touched_rows.values():  # as for dense gradients, for who restores the window
                    flags.assign(tf.ones(flags.shape, tf.bool))
            self._connect(batch.present)

    def _count(self, steps: int | tf.Tensor, weight: tf.Tensor) -> None:
        """Opens a window that holds all of its micro-batches already."""
        self._weight.assign(weight)
        self._step.assign(tf.cast(steps, tf.int64))

    def _sum(self, batch: MicroBatch, positions: Iterable[int]) -> None:
        """Adds the gradients of some variables to their accumulators."""
        positions = list(positions)
        if not positions:
            return
        accumulators = [self._accumulators[i] for i in positions]
        gradients = [batch.gradients[i] for i in positions]
        ops.accumulate(
            accumulators,
            [
                _no_change(accumulator) if gradient is None else gradient
                for accumulator, gradient in zip(accumulators, gradients, strict=True)
            ],
            scale=batch.weight,
            overwrite=batch.starts,
            touched_rows=[batch.touched_rows[i] for i in positions],
        )

    def _sum_on_replica(self, strategy: tf.distribute.Strategy, batch: MicroBatch) -> None:
        accumulators = [replicas.own(accumulator) for accumulator in self._accumulators]
        nothing = [_no_change(accumulator) for accumulator in accumulators]
        given = [
            none if gradient is None else gradient for none, gradient in zip(nothing, batch.gradients, strict=True)
        ]

        # The number of replicas is taken out of the gradients here: a window's sums are then those of one device, and
        # go on under another strategy.
        scale = batch.weight * strategy.num_replicas_in_sync

        def add() -> None:
            ops.accumulate(accumulators, given, scale=scale, overwrite=batch.starts)

        def start() -> None:
            ops.accumulate(accumulators, nothing, overwrite=batch.starts)

        weight = tf.get_static_value(batch.weight)
        if weight is None:
            # A replica that got no samples has gradients of 0 / 0.
            tf.cond(tf.not_equal(batch.weight, 0), add, start)
        elif weight != 0:
            add()
        else:
            start()

    @tf.autograph.experimental.do_not_convert
    def close(self, *, keep_sparse: bool = False, reduce: bool = False) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """Ends the window, full or not, and returns its gradient.

        Args:
            keep_sparse: Whether a variable whose gradients were sparse gives `tf.IndexedSlices` of the rows that they
                touched, each once and in order, where these are known: for variables of at least 1024 rows and 65,536
                values, or all with `build(track_all_rows=True)`.
            reduce: Under a mirroring strategy, whether to return the window's gradient, the same on all replicas. By
                default each gets a share, and their sum is that gradient: what `apply` of an optimizer takes, which
                sums over the replicas.

        Returns:
            For each variable the weighted mean of its gradients, of the accumulator's dtype, or None where it had none.
            If the weights add up to zero, so do the gradients.

        Raises:
            ValueError: If no window is open, when executing eagerly. In a graph, `tf.errors.InvalidArgumentError`,
                which a function that XLA compiles does not check. Under a strategy, outside of its replicas and with
                `keep_sparse`.
        """
        check_bool("keep_sparse", keep_sparse)
        check_bool("reduce", reduce)
        if self.built and self.strategy is not None:
            return self._close_on_replica(self.strategy, keep_sparse, reduce)
        with self._ending() as window:
            return window.means(sparse=keep_sparse)

    def _close_on_replica(
        self, strategy: tf.distribute.Strategy, keep_sparse: bool, reduce: bool
    ) -> list[tf.Tensor | None]:
        replicas.check_in_replica(strategy, f"`close` of {self.name}")
        if keep_sparse:
            raise ValueError(
                f"Under {type(strategy).__name__} gradients of a window are dense: `keep_sparse=True` needs one device."
            )
        with self._ending() as window:
            held = [None if each is None else tf.convert_to_tensor(each) for each in window.accumulators]
            present = [each for each in held if each is not None] if reduce else []
            weight, *sums = replicas.sum_over_replicas([window.weight, *present])
            if reduce:
                reduced = iter(sums)
                held = [None if each is None else next(reduced) for each in held]
            return [None if each is None else tf.math.divide_no_nan(each, tf.cast(weight, each.dtype)) for each in held]

    @contextlib.contextmanager
    def _ending(self) -> Iterator[Window]:
        """The open window, which ends when what is done with it has not failed."""
        self._check_built()
        empty = f"{self.name} has no open window to close: call `accumulate` first."
        checks = []
        if tf.executing_eagerly():
            if int(self.step) == 0:
                raise ValueError(empty)
        else:
            with tf.device(self._step.value.device):
                checks.append(tf.debugging.assert_positive(self.step, message=empty))
        with tf.control_dependencies([check for check in checks if check is not None]):
            with Recording() as update:
                yield Window(self._held(), tf.convert_to_tensor(self._weight), self._rows_of)
            with tf.control_dependencies(update.effects):
                self._finish()

    @contextlib.contextmanager
    def _ending_across(self, strategy: tf.distribute.Strategy) -> Iterator[list[Window]]:
        """As `_ending`, outside of the replicas: for each of this process's the window, its sums those of all."""
        with self._ending() as window:
            held = [i for i, each in enumerate(window.accumulators) if each is not None]

            def reduce() -> list[tf.Tensor]:
                parts = [self._weight, *(self._accumulators[i] for i in held)]
                return replicas.sum_over_replicas([tf.convert_to_tensor(each) for each in parts])

            windows = []
            for replica, (weight, *sums) in enumerate(replicas.on_each_replica(strategy, reduce)):
                latest = dict(zip(held, sums, strict=True))
                windows.append(Window(window.accumulators, weight, _no_rows, latest, 1.0, True, replica))
            yield windows

    @contextlib.contextmanager
    def _ending_with(self, batch: CountedMicroBatch) -> Iterator[Window]:
        """The window with a last micro-batch, whose dense gradients are not added to the accumulators first."""
        latest = {i: batch.gradients[i] for i in batch.present if not isinstance(batch.gradients[i], tf.IndexedSlices)}
        with Recording() as accumulation:
            self._sum(batch, (i for i in range(len(self._accumulators)) if i not in latest))
        with tf.control_dependencies(accumulation.operations):
            self._connect(batch.present)
            with Recording() as update:
                yield Window(self._held(), batch.total, self._rows_of, latest, batch.weight, batch.starts)
            with tf.control_dependencies(update.effects):
                self._finish()

    def _held(self) -> list[keras.Variable | None]:
        """The accumulators of the variables that have a gradient in this window."""
        # Before the first gradient all variables may have one: the function that closes is traced before the others.
        seen = self._seen_gradients() or range(len(self._accumulators))
        if not tf.executing_eagerly():
            self._closed_without.update(set(range(len(self._accumulators))).difference(seen))
        return [accumulator if i in seen else None for i, accumulator in enumerate(self._accumulators)]

    def _rows_of(self, i: int) -> keras.Variable | None:
        """The flags of touched rows, from now on kept right whatever comes; None where they are not known."""
        if str(i) not in self._touched_rows or i in self._untracked:
            return None
        self._tracked.add(i)
        return self._touched_rows[str(i)]

    def _finish(self) -> None:
        self._step.assign(0)
        if self._closed is not None:
            self._closed.assign_add(1)

        def close_members() -> None:
            members: list[WindowMember] = self._setting.members
            for kind in dict.fromkeys(type(member) for member in members):
                kind.close_windows([member for member in members if type(member) is kind])

        if self.strategy is not None and tf.distribute.in_cross_replica_context() and self._setting.members:
            replicas.on_each_replica(self.strategy, close_members)
        else:
            close_members()

    def reset(self) -> None:
        """Drops the open window, if there is one: the next micro-batch starts a new one."""
        self._check_built()
        self._step.assign(0)
        for member in self._setting.members:
            member.drop_window()

    def add_member(self, member: WindowMember) -> None:
        """Has `close` call the member's `close_windows`, and `reset` its `drop_window`."""
        self._setting.members.append(member)

    def has_member(self, member: WindowMember) -> bool:
        """Whether `add_member` has been called for the member."""
        return any(each is member for each in self._setting.members)

    def remove_member(self, member: WindowMember) -> None:
        """Undoes `add_member`."""
        self._setting.members = [each for each in self._setting.members if each is not member]

    def _window_limit(self, starts: tf.Tensor) -> tf.Tensor:
        schedule = self._schedule
        if schedule is None:
            return _choose(starts, tf.convert_to_tensor(self._setting.next_limit), tf.convert_to_tensor(self._limit))

        def scheduled() -> tf.Tensor:
            limit = schedule(tf.cast(self._iterations, tf.int64))
            if limit.shape.rank != 0 or not limit.dtype.is_integer:
                raise TypeError(f"The callable `accum_steps` must return an int. Received: {limit}")
            # Where XLA compiles, nothing is raised, and the least there can be is done.
            tf.debugging.assert_positive(limit, message="The callable `accum_steps` must return at least 1.")
            return tf.maximum(tf.cast(limit, tf.int64), 1)

        # A condition, as the count of updates may have to come from a GPU.
        return tf.cond(starts, scheduled, lambda: tf.identity(self._limit))

    def _choose_tracking(self, gradients: list[tf.Tensor | tf.IndexedSlices | None]) -> list[keras.Variable | None]:
        """Returns the flags that sparse gradients of this call rely on, by position."""
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                if str(i) in self._touched_rows and i not in self._untracked:
                    self._tracked.add(i)
            elif gradient is not None and i not in self._tracked and i not in self._untracked:
                self._untracked.add(i)
                self._flag_all_rows(i)
        return [self._touched_rows[str(i)] if i in self._tracked else None for i in range(len(gradients))]

    def _flag_all_rows(self, i: int) -> None:
        """For a window that is restored, and functions that are traced already."""
        flags = self._touched_rows.get(str(i))
        if flags is not None:
            with tf.init_scope():
                if flags.value.is_initialized():  # else it starts so
                    flags.assign(tf.ones(flags.shape, tf.bool))

    def _seen_gradients(self) -> set[int]:
        """Which variables have had a gradient, in this process or in the window that it was started with."""
        if self._seen is None:
            self._seen = set()
            with tf.init_scope():
                # Not yet initialized in a function that is being traced for the first time, and then not restored.
                if self._step.value.is_initialized() and int(self._step.numpy()) > 0:
                    restored = np.flatnonzero(self._connected.numpy())
                    self._seen.update(restored.tolist() or range(len(self._accumulators)))
        return self._seen

    def _check_connections(self, present: list[int]) -> None:
        late = self._closed_without.intersection(present)
        if late:
            raise ValueError(
                f"The gradient of {[self._names[i] for i in sorted(late)]} was None in every call when the function "
                f"that closes {self.name} was traced, which therefore leaves it out. Give zeros instead of None for a "
                "variable that has a gradient in some calls only."
            )

    def _connect(self, present: list[int]) -> None:
        seen = self._seen_gradients()
        before = len(seen)
        seen.update(present)
        if len(seen) < len(self._accumulators) or before not in (0, len(seen)):
            self._has_gaps = True
        if self._has_gaps:
            self._connected.assign([i in seen for i in range(len(self._accumulators))])

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


# By the identity of a variable: who is to join the accumulator that is built for it.
_MEMBERS: weakref.WeakValueDictionary[int, WindowMember] = weakref.WeakValueDictionary()


def register_member(variable: keras.Variable, member: WindowMember) -> None:
    """Has `member` join the window of the accumulator that is built for `variable`, which it owns."""
    _MEMBERS[id(variable)] = member


def _member_of(variable: tf.Variable | keras.Variable) -> WindowMember | None:
    return _MEMBERS.get(id(variable))


# How each replica of a mirroring strategy has its own.
_PER_REPLICA = {
    "same": {"synchronization": "on_read", "aggregation": "only_first_replica"},
    "summed": {"synchronization": "on_read", "aggregation": "sum"},
}

# Where a window starts, a sparse gradient clears all of a smaller variable, for no more than it costs to ask its flags.
_TABLE_VALUES = 1 << 16


def _may_be_table(accumulator: keras.Variable) -> bool:
    """Whether it is worth knowing which rows of it a sparse gradient has touched."""
    shape = accumulator.shape
    return len(shape) >= 2 and shape[0] >= 1024 and math.prod(shape) >= _TABLE_VALUES


def _new_accumulator(variable: tf.Variable | keras.Variable, mirrored: bool) -> keras.Variable:
    dtype = "float64" if tf.as_dtype(variable.dtype) == tf.float64 else "float32"
    name = f"{_flat_name(variable)}_accumulator"
    kind = _PER_REPLICA["summed"] if mirrored else {}
    return _new_variable(name, tuple(variable.shape), dtype, beside=variable, **kind)


def _new_touched_rows(
    variable: tf.Variable | keras.Variable, accumulator: keras.Variable, mirrored: bool
) -> keras.Variable:
    name = f"{_flat_name(variable)}_touched_rows"
    kind = _PER_REPLICA["same"] if mirrored else {}
    return _new_variable(name, (accumulator.shape[0],), "bool", initializer="ones", beside=variable, **kind)


def _choose(condition: tf.Tensor, chosen: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """`tf.where` for integers: that of scalars takes TensorFlow long enough to hand it to another thread."""
    return other + tf.cast(condition, other.dtype) * (chosen - other)


def _no_rows(i: int) -> None:
    return None


def _counter_device(jit_compile: bool | None) -> contextlib.AbstractContextManager[None]:
    if jit_compile is None:
        # Executing eagerly says nothing about the functions to come.
        jit_compile = tf.executing_eagerly() or control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
    return contextlib.nullcontext() if jit_compile else tf.device("/CPU:0")


def _new_variable(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    initializer: str | keras.Initializer = "zeros",
    beside: tf.Variable | keras.Variable | None = None,
    **kind: str,
) -> keras.Variable:
    reference = None if beside is None else tf_variable(beside)
    with contextlib.nullcontext() if reference is None else tf.device(reference.device):
        return keras.Variable(
            initializer=initializer, shape=shape, dtype=dtype, trainable=False, autocast=False, name=name, **kind
        )


def _flat_name(variable: tf.Variable | keras.Variable) -> str:
    return name_of(variable).replace("/", "_").replace(":", "_")


def _as_gradient(
    gradient: tf.Tensor | tf.IndexedSlices | None, accumulator: keras.Variable
) -> tf.Tensor | tf.IndexedSlices | None:
    """The gradient in a dtype that the ops add: as with Keras's optimizers, any number will do."""
    if gradient is None:
        return None
    sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.convert_to_tensor(gradient.values if sparse else gradient)
    added = (tf.float16, tf.bfloat16, tf.float32, tf.as_dtype(accumulator.dtype))
    if values.dtype in added or not (values.dtype.is_floating or values.dtype.is_integer):
        return gradient if sparse else values
    values = tf.cast(values, accumulator.dtype)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape) if sparse else values


def _no_change(accumulator: tf.Variable | keras.Variable) -> tf.Tensor | tf.IndexedSlices:
    """A gradient of zero that costs nothing to add and still clears where a window starts: no rows at all."""
    if len(accumulator.shape) == 0:
        return tf.zeros([], accumulator.dtype)
    values = tf.zeros([0, *accumulator.shape[1:]], accumulator.dtype)
    return tf.IndexedSlices(values, tf.zeros([0], tf.int32))
