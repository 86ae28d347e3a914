"""Samples and updates to one test accuracy, by the number of micro-batches in a window: fixed, and following the noise.

    python benchmarks/noise_schedule.py [--seeds N] [--json FILE]
    python benchmarks/noise_schedule.py --plot PICTURE

Handwritten digits of scikit-learn, with a tenth of the training labels wrong, so that gradients stay noisy. The
learning rate is that of one micro-batch times the square root of K, for all. The second command trains once with the
schedule, on all epochs of a run, and draws noise scale, effective batch and K.
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
SCHEDULE, EPOCHS = (2, 64), 16


def data(seed: int) -> tuple[np.ndarray, ...]:
    """Training and test set."""
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.data / 16).astype("float32"), digits.target, test_size=0.3, random_state=seed
    )
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(y_train)) < 0.1
    return x_train, np.where(wrong, rng.integers(0, 10, len(y_train)), y_train), x_test, y_test


def compiled(steps: int | None, seed: int) -> accumops.GradientAccumulateModel:
    """The model. `steps` is K, or None for the schedule."""
    keras.utils.set_random_seed(seed)
    net = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    schedule = accumops.NoiseScaleSchedule(*SCHEDULE, learning_rate="sqrt", decay=0.95, patience=10)
    model = accumops.GradientAccumulateModel(net, accum_steps=steps or schedule, partial_window="carry")
    rate = RATE * (steps or SCHEDULE[0]) ** 0.5
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=["accuracy"], jit_compile=False)
    return model


def run(steps: int | None, seed: int) -> dict[str, Any]:
    """Trains until the test accuracy is reached. `steps` is K, or None for the schedule."""
    x, y, x_test, y_test = data(seed)
    model = compiled(steps, seed)
    rng = np.random.default_rng(seed)
    chunks = 0
    reached = False
    while not reached and chunks < MOST:
        chunks += 1
        chosen = rng.integers(0, len(x), CHUNK * MICRO_BATCH)
        model.fit(x[chosen], y[chosen], batch_size=MICRO_BATCH, shuffle=False, verbose=0)
        reached = bool(np.mean(np.argmax(model(x_test).numpy(), axis=1) == y_test) >= ACCURACY)
    optimizer = model.optimizer
    return {
        "samples": chunks * CHUNK * MICRO_BATCH,
        "updates": int(optimizer.iterations),
        "last": steps or int(optimizer.accumulator.state.counters.limit),
        "reached": reached,
    }


def draw(path: str) -> None:
    """Draws a run with the schedule, and prints its epochs."""
    x, y, *_ = data(0)
    noise_scale = accumops.GradientNoiseScale(decay=0.95)
    logs = (
        compiled(None, 0).fit(x, y, batch_size=MICRO_BATCH, epochs=EPOCHS, verbose=0, callbacks=[noise_scale]).history
    )
    for epoch in range(EPOCHS):
        names = ("loss", "gradient_noise_scale", "effective_batch_size", "accum_steps", "batch_efficiency")
        print(epoch + 1, *(f"{name} {logs[name][epoch]:.3g}" for name in names))
    noise_scale.plot(path)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", help="a file for all results")
    parser.add_argument("--plot", help="draws one run in this file, instead of the table")
    options = parser.parse_args()
    if options.plot:
        draw(options.plot)
        return
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
