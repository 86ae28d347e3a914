"""Test accuracy by the size of micro-batches, for three ways to take the statistics of batch normalization.

    python benchmarks/window_statistics.py [--seeds N] [--json FILE] [--plot PICTURE]

Handwritten digits of scikit-learn with noise on them, and two small networks. In one, all normalization layers are
behind convolutions, so that a sample has 64, 16 or 4 values in a channel. The other one has a dense layer as well, with
one value a sample. All runs of a seed start from the same weights, see the same samples in the same order, and make the
same number of updates, each from 32 samples. They differ in the micro-batches that the 32 are split into, and in whose
statistics normalize.
"""

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import accumops

BATCH, EPOCHS, TRAINED, NOISE, RATE, MOMENTUM = 32, 20, 512, 0.3, 0.05, 0.9
SIZES = (1, 2, 4, 8, 16)
NETWORKS = ("convolutions", "convolutions and a dense layer")
WHOLE = "whole batch"
WAYS = {
    WHOLE: "Keras, the whole batch at once",
    "window": 'accumops, statistics="window"',
    "micro_batch": 'accumops, statistics="micro_batch"',
    "keras": "Keras, gradient_accumulation_steps",
}

Curves: TypeAlias = dict[str, list[float]]
"""Test loss and test accuracy after each epoch."""


def data(seed: int) -> tuple[np.ndarray, ...]:
    """Training and test set."""
    digits = load_digits()
    noise = np.random.default_rng(seed).normal(0, NOISE, digits.images.shape)
    images = (digits.images / 16 + noise).astype("float32")[..., None]
    x, x_test, y, y_test = train_test_split(images, digits.target, train_size=TRAINED, random_state=seed)
    return x, y, x_test, y_test


def network(name: str) -> keras.Model:
    """Three 3x3 convolutions, and for the second network a dense layer, with batch normalization and ReLU."""
    layers = keras.layers

    def normalized(layer: keras.Layer) -> list[keras.Layer]:
        return [layer, layers.BatchNormalization(momentum=MOMENTUM), layers.ReLU()]

    parts: list[Any] = [keras.Input((8, 8, 1))]
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        parts += normalized(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False))
    if name == NETWORKS[0]:
        parts.append(layers.GlobalAveragePooling2D())
    else:
        parts += [layers.Flatten(), *normalized(layers.Dense(64, use_bias=False))]
    return keras.Sequential([*parts, layers.Dense(10)])


def run(name: str, way: str, size: int, seed: int) -> Curves:
    """Trains a network in micro-batches of a size."""
    x, y, x_test, y_test = data(seed)
    keras.utils.set_random_seed(seed)
    net = model = network(name)
    steps: dict[str, int] = {}
    if way == "keras":
        steps = {"gradient_accumulation_steps": BATCH // size}
    elif way != WHOLE:
        net = accumops.replace_batchnorm_layers(net, statistics=way)
        model = accumops.GradientAccumulateModel(net, micro_batch_size=size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE, momentum=0.9, **steps), loss=loss, jit_compile=False)
    rng = np.random.default_rng(seed)
    curves: Curves = {"loss": [], "accuracy": []}
    for _ in range(EPOCHS):
        order = rng.permutation(TRAINED)
        # With Keras's accumulation a batch of `fit` is a micro-batch, otherwise it is a window.
        model.fit(x[order], y[order], batch_size=size if way == "keras" else BATCH, shuffle=False, verbose=0)
        logits = net(x_test, training=False)
        curves["loss"].append(float(loss(y_test, logits)))
        curves["accuracy"].append(float(np.mean(np.argmax(logits, axis=1) == y_test)))
    return curves


def cases() -> Iterator[tuple[str, int]]:
    """All ways, and sizes of micro-batches."""
    yield WHOLE, BATCH
    for size in SIZES:
        for way in WAYS:
            if way != WHOLE:
                yield way, size


