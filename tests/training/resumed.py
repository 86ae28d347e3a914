"""A training that is backed up after every seventh batch, and may be killed: `resumed.py DIRECTORY [EPOCH]`."""

import os
import pathlib
import signal
import sys

import keras
import numpy as np

import accumops


class Kill(keras.callbacks.Callback):
    """Kills the process after the second micro-batch of an epoch."""

    def __init__(self, in_epoch):
        super().__init__()
        self.in_epoch = in_epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.in_epoch and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(directory, *callbacks):
    """Trains for 7 epochs and writes all variables to the directory.

    An epoch has 3 micro-batches and a window 4. So the backup after 14 micro-batches is in the middle of both.
    """
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((48, 5)).astype("float32"), rng.standard_normal((48, 2)).astype("float32")
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
    model = accumops.GradientAccumulateModel(net, accum_steps=4, partial_window="carry")
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    callbacks = [*callbacks, accumops.BackupAndRestore(directory / "backup", save_freq=7)]
    model.fit(x, y, batch_size=16, epochs=7, shuffle=False, verbose=0, callbacks=callbacks)
    np.savez(directory / "weights.npz", *model.get_weights(), *[v.numpy() for v in model.optimizer.variables])


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), *(Kill(int(epoch)) for epoch in sys.argv[2:]))
