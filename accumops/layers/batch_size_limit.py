"""A layer that refuses batches that are too large."""

from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this
from accumops.arguments import check_count


@keras.saving.register_keras_serializable(package="accumops")
class BatchSizeLimit(keras.layers.Layer):
    """Raises an error when a batch has more samples than it may, and otherwise returns its inputs.

    It checks training, evaluation and prediction alike, in eager execution and in graphs. Put it behind the inputs of a
    model whose memory is known to hold so many samples, so that a batch that is too large fails at once and says why.
    With `GradientAccumulateModel(micro_batch_size=b)` the layer sees micro-batches: `b` samples at most.

    XLA raises the error when it compiles a function for a batch that is too large. Its words are its own: they name the
    operation `<layer>/takes_at_most_<n>_samples`.

    Args:
        max_batch_size: The most samples that a batch may have.
        **kwargs: As for `keras.layers.Layer`.

    Raises:
        TypeError: If `max_batch_size` is not an int.
        ValueError: If `max_batch_size` is less than 1. When it is called: if a batch is too large, in eager execution
            or where its size is known when a function is traced; in a graph `tf.errors.InvalidArgumentError`.

    Input: a tensor or a structure of tensors, with samples along the first axis. Output: the same.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), accumops.layers.BatchSizeLimit(32), keras.layers.Dense(1)])
    >>> model(tf.zeros([32, 4])).shape
    TensorShape([32, 1])
    """

    def __init__(self, max_batch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("max_batch_size", max_batch_size, "the samples of a batch")
        self.max_batch_size = int(max_batch_size)
        self.supports_masking = True
        self.autocast = False  # the inputs pass as they are

    def build(self, input_shape: Any) -> None:
        """Has nothing to make, for inputs of any shapes."""

    def call(self, inputs: Any) -> Any:
        """Returns the inputs, once their sizes are checked.

        Args:
            inputs: A tensor or a structure of tensors.
        """
        checks = []
        for tensor in keras.tree.flatten(inputs):
            samples = tensor.shape[0] if tensor.shape.rank else None
            if samples is not None and samples > self.max_batch_size:
                raise ValueError(self._message(samples))
            if samples is None and tensor.shape.rank != 0:
                checks.append(self._check(tf.shape(tensor)[0]))
        with tf.control_dependencies(checks):
            return keras.tree.map_structure(tf.identity, inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        """The shapes and dtypes of the inputs.

        Raises:
            ValueError: If a batch of fixed size is too large.
        """
        for tensor in keras.tree.flatten(inputs):
            if tensor.shape and tensor.shape[0] is not None and tensor.shape[0] > self.max_batch_size:
                raise ValueError(self._message(tensor.shape[0]))
        return keras.tree.map_structure(lambda each: keras.KerasTensor(each.shape, each.dtype), inputs)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer."""
        return {**super().get_config(), "max_batch_size": self.max_batch_size}

    def _check(self, samples: tf.Tensor) -> tf.Operation | None:
        if not xla_compiles_this():
            return tf.debugging.assert_less_equal(samples, self.max_batch_size, message=self._message("more"))
        # XLA leaves assertions out. It refuses to cut more from a tensor than there is, and names the operation.
        name = f"takes_at_most_{self.max_batch_size}_samples"
        return tf.slice(tf.zeros([self.max_batch_size]), [0], [samples], name=name).op

    def _message(self, samples: int | str) -> str:
        return (
            f"The layer '{self.name}' takes batches of at most {self.max_batch_size} samples. Received: {samples}. Use "
            "a smaller `batch_size`; for training, `accumops.GradientAccumulateModel` with "
            f"micro_batch_size={self.max_batch_size} computes a larger batch in parts."
        )
