"""Models that plain Keras trains with whole batches, and the same in windows that run layer by layer."""

import contextlib

import keras
import numpy as np

import accumops

RUNS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}


@keras.saving.register_keras_serializable(package="tests")
class SquaresLoss(keras.layers.Layer):
    """Adds a loss that is a mean over samples."""

    def call(self, inputs):
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


@contextlib.contextmanager
def computing_in(dtype):
    """Models that are made in a block compute in a dtype. Keras keeps its first policy, whatever floatx is later."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(before)


class Trained:
    """A model and what its training has logged.

    Args:
        net: The model, without a wrapper.
        model: The model that was trained.
        history: The logs of its epochs.
    """

    def __init__(self, net, model, history):
        self.net, self.model, self.history = net, model, history

    def weights(self):
        """The weights that are numbers: counters of seeds go on as often as a layer is called."""
        return [each for each in self.net.get_weights() if np.issubdtype(each.dtype, np.floating)]


def windows_of(net, **settings):
    """A copy of a model that normalizes by the moments of windows."""
    return accumops.replace_batchnorm_layers(net, statistics="window", **settings)


def train(
    net, data, *, micro=None, every=None, run="eager", optimizer=None, batch=12, epochs=1, model=None, **arguments
):
    """Trains a copy of a model, in windows or as plain Keras does.

    Args:
        net: The model.
        data: The arguments `x`, `y` and others of `fit`.
        micro: Samples a micro-batch, or None for plain Keras.
        every: As for `replace_batchnorm_layers`.
        run: How steps run.
        optimizer: Makes the optimizer.
        batch: Samples a batch.
        epochs: The number of epochs.
        model: Arguments of the `GradientAccumulateModel`.
        **arguments: Arguments of `compile`.
    """
    if micro is None:
        net = trained = accumops.restore_batchnorm_layers(net)
    else:
        net = windows_of(net, every=every)
        trained = accumops.GradientAccumulateModel(net, micro_batch_size=micro, **(model or {}))
    made = keras.optimizers.SGD(0.1, momentum=0.9) if optimizer is None else optimizer()
    trained.compile(made, **({"loss": "mse"} | arguments), **RUNS[run])
    sizes = {} if batch is None else {"batch_size": batch}
    history = trained.fit(**data, **sizes, epochs=epochs, shuffle=False, verbose=0).history
    return Trained(net, trained, history)


def check_same(trained, wanted, atol=1e-11):
    """Checks that weights, moving statistics and logs are the same. The names of outputs may differ."""
    for variable, mine, its in zip(
        trained.net.weights, trained.net.get_weights(), wanted.net.get_weights(), strict=True
    ):
        if np.issubdtype(mine.dtype, np.floating):
            np.testing.assert_allclose(mine, its, rtol=atol, atol=atol, err_msg=variable.path)
    logs = [value for name, value in trained.history.items() if name != "nonfinite_count"]
    for mine, (name, its) in zip(logs, wanted.history.items(), strict=True):
        np.testing.assert_allclose(mine, its, rtol=atol, atol=atol, err_msg=name)
