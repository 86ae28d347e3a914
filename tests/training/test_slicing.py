"""Slices of a batch, run one after another."""

import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

from accumops.training.slicing import fold_slices

SIZE = 4


def expected(x):
    """The result of `summed`: how many slices there are, the sum of their means, weighted by order, and one first.

    And the mean of the last one.
    """
    parts = [x[i : i + SIZE] for i in range(0, len(x), SIZE)]
    total = 0.0
    for part in parts:
        total = total / 2 + part.mean()
    return len(parts), total, 1.0, parts[-1].mean()


def summed(x, known, **options):
    """A function of the order of the slices, of the values in each and of which slices are the first and the last."""

    def run(data, first, last, carried):
        total, firsts, lasts = carried
        part, nothing = data["x"]
        assert nothing is None
        mean = tf.reduce_mean(part)
        return [total / 2 + mean, firsts + tf.cast(first, tf.float32), lasts + mean * tf.cast(last, tf.float32)]

    def whole(x):
        slices, carried = fold_slices({"x": (x, None)}, SIZE, run, [tf.constant(0.0)] * 3, **options)
        return tf.convert_to_tensor(slices), *carried

    signature = [tf.TensorSpec([len(x) if known else None, 3])]
    return whole, signature


SAMPLES = [1, 3, 4, 5, 8, 11, 12, 24, 27]


def by_default(way, at_once, size, samples):
    """Eagerly every size is known; XLA compiles each number of samples once, with the other arguments in turn."""
    if way == "xla":
        return SAMPLES.index(samples) % 4 == 2 * (at_once - 1) + (size == "known")
    return way == "graph" or size == "known"


@pytest.mark.parametrize(
    ("way", "at_once", "size", "samples"),
    cross(["eager", "graph", "xla"], [1, 2], ["known", "unknown"], SAMPLES, default=by_default),
)
@pytest.mark.some_by_default(8)
def test_each_slice_once_in_order(rng, samples, size, at_once, way):
    x = rng.standard_normal((samples, 3)).astype("float32")
    function, signature = summed(x, size == "known", static_sizes=way == "xla", at_once=at_once)
    if way != "eager":
        function = tf.function(function, input_signature=signature, jit_compile=way == "xla", autograph=False)
    np.testing.assert_allclose([each.numpy() for each in function(tf.constant(x))], expected(x), rtol=1e-5)


def test_sizes_are_known_to_the_graph_where_slices_are_of_one_size():
    """Layers then need no operations to find out about shapes."""
    seen = []

    def run(part, first, last, carried):
        seen.append(part.shape[0])
        return carried

    def whole(x):
        return fold_slices(x, SIZE, run, [tf.constant(0.0)], static_sizes=False)[1]

    for rows in (12, 13, None):
        tf.function(whole, autograph=False).get_concrete_function(tf.TensorSpec([rows, 3]))
    assert seen == [SIZE, None, None]


def test_a_batch_without_samples():
    def run(part, first, last, carried):
        return [carried[0] + tf.cast(tf.shape(part)[0] + 1, tf.float32)]

    def whole(x, empty):
        return fold_slices(x, SIZE, run, [tf.constant(0.0)], static_sizes=False, empty=empty)

    nothing = tf.zeros([0, 3])
    with pytest.raises(ValueError, match="without samples"):
        whole(nothing, False)
    function = tf.function(lambda x: whole(x, False), input_signature=[tf.TensorSpec([None, 3])])
    with pytest.raises(tf.errors.InvalidArgumentError, match="without samples"):
        function(nothing)
    function = tf.function(lambda x: whole(x, True), input_signature=[tf.TensorSpec([None, 3])])
    slices, (total,) = function(nothing)
    assert (int(slices), float(total)) == (1, 1.0)


def test_no_samples_where_the_graph_knows():
    """A replica may get no samples: it then runs one slice without any."""

    def run(part, first, last, carried):
        return [carried[0] + tf.cast(tf.shape(part)[0] + 1, tf.float32)]

    def whole(x):
        return fold_slices(x, SIZE, run, [tf.constant(0.0)], static_sizes=False, empty=True)[1][0]

    assert float(tf.function(whole, input_signature=[tf.TensorSpec([0, 3])])(tf.zeros([0, 3]))) == 1.0


@pytest.mark.parametrize("rows", [8, 10])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.some_by_default(4)
def test_ragged_tensors(rows, known, at_once):
    x = tf.RaggedTensor.from_row_lengths(tf.range(2.0 * rows), [1, 3] * (rows // 2))
    y = tf.range(rows, dtype=tf.float32)

    def run(part, first, last, carried):
        x, y = part
        return [carried[0] / 2 + tf.reduce_sum(x) * tf.reduce_sum(y)]

    def whole(x, y):
        return fold_slices((x, y), SIZE, run, [tf.constant(0.0)], static_sizes=False, at_once=at_once)[1][0]

    size = rows if known else None
    signature = [tf.RaggedTensorSpec([size, None], tf.float32), tf.TensorSpec([size])]
    expected = 0.0
    for i in range(0, rows, SIZE):
        expected = expected / 2 + float(tf.reduce_sum(x[i : i + SIZE]) * tf.reduce_sum(y[i : i + SIZE]))
    np.testing.assert_allclose(tf.function(whole, input_signature=signature)(x, y), expected, rtol=1e-6)


def test_what_cannot_be_split():
    sparse = tf.sparse.from_dense(tf.eye(4))
    with pytest.raises(ValueError, match="use `accum_steps`"):
        fold_slices(sparse, SIZE, lambda *arguments: [], [], static_sizes=False)
