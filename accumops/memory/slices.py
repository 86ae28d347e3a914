"""A batch that is cut into slices."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

# Sizes are counted in int32, and the end of the last slice may lie behind its batch.
_LARGEST = 1 << 30


def whole_tensors(data: Any, keys: Collection[str | int]) -> list[tf.Tensor]:
    """The inputs of a batch that each of its slices gets whole.

    Args:
        data: The batch, as `fit` gives it.
        keys: Keys of the inputs if they are a dict, else positions.

    Raises:
        ValueError: If there is no such input.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    tensors: list[tf.Tensor] = []
    for key in keys:
        try:
            tensors.extend(keras.tree.flatten(x[key]))
        except (KeyError, IndexError, TypeError) as error:
            names = list(x) if isinstance(x, dict) else f"positions 0 to {len(keras.tree.flatten(x)) - 1}"
            raise ValueError(f"`whole_inputs` has {key!r}, and the model's inputs are {names}.") from error
    return tensors


class Slices:
    """A batch that is cut into slices of a number of samples, of which the last one may be smaller.

    Args:
        data: The batch, a structure of tensors, with None for parts that it lacks.
        size: Samples a slice.
        empty: Whether a batch without samples is one slice, instead of an error.
        uncut: Tensors of the batch that are not cut: each slice gets all of them.

    Raises:
        ValueError: If the batch cannot be split, has no samples, or its tensors have different numbers of samples. In
            a graph that does not know the numbers, `tf.errors.InvalidArgumentError`.
    """

    def __init__(self, data: Any, size: int, *, empty: bool = False, uncut: Collection[tf.Tensor] = ()) -> None:
        self._data = data
        self._uncut = {id(tensor) for tensor in uncut}
        leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None and id(leaf) not in self._uncut]
        if any(isinstance(leaf, tf.SparseTensor) for leaf in leaves):
            raise ValueError(
                "A batch with a tf.SparseTensor cannot be split: use `accum_steps` instead of `micro_batch_size`."
            )
        self.size = min(size, _LARGEST)
        self.count = _count(leaves, empty)
        """The number of samples, a scalar."""
        self.known = next((leaf.shape[0] for leaf in leaves if leaf.shape[0] is not None), None)
        """The number of samples, if the graph knows it."""
        self.divides = self.known is not None and self.known > 0 and self.known % self.size == 0
        """Whether the graph knows that all slices have the same size."""

    def part(self, begin: tf.Tensor | int, end: tf.Tensor | int) -> Any:
        """The samples from one position to another."""
        return self._map(lambda leaf: leaf[begin:end])

    def whole(self, begin: tf.Tensor | int) -> Any:
        """The slice that begins at a position, of a size that the graph knows, where it can."""
        return self._map(lambda leaf: self._cut(leaf, begin, self.divides))

    def full(self, begin: tf.Tensor | int, *, pads: bool = False) -> Any:
        """The slice that begins at a position where another slice follows, so that it has its full size.

        Args:
            begin: The position.
            pads: Whether there may be no such slice, and the batch is then filled up with zeros.
        """
        more = self.size - self.count
        return self._map(lambda leaf: self._cut(padded(leaf, more) if pads else leaf, begin, True))

    def _cut(self, leaf: tf.Tensor, begin: tf.Tensor | int, is_full: bool) -> tf.Tensor:
        if isinstance(leaf, tf.RaggedTensor):
            return leaf[begin : begin + self.size]
        rest = len(leaf.shape) - 1
        size = self.size if is_full else tf.minimum(self.size, self.count)
        result = tf.slice(leaf, [begin] + [0] * rest, [size] + [-1] * rest)
        return tf.ensure_shape(result, [self.size if is_full else None, *leaf.shape[1:]])

    def _map(self, cut: Callable[[tf.Tensor], tf.Tensor]) -> Any:
        return keras.tree.map_structure(
            lambda leaf: leaf if leaf is None or id(leaf) in self._uncut else cut(leaf), self._data
        )


def padded(rows: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Returns rows with a number of rows of zeros behind them, or as they are if the number is negative."""
    return tf.pad(rows, [[0, tf.maximum(number, 0)], *([[0, 0]] * (len(rows.shape) - 1))])


def _count(leaves: Sequence[tf.Tensor], empty: bool) -> tf.Tensor:
    """The number of samples, which all tensors of a batch must have."""
    sizes = sorted({leaf.shape[0] for leaf in leaves if leaf.shape[0] is not None})
    different = (
        "All inputs, targets and sample weights of a batch must have the same number of samples to be split with "
        "`micro_batch_size`. Name inputs that are no batch in `whole_inputs`."
    )
    if len(sizes) > 1:
        raise ValueError(f"{different} Received: {sizes} samples.")
    count = tf.shape(leaves[0])[0]
    checks = [
        _check(tf.equal(tf.cast(tf.shape(leaf)[0], count.dtype), count), different)
        for leaf in leaves[1:]
        if leaf.shape[0] is None or leaves[0].shape[0] is None
    ]
    if not empty:
        message = "A batch without samples makes no update."
        if leaves[0].shape[0] == 0:
            raise ValueError(message)
        if leaves[0].shape[0] is None:
            checks.append(_check(tf.greater(count, 0), message))
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.maximum(count, 1) if empty else tf.identity(count)


def _check(condition: tf.Tensor, message: str) -> tf.Operation | None:
    """An assertion on sizes. `tf.debugging.assert_equal` would reduce the condition on a GPU, and wait for it."""
    return tf.raw_ops.Assert(condition=condition, data=[message])
