"""Saving on replicas and restoring on one device, and the reverse, in the middle of a window."""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import MICRO, data, largest_difference, mirrored, network

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")


def model_under(strategy):
    with strategy.scope():
        model = accumops.GradientAccumulateModel(network(), accum_steps=4, partial_window="carry")
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
        model.optimizer.build(model.trainable_variables)
    return model


def train(model, begin, end):
    x, y, _ = data()
    x, y = x[begin * MICRO : end * MICRO], y[begin * MICRO : end * MICRO]
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)


@functools.cache
def straight():
    """A model that no one interrupts, on one device."""
    model = model_under(tf.distribute.get_strategy())
    train(model, 0, 12)
    return model


def by_file(saved, path, restored):
    saved.save(path / "model.keras")
    with restored.scope() if restored else contextlib.nullcontext():
        return keras.models.load_model(path / "model.keras")


def by_weights(saved, path, restored):
    saved.save_weights(path / "model.weights.h5")
    model = model_under(restored)
    model.load_weights(path / "model.weights.h5")
    return model


def by_checkpoint(saved, path, restored):
    written = tf.train.Checkpoint(model=saved.model, optimizer=saved.optimizer).write(path / "checkpoint")
    model = model_under(restored)
    tf.train.Checkpoint(model=model.model, optimizer=model.optimizer).read(written).assert_existing_objects_matched()
    return model


@pytest.mark.parametrize(
    ("before", "after", "way"),
    [
        (4, 0, by_file),
        (0, 2, by_file),
        (4, 0, by_weights),
        (0, 2, by_checkpoint),
        pytest.param(0, 2, by_weights, marks=pytest.mark.exhaustive),
        pytest.param(4, 0, by_checkpoint, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.some_by_default(1)
def test_a_window_goes_on_elsewhere(before, after, way, tmp_path):
    """Six micro-batches, one window and a half, then six more; 0 replicas is no strategy."""
    here, there = (mirrored(n) if n else tf.distribute.get_strategy() for n in (before, after))
    first = model_under(here)
    train(first, 0, 6)
    second = way(first, tmp_path, there)
    assert int(second.optimizer.accumulator.step) == 2
    for mine, wanted in zip(second.optimizer.variables, first.optimizer.variables, strict=True):
        np.testing.assert_allclose(mine.numpy(), wanted.numpy(), atol=1e-6, err_msg=wanted.path)
    train(second, 6, 12)
    assert second.optimizer.iterations.numpy() == 3
    assert largest_difference(straight().model, second.model) <= 1e-6


class Interrupt(keras.callbacks.Callback):
    """Interrupts `fit` in its second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 4):
            raise KeyboardInterrupt


def test_a_backup_in_mid_window_goes_on(tmp_path):
    """Six micro-batches an epoch; the last backup is after ten. With its logs, which are sums over the replicas."""
    x, y, _ = (each[: 6 * MICRO - 3] for each in data())

    def train(backup, *callbacks):
        model = model_under(mirrored(2))
        logs = model.fit(
            x, y, batch_size=MICRO, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks, backup]
        ).history
        return model, logs["loss"][-1]

    straight, wanted = train(accumops.BackupAndRestore(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        train(accumops.BackupAndRestore(tmp_path / "b", save_freq=5), Interrupt())
    again, loss = train(accumops.BackupAndRestore(tmp_path / "b", save_freq=5))
    assert largest_difference(straight.model, again.model) <= 1e-6
    assert again.optimizer.iterations.numpy() == 3
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_a_new_fit_drops_the_window_on_all_replicas():
    model = model_under(mirrored(2))
    model.partial_window = "flush"
    x, y, _ = data()
    model.train_on_batch(x[:MICRO], y[:MICRO])
    for each in model.optimizer.accumulator.variables[0].value.values:
        assert int(each) == 1
    model.optimizer.accumulator.reset()
    for each in model.optimizer.accumulator.variables[0].value.values:
        assert int(each) == 0
