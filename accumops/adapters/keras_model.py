"""What accumops uses of Keras's models beyond their public interface."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters import keras_losses  # noqa: F401  has the samples
from accumops.adapters.upstream import relies_on


@relies_on("<a compiled model>._loss_tracker", feature="the mean of the loss in the logs, and EffectiveBatchSize")
def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """The metric that keeps the mean of the loss, of a compiled model."""
    return model._loss_tracker


@relies_on("<a compiled model>._metrics", feature="the error for models with metrics of their own")
def own_metrics(model: keras.Layer) -> list[keras.metrics.Metric]:
    """The metrics that are attributes of a model or layer itself."""
    return list(model._metrics)


def mask_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """The mask that Keras's layers have given a tensor, or None.

    A tensor without mask need not have the attribute, so there is nothing to ask the installed Keras for.
    """
    return getattr(tensor, "_keras_mask", None)


def with_mask(tensor: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Gives a tensor a mask, as Keras's layers do, and returns the tensor."""
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


_PROBABILITIES = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}
_SEES_OPERATIONS = contextvars.ContextVar("sees_operations", default=True)


def logits_of(tensor: tf.Tensor, *, operations: bool = False) -> tf.Tensor | None:
    """What a softmax or sigmoid has made a tensor from, or None.

    Keras's losses take it in place of probabilities, whose logarithm is cut off at 1e-7. Keras's functions note it in
    an attribute; where TensorFlow's were called, losses look at the operation in the graph.

    Args:
        tensor: The tensor.
        operations: Whether to look at the operation, too.
    """
    logits = getattr(tensor, "_keras_logits", None)
    sees = operations and _SEES_OPERATIONS.get()
    if logits is None and sees and isinstance(tensor, tf.Tensor) and tf.is_symbolic_tensor(tensor):
        logits = tensor.op.inputs[0] if tensor.op.type in _PROBABILITIES else None
    return logits


@contextlib.contextmanager
def standing_for(eagerly: bool) -> Iterator[None]:
    """Has `logits_of` look at attributes alone within a block that traces what is to be executed eagerly.

    Keras's losses see no operations there.

    Args:
        eagerly: Whether it is to be executed eagerly.
    """
    token = _SEES_OPERATIONS.set(not eagerly and _SEES_OPERATIONS.get())
    try:
        yield
    finally:
        _SEES_OPERATIONS.reset(token)


def with_logits(tensor: tf.Tensor, logits: tf.Tensor | None, like: tf.Tensor) -> tf.Tensor:
    """Returns a tensor for Keras's losses, made from logits in the way of another one.

    Args:
        tensor: The tensor.
        logits: What it was made from, or None.
        like: A tensor whose `logits_of` says how.
    """
    if logits is None:
        return tensor
    if hasattr(like, "_keras_logits"):
        tensor._keras_logits = logits
        return tensor
    return with_mask(_PROBABILITIES[like.op.type](logits), mask_of(tensor))


@relies_on(
    "<a compiled model>._convert_input_args",
    "<a compiled model>._allow_non_tensor_positional_args",
    feature="inputs that reach a wrapped model as they are",
)
def pass_inputs_on(model: keras.Model) -> None:
    """Has a model give its inputs to `call` as they are: it converts no arrays, and takes what is no tensor."""
    model._convert_input_args = False
    model._allow_non_tensor_positional_args = True


@relies_on("<a compiled model>._build_shapes_dict", feature="saving a wrapped model that was built before")
def mark_built(model: keras.Model, like: keras.Model) -> None:
    """Makes a model count as built, with the input shapes that another was built for."""
    model.built = True
    model._build_shapes_dict = getattr(like, "_build_shapes_dict", None)


@relies_on("<a compiled model>._initial_epoch", feature="BackupAndRestore")
def start_at_epoch(model: keras.Model, epoch: int | None) -> int | None:
    """Sets the epoch that `fit` starts with, counted from 0; None leaves it to the arguments of `fit`.

    Returns:
        What was set before.
    """
    before = model._initial_epoch
    model._initial_epoch = epoch
    return before


@relies_on("keras.src.utils.file_utils.is_remote_path(path)", feature="BackupAndRestore")
def is_remote_path(path: str) -> bool:
    """Whether Keras reads and writes a path through TensorFlow's file systems, as it does `gs://bucket/file`."""
    from keras.src.utils import file_utils

    return bool(file_utils.is_remote_path(path))


@relies_on(
    "keras.src.backend.common.global_state.get_global_attribute(name)",
    "keras.src.random.seed_generator.GLOBAL_SEED_GENERATOR",
    "keras.src.random.seed_generator.global_seed_generator()",
    feature="BackupAndRestore",
)
def global_seed(*, create: bool) -> keras.Variable | None:
    """The state of the seed of `keras.random` functions that are called without one; None before the first such call.

    Args:
        create: Whether to create it if there is none yet.
    """
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    if not create and global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR) is None:
        return None
    return seed_generator.global_seed_generator().state


@relies_on(
    "keras.Model._maybe_symbolic_build(iterator=, data_batch=)",
    "<a compiled model>._default_save_signature",
    feature="models that wrap a model",
)
def _declare_hooks() -> None:
    """Declares what `WrapperModel` overrides."""


class WrapperModel(keras.Model):
    """A base class for models that wrap another, as `model`, with the private hooks that Keras calls."""

    model: keras.Model

    def batch_to_build_with(self, iterator: Any, data_batch: Any) -> tuple[Any, Any]:
        """May replace what Keras builds the model with.

        Args:
            iterator: An iterator over batches, of which Keras would take the first, or None.
            data_batch: The batch otherwise.

        Returns:
            Both, replaced or not.
        """
        return iterator, data_batch

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        super()._maybe_symbolic_build(*self.batch_to_build_with(iterator, data_batch))

    @property
    def _default_save_signature(self) -> Any:
        """What `tf.saved_model.save` takes: the wrapped model knows the shapes and dtypes of its inputs."""
        return self.model._default_save_signature
