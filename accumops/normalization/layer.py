"""Batch normalization whose running statistics are those of a window, pooled over its micro-batches.

A window's moments are its count, mean and centred sum of squares for each channel. Each call in training adds the
moments of its batch. Who ends the window is found anew at each call, in this order:

ended by                       when                                                          counts calls itself
a GradientAccumulateModel      its step is running or being traced (`owning_windows`)        no
a GradientAccumulator          it was built for the layer's gamma or beta, on its own or     no
                               for an optimizer (`join_window`)
the layer                      otherwise: after `accum_steps` calls                          yes
"""

import contextlib
import contextvars
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.adapters.keras_layer import ExtraCheckpointState, in_stateless_scope
from accumops.adapters.tensorflow import enclosing_functions
from accumops.adapters.untracked import Untracked
from accumops.arguments import check_accum_steps
from accumops.normalization import replica_moments
from accumops.window import replicas
from accumops.window.accumulator import GradientAccumulator
from accumops.window.members import register_member

# A number of calls that is never reached, for a window that something else ends.
_NEVER = 1 << 62
# Called with each layer by the model whose step is running or being traced. A context variable, since each replica has
# a thread and threads switch at every collective.
_ADOPT: contextvars.ContextVar["Callable[[AccumBatchNormalization], None] | None"] = contextvars.ContextVar(
    "adopt", default=None
)


@contextlib.contextmanager
def owning_windows(adopt: "Callable[[AccumBatchNormalization], None]") -> Iterator[None]:
    """Leaves it to a model to end the windows of all layers that are called while the block runs or is traced.

    Args:
        adopt: Called with a layer each time it is called, before it adds moments to its window.
    """
    token = _ADOPT.set(adopt)
    try:
        yield
    finally:
        _ADOPT.reset(token)


# Whether layers add moments to windows that others end: None leaves it to how they are called.
_COLLECTS: contextvars.ContextVar[bool | None] = contextvars.ContextVar("collects", default=None)


@contextlib.contextmanager
def collecting_moments(collects: bool) -> Iterator[None]:
    """Says whether layers that are called while the block runs or is traced add moments to windows that others end.

    Of several runs over the same inputs one has to. It may be in a `keras.StatelessScope`.
    """
    token = _COLLECTS.set(collects)
    try:
        yield
    finally:
        _COLLECTS.reset(token)


