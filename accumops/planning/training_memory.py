"""The memory that training takes besides micro-batches, and the most that there is."""

import math
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import memory_limit_of_device
from accumops.memory.device_memory import DeviceMemory, ResidentMemory
from accumops.optimizer.optimizer import GradientAccumulateOptimizer

_BATCHES_ON_HOST = 3
"""The batches that `fit` has in memory on a CPU: the one that trains, and those that its dataset has made ready."""
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def default_limit(device: str) -> int:
    """The most bytes that training may take if nobody says: what the device has, or what this process can have.

    Args:
        device: `"CPU:0"` or the name of a GPU.
    """
    if device != "CPU:0":
        return memory_limit_of_device(device)
    entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = [1024 * int(entries["MemAvailable"].split()[0])]
    for most, current in _CGROUPS:
        if most.exists() and most.read_text().strip().isdecimal():
            free.append(int(most.read_text()) - int(current.read_text()))
    return max(0, min(free)) + ResidentMemory().now()


def missing_variables(model: keras.Model) -> int:
    """The bytes of the accumulators and of the optimizer's variables that training has still to make.

    Args:
        model: The model, compiled.
    """
    optimizer: Any = model.optimizer
    accumulates = isinstance(optimizer, GradientAccumulateOptimizer)
    accumulators = 0
    if not accumulates or not optimizer.accumulator.built:
        wide = [max(4, tf.as_dtype(each.dtype).size) for each in model.trainable_variables]
        shapes = [each.shape for each in model.trainable_variables]
        accumulators = sum(size * math.prod(shape) for size, shape in zip(wide, shapes, strict=True))
    inner = optimizer.inner_optimizer if accumulates else optimizer
    return accumulators + (0 if inner.built else _bytes_of_slots(inner, model.trainable_variables))


def _bytes_of_slots(optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]) -> int:
    """The bytes of an optimizer's variables once it is built: those of a copy in a graph that is never run."""
    config = keras.optimizers.serialize(optimizer)
    with tf.Graph().as_default():
        copy = keras.optimizers.deserialize(config)
        like = [keras.Variable(keras.initializers.Zeros(), shape=each.shape, dtype=each.dtype) for each in variables]
        before = bytes_of(copy.variables)
        copy.build(like)
        return bytes_of(copy.variables) - before


def bytes_of(variables: list[keras.Variable]) -> int:
    """The bytes of variables."""
    return sum(math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in variables)


def fixed_memory(model: keras.Model, memory: DeviceMemory, batch: int, device: str) -> int:
    """The bytes that training takes besides what a micro-batch adds: what is there now, and what is still to be made.

    Args:
        model: The model, compiled.
        memory: Counts the memory.
        batch: The bytes of a batch of `fit`.
        device: The device that trains.
    """
    copies = _BATCHES_ON_HOST if device == "CPU:0" else 1
    return memory.now() + missing_variables(model) + copies * batch
