"""Trains on scikit-learn's digits with a batch of 256 at once, and with the same batch in micro-batches of 16.

    pip install scikit-learn
    python examples/digits_in_fit.py

Nothing in the script but one line knows of micro-batches: batch size, epochs, callbacks, schedule and logs are those of
the large batch. Both trainings make the same updates. So they print the same accuracy, and the largest difference
between their weights is that of rounding.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import accumops

BATCH, MICRO, EPOCHS, TRAINING = 256, 16, 20, 1400


def load():
    """Returns training images and labels, and those to test with."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.images / 16).astype("float32")[order, ..., None], digits.target[order]
    return (images[:TRAINING], labels[:TRAINING]), (images[TRAINING:], labels[TRAINING:])


def make_net():
    """Returns a small convolutional network, the same each time."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="gelu"),
            keras.layers.Conv2D(32, 3, activation="gelu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def train(model, images, labels):
    """Trains a model, and returns its last logs."""
    updates = EPOCHS * -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, updates, warmup_target=0.1, warmup_steps=updates // 10)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, weight_decay=1e-3, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    history = model.fit(images, labels, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0).history
    return {name: values[-1] for name, values in history.items()}


def main():
    """Trains both ways, and prints what they reach and how far apart they are."""
    training, test = load()
    nets = {}
    for name in ("the batch at once", f"micro-batches of {MICRO}"):
        nets[name] = make_net()
        model = nets[name]
        if name != "the batch at once":
            model = accumops.GradientAccumulateModel(model, micro_batch_size=MICRO)
        logs = train(model, *training)
        _, accuracy = model.evaluate(*test, verbose=0)
        print(f"{name:20s} loss {logs['loss']:.5f}   test accuracy {accuracy:.4f}")
    plain, split = (np.concatenate([w.ravel() for w in net.get_weights()]) for net in nets.values())
    apart = np.abs(plain - split).max() / np.abs(plain).max()
    print(f"largest difference of the weights: {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
