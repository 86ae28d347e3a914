"""Samples and updates to one test accuracy, by the number of micro-batches in a window: fixed, and following the noise.

    python benchmarks/noise_schedule.py [--seeds N] [--json FILE]

Handwritten digits of scikit-learn, with a tenth of the training labels wrong, so that gradients stay noisy. The
learning rate is that of one micro-batch times the square root of K, for all.
"""

import argparse
import json
import os
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import accumops

MICRO_BATCH, RATE, ACCURACY, CHUNK, MOST = 8, 1e-3, 0.95, 32, 200
SCHEDULE = (2, 64)


def data(seed: int) -> tuple[np.ndarray, ...]:
    """Training and test set."""
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.data / 16).astype("float32"), digits.target, test_size=0.3, random_state=seed
    )
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(y_train)) < 0.1
    return x_train, np.where(wrong, rng.integers(0, 10, len(y_train)), y_train), x_test, y_test


def run(steps: int | None, seed: int) -> dict[str, Any]:
    """Trains until the test accuracy is reached. `steps` is K, or None for the schedule."""
    x, y, x_test, y_test = data(seed)
    keras.utils.set_random_seed(seed)
    net = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    schedule = accumops.NoiseScaleSchedule(*SCHEDULE, learning_rate="sqrt", decay=0.95, patience=10)
    model = accumops.GradientAccumulateModel(net, accum_steps=steps or schedule, partial_window="carry")
    rate = RATE * (steps or SCHEDULE[0]) ** 0.5
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=["accuracy"], jit_compile=False)
    rng = np.random.default_rng(seed)
    chunks = 0
    reached = False
    while not reached and chunks < MOST:
        chunks += 1
        chosen = rng.integers(0, len(x), CHUNK * MICRO_BATCH)
        model.fit(x[chosen], y[chosen], batch_size=MICRO_BATCH, shuffle=False, verbose=0)
        reached = bool(np.mean(np.argmax(net(x_test).numpy(), axis=1) == y_test) >= ACCURACY)
    optimizer = model.optimizer
    return {
        "samples": chunks * CHUNK * MICRO_BATCH,
        "updates": int(optimizer.iterations),
        "last": steps or int(optimizer.accumulator.state.counters.limit),
        "reached": reached,
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", help="a file for all results")
    options = parser.parse_args()
    results = {}
    print(f"To a test accuracy of {ACCURACY}, over {options.seeds} seeds: median (least to most)\n")
    print("| K | samples | updates | last K |\n|---|---|---|---|")
    for steps in (1, 4, 16, 64, None):
        runs = [run(steps, seed) for seed in range(options.seeds)]
        results[str(steps or "schedule")] = runs
        name = str(steps) if steps else f"`NoiseScaleSchedule{SCHEDULE}`"
        cells = []
        for key in ("samples", "updates", "last"):
            values = sorted(each[key] for each in runs)
            cells.append(f"{np.median(values):,.0f} ({values[0]:,} to {values[-1]:,})")
        missed = sum(not each["reached"] for each in runs)
        print(f"| {name} | {' | '.join(cells)} |" + (f" {missed} not reached" if missed else ""), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
