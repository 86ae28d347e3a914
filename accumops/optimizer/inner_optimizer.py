"""The optimizer within wrappers, such as a LossScaleOptimizer, and its settings."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_optimizer import SharesAverages, innermost


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


class StandsForInner(SharesAverages):
    """A base class for optimizers that wrap another one, to which they hand on what Keras and its callbacks ask for."""

    inner_optimizer: keras.optimizers.Optimizer

    weight_decay = OfInnermost()
    clipnorm = OfInnermost()
    clipvalue = OfInnermost()
    global_clipnorm = OfInnermost()
    use_ema = OfInnermost()
    ema_momentum = OfInnermost()
    ema_overwrite_frequency = OfInnermost()

    @property
    def iterations(self) -> keras.Variable:
        """The wrapped optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate; setting it sets that one's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The optimizers of a wrapped MultiOptimizer, each with a learning rate of its own.

        Raises:
            AttributeError: If the wrapped optimizer has none.
        """
        return innermost(self.inner_optimizer).optimizers

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Has the wrapped optimizer exclude variables from weight decay."""
        innermost(self.inner_optimizer).exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Scales the loss by the wrapped optimizer's factor, which that optimizer takes out of the gradients again."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Has the wrapped optimizer set the variables' final values, such as their moving averages."""
        self.inner_optimizer.finalize_variable_values(var_list)
