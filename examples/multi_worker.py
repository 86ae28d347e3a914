"""Trains a small convolutional network on several hosts, with gradients that are reduced once a window.

Run it on every host with TF_CONFIG in the environment, which lists the hosts and says which one this is:

    TF_CONFIG='{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}' \
        python examples/multi_worker.py

with `"index": 1` on the second. Without TF_CONFIG it trains on the GPUs of one host, or on its CPU. To try it on one
machine, start two processes, each in a terminal of its own or the first in the background:

    CLUSTER='"cluster": {"worker": ["localhost:2222", "localhost:2223"]}'
    TF_CONFIG="{$CLUSTER, \"task\": {\"type\": \"worker\", \"index\": 0}}" python examples/multi_worker.py &
    TF_CONFIG="{$CLUSTER, \"task\": {\"type\": \"worker\", \"index\": 1}}" python examples/multi_worker.py

Each step of `fit` takes a micro-batch of 64 samples, divided among all replicas, and every fourth makes an update, of
256 samples. A job that is killed goes on from its last backup, in mid-window too, when it is started again: each worker
keeps its own backup, in `--backup`, and the workers check that theirs are of the same point.
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
    """The strategy for where this process runs; it has to be made before TensorFlow is used."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.MirroredStrategy()


def make_data(samples: int) -> tf.data.Dataset:
    """Images of one bright quarter each, and which one it is; the same on all workers, which take turns at it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, samples)
    images = rng.normal(0, 1, (samples, 16, 16, 1)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 0.5
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(MICRO_BATCH)


def make_model() -> accumops.GradientAccumulateModel:
    """The model, compiled; to be called within the strategy's scope."""
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
    """Trains, and prints the result on the first worker."""
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
        callbacks.append(keras.callbacks.BackupAndRestore(os.path.join(arguments.backup, f"worker_{index}")))
    logs = model.fit(
        make_data(arguments.samples), epochs=arguments.epochs, callbacks=callbacks, verbose=2 if index == 0 else 0
    ).history
    if index == 0:
        updates = int(model.optimizer.iterations.numpy())
        print(f"{strategy.num_replicas_in_sync} replicas, {updates} updates, accuracy {logs['accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main()
