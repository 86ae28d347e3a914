"""What a step makes a GPU do, as TensorFlow would place its operations. No GPU is needed; two logical CPUs are."""

import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"))

# The most launches beside plain Keras's forward and backward pass, and scalars that go to the GPU.
BUDGET = {
    "accum_steps, micro-batch": (22, 2),
    "accum_steps, ends the window": (28, 2),
    "micro_batch_size": (35, 3),
    "micro_batch_size, clipped": (51, 3),
    "micro_batch_size, losses scaled": (65, 3),
    "accum_steps, non-finite: skip, micro-batch": (48, 2),
    "accum_steps, non-finite: skip, ends the window": (63, 2),
    "accum_steps, non-finite: drop, micro-batch": (37, 2),
    "accum_steps, non-finite: drop, ends the window": (56, 2),
    "a loop of one's own": (14, 4),
    "accum_steps, norms of variables, micro-batch": (22, 2),
    "accum_steps, norms of variables, ends the window": (36, 2),
    "micro_batch_size, norms of variables": (42, 3),
    "a loop of one's own, norms of variables": (20, 4),
    "accum_steps, noise scale, micro-batch": (24, 2),
    "accum_steps, noise scale, ends the window": (33, 2),
    "micro_batch_size, noise scale": (38, 3),
    "accum_steps, several steps": (31, 2),
    "micro_batch_size, several steps": (36, 3),
}


@pytest.fixture(scope="module")
def steps(logical_devices):
    import count_launches
    import placement
    import tensorflow as tf

    import accumops
    from accumops import ops

    if not ops.build_info()["cuda"]:
        pytest.skip("the kernels for a GPU, which say where their arguments are, are not built")

    def model():
        layers = [keras.layers.Dense(4), accumops.AccumBatchNormalization(), keras.layers.Dense(3)]
        return keras.Sequential([keras.Input((5,)), *layers])

    with tf.device(placement.GPU):
        return {name: placement.placed(function) for name, function in count_launches.steps(model)}


@pytest.mark.parametrize("step", BUDGET)
def test_nothing_waits_for_the_gpu(steps, step):
    assert steps[step].waits == []


@pytest.mark.parametrize("step", BUDGET)
def test_few_launches_and_copies(steps, step):
    launches, uploads = BUDGET[step]
    beside = steps[step].launches - steps["forward and backward"].launches
    assert beside.total() <= launches, beside
    assert len(steps[step].uploads) <= uploads, steps[step].uploads
