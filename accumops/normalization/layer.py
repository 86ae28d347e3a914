"""Batch normalization whose running statistics are those of a window, pooled over its micro-batches.

A window's moments are its count, mean and centred sum of squares for each channel. Each call in training adds the
moments of its batch. Who ends the window is found anew at each call, in this order:

ended by                       when                                                          counts calls itself
a GradientAccumulateModel      its step is running or being traced (`owning_windows`)        no
a GradientAccumulator          it was built for the layer's gamma or beta, on its own or     no
                               for an optimizer (`join_window`)
the layer                      otherwise: after `accum_steps` calls                          yes

Each model has a window of its own in the layer. The last two have one together: an accumulator or optimizer does not
see which calls of the layer are its own, so the layer follows one of them at a time.
"""

import json
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.adapters.keras_layer import ExtraCheckpointState, in_stateless_scope
from accumops.adapters.tensorflow import enclosing_functions
from accumops.adapters.untracked import Untracked
from accumops.arguments import check_accum_steps, check_statistics, check_window_memory
from accumops.normalization import replica_moments
from accumops.normalization.layer_calls import adopting, collects_as_told
from accumops.normalization.layer_window import LayerWindow, Saved, load_windows, saved_windows
from accumops.normalization.window_moments import NormalizationOverWindow
from accumops.renamed import explains_renamed
from accumops.window import replicas
from accumops.window.accumulator import GradientAccumulator
from accumops.window.coupling import at_hand
from accumops.window.members import register_member
from accumops.window.state import WindowState

# A number of calls that is never reached, for a window that something else ends.
_NEVER = 1 << 62
# In files, how the names of a window's counters and moments begin. The name of a model follows, after a colon.
_COUNTERS, _MOMENTS = "window_counters", "window_moments"