@keras.saving.register_keras_serializable(package="accumops")
class AccumBatchNormalization(ExtraCheckpointState, keras.layers.BatchNormalization):
    """Batch normalization that is fused, and moves its running statistics once a window.

    A drop-in for `keras.layers.BatchNormalization`. Each micro-batch is normalized by its own moments, so the forward
    pass is not the large batch's. The running statistics are the large batch's: they move once a window, by the moments
    of all its micro-batches together, which count the variance between micro-batches as well. Statistics are float32 in
    half precision, and no float32 copy of the activations is made or kept.

    A `GradientAccumulateModel`, `GradientAccumulateOptimizer` or `GradientAccumulator` that trains the layer ends its
    windows, partial windows included; `accum_steps` need not be given then, and may change. `replace_batchnorm_layers`
    puts such layers into a model that has Keras's.

    Under MirroredStrategy and MultiWorkerMirroredStrategy the running statistics move by the moments of all replicas,
    which they exchange where a window ends, for all layers of a model together; without accumulation, at each call.
    With `synchronized=True` micro-batches are normalized by the moments of all replicas as well, in plain TensorFlow.
    This takes an exchange for each layer, which cannot be made within `micro_batch_size`'s loop.

    An open window is saved with the layer, by Keras and by `tf.train.Checkpoint`; a checkpoint of Keras's layer has
    none, and is restored with `expect_partial()`. The fused ops have no gradients of second order, which a gradient
    penalty needs, in training or inference: use `accumops.set_backend("reference")` for it.

    An optimizer or accumulator finds the layer by its gamma or beta when it is built. When executing eagerly, build it
    before the first step. For a layer with `center=False` and `scale=False`, call `join_window`. To train the layer
    without accumulation after that, call `leave_window`.

    Args:
        *args: As for `keras.layers.BatchNormalization`.
        accum_steps: Calls in training that make a window if nothing else ends windows: an int of at least 1, by default
            1. If the layer is trained with another number, that is an error; by default it takes any.
        **kwargs: All other arguments of `keras.layers.BatchNormalization` except `renorm`, whose corrections come from
            statistics that move with each batch.

    Raises:
        TypeError: If `accum_steps` is not an int.
        ValueError: If `accum_steps` is less than 1, or with `renorm=True`.

    Example:

    >>> layer = accumops.AccumBatchNormalization(momentum=0.0, accum_steps=2)
    >>> for batch in ([[0.0], [2.0]], [[4.0]]):
    ...     y = layer(tf.constant(batch), training=True)
    >>> layer.moving_mean.numpy(), layer.moving_variance.numpy()  # of 0, 2 and 4
    (array([2.], dtype=float32), array([2.6666667], dtype=float32))
    """

    def __init__(self, *args: Any, accum_steps: int | None = None, **kwargs: Any) -> None:
        if kwargs.get("renorm"):
            raise ValueError(
                "AccumBatchNormalization does not do batch renormalization: its corrections come from statistics that "
                "move with each batch, and these move once a window. Use keras.layers.BatchNormalization."
            )
        if callable(accum_steps):
            raise TypeError(f"`accum_steps` of a layer must be an int or None. Received: {accum_steps!r}")
        super().__init__(*args, **kwargs)
        if self.renorm:  # given by its position
            raise ValueError("AccumBatchNormalization does not do batch renormalization.")
        check_accum_steps(accum_steps)
        self.accum_steps = None if accum_steps is None else int(accum_steps)
        # Untracked, as the window is saved apart from the weights. `accumulator` is what the layer has joined, and
        # `alone_in` the function in which the layer ended windows itself: 0 if that was eagerly, None if it did not.
        self._state = Untracked(accumulator=None, alone_in=None)

    def build(self, input_shape: Any) -> None:
        """Creates the variables of Keras's layer, and those of the window."""
        super().build(input_shape)
        channels = input_shape[self.axis]
        limit = self.accum_steps or 1 if self._state.accumulator is None else _NEVER
        self._state.window = ops.MomentsWindow(
            _window_variable("counters", [0, 0, limit], "int64"),
            _window_variable("moments", np.zeros([2, channels]), "float64"),
        )
        self.checkpoint_state = _WindowInCheckpoints(self)
        for variable in (self.gamma, self.beta):
            if variable is not None:
                register_member(variable, self)

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """Normalizes `inputs`, in training by their own moments."""
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            raise ValueError(
                "The mask provided should be one dimension less than the inputs. "
                f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
            )
        if mask is not None and self.axis not in (-1, len(inputs.shape) - 1):
            if self._joined() or self.accum_steps not in (None, 1):
                raise ValueError(
                    f"The layer '{self.name}' cannot pool a window's statistics under a mask, with channels that are "
                    "not the last axis."
                )
            return super().call(inputs, training=training, mask=mask)
        if isinstance(inputs, tf.RaggedTensor):
            if mask is not None or self.axis not in (-1, inputs.shape.rank - 1):
                raise ValueError(
                    f"The layer '{self.name}' normalizes a tf.RaggedTensor along its last axis only, and without a "
                    f"mask. Received: axis={self.axis}, mask={mask}"
                )
            return inputs.with_flat_values(self._normalize(inputs.flat_values, -1, training, None))
        inputs = tf.convert_to_tensor(inputs)
        if mask is not None:
            mask = tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(inputs)[:-1])
        return self._normalize(inputs, self.axis, training, mask)

    def _normalize(self, inputs: tf.Tensor, axis: int, training: bool | None, mask: tf.Tensor | None) -> tf.Tensor:
        if not inputs.dtype.is_floating:
            inputs = tf.cast(inputs, tf.float32)
        settings = {"axis": axis, "epsilon": self.epsilon}
        if training and self.trainable:
            together = self.synchronized and replicas.running() is not None
            normalize = replica_moments.batch_norm if together else ops.batch_norm
            outputs, moments = normalize(inputs, self.gamma, self.beta, mask=mask, **settings)
            self._add(moments, pooled=together)
        else:
            outputs = ops.batch_norm_inference(
                inputs, self.gamma, self.beta, self.moving_mean, self.moving_variance, **settings
            )
        return tf.cast(outputs, self.compute_dtype)

    def check_window(self, accum_steps: Any, micro_batch_size: int | None = None) -> None:
        """Raises if the layer cannot be trained with windows of `accum_steps` micro-batches.

        Args:
            accum_steps: The `accum_steps` of what trains the layer.
            micro_batch_size: Its `micro_batch_size`, if it loops over micro-batches within a step.

        Raises:
            ValueError: If the layer was made with another `accum_steps`. With `micro_batch_size` also if it is
                `synchronized` under a mirroring strategy, whose replicas cannot communicate within a loop.
        """
        if micro_batch_size is not None and self.synchronized and replicas.spreads(self):
            raise ValueError(
                f"The layer '{self.name}' has synchronized=True, and with `micro_batch_size` replicas cannot "
                "communicate between micro-batches: use `accum_steps`."
            )
        if self.accum_steps is None or self.accum_steps == accum_steps:
            return
        trained = f"accum_steps={accum_steps}" if micro_batch_size is None else f"micro_batch_size={micro_batch_size}"
        raise ValueError(
            f"The layer '{self.name}' has accum_steps={self.accum_steps} and is trained with {trained}. Leave it out "
            "in the layer."
        )

    def join_window(self, accumulator: GradientAccumulator) -> None:
        """Leaves it to `accumulator` to end the layer's windows. An accumulator that finds the layer calls this.

        Args:
            accumulator: The accumulator that sums the gradients of the layer's model.

        Raises:
            ValueError: If its `accum_steps` is another than the layer's own.
        """
        self.check_window(accumulator.accum_steps)
        if self._state.alone_in is not None and (
            self._state.alone_in == 0 or self._state.alone_in not in enclosing_functions()
        ):
            warnings.warn(
                f"The layer '{self.name}' has been called in training before the optimizer or accumulator was built: "
                "its running statistics have moved by those micro-batches alone. Build it first.",
                stacklevel=3,
            )
        self.leave_window()
        self._state.accumulator = accumulator
        accumulator.state.add_member(self)
        self._set_limit(_NEVER)

    def leave_window(self) -> None:
        """Undoes `join_window`: the layer counts its calls again, and ends windows itself."""
        accumulator, self._state.accumulator = self._state.accumulator, None
        if accumulator is not None:
            accumulator.state.remove_member(self)
        self._state.alone_in = None
        self._set_limit(self.accum_steps or 1)

    def _set_limit(self, limit: int) -> None:
        if self.built:
            with tf.init_scope():
                self._state.window.counters.assign([0, 0, limit])

    def _joined(self) -> bool:
        return self._state.accumulator is not None or _ADOPT.get() is not None

    @classmethod
    def close_windows(cls, members: Sequence["AccumBatchNormalization"]) -> None:
        """Ends the windows of layers, full or not: running statistics move by the window's moments, if it has any.

        On a replica of a strategy they move by the moments of all replicas. All replicas have to call this.

        Args:
            members: The layers.
        """
        layers = [layer for layer in members if layer.built]
        if replicas.running() is None:
            for layer in layers:
                for window, moving in layer.window_parts():
                    ops.merge_moments(None, window=window, moving=moving)
        elif layers:
            for layer, pooled in zip(layers, cls._pool(layers), strict=True):
                ((_, moving),) = layer.window_parts()
                ops.merge_moments(pooled, moving=moving)
                layer.drop_window()

    @staticmethod
    def _pool(layers: Sequence["AccumBatchNormalization"]) -> list[ops.BatchMoments]:
        windows = [layer.window_parts()[0][0] for layer in layers]
        return replica_moments.pool([(window.counters[0], window.moments[0], window.moments[1]) for window in windows])

    def drop_window(self) -> None:
        """Drops the window: its moments never reach the running statistics."""
        if self.built:
            for window, _ in self.window_parts():
                window.counters.assign(window.counters * [0, 0, 1])

    def forget_window(self) -> None:
        """Drops the window now, even while a function is traced: what takes over the layer starts with a new window."""
        if self.built:
            with tf.init_scope():
                # The variables are not initialized while a function is traced for the first time.
                if self._state.window.counters.value.is_initialized():
                    self.drop_window()

    def window_parts(self) -> list[tuple[ops.MomentsWindow, ops.MovingStatistics]]:
        """The variables on the replica that runs; outside of replicas, on each of this process's replicas."""
        variables = (*self._state.window, self.moving_mean, self.moving_variance)
        return [
            (ops.MomentsWindow(counters, moments), ops.MovingStatistics(mean, variance, self.momentum))
            for counters, moments, mean, variance in replicas.components(*variables)
        ]

    def _add(self, moments: ops.BatchMoments, pooled: bool) -> None:
        adopt = _ADOPT.get()
        collects = _COLLECTS.get() if self._joined() else None
        if collects is False:
            return
        if collects is None and in_stateless_scope():
            if adopt is None:
                self._called_alone()
            self._move_stateless(moments)
            return
        if adopt is not None:
            adopt(self)
        if self._joined():
            accumulator = self._state.accumulator
            if accumulator is not None and accumulator.nonfinite != "propagate":
                moments = _if_finite(moments)
            if pooled:  # they count the values of all replicas, so that only one replica adds them
                first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
                moments = moments._replace(count=tf.where(first, moments.count, 0))
            for window, _ in self.window_parts():
                ops.merge_moments(moments, window=window)
            return
        self._called_alone()
        alone = self.accum_steps == 1 or (self.accum_steps is None and tf.executing_eagerly())
        strategy = replicas.running()
        if strategy is not None:
            if self.accum_steps not in (None, 1):
                raise ValueError(
                    f"The layer '{self.name}' has accum_steps={self.accum_steps}, and under "
                    f"{type(strategy).__name__} cannot end windows by itself: train it with a GradientAccumulateModel, "
                    "a GradientAccumulateOptimizer or a GradientAccumulator."
                )
            alone = True
            if not pooled:
                count, mean, rest, variance = moments
                centred = tf.cast(variance, tf.float64) * tf.cast(count, tf.float64)
                exact = tf.cast(mean, tf.float64) + tf.cast(rest, tf.float64)
                (moments,) = replica_moments.pool([(count, exact, centred)])
        for window, moving in self.window_parts():
            # Unless the layer is certainly alone, the window's variables decide: an optimizer that is built later in
            # the function that is being traced may still take the layer in.
            ops.merge_moments(moments, window=None if alone else window, moving=moving)

    def _move_stateless(self, moments: ops.BatchMoments) -> None:
        """Moves the values that a `keras.StatelessScope` holds instead of the variables."""
        for moving, value in ((self.moving_mean, moments.mean), (self.moving_variance, moments.variance)):
            old = tf.convert_to_tensor(moving)
            new = tf.cast(old, value.dtype) * self.momentum + value * (1.0 - self.momentum)
            moving.assign(tf.where(moments.count > 0, tf.cast(new, old.dtype), old))

    def _called_alone(self) -> None:
        """Notes the function that is running or being traced, so that `join_window` can warn if it comes too late."""
        if self.accum_steps is None:
            self._state.alone_in = enclosing_functions()[0]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this layer again, without its state."""
        return {**super().get_config(), "accum_steps": self.accum_steps}

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the variables, and the window if one is open."""
        super().save_own_variables(store)
        if self.built:
            counters, moments = self.saved_window()
            if counters[0] > 0:
                store["window_counters"], store["window_moments"] = counters[:2], moments

    def saved_window(self) -> tuple[np.ndarray, np.ndarray]:
        """The counters and moments of the window; under a strategy, the moments of all replicas together."""
        strategy = replicas.strategy_of_variable(self._state.window.counters)
        parts = [[each.numpy() for each in window] for window, _ in self.window_parts()]
        counters, moments = parts[0]
        if strategy is None or counters[1] == 0:  # all replicas have made as many calls
            return counters, moments
        if not replicas.spans_processes(strategy):
            return replica_moments.pool_arrays(parts)

        def pooled() -> tuple[tf.Tensor, tf.Tensor]:
            (moments,) = self._pool([self])
            count = tf.cast(moments.count, tf.float64)
            return moments.count, tf.stack([moments.mean, moments.variance * count])

        results = tf.function(lambda: strategy.run(pooled), autograph=False)()
        count, moments = (strategy.experimental_local_results(each)[0].numpy() for each in results)
        return np.array([count, *counters[1:]]), moments

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` stored, or what Keras's layer stored, which has no window."""
        keys = set(store.keys())
        super().load_own_variables({key: store[key] for key in keys if not key.startswith("window_")})
        if self.built and "window_counters" in keys:
            self.load_window(store["window_counters"], store["window_moments"])
        elif self.built:
            self.load_window([0, 0], np.zeros(self._state.window.moments.shape))

    def load_window(self, counters: Any, moments: Any) -> None:
        """Restores a saved window, except for the number of calls that make one full: this is the layer's own."""
        (values, calls), saved = counters, np.array(moments)
        strategy = replicas.strategy_of_variable(self._state.window.counters)
        ids = [0] if strategy is None else replicas.replica_ids(strategy)
        for replica, (own, held) in zip(ids, replicas.components(*self._state.window), strict=True):
            # The saved moments are those of all replicas together: one replica takes them, the others start empty.
            own.assign([values if replica == 0 else 0, calls, own.numpy()[2]])
            held.assign(saved if replica == 0 else np.zeros_like(saved))


class _WindowInCheckpoints(tf.train.experimental.PythonState):
    """Saves a layer's window in a `tf.train.Checkpoint`."""

    def __init__(self, layer: AccumBatchNormalization) -> None:
        super().__init__()
        self._layer = layer

    def serialize(self) -> str:
        """Returns the window as text, which is exact."""
        counters, moments = self._layer.saved_window()
        return json.dumps([np.array(counters[:2]).tolist(), np.array(moments).tolist()])

    def deserialize(self, string_value: str) -> None:
        """Restores what `serialize` returned."""
        self._layer.load_window(*json.loads(string_value))


def _if_finite(moments: ops.BatchMoments) -> ops.BatchMoments:
    """The moments, of no values if they are not finite: what is merged into a window cannot be taken out of it."""
    finite = ops.all_finite([moments.mean, moments.variance])
    return moments._replace(count=tf.where(finite, moments.count, tf.zeros_like(moments.count)))


def _window_variable(name: str, value: Any, dtype: str) -> keras.Variable:
    value = np.array(value, dtype)
    return keras.Variable(
        initializer=lambda shape, dtype: tf.constant(value, dtype),
        shape=value.shape,
        dtype=dtype,
        trainable=False,
        autocast=False,
        name=f"window_{name}",
    )
