"""Trains a step again and again, and has another allocation fail each time.

Usage: allocation_failures.py LIBRARY OPTIMIZER STRIDE [SECONDS], with the library of `failing_allocations.cc`
preloaded. Prints how often a step ended with which micro-batch, and "wrong" for a step whose variables are not, to the
bit, those of a step with that micro-batch in which nothing fails. With SECONDS allocations come in random order, for so
long.
"""

import collections
import ctypes
import math
import random
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import accumops

L = keras.layers
OPTIMIZERS = {
    "adam": keras.optimizers.Adam,  # its update is one op
    "clipped": lambda: keras.optimizers.Adam(global_clipnorm=0.1),  # by norms of its sums
    "averaged": lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=1),  # several ops follow the update
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),  # and here others
    "adagrad": keras.optimizers.Adagrad,  # not fused
}


def main(path, optimizer, stride, seconds=None):
    library = ctypes.CDLL(path)
    library.fail_allocation.argtypes = [ctypes.c_long]
    library.allocations.restype = ctypes.c_long

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = L.BatchNormalization()(accumops.AccumBatchNormalization()(L.Dense(8, "relu")(inputs)))
    net = keras.Model(inputs, L.Dense(2)(L.Dropout(0.3, seed=1)(hidden)))
    model = accumops.GradientAccumulateModel(net, micro_batch_size="auto", memory_limit="64GB", check_loss=False)
    model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"], jit_compile=False)
    x = tf.random.stateless_normal([16, 6], [0, 1])
    y = x[:, :2]

    model.train_on_batch(x, y)
    every = [*model.variables, *model.optimizer.variables, *(each for m in model.metrics for each in m.variables)]
    variables = list({id(each.value): each.value for each in every}.values())
    accumulators = {id(each.value) for each in model.optimizer.accumulator.accumulators}
    start = [variable.numpy() for variable in variables]

    def step_of(size):
        """A step from the same state, not yet made."""
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        if model.micro_batch_size != size:
            model.micro_batch_size = size
            model.make_train_function(force=True)
        function = model.make_train_function()
        data = iter([(x, y)])
        return lambda: function(data)

    def result():
        return [variable.numpy() for variable in variables if id(variable) not in accumulators]

    expected = {}
    for size in (4, 8):
        step_of(size)()
        expected[size] = result()
    step = step_of(8)
    library.fail_allocation(-1)
    step()
    count = library.allocations()
    outcomes = collections.Counter()
    order = list(range(0, count, stride))
    deadline = math.inf
    if seconds is not None:
        random.Random(0).shuffle(order)
        deadline = time.monotonic() + seconds
    for n in order:
        if time.monotonic() > deadline:
            break
        step_of(8)()  # traces
        step = step_of(8)
        library.fail_allocation(n)
        try:
            step()
        finally:
            library.fail_allocation(-1)
        size = model.micro_batch_size
        right = all(np.array_equal(*each) for each in zip(result(), expected[size], strict=True))
        outcomes[f"{size} {'right' if right else 'wrong'}"] += 1
    print(count, dict(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(float, sys.argv[4:]))
