"""Functions of the rows of a matrix that is never whole: a tile of rows at a time, forward and backward."""

from collections.abc import Callable

import tensorflow as tf


def over_row_tiles(
    function: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor], rows: tf.Tensor, shared: tf.Tensor, tile: int
) -> tf.Tensor:
    """Computes a value for each row in tiles, and each tile again for its gradient.

    What `function` needs in between exists for one tile at a time: memory is that of `tile` rows.

    Args:
        function: Takes some rows, their positions, and `shared`; returns a value for each of the rows. It must depend
            on nothing else that has a gradient, and give the same each time.
        rows: What is tiled, of shape (n, ...).
        shared: What each tile gets whole.
        tile: Rows a tile.

    Returns:
        The values, of shape (n,).
    """

    # XLA knows this number when it compiles, and compiles the loops even if there are fewer rows than a tile has.
    size = tf.maximum(tf.minimum(tile, tf.shape(rows)[0]), 1)

    @tf.custom_gradient
    def values_of(rows: tf.Tensor, shared: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            def tile_gradient(begin: tf.Tensor, end: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
                part, positions = _part(rows, begin, end, size), _positions(rows, begin, end, size)
                with tf.GradientTape() as tape:
                    tape.watch([part, shared])
                    values = function(part, positions, shared)
                return tape.gradient(
                    values,
                    [part, shared],
                    output_gradients=_part(upstream, begin, end, size),
                    unconnected_gradients="zero",
                )

            def body(i: tf.Tensor, of_shared: tf.Tensor, of_rows: tf.TensorArray) -> tuple:
                of_part, more = tile_gradient(i * size, None)
                return i + 1, of_shared + more, of_rows.write(i, of_part)

            count = tf.shape(rows)[0] // size
            array = tf.TensorArray(rows.dtype, count, element_shape=[None, *rows.shape[1:]])
            first = (0, tf.zeros_like(shared), array)
            _, of_shared, array = tf.while_loop(lambda i, *_: i < count, body, first, parallel_iterations=1)
            rest, more = tile_gradient(count * size, tf.shape(rows)[0])
            shape = tf.concat([[count * size], tf.shape(rows)[1:]], 0)
            # If the graph does not know the shape of a row, an array without tiles has none.
            whole = tf.cond(count > 0, lambda: tf.reshape(array.stack(), shape), lambda: rows[:0])
            return tf.concat([whole, rest], 0), of_shared + more

        def body(i: tf.Tensor, values: tf.TensorArray) -> tuple:
            part, positions = _part(rows, i * size, None, size), _positions(rows, i * size, None, size)
            return i + 1, values.write(i, function(part, positions, shared))

        count = tf.shape(rows)[0] // size
        array = tf.TensorArray(rows.dtype, count, element_shape=[None])
        _, array = tf.while_loop(lambda i, *_: i < count, body, (0, array), parallel_iterations=1)
        begin, end = count * size, tf.shape(rows)[0]
        rest = function(_part(rows, begin, end, size), _positions(rows, begin, end, size), shared)
        whole = tf.cond(count > 0, lambda: tf.reshape(array.stack(), [-1]), lambda: rest[:0])
        return tf.concat([whole, rest], 0), gradient

    return values_of(rows, shared)


def _part(tensor: tf.Tensor, begin: tf.Tensor, end: tf.Tensor | None, size: tf.Tensor) -> tf.Tensor:
    """The rows from one position to another, or as many as a tile has."""
    if end is not None:
        return tensor[begin:end]
    rest = tensor.shape.rank - 1
    return tf.slice(tensor, [begin] + [0] * rest, [size] + [-1] * rest)


def _positions(rows: tf.Tensor, begin: tf.Tensor, end: tf.Tensor | None, size: tf.Tensor) -> tf.Tensor:
    return begin + tf.range(size if end is None else end - begin)
