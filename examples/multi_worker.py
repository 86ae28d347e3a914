"""Trains a small convolutional network on several hosts, which reduce their gradients once a window.

Run it on every host. The environment variable TF_CONFIG lists the hosts and says which one this is:

    TF_CONFIG='{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}' \
        python examples/multi_worker.py

The second host has `"index": 1`. Without TF_CONFIG the program trains on the GPUs of one host, or on its CPU. To try it
on one machine, start two processes, each in a terminal of its own or the first in the background:

    CLUSTER='"cluster": {"worker": ["localhost:2222", "localhost:2223"]}'
    TF_CONFIG="{$CLUSTER, \"task\": {\"type\": \"worker\", \"index\": 0}}" python examples/multi_worker.py &
    TF_CONFIG="{$CLUSTER, \"task\": {\"type\": \"worker\", \"index\": 1}}" python examples/multi_worker.py

Each step of `fit` takes a micro-batch of 64 samples, divided among all replicas. Every fourth step makes an update,
from 256 samples. If a job is killed and started again, it continues from its last backup, in mid-window too. Each
worker keeps its own backups in `--backup`, and all continue from the newest one that each of them has.
"""

import argparse
import json
import os

import keras
import numpy as np
import tensorflow as tf

import accumops

MICRO_BATCH, ACCUM_STEPS = 64, 4


def make_strategy() -> tf.distribute.Strategy:
    """Returns the strategy for this process. Call it before anything else uses TensorFlow."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.MirroredStrategy()


def make_data(samples: int) -> tf.data.Dataset:
    """Returns images with one bright quarter, labelled by that quarter.

    The data is the same on all workers, which share it among them.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, samples)
    images = rng.normal(0, 1, (samples, 16, 16, 1)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 0.5
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(MICRO_BATCH)


def make_model() -> accumops.GradientAccumulateModel:
    """Returns the compiled model. Call it within the strategy's scope."""
    net = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    model = accumops.GradientAccumulateModel(net, accum_steps=ACCUM_STEPS, partial_window="carry")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss=loss, metrics=["accuracy"])
    return model


def main() -> None:
    """Trains; the first worker prints the result."""
    parser = argparse.ArgumentParser(description="Trains on the hosts that TF_CONFIG lists.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--backup", help="a directory for backups, of this host or of all")
    arguments = parser.parse_args()
    strategy = make_strategy()
    index = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = make_model()
    callbacks = []
    if arguments.backup:
        callbacks.append(accumops.BackupAndRestore(os.path.join(arguments.backup, f"worker_{index}")))
    logs = model.fit(
        make_data(arguments.samples), epochs=arguments.epochs, callbacks=callbacks, verbose=2 if index == 0 else 0
    ).history
    if index == 0:
        updates = int(model.optimizer.iterations.numpy())
        print(f"{strategy.num_replicas_in_sync} replicas, {updates} updates, accuracy {logs['accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main()
