"""A batch in slices: runs a function on each of them, one after another, in a loop of one graph."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

Carried = Sequence[tf.Tensor]

# Sizes are counted in int32, and the end of the last slice may lie behind its batch.
_LARGEST = 1 << 30


def fold_slices(
    data: Any,
    size: int,
    run: Callable[[Any, tf.Tensor | bool, Carried], Carried],
    carried: Carried,
    *,
    static_sizes: bool,
    at_once: int = 1,
    empty: bool = False,
    uncut: Collection[tf.Tensor] = (),
) -> tuple[int | tf.Tensor, Carried]:
    """Calls `run` with slices of a batch, one after another, each with what the one before has returned.

    In a graph the body of one loop serves all slices. With `at_once` it holds that many slices, and a second loop has
    the rest. TensorFlow runs side by side what depends on no state in the slices of one body.

    Args:
        data: The batch, a structure of tensors, with None for parts that it lacks.
        size: Samples a slice; the last one is smaller where it has to be.
        run: Takes a slice, whether it is the first, and scalars that go from slice to slice; returns the scalars.
        carried: The scalars that the first slice is given.
        static_sizes: Whether the graph has to know the sizes of slices, as XLA needs it: a remainder then has a body of
            its own.
        at_once: How many slices may run side by side.
        empty: Whether a batch without samples is one slice, instead of an error.
        uncut: Tensors of the batch that are not cut: each slice gets all of them.

    Returns:
        The number of slices, and the scalars that the last one has returned.

    Raises:
        ValueError: If the batch cannot be split, has no samples, or its tensors have different numbers of samples. In
            a graph that does not know the numbers, `tf.errors.InvalidArgumentError`.
    """
    kept = {id(tensor) for tensor in uncut}
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None and id(leaf) not in kept]
    if any(isinstance(leaf, tf.SparseTensor) for leaf in leaves):
        raise ValueError(
            "A batch with a tf.SparseTensor cannot be split: use `accum_steps` instead of `micro_batch_size`."
        )
    size = min(size, _LARGEST)
    count = _count(leaves, empty)
    known = next((leaf.shape[0] for leaf in leaves if leaf.shape[0] is not None), None)
    divides = known is not None and known > 0 and known % size == 0

    def part(begin: tf.Tensor | int, end: tf.Tensor | int) -> Any:
        def cut(leaf: tf.Tensor | None) -> tf.Tensor | None:
            return leaf if leaf is None or id(leaf) in kept else leaf[begin:end]

        return keras.tree.map_structure(cut, data)

    def whole(begin: tf.Tensor) -> Any:
        """A slice of a size that the graph knows, where it can."""

        def cut(leaf: tf.Tensor | None) -> tf.Tensor | None:
            if leaf is None or id(leaf) in kept:
                return leaf
            if isinstance(leaf, tf.RaggedTensor):
                return leaf[begin : begin + size]
            rest = leaf.shape.rank - 1
            result = tf.slice(leaf, [begin] + [0] * rest, [size if divides else tf.minimum(size, count)] + [-1] * rest)
            return tf.ensure_shape(result, [size if divides else None, *leaf.shape[1:]])

        return keras.tree.map_structure(cut, data)

    if tf.executing_eagerly():
        begins = range(0, int(count), size)
        for begin in begins:
            carried = run(part(begin, begin + size), begin == 0, carried)
        return len(begins), carried

    def loop(
        begin: tf.Tensor | int,
        end: tf.Tensor | int,
        cut: Callable[[tf.Tensor], Any],
        carried: Carried,
        slices: int = 1,
    ) -> Carried:
        def body(begin: tf.Tensor, *before: tf.Tensor) -> list[tf.Tensor]:
            carried: Carried = before
            for i in range(slices):
                first = tf.equal(begin, 0) if i == 0 else False
                carried = run(cut(begin + i * size), first, carried)
            return [begin + slices * size, *carried]

        # One at a time: side by side, every micro-batch's activations would be alive, and their sums in any order.
        state = [tf.convert_to_tensor(begin), *carried]
        return tf.while_loop(lambda begin, *_: begin < end, body, state, parallel_iterations=1)[1:]

    slices = (count + size - 1) // size
    cut_one = whole if static_sizes or divides else lambda begin: part(begin, begin + size)
    done: tf.Tensor | int = 0
    if at_once > 1:
        done = count // (size * at_once) * (size * at_once)
        carried = loop(0, done, cut_one, carried, at_once)
    if divides:
        return slices, loop(done, count, whole, carried)
    if not static_sizes:
        return slices, loop(done, count, lambda begin: part(begin, tf.minimum(begin + size, count)), carried)
    full = count // size * size
    carried = loop(done, full, whole, carried)
    return slices, tf.cond(
        full < count, lambda: list(run(part(full, count), tf.equal(full, 0), carried)), lambda: list(carried)
    )


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
        tf.debugging.assert_equal(tf.cast(tf.shape(leaf)[0], count.dtype), count, message=different)
        for leaf in leaves[1:]
        if leaf.shape[0] is None or leaves[0].shape[0] is None
    ]
    if not empty:
        message = "A batch without samples makes no update."
        if leaves[0].shape[0] == 0:
            raise ValueError(message)
        checks.append(tf.debugging.assert_positive(count, message=message))
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.maximum(count, 1) if empty else tf.identity(count)
