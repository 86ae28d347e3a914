"""A training loop of one's own, with micro-batches of any size, a partial window, and its own validation.

    pip install scikit-learn
    python examples/custom_loop.py

The optimizer's `apply` is called for each micro-batch with what its loss has divided by, and `flush` at the end of an
epoch. Micro-batches have between 8 and 32 digits here, as if they were filled up to a number of tokens. The loop makes
the updates of a loop without accumulation that sees the same windows at once: the script trains both, and prints their
accuracies and the largest difference between their weights.
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import accumops

ACCUM_STEPS, EPOCHS, TRAINING = 8, 10, 1400


def make_net():
    """Returns a small network, the same each time."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def epoch_of_micro_batches(number):
    """Returns the indices of an epoch's micro-batches, of different sizes."""
    rng = np.random.default_rng(number)
    cuts = np.cumsum(rng.integers(8, 33, TRAINING))
    return np.split(rng.permutation(TRAINING), cuts[cuts < TRAINING])


def train(x, y, accumulates):
    """Trains in windows, in micro-batches or at once. Returns the network and the number of updates."""
    net = make_net()
    inner = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
    optimizer = accumops.GradientAccumulateOptimizer(inner, accum_steps=ACCUM_STEPS) if accumulates else inner
    optimizer.build(net.trainable_variables)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(reduce_retracing=True)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_function(y, net(x, training=True))
        weight = {"weight": tf.shape(x)[0]} if accumulates else {}
        optimizer.apply(tape.gradient(loss, net.trainable_variables), net.trainable_variables, **weight)

    for epoch in range(EPOCHS):
        parts = epoch_of_micro_batches(epoch)
        if not accumulates:
            parts = [np.concatenate(parts[i : i + ACCUM_STEPS]) for i in range(0, len(parts), ACCUM_STEPS)]
        for part in parts:
            step(tf.constant(x[part]), tf.constant(y[part]))
        if accumulates:
            optimizer.flush()  # the epoch's last window may have fewer than 8 micro-batches
    return net, int(optimizer.iterations)


def main():
    """Trains both ways, and prints what they reach and how far apart they are."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data / 16).astype("float32")[order], digits.target[order]
    nets = []
    for name, accumulates in (("windows at once", False), ("micro-batches", True)):
        net, updates = train(x, y, accumulates)
        accuracy = np.mean(net.predict(x[TRAINING:], verbose=0).argmax(axis=1) == y[TRAINING:])
        print(f"{name:16s} {updates} updates   test accuracy {accuracy:.4f}")
        nets.append(np.concatenate([weight.ravel() for weight in net.get_weights()]))
    apart = np.abs(nets[0] - nets[1]).max() / np.abs(nets[0]).max()
    print(f"largest difference of the weights: {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
