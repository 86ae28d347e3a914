"""Contrastive learning with an effective batch of 1024 in micro-batches of 32, on scikit-learn's digits.

    pip install scikit-learn matplotlib
    python examples/contrastive.py [picture.png]

Two views of each image, moved by a pixel and with noise, go through a small encoder. The loss is NT-Xent (SimCLR): its
negatives are all other images of the batch. Trained three ways with the same number of updates:

    the full batch         1024 images at once: what the other two stand for
    window                 micro-batches of 32, `loss_over="window"`: the same loss, so the same curve
    micro-batches alone    micro-batches of 32, each with the 62 negatives of its own: another loss

Then, on other images: a linear probe (logistic regression on frozen features), and how many images are found by their
other view among all.
"""

import sys

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import accumops

BATCH, MICRO, UPDATES = 1024, 32, 200


def images():
    """Returns training images, test images, and their labels."""
    digits = load_digits()
    x = (digits.images / 16).astype("float32")[..., None]
    order = np.random.default_rng(0).permutation(len(x))
    return x[order[:BATCH]], x[order[BATCH:]], digits.target[order[:BATCH]], digits.target[order[BATCH:]]


def views(x, seed):
    """Returns each image moved by up to a pixel each way, with noise."""
    rng = np.random.default_rng(seed)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    corners = rng.integers(0, 3, size=(len(x), 2))
    moved = np.stack([image[i : i + 8, j : j + 8] for image, (i, j) in zip(padded, corners, strict=True)])
    return moved + rng.normal(scale=0.1, size=moved.shape).astype("float32")


def pairs(x, update):
    """Returns two views of each image, of shape (batch, 2, 8, 8, 1)."""
    return np.stack([views(x, 2 * update), views(x, 2 * update + 1)], axis=1)


def encoder():
    """Returns an encoder of images, and the model of pairs of views that trains it."""
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            keras.layers.Conv2D(64, 3, activation="relu", strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
        ]
    )
    pair = keras.Input((2, 8, 8, 1))
    head = keras.layers.Dense(32)
    embeddings = [keras.layers.Reshape((1, 32))(head(encoder(pair[:, i]))) for i in range(2)]
    return encoder, keras.Model(pair, keras.layers.Concatenate(axis=1)(embeddings))


def train(x, wrap):
    """Trains an encoder, and returns it, the model of pairs, and the loss of each update."""
    features, net = encoder()
    model = wrap(net)
    model.compile(keras.optimizers.Adam(1e-3), accumops.losses.NTXent(temperature=0.2))
    losses = [float(model.train_on_batch(pairs(x, update), np.zeros(BATCH))) for update in range(UPDATES)]
    return features, net, losses


def found(net, pairs):
    """Returns the share of images whose other view has the most similar embedding of all."""
    embeddings = net.predict(pairs, verbose=0)
    left, right = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in np.moveaxis(embeddings, 1, 0))
    return np.mean(np.argmax(left @ right.T, axis=1) == np.arange(len(left)))


def main():
    """Trains in the three ways, prints what a linear probe makes of the features, and draws the losses."""
    x, x_test, y, y_test = images()
    ways = {
        "the full batch": lambda net: net,
        "window": lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=MICRO, loss_over="window"),
        "micro-batches alone": lambda net: accumops.GradientAccumulateModel(
            net, micro_batch_size=MICRO, check_loss=False
        ),
    }
    curves = {}
    for name, wrap in ways.items():
        features, net, curves[name] = train(x, wrap)
        probe = LogisticRegression(max_iter=2000).fit(features.predict(x, verbose=0), y)
        accuracy = probe.score(features.predict(x_test, verbose=0), y_test)
        share = found(net, pairs(x_test, UPDATES))
        print(f"{name:22s} last loss {curves[name][-1]:.4f}   linear probe {accuracy:.3f}   finds {share:.1%}")
    apart = max(abs(one - other) for one, other in zip(curves["the full batch"], curves["window"], strict=True))
    print(f"largest difference between the losses of the full batch and of the window: {apart:.1e}")
    if len(sys.argv) > 1:
        import matplotlib.pyplot as plt

        for name, curve in curves.items():
            plt.plot(curve, label=name, linestyle="--" if name == "window" else "-")
        plt.xlabel("updates")
        plt.ylabel("NT-Xent")
        plt.legend()
        plt.savefig(sys.argv[1], dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
