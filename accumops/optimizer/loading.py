"""How the state of an optimizer that accumulates is set and loaded, also from the wrapped optimizer's state alone."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accumops.optimizer.inner_optimizer import StandsForInner
from accumops.window.accumulator import GradientAccumulator


class LoadsState(StandsForInner):
    """A base class for an optimizer with a wrapped optimizer and a window."""

    built: bool

    @property
    @abc.abstractmethod
    def accumulator(self) -> GradientAccumulator:
        """The accumulator of the window's gradients."""

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all of `variables`: the wrapped optimizer's, then the window's state.

        Args:
            weights: An array for each of `variables`, or for each of the wrapped optimizer's; then the open window is
                dropped.

        Raises:
            ValueError: If it is not built, or the number of arrays or a shape does not fit. Nothing is set then.
        """
        if not self.built:
            raise ValueError("`set_weights` needs an optimizer that is built: call `build(trainable_variables)` first.")
        inner, weights = self.inner_optimizer.variables, list(weights)
        variables = inner if len(weights) == len(inner) else self.variables
        if len(weights) != len(variables):
            raise ValueError(
                f"`weights` must be {len(self.variables)} arrays, or {len(inner)} for the wrapped optimizer alone. "
                f"Received: {len(weights)}"
            )
        for variable, weight in zip(variables, weights, strict=True):
            if tuple(variable.shape) != np.shape(weight):
                raise ValueError(
                    f"The weight of '{variable.path}' must have shape {tuple(variable.shape)}. "
                    f"Received: {np.shape(weight)}"
                )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)
        if variables is inner and self.accumulator.built:
            self.accumulator.reset()

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` stored, or the variables of the wrapped optimizer alone.

        A model that was saved before it was wrapped has only these. The next window then starts empty.
        """
        if self.accumulator.built and len(store.keys()) == len(self.inner_optimizer.variables):
            self.inner_optimizer.load_own_variables(store)
            self.accumulator.reset()
            return
        super().load_own_variables(store)
