"""`GradientAccumulator`: windows of micro-batches for custom training loops."""

import gc
import warnings
import weakref
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.arguments import Schedule, check_bool, check_decay, check_variables, is_variable
from accumops.renamed import explains_renamed
from accumops.window import replicas
from accumops.window.members import members_of
from accumops.window.state import WindowState


class GradientAccumulator(tf.Module):
    """Sums the gradients of `accum_steps` micro-batches, for custom training loops.

    The gradient that `close` returns is the weighted mean over the window, `sum(weight * gradient) / sum(weight)`. With
    equal micro-batches and the default weight it is the gradient of the whole window's mean loss. Accumulators are
    float32 whatever the variables are, and float64 for float64 variables. Sparse gradients (`tf.IndexedSlices`, from
    embeddings) touch only their rows.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) build the accumulator within
    `strategy.scope()`. Accumulate in a function that `strategy.run` calls; this does not communicate. Close in such a
    function too. As everywhere in `tf.distribute`, gradients are summed over the replicas: with R replicas the window's
    gradient is `R * sum(weight * gradient) / sum(weight)` over the micro-batches of all replicas. This is the gradient
    of the whole window's mean loss in two cases:

    - a replica's loss is `mean / R`, as in Keras's trainer and `tf.nn.scale_regularization_loss`, and micro-batches
      have one size or are weighted by their size;
    - a replica's loss comes from `tf.nn.compute_average_loss`, and the weight is the default.

    Sparse gradients become dense.

    A micro-batch of weight 0, such as one without samples, counts as nothing, whatever its gradients are, NaN included.
    If all weights of a window are 0, its gradient is zero.

    Args:
        accum_steps: Micro-batches a window, an int of at least 1; or a callable that returns it for a count of updates,
            an int64 scalar; or None: then a window is never `ready` and ends when `close` is called. An int can be
            changed by setting the attribute, for the next window on.
        name: The name of the accumulator, in messages and checkpoints.
        reduction: `"mean"`, or `"sum"`: then the gradient is `sum(weight * gradient)`, as of a loss that is a sum over
            the whole window. A replica's loss is not divided by R then. The accumulator sees no loss: nothing checks
            that the loss is a mean or a sum over samples.
        nonfinite: What becomes of gradients with Inf or NaN. `"propagate"`: they make the window's gradient what they
            are. `"skip"`: the micro-batch is left out, and the window's gradient is the mean over the others; the
            micro-batch still is one of the window's `accum_steps`. `"drop"`: the whole window is discarded. A full
            window that is discarded, or has nothing left, is never `ready`: the next micro-batch starts a new one.
            Under a strategy replicas skip micro-batches each for themselves, and `"drop"` needs a
            `GradientAccumulateOptimizer`.

    Raises:
        TypeError: If `accum_steps` is neither an int nor a callable that returns one.
        ValueError: If `accum_steps` is less than 1, or `reduction` or `nonfinite` is none of its values.

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

    @explains_renamed
    def __init__(
        self,
        accum_steps: int | Schedule | None,
        name: str = "gradient_accumulator",
        *,
        reduction: str = "mean",
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(name=name)
        self._state = WindowState(accum_steps, owner=self.name, reduction=reduction, nonfinite=nonfinite)

    def build(
        self,
        variables: Sequence[tf.Variable],
        *,
        iterations: tf.Variable | None = None,
        jit_compile: bool | None = None,
        track_all_rows: bool = False,
    ) -> None:
        """Creates the accumulators. `accumulate` does it when it is given `variables`.

        Args:
            variables: The trainable variables (`tf.Variable` or `keras.Variable`), of floating-point dtypes.
            iterations: The count of updates that a callable `accum_steps` is given; by default, of closed windows.
            jit_compile: Whether XLA will compile the functions that accumulate. If not, counters live on the host,
                where reading them does not wait for a GPU; XLA needs them on the GPU. By default the function that is
                being traced decides; when executing eagerly, counters go to the GPU.
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
        members = [] if self._state.members.added_by_model else members_of(variables)
        for member in members:
            member.check_window(self.accum_steps)
        if iterations is not None and not (is_variable(iterations) and tf.as_dtype(iterations.dtype).is_integer):
            raise TypeError(f"`iterations` must be an integer variable. Received: {iterations!r}")
        self._state.build(
            variables,
            strategy=replicas.strategy_of(variables, self.name),
            iterations=iterations,
            jit_compile=jit_compile,
            track_all_rows=track_all_rows,
        )
        found = [
            member.found_by(self, variables) for member in members if self._state.members.window_of(member) is None
        ]
        losers = [weakref.ref(each) for each in found if each is not None]
        if losers:
            del found
            _warn_of_those_in_use(losers, self.name)

    @property
    def built(self) -> bool:
        """Whether `build` has been called."""
        return self._state.built

    @property
    def state(self) -> WindowState:
        """The window's state, for what ends windows in other ways than `close`; not public."""
        return self._state

    @property
    def accum_steps(self) -> int | Schedule | None:
        """Micro-batches a window, a callable that returns them, or None. An int can be set, for the next window on."""
        return self._state.counters.accum_steps

    @accum_steps.setter
    def accum_steps(self, accum_steps: int) -> None:
        self._state.counters.set_accum_steps(accum_steps, built=self.built)

    @property
    def reduction(self) -> str:
        """`"mean"` or `"sum"`."""
        return self._state.reduction

    @property
    def nonfinite(self) -> str:
        """What becomes of gradients that are not finite: `"propagate"`, `"skip"` or `"drop"`."""
        return self._state.nonfinite.policy

    @property
    def nonfinite_count(self) -> keras.Variable:
        """How many micro-batches have been skipped, or with `"drop"` windows discarded: a variable, an int64 scalar.

        It is part of the state, and can be set. Under a strategy a window's micro-batches are counted where it ends.
        """
        return self._built_state().nonfinite.count

    @property
    def strategy(self) -> tf.distribute.Strategy | None:
        """The mirroring strategy that the accumulator was built under, or None."""
        return self._state.strategy

    @property
    def accumulators(self) -> list[keras.Variable]:
        """The variables that hold the open window's sum of weighted gradients, in the order of `build`'s variables."""
        return list(self._built_state().accumulators)

    @property
    def variables(self) -> list[keras.Variable]:
        """All of the window's state, to save and to restore: counters, weight, flags and accumulators."""
        return self._built_state().saved_variables

    @property
    def step(self) -> tf.Tensor:
        """How many micro-batches the open window holds: an int64 scalar, 0 when none is open."""
        return tf.convert_to_tensor(self._built_state().counters.step)

    @property
    def remaining(self) -> tf.Tensor:
        """How many micro-batches are missing until the window, or the next one, is full: an int64 scalar.

        It is 1, the least there can be, if the size of the next window comes from a callable or is not known.
        """
        return self._built_state().counters.remaining

    def missing(self) -> int | None:
        """Returns `remaining` as it is now, outside of any function. None where the variables alone do not say it."""
        return self._state.counters.missing() if self.built else None

    @property
    def open(self) -> tf.Tensor:
        """Whether a window has begun and waits for `close`, full or not: a bool scalar."""
        return self._built_state().counters.open

    @property
    def ready(self) -> tf.Tensor:
        """Whether the window is full and waits for `close`: a bool scalar."""
        if self.accum_steps is None:
            return tf.constant(False)
        return self._built_state().counters.ready

    @property
    def makes_update(self) -> tf.Tensor:
        """Whether the open window has a gradient to make an update with: a bool scalar.

        False if none is open; with `nonfinite="skip"` if nothing but skipped micro-batches have a weight; with
        `nonfinite="drop"` if a micro-batch was not finite. Ask it before `close` of a window that is not full; if it is
        False, call `reset`.
        """
        return tf.logical_and(self.open, self._state.verdict().applies)

    def track_noise(self, decay: float = 0.99) -> None:
        """Has functions that are traced from now on note how noisy gradients are, for `noise_scale`.

        Args:
            decay: What is left of the averages after one more window.

        Raises:
            TypeError: If `decay` is not a number.
            ValueError: If it is out of range, or windows are sums.
        """
        self._state.notes.track_noise(check_decay(decay))

    @property
    def noise_scale(self) -> tf.Tensor:
        """The gradient noise scale, in the unit of the weights: a float64 scalar; see `GradientNoiseScale`.

        It needs `track_noise`, windows of two micro-batches at least, and weights that are their numbers of samples:
        with the default weight it is in micro-batches. It is NaN before such a window has been closed, and infinite
        where no gradient is seen for noise. Under a strategy `close(reduce=True)` or an optimizer's update tell of it;
        `close()` does not.

        Raises:
            ValueError: If nothing is tracked.
        """
        noise = self._built_state().notes.noise
        if noise is None:
            raise ValueError(f"{self.name} does not track noise: call `track_noise()` before functions are traced.")
        return noise.scale

    def track_norms(self) -> None:
        """Has functions that are traced from now on note the norm of each variable's gradient.

        `accumops.per_variable_norms` returns the norms. Under a mirroring strategy windows then end with
        `close(reduce=True)` or with an optimizer's update: a part of the gradient has no norm of the window's.
        """
        self._state.notes.track_norms()

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
                zero, and a variable that has nothing but None in a window closes with None.
            variables: What to build with on the first call; it is not needed later.
            weight: This micro-batch's share in the window, a number or scalar tensor, not negative. For micro-batches
                of different sizes whose loss is a mean, give the number of samples. With 0 the micro-batch counts as
                nothing, whatever its gradients are, NaN included.

        Raises:
            ValueError: If it is not built and `variables` is not given, if all gradients are None, if their number, a
                shape or a dtype does not fit, or under a strategy outside of its replicas or with `nonfinite="drop"`.
        """
        if not self.built:
            if variables is None:
                raise ValueError(f"{self.name} is not built: call `build(variables)` first, or pass `variables`.")
            self.build(variables)
        if self.strategy is not None and self.nonfinite == "drop":
            raise ValueError(
                f"{self.name} has nonfinite='drop', and under {type(self.strategy).__name__} a replica knows only of "
                "its own gradients. Use nonfinite='skip', or a GradientAccumulateOptimizer, which drops the window on "
                "all replicas."
            )
        self._state.add(self._state.prepare(gradients, weight))
        if self.nonfinite != "propagate" and self.strategy is None and self.accum_steps is not None:
            self._state.discard_full()

    @tf.autograph.experimental.do_not_convert
    def close(self, *, keep_sparse: bool = False, reduce: bool = False) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """Ends the window, full or not, and returns its gradient.

        Args:
            keep_sparse: Whether a variable with sparse gradients gives `tf.IndexedSlices` of the rows that they
                touched, each once and in order. These are known for variables of at least 1024 rows and 65,536 values,
                or for all with `build(track_all_rows=True)`.
            reduce: Under a mirroring strategy, whether to return the window's gradient, the same on all replicas. By
                default each replica gets a part, and the sum of the parts is that gradient: give the parts to `apply`
                of an optimizer, which sums over the replicas.

        Returns:
            For each variable the weighted mean (or sum) of its gradients, of the accumulator's dtype, or None where it
            had none in the window. If the weights add up to zero, so do the gradients, as do those of a window that is
            not `makes_update`. A graph decides about None when it is traced: a variable that had no gradient until then
            closes with None.

        Raises:
            ValueError: If no window is open, when executing eagerly. In a graph, `tf.errors.InvalidArgumentError`,
                as where the window has gradients of other variables than when the graph was traced; a function that
                XLA compiles checks neither. Under a strategy, outside of its replicas, with `keep_sparse`, and
                without `reduce` after `track_norms`.
        """
        check_bool("keep_sparse", keep_sparse)
        check_bool("reduce", reduce)
        state = self._built_state()
        if state.strategy is not None:
            return self._close_on_replica(state.strategy, keep_sparse, reduce)
        with state.ending(by_trace=True) as window:
            state.notes.end(window, None)
            return window.or_zero().means(sparse=keep_sparse)

    def _close_on_replica(
        self, strategy: tf.distribute.Strategy, keep_sparse: bool, reduce: bool
    ) -> list[tf.Tensor | None]:
        replicas.check_in_replica(strategy, f"`close` of {self.name}")
        if keep_sparse:
            raise ValueError(
                f"Under {type(strategy).__name__} gradients of a window are dense: `keep_sparse=True` needs one device."
            )
        if not reduce and self._state.notes.norms is not None:
            raise ValueError(
                f"{self.name} tracks the norms of gradients, and under {type(strategy).__name__} each replica closes "
                "with a part of the gradient: use `close(reduce=True)`, or a GradientAccumulateOptimizer."
            )
        with self._state.ending_on_replica(reduce_sums=reduce) as window:
            self._state.notes.end(window, None)
            sums = [window.latest.get(i) for i in range(len(window.accumulators))]
            return [
                None if each is None else tf.math.divide_no_nan(each, tf.cast(window.weight, each.dtype))
                for each in sums
            ]

    def reset(self) -> None:
        """Drops the open window, if there is one: the next micro-batch starts a new one."""
        self._built_state().reset()

    def _built_state(self) -> WindowState:
        if not self.built:
            raise ValueError(f"{self.name} is not built: call `build(variables)` first.")
        return self._state


def _warn_of_those_in_use(losers: "Sequence[weakref.ref[GradientAccumulator]]", winner: str) -> None:
    """Warns of accumulators that have lost layers to another one, unless nothing refers to them any longer."""
    gc.collect()
    names = sorted({loser.name for each in losers if (loser := each()) is not None})
    if names:
        warnings.warn(
            f"Layers whose statistics follow windows have followed those of {', '.join(names)} until now, and follow "
            f"those of {winner} from now on, which was built for the same variables. To train in turns, wrap each "
            "model in a GradientAccumulateModel: a layer has a window for each of them.",
            stacklevel=3,
        )
