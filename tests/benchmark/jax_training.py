"""Runs in a process whose Keras runs on JAX."""

import keras

from accumops.benchmark import jax_scan, models

SMALL = models.Problem("small MLP", models.perceptron(5, 2), (5,))


def two_windows():
    """Trains on the same window twice. Returns the weights before and after."""
    keras.utils.set_random_seed(1)
    model = SMALL.build(keras)
    before = [each.tolist() for each in model.get_weights()]
    window = jax_scan.windows_of(model, *(each.numpy() for each in SMALL.data(8)), micro_batch=2)
    window()
    return [before, [each.tolist() for each in window()]]
