"""The optimizer within wrappers, such as a LossScaleOptimizer."""

import keras


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer that makes the update, inside of all that wrap it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer
