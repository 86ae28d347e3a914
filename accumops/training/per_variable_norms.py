"""The norms of single variables' gradients, for whoever trains: a model, an optimizer or a loop."""

from typing import Any

import keras
import tensorflow as tf

from accumops.training.callbacks import accumulating_within
from accumops.window.accumulator import GradientAccumulator


def per_variable_norms(
    source: keras.Model | keras.optimizers.Optimizer | GradientAccumulator,
) -> dict[str, float]:
    """Returns the norm of each variable's gradient, of the last window that has ended.

    The gradient is the window's: the mean over its micro-batches, or their sum with `reduction="sum"`. It is taken
    before any clipping, and without the factor of a loss that an optimizer scales. A variable that the window had no
    gradient for has 0. If `nonfinite` has kept the window from an update, all norms are NaN, as they are before a first
    window has ended.

    Somebody has to ask for the norms before functions are traced: `GradientAccumulator.track_norms`, which is
    `optimizer.accumulator.track_norms()` with an optimizer, or in `fit` the callback
    `AccumulationLogger(per_variable_norms=True)`, which also writes them for TensorBoard.

    The call reads one small tensor, which waits for a GPU to end its work. Between calls nothing does.

    Args:
        source: A model that is compiled with a `GradientAccumulateOptimizer`, such as a `GradientAccumulateModel`; a
            `GradientAccumulateOptimizer`, or a `LossScaleOptimizer` around one; or a `GradientAccumulator`.

    Returns:
        A dict from variables' paths, in the order of the trained variables, to floats. For a `tf.Variable` it is the
        name. Where names repeat, `_1`, `_2` and so on follow them.

    Raises:
        TypeError: If `source` is none of these.
        ValueError: If it does not accumulate, is not built, nobody has asked for the norms, or in a `tf.function`.

    Example:

    >>> variables = [keras.Variable([0.0, 0.0], name="a"), keras.Variable(0.0, name="b")]
    >>> accumulator = accumops.GradientAccumulator(accum_steps=2)
    >>> accumulator.track_norms()
    >>> accumulator.build(variables)
    >>> for _ in range(2):
    ...     accumulator.accumulate([tf.constant([3.0, 4.0]), tf.constant(-2.0)])
    >>> gradients = accumulator.close()
    >>> accumops.per_variable_norms(accumulator)
    {'a': 5.0, 'b': 2.0}
    """
    accumulator = _accumulator_of(source)
    if not tf.executing_eagerly():
        raise ValueError("`per_variable_norms` returns numbers: call it outside of `tf.function`.")
    if not accumulator.built:
        raise ValueError(f"{accumulator.name} is not built: no window has ended.")
    norms = accumulator.state.notes.norms
    if norms is None:
        raise ValueError(
            f"Nobody has asked {accumulator.name} for norms. Call its `track_norms()` before functions are traced, or "
            "give `fit` the callback AccumulationLogger(per_variable_norms=True)."
        )
    return norms.read()


def _accumulator_of(source: Any) -> GradientAccumulator:
    if isinstance(source, GradientAccumulator):
        return source
    if isinstance(source, keras.optimizers.Optimizer):
        optimizer = accumulating_within(source)
    elif isinstance(source, keras.Model):
        optimizer = accumulating_within(getattr(source, "optimizer", None))
    else:
        raise TypeError(
            "`per_variable_norms` takes a model, a GradientAccumulateOptimizer or a GradientAccumulator. "
            f"Received: {source!r}"
        )
    if optimizer is None:
        raise ValueError(f"Nothing accumulates in {source!r}: there is no GradientAccumulateOptimizer.")
    return optimizer.accumulator
