"""The batch that a train function is about to get, looked at before it gets it."""

import itertools
from typing import Any

import keras
import tensorflow as tf


def peek(iterator: Any, steps: int) -> tuple[Any, Any]:
    """Takes the next batch from an iterator, and makes an iterator that still has it.

    A `tf.data` iterator cannot take a batch back. The new one has the batches of one call of a train function, and the
    old one has those that come after. Both have the same element spec, so that they share a traced function.

    Args:
        iterator: An iterator of `tf.data`, or of Python.
        steps: How many batches a train function takes in one call.

    Returns:
        The batch, with None for parts that it lacks; None if the iterator has no more batches, or distributes them over
        replicas. And the iterator for the train function.
    """
    if isinstance(iterator, tf.distribute.DistributedIterator):
        return None, iterator
    try:
        batch = next(iterator)
    except StopIteration:
        return None, iterator
    if not isinstance(iterator, tf.data.Iterator):
        return plain(batch), itertools.chain([batch], iterator)
    if steps == 1:
        dataset = tf.data.Dataset.from_tensors(batch)
    else:
        # The others are read when they are needed, so that they are not in memory together.
        dataset = tf.data.Dataset.from_generator(
            lambda: itertools.chain([batch], itertools.islice(iterator, steps - 1)),
            output_signature=iterator.element_spec,
        )
    resources = tf.nest.flatten(iter(dataset), expand_composites=True)
    return plain(batch), tf.nest.pack_sequence_as(iterator, resources, expand_composites=True)


def plain(batch: Any) -> Any:
    """Returns a batch as a step gets it: with None for parts that it lacks, and tensors for arrays."""

    def plain_leaf(leaf: Any) -> Any:
        if isinstance(leaf, tf.experimental.Optional):
            return None
        return tf.convert_to_tensor(leaf) if hasattr(leaf, "__array__") else leaf

    return keras.tree.map_structure(plain_leaf, batch)


def samples_of(batch: Any) -> int:
    """The samples of a batch that `plain` has returned, by the first of its targets: an input may be no batch."""
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    leaves = [leaf for leaf in (*keras.tree.flatten(y), *keras.tree.flatten(x)) if leaf is not None]
    return int(leaves[0].shape[0])
