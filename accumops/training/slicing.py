"""A batch in slices: runs a function on each of them, one after another, in a loop of one graph."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import tensorflow as tf

from accumops.memory.slices import Slices

Carried = Sequence[tf.Tensor]


def fold_slices(
    data: Any,
    size: int,
    run: Callable[[Any, tf.Tensor | bool, tf.Tensor | bool, Carried], Carried],
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
        run: Takes a slice, whether it is the first, whether it is the last, and scalars that go from slice to slice;
            returns the scalars.
        carried: The scalars that the first slice is given.
        static_sizes: Whether the graph has to know the sizes of slices, as XLA needs it: a remainder then has a body of
            its own.
        at_once: How many slices may run side by side.
        empty: Whether a batch without samples is one slice, instead of an error.
        uncut: Tensors of the batch that are not cut: each slice gets all of them.

    Returns:
        The number of slices, and the scalars that the last one has returned.

    Raises:
        ValueError: As `Slices`.
    """
    slices = Slices(data, size, empty=empty, uncut=uncut)
    size, count, part, whole, divides = slices.size, slices.count, slices.part, slices.whole, slices.divides
    if tf.executing_eagerly():
        begins = range(0, int(count), size)
        for begin in begins:
            carried = run(part(begin, begin + size), begin == 0, begin == begins[-1], carried)
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
                last = begin + (i + 1) * size >= count
                carried = run(cut(begin + i * size), first, last, carried)
            return [begin + slices * size, *carried]

        # One at a time: side by side, every micro-batch's activations would be alive, and their sums in any order.
        state = [tf.convert_to_tensor(begin), *carried]
        return tf.while_loop(lambda begin, *_: begin < end, body, state, parallel_iterations=1)[1:]

    number = (count + size - 1) // size
    cut_one = whole if static_sizes or divides else lambda begin: part(begin, begin + size)
    done: tf.Tensor | int = 0
    if at_once > 1:
        done = count // (size * at_once) * (size * at_once)
        carried = loop(0, done, cut_one, carried, at_once)
    if divides:
        return number, loop(done, count, whole, carried)
    if not static_sizes:
        return number, loop(done, count, lambda begin: part(begin, tf.minimum(begin + size, count)), carried)
    full = count // size * size
    carried = loop(done, full, whole, carried)
    return number, tf.cond(
        full < count, lambda: list(run(part(full, count), tf.equal(full, 0), True, carried)), lambda: list(carried)
    )
