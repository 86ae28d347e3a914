"""One of two workers: `worker.py DIRECTORY SCENARIO...`, with TF_CONFIG in the environment.

Runs the scenarios one after another and writes what each returns to the directory, in a JSON file.
"""

import functools
import json
import os
import pathlib
import signal
import sys
import traceback

import keras
import numpy as np
import tensorflow as tf
from replicas import (
    BATCHES,
    MICRO,
    MODES,
    UPDATES,
    WINDOW,
    data,
    fit,
    full_batches,
    largest_difference,
    moved_by,
    network,
    normalizing_network,
    optimizer,
    whole,
)
from tensorflow.python.eager import context

import accumops

# Each clips in another way.
OPTIMIZERS = {"accum_steps": ("AdamW",), "micro_batch_size": ("Adam",)}


def compiled(strategy, mode, name="AdamW"):
    with strategy.scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, **MODES[mode])
        model.compile(optimizer(name), loss="mse", metrics=["mae"])
    return inner, model


def train(strategy, mode, optimizers):
    differences, weights = [], []
    for name in optimizers:
        inner, model = compiled(strategy, mode, name)
        wanted, wanted_logs = full_batches(name)
        logs = fit(model, BATCHES[mode])
        assert model.optimizer.iterations.numpy() == UPDATES
        assert model.optimizer.fused_update
        for log, values in wanted_logs.items():
            np.testing.assert_allclose(logs[log], values, rtol=1e-5, err_msg=f"{log}, {name}")
        differences.append(float(largest_difference(inner, wanted)))
        weights += weights_of(inner)
    return {"difference": max(differences), "weights": weights}


def loop(strategy):
    """A loop of one's own, whose micro-steps do not communicate."""
    wanted, _ = full_batches("AdamW")
    with strategy.scope():
        model = network()
        accumulating = accumops.GradientAccumulateOptimizer(optimizer("AdamW"), WINDOW)
        accumulating.build(model.trainable_variables)

    def micro_step(x, y, weights):
        with tf.GradientTape() as tape:
            errors = tf.reduce_mean((model(x, training=True) - y) ** 2, axis=-1)
            loss = tf.reduce_sum(errors * weights) / tf.cast(tf.shape(x)[0], tf.float32) + tf.add_n(model.losses)
            loss /= strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        accumulating.apply(gradients, weight=tf.cast(tf.shape(x)[0], tf.float32))

    @tf.function
    def step(batch):
        strategy.run(micro_step, args=batch)

    for _ in range(2):
        batches = tf.data.Dataset.from_tensor_slices(data()).batch(MICRO)
        for batch in strategy.experimental_distribute_dataset(batches):
            step(batch)
        tf.function(accumulating.flush)()
    assert accumulating.iterations.numpy() == UPDATES
    return {"difference": float(largest_difference(model, wanted)), "weights": weights_of(model)}


def batch_norm(strategy):
    """Running statistics of the windows of both workers together, with ragged batches."""
    x, y, _ = data()
    wanted = moved_by(whole(x))
    differences = []
    for mode in MODES:
        with strategy.scope():
            inner = normalizing_network()
            model = accumops.GradientAccumulateModel(inner, **MODES[mode])
            model.compile("sgd", loss="mse")
        model.fit(x, y, batch_size=BATCHES[mode], shuffle=False, verbose=0)
        layer = inner.layers[0]
        for variable, value in zip((layer.moving_mean, layer.moving_variance), wanted, strict=True):
            differences.append(float(np.abs(variable.numpy() - value).max()))
    return {"difference": max(differences), "weights": weights_of(inner)}


def batch_norm_saved(strategy, directory, index):
    """Half a window of both workers, saved by each and loaded without a strategy."""
    x, y, _ = (each[: 2 * MICRO + 5] for each in data())
    with strategy.scope():
        model = accumops.GradientAccumulateModel(normalizing_network(), accum_steps=WINDOW, partial_window="carry")
        model.compile("sgd", loss="mse")
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)
    path = directory / f"half_{index}.keras"
    model.save(path)
    window = keras.saving.load_model(path).model.layers[0].windows()[0].variables
    wide = x.astype(np.float64)
    wanted = np.stack([wide.mean(0), wide.var(0) * len(x)])
    assert window.counters.numpy().tolist()[:2] == [len(x), 3]
    difference = np.abs(window.moments.numpy() - wanted).max() / len(x)
    return {"difference": float(difference), "weights": weights_of(model)}


class Kill(keras.callbacks.Callback):
    """Kills the second worker in the third epoch, after two backups; the first has two micro-batches of a window."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 2 and batch == 1 and self.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Start(keras.callbacks.Callback):
    """Remembers how many micro-batches the window held when training started."""

    def on_epoch_begin(self, epoch, logs=None):
        if not hasattr(self, "step"):
            self.step = int(self.model.optimizer.accumulator.step)


def backed_up(strategy, directory, index, killed):
    """Six micro-batches an epoch, so that each second epoch starts in mid-window; a backup after each epoch."""
    with strategy.scope():
        inner = network()
        model = accumops.GradientAccumulateModel(inner, accum_steps=WINDOW, partial_window="carry")
        model.compile(optimizer("AdamW"), loss="mse")
    start = Start()
    callbacks = [start, accumops.BackupAndRestore(directory / f"backup_{index}", delete_checkpoint=False)]
    if killed:
        callbacks.append(Kill(index))
    x, y, _ = data()
    batches = tf.data.Dataset.from_tensor_slices((x[: 6 * MICRO], y[: 6 * MICRO])).batch(MICRO)
    model.fit(batches, epochs=3, callbacks=callbacks, verbose=0)
    return {"weights": weights_of(inner), "step_at_start": start.step}


def disagreeing(strategy, index):
    _, model = compiled(strategy, "accum_steps")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(index)
    try:
        fit(model, MICRO)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def weights_of(model):
    return [variable.numpy().ravel().tolist() for variable in model.trainable_variables]


def run(scenario, strategy, directory, index):
    mode, *every_optimizer = scenario.split(", ")
    if mode in MODES:
        optimizers = ("SGD", "Adam", "AdamW") if every_optimizer else OPTIMIZERS[mode]
        return train(strategy, mode, optimizers)
    if scenario in ("loop", "batch_norm"):
        return {"loop": loop, "batch_norm": batch_norm}[scenario](strategy)
    if scenario == "batch_norm_saved":
        return batch_norm_saved(strategy, directory, index)
    if scenario == "disagreeing":
        return disagreeing(strategy, index)
    return backed_up(strategy, directory, index, killed=scenario == "killed")


def main(directory, *scenarios):
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    # On a busy machine a worker may take more than the usual ten seconds to answer.
    current = context.context()
    current.configure_coordination_service = functools.partial(
        current.configure_coordination_service, heartbeat_timeout_in_ms=60_000
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = {}
    for scenario in scenarios:
        try:
            results[scenario] = run(scenario, strategy, directory, index)
        except Exception:  # the other scenarios have tests of their own
            traceback.print_exc()
            results[scenario] = {"raised": traceback.format_exc()[-5_000:]}
    (directory / f"{index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