@keras.saving.register_keras_serializable(package="accumops")
class AccumBatchNormalization(ExtraCheckpointState, keras.layers.BatchNormalization):
    """Batch normalization that is fused, and moves its running statistics once a window.

    A drop-in for `keras.layers.BatchNormalization`. Each micro-batch is normalized by its own moments, so the forward
    pass is not the large batch's. The running statistics are the large batch's: they move once a window, by the moments
    of all its micro-batches together, which count the variance between micro-batches as well. Statistics are float32 in
    half precision, and no float32 copy of the activations is made or kept.

    With `statistics="window"` all micro-batches are normalized by the moments of their window: outputs, gradients and
    running statistics are those of the large batch. This takes a functional or Sequential model in a
    `GradientAccumulateModel` with `micro_batch_size`; see `replace_batchnorm_layers`. Without accumulation the batch is
    the window.

    A `GradientAccumulateModel`, `GradientAccumulateOptimizer` or `GradientAccumulator` that trains the layer ends its
    windows, partial windows included; `accum_steps` need not be given then, and may change. `replace_batchnorm_layers`
    puts such layers into a model that has Keras's.

    Several `GradientAccumulateModel`s may share the layer and be trained in turns: it has a window for each of them.
    With optimizers or accumulators it follows one at a time, the one that was built last. If the one before it is still
    in use, building it warns, and training with the one before it raises a ValueError.

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
        statistics: `"micro_batch"` or `"window"`: whose moments a micro-batch is normalized by.
        every: With `"window"`, how many such layers there are from one tensor that a window keeps to the next; by
            default 2. It has to be the same in all layers of a model.
        memory: With `"window"`, the most memory that a window may take, in place of `every`.
        **kwargs: All other arguments of `keras.layers.BatchNormalization` except `renorm`, whose corrections come from
            statistics that move with each batch.

    Raises:
        TypeError: If `accum_steps` or `every` is not an int, or `memory` neither bytes nor a text.
        ValueError: If one of them is less than 1, `statistics` is another text, or with `renorm=True`.

    Example:

    >>> layer = accumops.AccumBatchNormalization(momentum=0.0, accum_steps=2)
    >>> for batch in ([[0.0], [2.0]], [[4.0]]):
    ...     y = layer(tf.constant(batch), training=True)
    >>> layer.moving_mean.numpy(), layer.moving_variance.numpy()  # of 0, 2 and 4
    (array([2.], dtype=float32), array([2.6666667], dtype=float32))
    """

    @explains_renamed
    def __init__(
        self,
        *args: Any,
        accum_steps: int | None = None,
        statistics: str = "micro_batch",
        every: int | None = None,
        memory: str | int | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.statistics = check_statistics(statistics)
        check_window_memory(self.statistics, every, memory)
        self.every = None if every is None else int(every)
        self.memory = memory
        # Untracked, as windows are saved apart from the weights. `accumulator` is what the layer has joined, and
        # `joined_by` the identities of the variables that it was found by. `alone_in` is the function in which the
        # layer ended windows itself: 0 if that was eagerly, None if it did not. Models keep their windows themselves.
        own, of_models = LayerWindow(self, ""), list["weakref.ref[LayerWindow]"]()
        self._state = Untracked(own=own, of_models=of_models, accumulator=None, joined_by=set(), alone_in=None)

    def build(self, input_shape: Any) -> None:
        """Creates the variables of Keras's layer, and those of the window."""
        super().build(input_shape)
        self._state.own.build(self.accum_steps or 1 if self._state.accumulator is None else _NEVER)
        for window in self._windows_of_models():
            window.build(_NEVER)
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
        statistics = at_hand() if self.follows_window else None
        if training and statistics is not None:
            outputs = statistics.normalize(inputs, self.gamma, self.beta, mask=mask, **settings)
        elif training and self.trainable:
            together = self.synchronized and replicas.running() is not None
            normalize = replica_moments.batch_norm if together else ops.batch_norm
            outputs, moments = normalize(inputs, self.gamma, self.beta, mask=mask, **settings)
            self._add(moments, pooled=together)
        else:
            outputs = ops.batch_norm_inference(
                inputs, self.gamma, self.beta, self.moving_mean, self.moving_variance, **settings
            )
        return tf.cast(outputs, self.compute_dtype)

    @property
    def follows_window(self) -> bool:
        """Whether the layer normalizes by the moments of the window in training: it is not frozen."""
        return bool(self.statistics == "window" and self.trainable)

    @property
    def coupled_because(self) -> str:
        """Says that it couples the samples of a window, as the beginning of an error."""
        return f"The layer '{self.name}' has statistics='window'"

    @property
    def uncoupled(self) -> str:
        """What may stand in its place."""
        return "statistics='micro_batch'"

    def coupling(self) -> NormalizationOverWindow:
        """How the layer couples the samples of a window that it follows."""
        return NormalizationOverWindow(self)

    def check_window(self, accum_steps: Any, micro_batch_size: int | str | None = None) -> None:
        """Raises if the layer cannot be trained with windows of `accum_steps` micro-batches.

        Args:
            accum_steps: The `accum_steps` of what trains the layer.
            micro_batch_size: Its `micro_batch_size`, if it loops over micro-batches within a step.

        Raises:
            ValueError: If the layer was made with another `accum_steps`. With `micro_batch_size` also if it is
                `synchronized` under a mirroring strategy, whose replicas cannot communicate within a loop.
        """
        if micro_batch_size is not None and self.synchronized and not self.follows_window and replicas.spreads(self):
            raise ValueError(
                f"The layer '{self.name}' has synchronized=True, and with `micro_batch_size` replicas cannot "
                "communicate between micro-batches: use `accum_steps`."
            )
        if self.follows_window and micro_batch_size is None and accum_steps != 1:
            raise ValueError(
                f"The layer '{self.name}' has statistics='window', and with accum_steps={accum_steps} the samples of a "
                "window are not there at the same time. Train it with "
                "`GradientAccumulateModel(model, micro_batch_size=...)` and whole windows as batches, or use "
                "statistics='micro_batch'."
            )
        if self.accum_steps is None or self.accum_steps == accum_steps:
            return
        trained = f"accum_steps={accum_steps}" if micro_batch_size is None else f"micro_batch_size={micro_batch_size}"
        raise ValueError(
            f"The layer '{self.name}' has accum_steps={self.accum_steps} and is trained with {trained}. Leave it out "
            "in the layer."
        )

    def join_window(self, accumulator: GradientAccumulator) -> None:
        """Leaves it to `accumulator` to end the layer's windows, and to no other that was built for its variables.

        Args:
            accumulator: The accumulator that sums the gradients of the layer's model.

        Raises:
            ValueError: If its `accum_steps` is another than the layer's own.
        """
        self._join(accumulator, ())

    def found_by(self, accumulator: GradientAccumulator, variables: Sequence[Any]) -> GradientAccumulator | None:
        """As `join_window`, for an accumulator that is built for some variables.

        Returns:
            The accumulator that was built for one of the same variables before, and has lost the layer; or None.
        """
        mine = {id(each) for each in (self.gamma, self.beta) if each is not None}
        mine &= {id(each) for each in variables}
        before, rivals = self._state.accumulator, bool(mine & self._state.joined_by)
        self._join(accumulator, mine)
        if before is None or not rivals:
            return None
        before.state.members.lose(self.name, accumulator.name)
        return before

    def _join(self, accumulator: GradientAccumulator, variables: Iterable[int]) -> None:
        self.check_window(accumulator.accum_steps)
        if self._state.alone_in is not None and (
            self._state.alone_in == 0 or self._state.alone_in not in enclosing_functions()
        ):
            warnings.warn(
                f"The layer '{self.name}' has been called in training before the optimizer or accumulator was built: "
                "its running statistics have moved by those micro-batches alone. Build it first.",
                stacklevel=4,
            )
        self.leave_window()
        self._state.accumulator, self._state.joined_by = accumulator, set(variables)
        accumulator.state.members.add(self._state.own, can_be_lost=True)
        accumulator.state.members.regain(self.name)
        self._state.own.set_limit(_NEVER)

    def leave_window(self) -> None:
        """Undoes `join_window`: the layer counts its calls again, and ends windows itself."""
        accumulator, self._state.accumulator = self._state.accumulator, None
        if accumulator is not None:
            accumulator.state.members.remove(self._state.own)
        self._state.alone_in = None
        self._state.own.set_limit(self.accum_steps or 1)

    def _joined(self) -> bool:
        return self._state.accumulator is not None or adopting() is not None

    def window_of_model(self, state: WindowState, name: str) -> LayerWindow:
        """Returns the layer's window in the windows of a model, which it makes if there is none yet.

        Args:
            state: The state of the model's windows.
            name: The model's name.
        """
        found: LayerWindow | None = state.members.window_of(self)
        if found is not None:
            return found
        window = LayerWindow(self, name)
        if self.built:
            window.build(_NEVER)
        self._state.of_models = [weakref.ref(each) for each in (*self._windows_of_models(), window)]
        state.members.add(window)
        if self._state.own not in self.windows():
            self._state.own.forget()
        return window

    def windows(self) -> list[LayerWindow]:
        """The windows of all that train the layer now: that of an accumulator or the layer itself, those of models."""
        of_models = self._windows_of_models()
        idle = self._state.accumulator is None and self.accum_steps in (None, 1) and bool(of_models)
        return of_models if idle else [self._state.own, *of_models]

    def _windows_of_models(self) -> list[LayerWindow]:
        found = [each() for each in self._state.of_models]
        return [window for window in found if window is not None and not window.released]

    def add_window(self, calls: Sequence[ops.BatchMoments], *, pooled: bool) -> None:
        """Adds the moments of a whole window, for each call of the layer in the model that is being traced.

        Args:
            calls: The moments of each call.
            pooled: Whether they are those of all replicas.
        """
        adopt = adopting()
        window = self._state.own if adopt is None else adopt(self)
        window.add_calls(calls, pooled=pooled)

    def _add(self, moments: ops.BatchMoments, pooled: bool) -> None:
        adopt = adopting()
        collects = collects_as_told() if self._joined() else None
        if collects is False:
            return
        if collects is None and in_stateless_scope():
            if adopt is None:
                self._called_alone()
            self._move_stateless(moments)
            return
        if self._joined():
            window = self._state.own if adopt is None else adopt(self)
            accumulator = self._state.accumulator
            only_finite = accumulator is not None and accumulator.nonfinite != "propagate"
            if pooled:  # they count the values of all replicas, so that only one replica adds them
                first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
                moments = moments._replace(count=tf.where(first, moments.count, 0))
            window.add(moments, only_finite=only_finite)
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
        for own, moving in self._state.own.parts():
            # Unless the layer is certainly alone, the window's variables decide: an optimizer that is built later in
            # the function that is being traced may still take the layer in.
            ops.merge_moments(moments, window=None if alone else own, moving=moving)

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
        return {
            **super().get_config(),
            "accum_steps": self.accum_steps,
            "statistics": self.statistics,
            "every": self.every,
            "memory": self.memory,
        }

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the variables, and the windows that are open."""
        super().save_own_variables(store)
        if self.built:
            for name, (counters, moments) in saved_windows(self.windows()).items():
                ending = f":{name}" if name else ""
                store[f"{_COUNTERS}{ending}"], store[f"{_MOMENTS}{ending}"] = counters, moments

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` stored, or what Keras's layer stored, which has no window."""
        keys = set(store.keys())
        super().load_own_variables({key: store[key] for key in keys if not key.startswith("window_")})
        if self.built:
            names = [key.removeprefix(_COUNTERS) for key in keys if key.startswith(_COUNTERS)]
            self.load_windows({name[1:]: (store[f"{_COUNTERS}{name}"], store[f"{_MOMENTS}{name}"]) for name in names})

    def load_windows(self, saved: Mapping[str, Saved]) -> None:
        """Restores windows that were saved, by the names of the models that they are of."""
        lost = load_windows(self.windows(), saved)
        if lost:
            warnings.warn(
                f"The open windows of the layer '{self.name}' were saved for the models {sorted(lost)}, and no model "
                "of such a name trains it here: they are dropped.",
                stacklevel=2,
            )


class _WindowInCheckpoints(tf.train.experimental.PythonState):
    """Saves a layer's windows in a `tf.train.Checkpoint`."""

    def __init__(self, layer: AccumBatchNormalization) -> None:
        super().__init__()
        self._layer = layer

    def serialize(self) -> str:
        """Returns the windows as text, which is exact."""
        windows = saved_windows(self._layer.windows())
        return json.dumps({name: [np.array(part).tolist() for part in each] for name, each in windows.items()})

    def deserialize(self, string_value: str) -> None:
        """Restores what `serialize` returned."""
        self._layer.load_windows({name: tuple(each) for name, each in json.loads(string_value).items()})
