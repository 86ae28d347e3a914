"""The micro-batches of a window, one after another, and tensors that are kept for each of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from accumops.memory.slices import Slices, padded

Index: TypeAlias = "tf.Tensor | None"
"""The number of a micro-batch in the loop, or None for one that is run behind it."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Tensors of each micro-batch."""

    arrays: list[tf.TensorArray]
    shapes: list[tf.TensorShape]
    """What is known of the shape of each tensor."""
    lets_go: bool
    """Whether an array can let go of the tensors of a micro-batch. XLA has one block of memory for all of them."""
    last: list[tf.Tensor] = dataclasses.field(default_factory=list)
    """Those of the micro-batch that is run behind the loop."""

    def read(self, i: Index) -> list[tf.Tensor]:
        """Returns the tensors of a micro-batch."""
        if i is None:
            return self.last
        return [tf.ensure_shape(array.read(i), shape) for array, shape in zip(self.arrays, self.shapes, strict=True)]

    def written(self, i: Index, tensors: Sequence[tf.Tensor]) -> "Kept":
        """Returns this with the tensors of a micro-batch."""
        if i is None:
            return dataclasses.replace(self, last=list(tensors))
        return self.of([array.write(i, each) for array, each in zip(self.arrays, tensors, strict=True)])

    def without(self, i: Index) -> "Kept":
        """Returns this without the tensors of a micro-batch, whose memory is let go; they are not read again."""
        if i is None or not self.lets_go:
            return self
        return self.written(
            i, [tf.zeros([0] * shape.rank, each.dtype) for each, shape in zip(self.arrays, self.shapes, strict=True)]
        )

    def of(self, arrays: Sequence[tf.TensorArray]) -> "Kept":
        """Returns this with other arrays, as a loop has left them."""
        return dataclasses.replace(self, arrays=list(arrays))


Carried = dict[str, list[tf.Tensor]]
Body = Callable[[Index, Any, dict[str, Kept], Carried], None]


class MicroBatches:
    """The micro-batches of a window.

    Args:
        slices: The window's data.
        static_sizes: Whether the graph has to know the sizes of slices, as XLA needs it: the last micro-batch, which
            may be smaller, is then run behind the loop.
    """

    def __init__(self, slices: Slices, static_sizes: bool) -> None:
        self.slices = slices
        self.number = (slices.count + slices.size - 1) // slices.size
        self._static_sizes = static_sizes
        self._apart = static_sizes and not slices.divides
        self._in_loop = (slices.count - 1) // slices.size if self._apart else self.number
        self._left: list[tf.Tensor] = []

    def left(self) -> tf.Tensor:
        """How many micro-batches the loops so far have left out: 0, known when all of them have ended.

        TensorFlow may let what waits for a loop start too early, if nothing uses what the loop returns. So whatever has
        to wait for loops, such as the update behind them, has to use this.
        """
        return tf.add_n(self._left) if self._left else tf.zeros_like(self._in_loop)

    def room_for(self, specs: Sequence[tf.TensorSpec], *, rows: bool = True) -> Kept:
        """Returns room for tensors of each micro-batch.

        Args:
            specs: What they are like, in a micro-batch of the full size.
            rows: Whether their first dimension may depend on the number of samples.
        """
        fixed = self._apart or self.slices.divides or not rows
        shapes = [
            spec.shape if fixed or spec.shape.rank == 0 else tf.TensorShape([None, *spec.shape[1:]]) for spec in specs
        ]
        lets_go = rows and not self._static_sizes
        arrays = [
            tf.TensorArray(
                spec.dtype,
                tf.maximum(self._in_loop, 1) if self._static_sizes else self._in_loop,
                element_shape=tf.TensorShape([None] * shape.rank) if lets_go else shape,
                infer_shape=False,
                clear_after_read=False,
            )
            for spec, shape in zip(specs, shapes, strict=True)
        ]
        return Kept(arrays, shapes, lets_go)

    def example(self) -> Any:
        """A micro-batch."""
        return self._cut(tf.zeros_like(self._in_loop)) if not self._apart else self.slices.full(0, pads=True)

    def each(self, body: Body, kept: dict[str, Kept], carried: Carried) -> tuple[dict[str, Kept], Carried]:
        """Runs a body for each micro-batch, one after another.

        Args:
            body: Takes the index of a micro-batch, its data, what is kept, and tensors that go from one micro-batch to
                the next. It puts what it has written and its own tensors in place of what it was given.
            kept: What the body writes to.
            carried: The tensors that the first micro-batch is given.

        Returns:
            Both, as the last micro-batch has left them.
        """

        def step(i: tf.Tensor, arrays: dict[str, list[tf.TensorArray]], carried: Carried) -> Any:
            written = {name: kept[name].of(each) for name, each in arrays.items()}
            carried = dict(carried)
            body(i, self._cut(i), written, carried)
            return i + 1, {name: each.arrays for name, each in written.items()}, carried

        first = (tf.zeros_like(self._in_loop), {name: each.arrays for name, each in kept.items()}, carried)
        end, arrays, carried = tf.while_loop(lambda i, *_: i < self._in_loop, step, first, parallel_iterations=1)
        self._left.append(self._in_loop - end)
        written = {name: kept[name].of(each) for name, each in arrays.items()}
        carried = dict(carried)
        if self._apart:
            count, size = self.slices.count, self.slices.size
            body(None, self.slices.part(self._in_loop * size, count), written, carried)
        return written, carried

    def samples(self, i: Index) -> tf.Tensor:
        """The number of samples of a micro-batch."""
        size, count = self.slices.size, self.slices.count
        return count - self._in_loop * size if i is None else tf.minimum(size, count - i * size)

    def all_rows(self, kept: Kept, number: int) -> tf.Tensor:
        """Returns one of the kept tensors, with the rows of all micro-batches."""
        array, shape = kept.arrays[number], kept.shapes[number]
        if kept.lets_go:
            rows = array.concat()
        else:
            stacked = array.stack()[: self._in_loop]
            rows = tf.reshape(stacked, tf.concat([[self._in_loop * self.slices.size], tf.shape(stacked)[2:]], 0))
        if self._apart:
            rows = tf.concat([rows, kept.last[number]], 0)
        return tf.ensure_shape(rows, [None, *shape[1:]])

    def rows_of(self, whole: tf.Tensor, i: Index) -> tf.Tensor:
        """Returns the rows of a micro-batch, of a tensor that has those of all."""
        size, rest = self.slices.size, whole.shape.rank - 1
        if i is None:
            return whole[self._in_loop * size :]
        if self._apart:
            whole = padded(whole, size - self.slices.count)
        if self._apart or self.slices.divides:
            return tf.slice(whole, [i * size] + [0] * rest, [size] + [-1] * rest)
        return whole[i * size : tf.minimum((i + 1) * size, self.slices.count)]

    def is_first(self, i: Index) -> tf.Tensor:
        """Whether a micro-batch is the first one."""
        return tf.equal(self._in_loop if i is None else i, 0)

    def _cut(self, i: tf.Tensor) -> Any:
        size = self.slices.size
        # XLA compiles the loop even if no micro-batch is in it, and needs what the loop cuts and reads to be there.
        if self._apart or self.slices.divides:
            return self.slices.full(i * size, pads=self._apart)
        return self.slices.part(i * size, tf.minimum((i + 1) * size, self.slices.count))
