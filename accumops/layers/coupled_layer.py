"""A layer whose outputs depend on sums over all samples of the batch, and under accumulation of the window."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.untracked import Untracked
from accumops.window import replicas
from accumops.window.coupling import Tensors, at_hand


class CoupledLayer(keras.layers.Layer):
    """A layer whose outputs for a sample depend on the other samples of the batch, by way of sums over all of them.

    It is to be subclassed. `totals` returns sums over the samples that it is given, and `combine` makes the outputs of
    the inputs and the totals. In plain Keras the totals are those of the batch. In a `GradientAccumulateModel` with
    `micro_batch_size` they are those of the whole window: outputs and gradients are the large batch's. The window then
    runs layer by layer, as with batch normalization with `statistics="window"`, and keeps the tensors that lead into
    the layer for all of its samples. Under a strategy the totals are those of all replicas, and without accumulation
    those of a replica. In inference they are those of the batch.

    Whatever is a function of sums can be computed so: means, variances, covariances, counts, and norms over the batch.

    Only a functional or Sequential model can be cut at such a layer. With `accum_steps` the samples of a window are not
    there at the same time, so a model that is compiled with it raises an error. `GradientAccumulateOptimizer` and loops
    of your own do not know the layers of a model: there each micro-batch has totals of its own.

    Example: a layer that appends how much the features differ within the batch, as discriminators have it (Karras et
    al. 2018, https://arxiv.org/abs/1710.10196).

    >>> class BatchDeviation(accumops.layers.CoupledLayer):
    ...     def totals(self, x):
    ...         count = keras.ops.cast(keras.ops.shape(x)[0], "float32")
    ...         return count, keras.ops.sum(x, 0), keras.ops.sum(x * x, 0)
    ...     def combine(self, x, totals):
    ...         count, total, squares = totals
    ...         variance = keras.ops.maximum(squares / count - (total / count) ** 2, 0.0)
    ...         deviation = keras.ops.mean(keras.ops.sqrt(variance + 1e-8))
    ...         return keras.ops.concatenate([x, keras.ops.zeros_like(x[:, :1]) + deviation], 1)
    >>> BatchDeviation()(tf.constant([[1.0, 2.0], [3.0, 2.0]])).numpy()
    array([[1. , 2. , 0.50005],
           [3. , 2. , 0.50005]], dtype=float32)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._coupling = Untracked(structure=None)

    def totals(self, inputs: Any) -> Any:
        """Returns sums over samples: a tensor or a structure of tensors, of shapes that do not depend on the samples.

        The totals of two batches together must be the sums of their totals. The layer may use its variables here, also
        those that are trained; it may not assign any, nor draw random numbers.

        Args:
            inputs: The inputs of the layer.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method `totals(inputs)` that returns sums.")

    def combine(self, inputs: Any, totals: Any) -> Any:
        """Returns the outputs.

        Args:
            inputs: The inputs of the layer.
            totals: What `totals` returns for all samples; in half precision as float32.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method `combine(inputs, totals)`.")

    def call(self, inputs: Any) -> Any:
        """Returns what `combine` does with the totals of the batch, or of the window."""
        exchange = at_hand()
        if exchange is not None:
            return exchange.call(self, inputs)
        return self.combine(inputs, self.packed(self.flat_totals(inputs)))

    def flat_totals(self, inputs: Any) -> list[tf.Tensor]:
        """The tensors in `totals`, float32 in place of half precision.

        Raises:
            ValueError: If the shape of one depends on the samples.
        """
        found = self.totals(inputs)
        self._coupling.structure = found
        tensors = [tf.convert_to_tensor(each) for each in keras.tree.flatten(found)]
        for each in tensors:
            if not each.shape.is_fully_defined():
                raise ValueError(
                    f"The layer '{self.name}' has totals of shape {each.shape}. `totals` must sum over the samples, so "
                    "that its shapes are known."
                )
        return [tf.cast(each, tf.float32) if each.dtype in (tf.float16, tf.bfloat16) else each for each in tensors]

    def packed(self, tensors: Tensors) -> Any:
        """The structure that `totals` has returned last, with other tensors."""
        return keras.tree.pack_sequence_as(self._coupling.structure, list(tensors))

    @property
    def follows_window(self) -> bool:
        """Whether the layer couples the samples of a window: always."""
        return True

    @property
    def coupled_because(self) -> str:
        """Says that it couples the samples of a window, as the beginning of an error."""
        return f"The layer '{self.name}' is a CoupledLayer"

    @property
    def uncoupled(self) -> str:
        """What may stand in its place."""
        return "a layer that looks at each sample by itself"

    def coupling(self) -> "_CouplingBySums":
        """How it couples the samples of a window."""
        return _CouplingBySums(self)


class _Measuring:
    totals: Tensors = ()

    def call(self, layer: CoupledLayer, inputs: Any) -> Any:
        self.totals = layer.flat_totals(inputs)
        return inputs


class _Supplying:
    """Computes outputs of totals, which it has the tape watch."""

    def __init__(self, totals: Tensors, watch: Callable[[tf.Tensor], None]) -> None:
        self._totals = [tf.identity(each) for each in totals]
        self.factors: Tensors = [each for each in self._totals if each.dtype.is_floating]
        self._watch = watch

    def call(self, layer: CoupledLayer, inputs: Any) -> Any:
        for each in self.factors:
            self._watch(each)
        return layer.combine(inputs, layer.packed(self._totals))


class _Tying:
    """Passes the gradient of the window's totals on to a micro-batch: they are sums, so each summand has all of it."""

    tie: Any = None

    def __init__(self, sums: Tensors) -> None:
        self._sums = sums

    def call(self, layer: CoupledLayer, inputs: Any) -> Any:
        floating = [each for each in layer.flat_totals(inputs) if each.dtype.is_floating]
        tied = [
            tf.reduce_sum(tf.cast(tf.stop_gradient(gradient), each.dtype) * each)
            for gradient, each in zip(self._sums, floating, strict=True)
        ]
        self.tie = tf.add_n([tf.cast(each, tf.float64) for each in tied]) if tied else tf.zeros([], tf.float64)
        return inputs


class _CouplingBySums:
    """How a `CoupledLayer` couples the samples of a window: a `Coupling`."""

    def __init__(self, layer: CoupledLayer) -> None:
        self._layer = layer

    def measuring(self) -> _Measuring:
        return _Measuring()

    def supplying(self, totals: Tensors, watch: Callable[[tf.Tensor], None]) -> _Supplying:
        return _Supplying(totals, watch)

    def tying(self, totals: Tensors, sums: Tensors) -> _Tying:
        return _Tying(sums)

    def merged(self, totals: Tensors, others: Tensors) -> Tensors:
        return [a + b for a, b in zip(totals, others, strict=True)]

    def factor_specs(self, totals: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        return [each for each in totals if each.dtype.is_floating]

    def over_replicas(self, totals: Sequence[Tensors]) -> list[Tensors]:
        rest = iter(replicas.sum_over_replicas([each for one in totals for each in one]))
        return [[next(rest) for _ in one] for one in totals]

    def end(self, calls: Sequence[Tensors], *, pooled: bool) -> None:
        """Has nothing to take: the layer has no state of its own."""
