"""What test_buckets.py has measured in another process, where TensorFlow's allocator counts."""

from unittest import mock

import keras
import numpy as np

import accumops
from accumops.memory.device_memory import AllocatorMemory
from accumops.window import buckets

L = keras.layers


def peak(how, bucket_bytes=buckets.BUCKET_BYTES, small_bytes=buckets.SMALL_BYTES):
    """The MiB that steps of a wide model add.

    Args:
        how: `"accum_steps"` or `"micro_batch_size"`.
        bucket_bytes: The gradients of a bucket.
        small_bytes: The gradients that are no buckets' worth.
    """
    with mock.patch.multiple(buckets, BUCKET_BYTES=bucket_bytes, SMALL_BYTES=small_bytes):
        keras.utils.set_random_seed(0)
        net = keras.Sequential([keras.Input((1024,)), *(L.Dense(1024, "relu") for _ in range(12))])
        arguments = {"accum_steps": 2} if how == "accum_steps" else {"micro_batch_size": 1}
        model = accumops.GradientAccumulateModel(net, **arguments)
        model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=False)
        x = np.ones((8, 1024), "float32")
        batch = 1 if how == "accum_steps" else 4
        model.fit(x, x, batch_size=batch, verbose=0)
        memory = AllocatorMemory("CPU:0")
        before = memory.now()
        memory.forget_peak()
        model.fit(x, x, batch_size=batch, verbose=0)
        return (memory.peak() - before) / 2**20
