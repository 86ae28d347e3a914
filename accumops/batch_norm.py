"""Batch normalization whose running statistics are those of a window, pooled over its micro-batches.

A window's moments are its count, mean and centred sum of squares for each channel, to which each call in training adds
those of its batch. They belong to who ends the window:

- a `GradientAccumulator`, within an optimizer, a model or a loop of one's own, that was built for the layer's gamma or
  beta, or a `GradientAccumulateModel` that has the layer: the layer joins it, and its windows are that one's;
- nobody: then the layer counts its calls, and ends a window after `accum_steps` of them.
"""

import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope

from accumops import ops
from accumops.accumulator import GradientAccumulator, check_accum_steps, register_member

# A number of calls that is never reached: the window is somebody else's to end.
_NEVER = 1 << 62
_WINDOW = ("count", "mean", "centred", "calls")


@keras.saving.register_keras_serializable(package="accumops")
class AccumBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization that is fused, and moves its running statistics once a window.

    A drop-in for `keras.layers.BatchNormalization`. Each micro-batch is normalized with its own moments, so the forward
    pass is not that of the large batch; what equals the large batch are the running statistics, which move once a
    window, by the moments of all its micro-batches together: the variance between micro-batches counts as well.
    Statistics are float32 in half precision, and no float32 copy of the activations is made or kept.

    Where a `GradientAccumulateModel`, a `GradientAccumulateOptimizer` or a `GradientAccumulator` trains the layer, the
    windows are that one's, partial windows and a number of micro-batches that changes included, and `accum_steps` need
    not be given. `replace_batchnorm_layers` puts such layers into a model that has Keras's.

    Args:
        axis: As for `keras.layers.BatchNormalization`.
        accum_steps: Calls in training that make a window, where nothing else ends windows: an int of at least 1. By
            default 1, or what the layer is trained by says; it is an error if that says another number.
        **kwargs: All other arguments of `keras.layers.BatchNormalization` but `renorm`, whose corrections are made from
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

    def __init__(self, axis: int = -1, *, accum_steps: int | None = None, **kwargs: Any) -> None:
        if kwargs.get("renorm"):
            raise ValueError(
                "AccumBatchNormalization does not do batch renormalization: its corrections come from statistics that "
                "move with each batch, and these move once a window. Use keras.layers.BatchNormalization."
            )
        if callable(accum_steps):
            raise TypeError(f"`accum_steps` of a layer must be an int or None. Received: {accum_steps!r}")
        super().__init__(axis=axis, **kwargs)
        check_accum_steps(accum_steps)
        self.accum_steps = None if accum_steps is None else int(accum_steps)
        # In a namespace, where Keras does not find it: the window is saved apart from the weights.
        self._state = types.SimpleNamespace(accumulator=None)

    def build(self, input_shape: Any) -> None:
        """Creates the variables: those of Keras's layer, and the window's."""
        super().build(input_shape)
        channels = (input_shape[self.axis],)
        limit = self.accum_steps or 1 if self._state.accumulator is None else _NEVER
        self._state.moments = ops.MomentsWindow(
            _window_variable("count", (), "float64"),
            _window_variable("mean", channels, "float64"),
            _window_variable("centred", channels, "float64"),
        )
        self._state.calls = _window_variable("calls", (), "int64")
        self._state.limit = _window_variable("limit", (), "int64", limit)
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
        if _replicas() > 1:
            return self._call_on_replicas(inputs, training, mask)
        inputs = tf.convert_to_tensor(inputs)
        if not inputs.dtype.is_floating:
            inputs = tf.cast(inputs, self.compute_dtype)
        settings = {"axis": self.axis, "epsilon": self.epsilon}
        if training and self.trainable:
            outputs, moments = ops.batch_norm(inputs, self.gamma, self.beta, mask=mask, **settings)
            self._add(moments)
        else:
            outputs = ops.batch_norm_inference(
                inputs, self.gamma, self.beta, self.moving_mean, self.moving_variance, **settings
            )
        return tf.cast(outputs, self.compute_dtype)

    def join_window(self, accumulator: GradientAccumulator) -> None:
        """Leaves it to `accumulator` to say when a window ends; accumops calls it where it can.

        Args:
            accumulator: What sums the gradients of the layer's model.

        Raises:
            ValueError: If it has another number of micro-batches than the layer's own `accum_steps`.
        """
        if self.accum_steps is not None and self.accum_steps != accumulator.accum_steps:
            raise ValueError(
                f"The layer '{self.name}' has accum_steps={self.accum_steps} and is trained with "
                f"accum_steps={accumulator.accum_steps}. Leave it out in the layer."
            )
        before = self._state.accumulator
        if before is accumulator:
            return
        if before is not None:
            before.remove_member(self)
        self._state.accumulator = accumulator
        accumulator.add_member(self)
        if self.built:
            with tf.init_scope():
                self._state.limit.assign(_NEVER)

    def close_window(self) -> None:
        """Ends the window, full or not: the running statistics move by its moments, if there are any."""
        count, mean, centred = (tf.convert_to_tensor(each) for each in self._state.moments)
        some = count > 0
        variance = tf.math.divide_no_nan(centred, count)
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = tf.convert_to_tensor(moving)
            moving.assign(tf.where(some, self._moved(old, tf.cast(value, old.dtype)), old))
        self._state.moments.count.assign(0)
        self._state.calls.assign(0)

    def _moved(self, old: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        return old * self.momentum + value * (1.0 - self.momentum)

    def _add(self, moments: ops.BatchMoments) -> None:
        accumulator = self._state.accumulator
        if accumulator is not None and accumulator.built:
            ops.merge_moments(self._state.moments, moments, overwrite=tf.logical_not(accumulator.open))
            return
        alone = self.accum_steps == 1 or (self.accum_steps is None and tf.executing_eagerly())
        if (alone and accumulator is None) or in_stateless_scope():
            for moving, value in ((self.moving_mean, moments.mean), (self.moving_variance, moments.variance)):
                old = tf.convert_to_tensor(moving)
                new = self._moved(old, tf.cast(value, old.dtype))
                moving.assign(tf.where(moments.count > 0, new, old))
            return
        # By variables: the layer may join an optimizer that is built later in the function that is being traced.
        calls = self._state.calls
        ops.merge_moments(self._state.moments, moments, overwrite=tf.equal(calls, 0))
        calls.assign_add(1)
        keras.ops.cond(tf.greater_equal(calls, self._state.limit), self.close_window, lambda: None)

    def _call_on_replicas(self, inputs: tf.Tensor, training: bool | None, mask: tf.Tensor | None) -> tf.Tensor:
        if self._state.accumulator is not None or self.accum_steps not in (None, 1):
            raise ValueError(
                f"The layer '{self.name}' cannot pool a window's statistics over the {_replicas()} replicas of "
                f"{type(tf.distribute.get_strategy()).__name__}."
            )
        return super().call(inputs, training=training, mask=mask)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this layer again, without its state."""
        return {**super().get_config(), "accum_steps": self.accum_steps}

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the variables, and the window's if one is open."""
        super().save_own_variables(store)
        if float(self._state.moments.count.numpy()) > 0:
            for name, variable in zip(_WINDOW, self._window_variables(), strict=True):
                store[f"window_{name}"] = variable.numpy()

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` stored, or what Keras's layer did, without a window."""
        keys = set(store.keys())
        super().load_own_variables({key: store[key] for key in keys if not key.startswith("window_")})
        for name, variable in zip(_WINDOW, self._window_variables(), strict=True):
            key = f"window_{name}"
            variable.assign(store[key] if key in keys else np.zeros(variable.shape, variable.dtype))

    def _window_variables(self) -> list[keras.Variable]:
        return [*self._state.moments, self._state.calls]


def _window_variable(name: str, shape: tuple[int, ...], dtype: str, value: int = 0) -> keras.Variable:
    return keras.Variable(
        initializer=keras.initializers.Constant(value),
        shape=shape,
        dtype=dtype,
        trainable=False,
        autocast=False,
        name=f"window_{name}",
    )


def _replicas() -> int:
    return int(tf.distribute.get_strategy().num_replicas_in_sync)
