"""The variables that an optimizer was built for, and gradients in their order."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.ops.variables import tf_variable


class KnownVariables:
    """The variables that an optimizer was built for.

    Args:
        variables: The variables, in the order of the window's accumulators.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self.variables = list(variables)
        self._positions = {tf_variable(variable).ref(): i for i, variable in enumerate(variables)}

    def positions(self, variables: Sequence[tf.Variable | keras.Variable] | None) -> list[int]:
        """Returns the positions of some variables among all, or all positions.

        Raises:
            ValueError: If one of them is not known.
        """
        if variables is None:
            return list(range(len(self.variables)))
        positions = []
        for variable in variables:
            position = self._positions.get(tf_variable(variable).ref())
            if position is None:
                raise ValueError(
                    f"Unknown variable: {variable}. This optimizer can only be called for the variables that it was "
                    "built with. For other variables, make a new one."
                )
            positions.append(position)
        return positions

    def in_order(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        variables: Sequence[tf.Variable | keras.Variable],
    ) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """Returns a gradient for each of all variables, in their order.

        Args:
            gradients: One for each of `variables`.
            variables: Some of the variables, in any order; the others get None.

        Raises:
            ValueError: If the numbers differ, or a variable is not known or given twice.
        """
        if len(gradients) != len(variables):
            raise ValueError(
                "There must be one gradient for each variable. "
                f"Received: {len(gradients)} gradients for {len(variables)} variables."
            )
        positions = self.positions(variables)
        if len(set(positions)) < len(positions):
            raise ValueError("A variable is given twice. Give each variable once, and its gradients summed.")
        given = dict(zip(positions, gradients, strict=True))
        return [given.get(i) for i in range(len(self.variables))]
