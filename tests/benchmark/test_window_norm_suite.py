"""Checks that the contenders do what their names say, and what counts as the memory of a window."""

import counted_windows
import keras
import numpy as np
import processes
import pytest

from accumops import AccumBatchNormalization
from accumops.benchmark import memory, models, training, window_norm
from accumops.memory.device_memory import ResidentMemory


def small_network():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = hidden = keras.Input((8, 8, 3))
    for _ in range(2):
        hidden = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(hidden)))
    return keras.Model(inputs, layers.Dense(models.CLASSES)(layers.GlobalAveragePooling2D()(hidden)))


def test_windows_train_as_the_whole_batch_does(monkeypatch):
    monkeypatch.setattr(window_norm, "BATCH", 8)
    monkeypatch.setattr(training, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(window_norm, "NETWORKS", {"small": window_norm.Network(small_network, 2, (1, 2))})
    made, train_steps = [], training.train_steps

    def steps(model, *arguments):
        made.append(model)
        return train_steps(model, *arguments)

    monkeypatch.setattr(training, "train_steps", steps)
    weights, every = {}, {}
    for name in window_norm.contenders("small"):
        window_norm.window("small", name)()
        weights[name] = made[-1].get_weights()
        normalizations = [each for each in made[-1].layers if isinstance(each, AccumBatchNormalization)]
        every[name] = {each.every for each in normalizations}
    assert every == {
        window_norm.FLOOR: set(),
        window_norm.MICRO_BATCHES: {None},
        "accumops, statistics='window', every=1": {1},
        "accumops, statistics='window', every=2": {2},
    }
    whole, of_each = weights.pop(window_norm.FLOOR), weights.pop(window_norm.MICRO_BATCHES)
    assert max(abs(a - b).max() for a, b in zip(whole, of_each, strict=True)) > 1e-3
    for name, each in weights.items():
        for now, wanted in zip(each, whole, strict=True):
            np.testing.assert_allclose(now, wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "normalizations"), [("residual network", 16), ("MobileNetV2", 52)])
def test_networks(name, normalizations):
    network = window_norm.NETWORKS[name]
    model = network.build()
    assert model.output_shape == (None, models.CLASSES)
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers) == normalizations
    assert window_norm.BATCH % network.micro_batch_size == 0


@pytest.mark.exhaustive
def test_memory_that_is_there_before_a_window_does_not_count():
    with processes.that_counts() as process:
        peak = process.call(counted_windows.peak)
    assert 4 <= peak / counted_windows.MIB < 5


def test_memory_that_does_not_shrink_counts_from_before_the_first_window(monkeypatch):
    class Process(ResidentMemory):
        used = 100

        def now(self):
            return self.used

        def forget_peak(self):
            pass

        def peak(self):
            return self.used

    counter, windows = Process(), []

    def prepare():
        counter.used += 50
        return window

    def window():
        windows.append(1)
        counter.used = max(counter.used, 157)

    monkeypatch.setattr(memory, "memory_counter", lambda device: counter)
    assert memory.peak_of_later_windows(prepare, "CPU") == 7
    assert len(windows) > 1
