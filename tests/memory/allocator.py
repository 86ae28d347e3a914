"""What test_profile.py has measured in another process, where TensorFlow's allocator counts."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import accumops
from accumops.memory.device_memory import AllocatorMemory
from accumops.memory.segments import segments_of

L = keras.layers
BATCH = 64


def wide(blocks=6):
    """Tensors that are large enough for the allocator to count them."""
    keras.utils.set_random_seed(0)
    inputs = hidden = keras.Input((16, 16, 16))
    for _ in range(blocks):
        skip = hidden
        hidden = L.Dropout(0.1)(L.ReLU()(L.BatchNormalization()(L.Conv2D(16, 3, padding="same")(hidden))))
        hidden = L.Add()([hidden, skip])
    return keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling2D()(hidden)))


def profile(batch_sizes, segments, blocks=6, picture=None):
    """The profile of `wide`, the variables that it moved, and its table.

    Args:
        batch_sizes: Those of the profile.
        blocks: Those of the model.
        segments: How many the model is cut into; 0 keeps all activations.
        picture: The path of a picture.
    """
    net = wide(blocks)
    if segments:
        accumops.recompute_layers(net, segments=segments)
    before = [np.asarray(variable) for variable in net.variables]
    found = accumops.memory_profile(net, batch_sizes)
    if picture:
        found.plot(picture)
    steps = [dataclasses.asdict(step) | {"predicted": step.predicted} for step in found.steps]
    moved = [
        variable.path
        for variable, value in zip(net.variables, before, strict=True)
        if not np.array_equal(variable, value)
    ]
    return {
        "steps": steps,
        "measured_by": found.measured_by,
        "moved": moved,
        "segments": len(segments_of(net)),
        "table": str(found),
    }


def counted(size):
    """The bytes in use before a tensor of a size, with it and after it, and their peak."""
    memory = AllocatorMemory("CPU:0")
    memory.forget_peak()
    before = memory.now()
    tensor = tf.zeros([size // 4]) + 1.0
    held = memory.now()
    del tensor
    return before, held, memory.now(), memory.peak()
