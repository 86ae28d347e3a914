"""The scalars in TensorBoard's event files, read without TensorBoard."""

import pathlib
import tempfile

import keras
import tensorflow as tf

import accumops
from accumops.memory.device_memory import AllocatorMemory


def scalars(log_dir):
    """What is in the files of `log_dir/train`: for each tag a dict of steps to values."""
    found = {}
    for path in sorted((pathlib.Path(log_dir) / "train").glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                steps = found.setdefault(value.tag, {})
                assert event.step not in steps
                steps[event.step] = tf.make_ndarray(value.tensor).item()
    return found


def logged_memory(jit_compile):
    """The peaks that a fit logs, and the one that the allocator tells at its end."""
    memory = AllocatorMemory("CPU:0")
    model = accumops.GradientAccumulateModel(
        keras.Sequential([keras.Input((4096,)), keras.layers.Dense(256)]), micro_batch_size=8
    )
    model.compile("sgd", loss="mse", jit_compile=jit_compile)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [accumops.AccumulationLogger(directory)]
        model.fit(tf.ones([64, 4096]), tf.ones([64, 256]), batch_size=32, epochs=2, callbacks=callbacks, verbose=0)
        return list(scalars(directory).get("accumulation/memory_peak", {}).values()), memory.peak()
