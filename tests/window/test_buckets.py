"""Gradients in buckets: the same sums in several operations, so that gradients are let go as they come."""

import bucket_peaks
import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops.adapters.tensorflow import operations_within
from accumops.window import buckets

L = keras.layers


@pytest.fixture
def small(monkeypatch):
    """Buckets that small models fill."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 << 10)
    monkeypatch.setattr(buckets, "SMALL_BYTES", 8 << 10)


def network(layers=2, width=32):
    keras.utils.set_random_seed(0)
    inputs = hidden = keras.Input((4,))
    hidden = L.Embedding(50, width)(L.Lambda(lambda x: keras.ops.cast(keras.ops.abs(x), "int32"))(hidden))
    hidden = L.Flatten()(hidden)
    for _ in range(layers):
        hidden = L.Dense(width, "tanh")(hidden)
    return keras.Model(inputs, L.Dense(1)(hidden))


def trained(how, nonfinite="propagate", jit_compile=False):
    model = accumops.GradientAccumulateModel(network(), nonfinite=nonfinite, **how)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32") * 10
    batch = 8 if "micro_batch_size" in how else 4
    model.fit(x, x.sum(axis=1), batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return model, [np.asarray(variable) for variable in model.variables]


WAYS = {"accum_steps": {"accum_steps": 2}, "micro_batch_size": {"micro_batch_size": 3}}
DEFAULT = [("accum_steps", "propagate", "fused"), ("micro_batch_size", "skip", "reference")]


@pytest.mark.parametrize(
    ("how", "nonfinite", "backend"),
    cross(WAYS, ["propagate", "skip", "drop"], ["fused", "reference"], default=lambda *case: case in DEFAULT),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
def test_the_same_bits_as_in_one_operation(how, nonfinite, monkeypatch, backend):
    how = WAYS[how]
    _, want = trained(how, nonfinite)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 << 10)
    monkeypatch.setattr(buckets, "SMALL_BYTES", 8 << 10)
    _, got = trained(how, nonfinite)
    for mine, its in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, its)


def operations(accumulator, variables, jit_compile=None):
    @tf.function(jit_compile=jit_compile)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(variable**2) for variable in variables])
        accumulator.accumulate(tape.gradient(loss, variables))

    graph = step.get_concrete_function().graph
    return [each for each in operations_within(graph) if each.type.startswith("AccumOps>Accumulate")]


@pytest.mark.usefixtures("small")
def test_how_many_operations():
    variables = [tf.Variable(tf.ones([32, 32])) for _ in range(6)]
    accumulator = accumops.GradientAccumulator(2)
    accumulator.build(variables)
    assert len(operations(accumulator, variables)) == 6  # each fills a bucket
    assert len(operations(accumulator, variables, jit_compile=True)) == 1
    few = accumops.GradientAccumulator(2)
    few.build(variables[:1])
    assert len(operations(few, variables[:1])) == 1


@pytest.mark.usefixtures("small")
def test_groups_in_the_order_of_the_graph(monkeypatch):
    monkeypatch.setattr(buckets, "SMALL_BYTES", 4 << 10)
    variables = [tf.Variable(tf.ones([32, 16])) for _ in range(5)]

    @tf.function
    def group():
        gradients = [None] * 5
        for i in (3, 1, 4, 0):
            gradients[i] = variables[i] * 2.0
        gradients[4] = tf.IndexedSlices(tf.ones([1, 16]), [0], [32, 16])
        group.found = buckets.in_buckets(range(5), gradients, variables)
        group.eager = buckets.in_buckets([], gradients, variables)

    group()
    # Two dense gradients fill a bucket. What is no dense gradient takes nothing.
    assert group.found == [[2, 3, 1], [0, 4]]
    assert group.eager == []
    assert buckets.in_buckets(range(2), [tf.ones([32, 16])] * 2, variables) == [[0, 1]]


@pytest.fixture(scope="module")
def process():
    """A process in which TensorFlow's allocator counts."""
    with processes.that_counts() as process:
        yield process


@pytest.mark.parametrize("how", [pytest.param("accum_steps", marks=pytest.mark.exhaustive), "micro_batch_size"])
@pytest.mark.exhaustive
def test_the_peak_of_a_wide_model_is_a_bucket_and_not_all_gradients(how, process):
    together = process.call(bucket_peaks.peak, how=how)
    in_buckets = process.call(bucket_peaks.peak, how=how, bucket_bytes=4 << 20, small_bytes=8 << 20)
    assert together > 44  # 12 layers of 4 MiB
    assert in_buckets < together / 1.3
