"""Tests that need a process's whole life: a kill and a restart, many windows, peak memory."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import processes
import pytest
import resumed
from crosses import cross
from many_windows import ManyWindows


def run(directory, *arguments):
    """Runs resumed.py in a process of its own."""
    return processes.run(pathlib.Path(resumed.__file__), directory, *arguments)


def test_killed_in_the_middle_of_a_window_and_restarted(tmp_path):
    """The same bits as without the kill."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for directory in (straight, killed):
        directory.mkdir()
    resumed.train(straight)
    assert run(killed, 5).returncode == -signal.SIGKILL
    assert not (killed / "weights.npz").exists()
    assert (killed / "backup").exists()
    again = run(killed)
    assert again.returncode == 0, again.stderr
    wanted, got = np.load(straight / "weights.npz"), np.load(killed / "weights.npz")
    assert wanted.files == got.files
    for name in wanted.files:
        np.testing.assert_array_equal(wanted[name], got[name])


@pytest.mark.parametrize(
    ("backend", "mode", "windows"),
    cross(
        ["fused", "reference"],
        ["accum_steps", "micro_batch_size"],
        [800, 5000],
        default=lambda backend, mode, windows: windows == 800 and (backend == "fused") == (mode == "accum_steps"),
    ),
    indirect=["backend"],
)
@pytest.mark.some_by_default(1)
def test_many_windows_in_flat_memory_without_retracing(backend, resident_bytes, mode, windows):
    training = ManyWindows(mode)
    training.train(200)
    settled, before = training.traces, resident_bytes()
    training.train(windows)
    assert training.traces == settled
    assert training.updates == 200 + windows
    assert resident_bytes() - before < 8 << 20


PEAK = """
import keras, numpy as np, tensorflow as tf
import accumops
from accumops.memory.device_memory import ResidentMemory

tf.config.set_visible_devices([], "GPU")  # activations in the memory that is measured
# With many threads, what happens to run at once moves the peak by several layers' activations.
tf.config.threading.set_inter_op_parallelism_threads(1)

# A sample is 256 bytes and its activations are 8 MiB. There are many layers, since the peak varies by a layer's
# activations: now and then TensorFlow runs gradients in an order that keeps them longer, in one micro-batch too.
body = [keras.layers.Conv2D(16, 1, activation="relu") for _ in range(32)]
head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.UpSampling2D(8), *body, *head])
memory = ResidentMemory()
for micro_batch_size, *sizes in ((8, 24), (24, 8, 24)):
    model = accumops.GradientAccumulateModel(net, micro_batch_size=micro_batch_size)
    model.compile("sgd", loss="mse")
    before = None
    for samples in (1, *sizes):
        slices = tf.data.Dataset.from_tensor_slices((tf.ones([samples, 8, 8, 1]), tf.ones([samples, 2])))
        memory.forget_peak()
        model.fit(slices.batch(samples).repeat(2), verbose=0)  # one trace, since the data says no size of a batch
        if before is None:
            before = memory.now()
        else:
            print((memory.peak() - before) / 2**20)
"""
# The operating system is to see each tensor come and go. The C library maps large ones one by one, and unmaps them,
# but by default raises the size from which it does so as soon as it has unmapped one. After that it keeps memory in the
# heaps of several threads, where what one has freed is of no use to another. With oneDNN, which by default is on for
# some processors only, TensorFlow has an allocator that keeps memory by itself.
EACH_TENSOR_MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "TF_ENABLE_ONEDNN_OPTS": "0"}


def test_a_window_takes_the_memory_of_one_micro_batch():
    """The MiB that steps add to a process that has its model, its accumulators and its graph."""
    environment = os.environ | EACH_TENSOR_MAPPED
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    window, one, at_once = map(float, done.stdout.split())
    assert window < 1.05 * one
    # The peak is activations: with all of them alive it is far above the bound.
    assert at_once > 2.5 * one
