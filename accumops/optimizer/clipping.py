"""Adaptive gradient clipping: each gradient is clipped by the norm of its weights."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops import ops
from accumops.arguments import check_positive, name_of
from accumops.renamed import explains_renamed


@keras.saving.register_keras_serializable(package="accumops")
class AdaptiveGradientClipping:
    """Scales gradients down that are large compared with their weights, unit by unit.

    Adaptive gradient clipping as in Brock et al., 2021, [High-Performance Large-Scale Image Recognition Without
    Normalization](https://arxiv.org/abs/2102.06171), equation 3. For each unit `i`, with gradient `G_i` and weights
    `W_i`:

        G_i  <-  clip_factor * max(|W_i|, epsilon) / |G_i| * G_i    if |G_i| / max(|W_i|, epsilon) > clip_factor

    A unit is the part of a variable that feeds one output: all values at one index of the last axis, as in the kernels
    of `Dense`, `(in, out)`, and `Conv2D`, `(height, width, in, out)`. A vector or scalar, such as a bias or a gain, is
    one unit. Layouts with another fan-in (multi-head projections, depthwise kernels and transposed convolutions) are
    treated alike: their units are the indices of the last axis, too.

    Norms are taken of the gradients as they are given: give unscaled gradients and, where gradients are accumulated,
    those of the whole window. A unit whose gradient is not finite is left as it is, for loss scaling to find. No
    gradient flows back through the clipping, except with `accumops.set_backend("reference")`.

    Args:
        clip_factor: The largest norm of a unit's gradient, as a share of the norm of its weights: a finite number
            greater than 0. The paper calls it lambda; the larger the batch, the smaller it should be.
        epsilon: The smallest norm that weights count with, so that weights of zero can grow: a finite number greater
            than 0.
        exclude: Regular expressions. If `re.search` finds one of them in the `path` of a variable (the `name` of a
            `tf.Variable`), the variable is not clipped. The paper leaves out the final linear layer.

    Raises:
        TypeError: If `clip_factor` or `epsilon` is not a number, or `exclude` is not an iterable of strings.
        ValueError: If `clip_factor` or `epsilon` is not finite or not greater than 0, or a string of `exclude` is not
            a regular expression.

    Example:

    >>> layers = [keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1, name="head")]
    >>> model = keras.Sequential([keras.Input((3,)), *layers])
    >>> variables = model.trainable_variables
    >>> optimizer = keras.optimizers.SGD(0.1)
    >>> optimizer.build(variables)
    >>> clip = accumops.AdaptiveGradientClipping(clip_factor=0.01, exclude=["head/"])
    >>> @tf.function
    ... def train_step(x, y):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    ...     gradients = clip(tape.gradient(loss, variables), variables)
    ...     optimizer.apply(gradients, variables)
    ...     return gradients
    >>> limits = 0.01 * tf.norm(tf.convert_to_tensor(variables[0]), axis=0)
    >>> gradients = train_step(tf.ones([8, 3]), tf.fill([8, 1], 100.0))
    >>> bool(tf.reduce_all(tf.norm(gradients[0], axis=0) <= 1.001 * limits))
    True
    """

    @explains_renamed
    def __init__(self, clip_factor: float = 0.01, epsilon: float = 1e-3, exclude: Iterable[str] = ()) -> None:
        self._clip_factor = check_positive("clip_factor", clip_factor)
        self._epsilon = check_positive("epsilon", epsilon)
        self._exclude = _check_exclude(exclude)

    @property
    def clip_factor(self) -> float:
        """The largest norm of a unit's gradient, as a share of the norm of its weights."""
        return self._clip_factor

    @property
    def epsilon(self) -> float:
        """The smallest norm that weights count with."""
        return self._epsilon

    @property
    def exclude(self) -> tuple[str, ...]:
        """The regular expressions for the variables that are not clipped."""
        return tuple(pattern.pattern for pattern in self._exclude)

    def __call__(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        variables: Sequence[tf.Variable | keras.Variable],
    ) -> list[tf.Tensor | tf.IndexedSlices | None]:
        """Returns the clipped gradients, each of its own dtype.

        Args:
            gradients: One for each variable: a tensor, `tf.IndexedSlices` or None; each is returned as the same kind.
                `tf.IndexedSlices` keep their indices. Rows that repeat are clipped by the norm of their sum.
            variables: The variables, in the order of `gradients`.

        Raises:
            ValueError: If their numbers differ, or a gradient's shape or dtype does not fit.
        """
        gradients, variables = list(gradients), list(variables)
        if len(gradients) != len(variables):
            raise ValueError(
                "There must be one gradient for each variable. "
                f"Received: {len(gradients)} gradients for {len(variables)} variables."
            )
        chosen = [
            i
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
            if gradient is not None and not self._excludes(variable)
        ]
        clipped = ops.clip_units(
            [gradients[i] for i in chosen],
            [variables[i] for i in chosen],
            clip_factor=self._clip_factor,
            epsilon=self._epsilon,
        )
        for i, each in zip(chosen, clipped, strict=True):
            gradients[i] = each
        return gradients

    def _excludes(self, variable: tf.Variable | keras.Variable) -> bool:
        return any(pattern.search(name_of(variable)) for pattern in self._exclude)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this object again."""
        return {"clip_factor": self.clip_factor, "epsilon": self.epsilon, "exclude": list(self.exclude)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AdaptiveGradientClipping":
        """Makes an object from what `get_config` returned."""
        return cls(**config)

    def __repr__(self) -> str:
        return (
            f"<AdaptiveGradientClipping clip_factor={self.clip_factor}, epsilon={self.epsilon}, "
            f"exclude={list(self.exclude)}>"
        )


def _check_exclude(exclude: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    if isinstance(exclude, str):
        raise TypeError(f"`exclude` must be an iterable of strings: for one of them, use [{exclude!r}].")
    if not isinstance(exclude, Iterable):
        raise TypeError(f"`exclude` must be an iterable of strings. Received: {exclude!r}")
    patterns = []
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"`exclude` must be an iterable of strings. Received one that holds {pattern!r}")
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"`exclude` must hold regular expressions. Received: {pattern!r} ({error})") from error
    return tuple(patterns)
