"""Trainings for the tests of BackupAndRestore: in all modes, with dropout, and with callbacks that change the model."""

import keras
import numpy as np

import accumops

BATCHES = 5  # of an epoch; the last is smaller
EPOCHS = 2
KINDS = ("plain", "optimizer", "accum_steps", "scheduled", "micro_batch_size", "batch_norm")


class Decay(keras.callbacks.Callback):
    """Decays the learning rate with each epoch and each batch, so that a callback that runs twice shows."""

    def _decay(self, factor):
        optimizer = self.model.optimizer
        optimizer.learning_rate = float(optimizer.learning_rate.numpy()) * factor

    def on_epoch_begin(self, epoch, logs=None):
        self._decay(0.9)

    def on_train_batch_end(self, batch, logs=None):
        self._decay(0.99)


class Logs(keras.callbacks.Callback):
    """Keeps the logs of each epoch in a dict that outlives the training."""

    def __init__(self, logs):
        super().__init__()
        self.logs = logs

    def on_epoch_end(self, epoch, logs=None):
        self.logs[epoch] = dict(logs)


class Moments(keras.callbacks.Callback):
    """Makes the begins and ends of batches and epochs moments of a clock."""

    def __init__(self, clock):
        super().__init__()
        for event in ("train_begin", "epoch_begin", "epoch_end", "train_batch_begin", "train_batch_end"):
            setattr(self, f"on_{event}", lambda *_, event=event, **__: clock.tick(event))


def data():
    rng = np.random.default_rng(1)
    return rng.standard_normal((4 * BATCHES - 1, 3)).astype("float32"), rng.standard_normal((4 * BATCHES - 1, 1))


def make(kind, **options):
    """A model of this kind, compiled with options. "eager" is "plain" without tracing."""
    if kind == "eager":
        kind, options = "plain", {"run_eagerly": True}
    keras.utils.set_random_seed(3)
    layers = [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    if kind == "batch_norm":
        layers.insert(2, accumops.AccumBatchNormalization())
    model, optimizer = keras.Sequential(layers), keras.optimizers.Adam(0.05)
    if kind == "optimizer":
        optimizer = accumops.GradientAccumulateOptimizer(optimizer, 3)
    elif kind == "micro_batch_size":
        model = accumops.GradientAccumulateModel(model, micro_batch_size=3)
    elif kind != "plain":
        steps = {0: 3, 1: 4} if kind == "scheduled" else 3
        model = accumops.GradientAccumulateModel(model, accum_steps=steps, partial_window="carry")
    model.compile(optimizer, loss="mse", metrics=["mae"], **options)
    return model


def fit(model, backup, *callbacks, **arguments):
    """Trains a model with a callback that backs up."""
    x, y = data()
    arguments = {"epochs": EPOCHS, "batch_size": 4, **arguments}
    return model.fit(x, y, verbose=0, callbacks=[Decay(), *callbacks, backup], **arguments)


def validation():
    """Arguments of `fit` for a validation, which resets the metrics."""
    x, y = data()
    return {"validation_data": (x[:4], y[:4])}


def state(model):
    """All of a model's variables, by place and name; without what a closed window has left, which has no influence."""
    variables = [*model.variables, *model.optimizer.variables]
    accumulator = getattr(model.optimizer, "accumulator", None)
    closed = accumulator is not None and int(accumulator.step) == 0
    left = {id(each) for each in accumulator.state.saved_variables} if closed else set()
    return {f"{i} {each.name}": each.numpy() for i, each in enumerate(variables) if id(each) not in left}


def check_same(got, wanted):
    for (name, mine), (other_name, other) in zip(got.items(), wanted.items(), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_array_equal(mine, other, err_msg=f"{name}, {other_name}")
