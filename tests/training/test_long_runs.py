"""What shows only over a whole process's life: a kill and a restart, many windows, peak memory."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from accumops import GradientAccumulateModel

TRAINING = """
import os, signal, sys
import keras, numpy as np
import accumops

directory, kill_in_epoch = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
x, y = rng.standard_normal((48, 5)).astype("float32"), rng.standard_normal((48, 2)).astype("float32")
keras.utils.set_random_seed(0)
net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
model = accumops.GradientAccumulateModel(net, accum_steps=4, partial_window="carry")
model.compile(keras.optimizers.Adam(0.01), loss="mse")

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == kill_in_epoch and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

# 3 micro-batches an epoch and 4 a window: two epochs' ends in three fall into the middle of one.
callbacks = [keras.callbacks.BackupAndRestore(directory + "/backup"), Kill()]
model.fit(x, y, batch_size=16, epochs=7, shuffle=False, verbose=0, callbacks=callbacks)
np.savez(directory + "/weights.npz", *model.get_weights(), *[v.numpy() for v in model.optimizer.variables])
"""


def train(directory, kill_in_epoch=-1):
    directory.mkdir(exist_ok=True)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", TRAINING, str(directory), str(kill_in_epoch)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_killed_in_the_middle_of_a_window_and_restarted(tmp_path):
    """The same bits as without the kill."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(straight).returncode == 0
    assert train(killed, kill_in_epoch=5).returncode == -signal.SIGKILL
    assert not (killed / "weights.npz").exists()
    assert (killed / "backup").exists()
    again = train(killed)
    assert again.returncode == 0, again.stderr
    wanted, got = np.load(straight / "weights.npz"), np.load(killed / "weights.npz")
    assert wanted.files == got.files
    for name in wanted.files:
        np.testing.assert_array_equal(wanted[name], got[name])


@pytest.mark.parametrize(
    "arguments", [{"accum_steps": 4}, {"micro_batch_size": 4}], ids=["accum_steps", "micro_batch_size"]
)
def test_5000_windows_in_flat_memory_without_retracing(backend, resident_bytes, arguments):
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x * 1.0

    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "tanh"), Counted(), keras.layers.Dense(1)])
    model = GradientAccumulateModel(net, **arguments)
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    samples = 4 if "accum_steps" in arguments else 16
    x = tf.data.Dataset.from_tensors((tf.ones([samples, 5]), tf.ones([samples, 1]))).repeat()
    steps_a_window = arguments.get("accum_steps", 1)
    model.fit(x, steps_per_epoch=200 * steps_a_window, verbose=0)
    settled, before = len(traces), resident_bytes()
    model.fit(x, steps_per_epoch=5000 * steps_a_window, verbose=0)
    assert len(traces) == settled
    assert int(model.optimizer.iterations) == 5200
    assert resident_bytes() - before < 8 << 20


PEAK = """
import sys
import keras, numpy as np
import accumops

def mebibytes(entry):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(entry))

samples, micro_batch_size = int(sys.argv[1]), int(sys.argv[2])
# A sample is 256 bytes and its activations are 8 MiB. The layers are many, as one layer's activations are the noise:
# now and then TensorFlow runs gradients in an order that keeps them longer, those of a single micro-batch as well.
body = [keras.layers.Conv2D(16, 1, activation="relu") for _ in range(32)]
head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.UpSampling2D(8), *body, *head])
model = accumops.GradientAccumulateModel(net, micro_batch_size=micro_batch_size)
model.compile("sgd", loss="mse")
x, y = np.ones((samples, 8, 8, 1), "float32"), np.ones((samples, 2), "float32")
model.train_on_batch(x[:1], y[:1])
before = mebibytes("VmRSS")
for _ in range(2):
    model.train_on_batch(x, y)
# Not getrusage's ru_maxrss, which begins with what the parent had when it forked.
print(mebibytes("VmHWM") - before)
"""


def test_a_window_takes_the_memory_of_one_micro_batch():
    """What a step adds to a process that has its model, its accumulators and its graph, in MiB."""

    def peak(samples, micro_batch_size):
        environment = os.environ | {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",  # activations in the memory that is measured
            # With many, what happens to run at once moves the peak by several layers' activations.
            "TF_NUM_INTEROP_THREADS": "1",
        }
        command = [sys.executable, "-c", PEAK, str(samples), str(micro_batch_size)]
        return float(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)

    one, window, at_once = peak(16, 16), peak(256, 16), peak(256, 256)
    assert window < 1.05 * one
    # What is measured is activations: with all of them alive the bound is missed by far.
    assert at_once > 8 * one
