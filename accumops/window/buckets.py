"""Gradients in buckets: a few operations in place of one, so that gradients are let go as the backward pass makes them.

One operation over all gradients starts when the last of them is there, and until then all of them take memory. With
operations over buckets, a bucket's gradients are added and let go while the others are still being computed. Small
models keep one operation, which is quicker to start. So do functions that XLA compiles: it orders what it computes by
itself, and buckets gain nothing there.
"""

from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this

BUCKET_BYTES = 16 << 20
SMALL_BYTES = 64 << 20
"""Gradients that take less stay together."""


def in_buckets(
    positions: Iterable[int],
    gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
    variables: Sequence[tf.Variable | keras.Variable],
) -> list[list[int]]:
    """Groups gradients by the order in which a graph makes them, each group of about `BUCKET_BYTES`.

    Args:
        positions: The positions of those to be grouped.
        gradients: All gradients.
        variables: The variables that they are for, which have their sizes.

    Returns:
        The groups. There is one in eager execution, where all gradients are there already, under XLA, and if gradients
        take less than `SMALL_BYTES`. There is none without positions.
    """
    positions = list(positions)
    if not positions:
        return []
    sizes = {i: _bytes(gradients[i], variables[i]) for i in positions}
    if tf.executing_eagerly() or sum(sizes.values()) < SMALL_BYTES or xla_compiles_this(unknown=False):
        return [positions]
    graph = tf.compat.v1.get_default_graph()
    made = {operation.name: i for i, operation in enumerate(graph.get_operations())}
    groups: list[list[int]] = [[]]
    for i in sorted(positions, key=lambda i: _made_at(gradients[i], graph, made)):
        if sum(sizes[each] for each in groups[-1]) >= BUCKET_BYTES:
            groups.append([])
        groups[-1].append(i)
    return groups


def _bytes(gradient: tf.Tensor | tf.IndexedSlices | None, variable: tf.Variable | keras.Variable) -> int:
    """The memory of a dense gradient; rows are few."""
    if gradient is None or isinstance(gradient, tf.IndexedSlices):
        return 0
    return int(tf.TensorShape(variable.shape).num_elements() or 0) * gradient.dtype.size


def _made_at(gradient: tf.Tensor | tf.IndexedSlices | None, graph: tf.Graph, made: dict[str, int]) -> int:
    """The position of the operation that makes a gradient; before all others if it is not of the graph."""
    value = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    if value is None or getattr(value, "graph", None) is not graph:
        return -1
    return made[value.op.name]
