"""The optimizer within wrappers, such as a LossScaleOptimizer, and its settings."""

from typing import Any

import keras


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer that makes the update, inside of all that wrap it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


class OfInnermost:
    """A setting of the innermost optimizer, which Keras and its callbacks look up on the optimizer that they are given.

    It acts once a window, where the innermost optimizer makes the update.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self.__doc__ = f"The wrapped optimizer's `{name}`."

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(innermost(optimizer.inner_optimizer), self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        if hasattr(optimizer, "inner_optimizer"):  # not yet in the base class's constructor
            setattr(innermost(optimizer.inner_optimizer), self._name, value)
