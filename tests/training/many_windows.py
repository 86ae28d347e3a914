"""A small model that trains for many windows, for tests of what piles up."""

import keras
import tensorflow as tf

from accumops import GradientAccumulateModel


class ManyWindows:
    """A model, its data without end, and how often it was traced.

    Args:
        mode: "accum_steps" or "micro_batch_size": windows are of 2 micro-batches.
    """

    def __init__(self, mode):
        traces = []

        class Counted(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x * 1.0

        net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "tanh"), Counted(), keras.layers.Dense(1)])
        self._model = GradientAccumulateModel(net, **{mode: 2})
        self._model.compile(keras.optimizers.Adam(0.01), loss="mse")
        self._traces = traces
        self._steps_a_window = 2 if mode == "accum_steps" else 1
        samples = 4 // self._steps_a_window
        self._data = tf.data.Dataset.from_tensors((tf.ones([samples, 5]), tf.ones([samples, 1]))).repeat()

    @property
    def traces(self):
        return len(self._traces)

    @property
    def updates(self):
        return int(self._model.optimizer.iterations)

    def train(self, windows):
        self._model.fit(self._data, steps_per_epoch=windows * self._steps_a_window, verbose=0)