class Results:
    """The curves of all seeds.

    Args:
        seeds: The number of seeds.
    """

    def __init__(self, seeds: int) -> None:
        self._seeds = range(seeds)
        self.runs: dict[str, dict[str, list[Curves]]] = {name: {} for name in NETWORKS}

    def train(self, name: str, way: str, size: int) -> None:
        """Trains a case."""
        self.runs[name][f"{way} {size}"] = [run(name, way, size, seed) for seed in self._seeds]

    def of(self, name: str, way: str, size: int, what: str) -> np.ndarray:
        """Losses or accuracies of a case, a row for each seed."""
        return np.array([curves[what] for curves in self.runs[name][f"{way} {size}"]])

    def accuracy(self, name: str, way: str, size: int) -> np.ndarray:
        """The last test accuracy of each seed, in percent."""
        return 100 * self.of(name, way, size, "accuracy")[:, -1]

    def distance(self, name: str, way: str, size: int) -> float:
        """The largest difference between test losses of a case and of the whole batch, over all epochs and seeds."""
        return float(np.abs(self.of(name, way, size, "loss") - self.of(name, WHOLE, BATCH, "loss")).max())


def print_tables(results: Results) -> None:
    """Prints accuracies, and distances from the curve of the whole batch."""
    for name in NETWORKS:

        def cell(way: str, size: int, name: str = name) -> str:
            values = results.accuracy(name, way, size)
            return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"

        ways = [way for way in WAYS if way != WHOLE]
        print(f"\n{name}: test accuracy in percent, mean (least to most); the whole batch {cell(WHOLE, BATCH)}\n")
        print("| samples a micro-batch |", " | ".join(WAYS[way] for way in ways), "| largest distance of test losses |")
        print("|---" * (len(ways) + 2) + "|")
        for size in SIZES:
            distances = " / ".join(f"{results.distance(name, way, size):.2g}" for way in ways)
            print(f"| {size} |", " | ".join(cell(way, size) for way in ways), f"| {distances} |")


def plot(results: Results, path: str) -> None:
    """Draws the accuracy by the size of micro-batches, and test losses with micro-batches of 2."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    colours = dict(zip(WAYS, ("#9a9a9a", "#08519c", "#d95f02", "#1b9e77"), strict=True))
    for row, name in enumerate(NETWORKS):
        left, right = (figure.add_subplot(len(NETWORKS), 2, 2 * row + column) for column in (1, 2))
        whole = results.accuracy(name, WHOLE, BATCH)
        left.axhspan(whole.min(), whole.max(), color="#e5e5e5", linewidth=0)
        left.axhline(whole.mean(), color=colours[WHOLE], linewidth=3, label=WAYS[WHOLE])
        for way in list(WAYS)[1:]:
            values = np.array([results.accuracy(name, way, size) for size in SIZES])
            means = values.mean(axis=1)
            spread = [means - values.min(axis=1), values.max(axis=1) - means]
            left.errorbar(SIZES, means, spread, color=colours[way], marker="o", capsize=3, label=WAYS[way])
        left.set_xscale("log", base=2)
        left.set_xticks(SIZES, list(map(str, SIZES)))
        left.set(title=name, xlabel="samples a micro-batch, of 32 in a window", ylabel="test accuracy, %")
        left.title.set_fontsize(10)
        for way in WAYS:
            curves = results.of(name, way, BATCH if way == WHOLE else 2, "loss")
            line = {"linewidth": 3.5} if way == WHOLE else {"linestyle": "--" if way == "window" else "-"}
            right.plot(range(1, EPOCHS + 1), np.median(curves, axis=0), color=colours[way], **line)
        right.set_yscale("log")
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        right.set_xticks(range(5, EPOCHS + 1, 5))
        right.set(title="micro-batches of 2, median of the seeds", xlabel="epoch", ylabel="test loss")
        right.title.set_fontsize(10)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", help="a file for all curves")
    parser.add_argument("--plot", help="a file for the picture")
    options = parser.parse_args()
    results = Results(options.seeds)
    for name in NETWORKS:
        for way, size in cases():
            results.train(name, way, size)
    print_tables(results)
    if options.plot:
        plot(results, options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results.runs, file, indent=1)


if __name__ == "__main__":
    main()
