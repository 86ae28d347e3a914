"""Recompute: a call that keeps its arguments, and computes what its gradient needs again.

The forward pass of the call is run from a state (`replay.py`), and the state is assigned once. What it computes is let
go, except its outputs. Backward, the call is run again from the same state, with the same bits: dropout draws the same
masks, and statistics do not move a second time. The second run stands behind a barrier (`accumops.ops.barrier`): it
starts when its gradient is wanted, and no compiler takes it for the first.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import StateRecorder, values_of
from accumops.adapters.keras_model import logits_of, mask_of, with_logits, with_mask
from accumops.adapters.tensorflow import xla_compiles_this
from accumops.memory.replay import Run, Stretch
from accumops.normalization.layer_calls import collects_moments
from accumops.ops import barrier


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that keeps its arguments, and computes what its gradient needs again.

    Training takes less memory, for another forward pass of the function. Gradients and state are those of `function`:
    in the second run dropout draws the masks of the first, and moving statistics do not move again. In that it differs
    from `tf.recompute_grad`.

    Args:
        function: A function of tensors, a `keras.Layer`, or a method of one. It takes and returns any structures of
            tensors, also with None, bools, ints and other values that are no tensors. Its Keras layers and variables
            may come from its surroundings or be arguments; tensors that gradients flow to have to be arguments.

    Returns:
        The function, which takes the same arguments. Make it once, outside the loop of training, as it checks
        `function` when it is called first. Variables among its arguments arrive as tensors.

    Raises:
        TypeError: If `function` is not callable.
        ValueError: When it is called: if `function` draws random numbers without a Keras seed of its layers, assigns a
            variable that Keras does not know, uses a tensor from its surroundings that a gradient flows to, or if a
            layer within it adds a loss and `function` is not a layer.

    Example:

    >>> block = keras.Sequential([keras.layers.Dense(64, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(8)])
    >>> recomputed = accumops.recompute(block)
    >>> x = tf.random.normal([16, 8])
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_mean(recomputed(x, training=True) ** 2)
    >>> gradients = tape.gradient(loss, block.trainable_variables)

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    if not callable(function):
        raise TypeError(f"`function` must be callable. Received: {function!r}")
    owner = function if isinstance(function, keras.Layer) else getattr(function, "__self__", None)
    again = Recomputation(function, [owner] if isinstance(owner, keras.Layer) else [])

    @functools.wraps(function, updated=())
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return again(*args, **kwargs)

    return recomputed


class Recomputation:
    """A call whose gradient computes it again.

    Args:
        function: The call.
        layers: The layers that it calls. If there are none, a trace of the call finds the variables that it uses.
        saves: Whether the call keeps tensors of its own. It then takes a keyword argument `saved`, which is None in the
            first run, and returns its outputs and a list of tensors. The second run gets that list, as `saved`.
    """

    def __init__(self, function: Callable[..., Any], layers: Sequence[keras.Layer], *, saves: bool = False) -> None:
        self._function = function
        self._saves = saves
        self._save_count = 0
        self._layers = list(layers)
        self._stretches: dict[str, Stretch] = {}
        self._returned = Leaves(None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the call returns. Losses that layers add in it are those layers' losses."""
        arguments = Leaves((args, kwargs))
        stretch = self._stretch(arguments)
        trainable, state = values_of(stretch.trainable), stretch.state()
        unchanged = list(zip(stretch.unchanged, values_of(stretch.unchanged), strict=True))
        count, collects = len(arguments.tensors), collects_moments()
        firsts: list[Run] = []

        def run(
            tensors: Sequence[tf.Tensor], state: Sequence[tf.Tensor], saved: Any = None, collects: bool | None = False
        ) -> tuple[Run, Any]:
            values = [*zip(stretch.trainable, tensors[count:], strict=True), *unchanged]
            made = stretch.run(state, tensors[:count], arguments, saved, values=values, collect_moments=collects)
            outputs = made.outputs[: len(made.outputs) - self._save_count]
            return made._replace(outputs=outputs), made.outputs[len(outputs) :]

        @tf.custom_gradient
        def forward(*tensors: tf.Tensor) -> Any:
            # A tape that runs eagerly would keep what leads to a gradient.
            first, saved = run([tf.stop_gradient(tensor) for tensor in tensors], state, collects=collects)
            firsts.append(first)

            def gradient(*upstream: tf.Tensor, variables: Sequence[tf.Variable] | None = None) -> Any:
                given = [None if each is None else tf.convert_to_tensor(each) for each in upstream]
                # XLA would copy variables to pass them through a barrier.
                behind = count if xla_compiles_this(unknown=False) else len(tensors)
                after = [each for each in given if each is not None]
                same = barrier([*tensors[:behind], *saved, *state], after=after)
                inputs, end = [*same[:behind], *tensors[behind:]], behind + len(saved)
                sources = [each for each in inputs if _is_differentiable(each)] + list(variables or ())
                with tf.GradientTape() as tape:
                    tape.watch([each for each in sources if isinstance(each, tf.Tensor)])
                    second, _ = run(inputs, same[end:], same[behind:end])
                pairs = [
                    pair
                    for pair in zip((*second.outputs, *second.losses), given, strict=True)
                    if pair[1] is not None and _is_differentiable(pair[0])
                ]
                targets, of_targets = zip(*pairs, strict=True) if pairs else ((), ())
                gradients = iter(tape.gradient(targets, sources, output_gradients=of_targets))
                of_tensors = [next(gradients) if _is_differentiable(each) else None for each in inputs]
                return of_tensors if variables is None else (of_tensors, list(gradients))

            return [*first.outputs, *first.losses], gradient

        results = forward(*arguments.tensors, *trainable)
        (first,) = firsts
        outputs = results[: len(first.outputs)]
        for loss, result in zip(first.losses, results[len(outputs) :], strict=True):
            layer = stretch.layer_that_added(loss)
            if layer is None:
                raise ValueError(
                    "A layer within the function adds a loss (`add_loss` or an activity regularizer), and `recompute` "
                    "does not know the layer. Wrap the layers that the function calls in `accumops.Recompute` instead."
                )
            layer.add_loss(result)
        stretch.assign(first.state)
        return self._returned.filled(outputs)

    def _call(self, tensors: Sequence[tf.Tensor], arguments: "Leaves", saved: Any = None) -> list[tf.Tensor]:
        args, kwargs = arguments.filled(tensors)
        if self._saves:
            outputs, to_save = self._function(*args, saved=saved, **kwargs)
        else:
            outputs, to_save = self._function(*args, **kwargs), []
        self._returned, self._save_count = Leaves(outputs, operations=True), len(to_save)
        return [*self._returned.tensors, *to_save]

    def _stretch(self, arguments: "Leaves") -> Stretch:
        """The stretch that runs the call with arguments of these kinds, checked."""
        # Windows of batch normalization are no state. Where it is not told to add to them, its statistics are.
        moments = None if collects_moments() is None else False
        # Layers may be frozen, or get other variables, between calls.
        variables = [(id(each), each.trainable) for layer in self._layers for each in layer.variables]
        key = f"{moments} {variables} {arguments.kinds()}"
        if key not in self._stretches:
            specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in arguments.tensors]
            found: list[keras.Variable] = []
            if not self._layers or not all(layer.built for layer in self._layers):
                _trace(lambda tensors: self._call(tensors, arguments), specs)  # builds layers
            if not self._layers:
                found = self._variables_of(specs, arguments)
            stretch = Stretch(self._layers, self._call, found)
            stretch.check(specs, arguments, collect_moments=moments)
            self._stretches[key] = stretch
        return self._stretches[key]

    def _variables_of(self, specs: list[tf.TensorSpec], arguments: "Leaves") -> list[keras.Variable]:
        """The Keras variables that the call reads or assigns."""
        found: dict[int, keras.Variable] = {}

        def trace(tensors: list[tf.Tensor]) -> None:
            with StateRecorder([]) as recorder:
                self._call(tensors, arguments)
            found.update(recorder.read)
            found.update({id(variable): variable for variable, _ in recorder.unknown})

        _trace(trace, specs)
        return list(found.values())


def with_value(computed: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """The value, with the gradient and the mask of what computes it again. A graph need not compute it then.

    Args:
        computed: What computes the value again.
        value: The value.
    """
    return with_mask(_with_gradient(value, computed), mask_of(computed))


@tf.custom_gradient
def _with_gradient(value: tf.Tensor, computed: tf.Tensor) -> Any:
    return tf.identity(value), lambda upstream: (None, upstream)


class Leaves:
    """A structure of arguments or results, and the tensors in it.

    Masks, the logits of probabilities, and the parts of composite tensors are among the tensors.

    Args:
        structure: Any structure. What is no tensor or variable in it stays as it is.
        operations: Whether to find the logits of TensorFlow's own softmax and sigmoid, too.
    """

    def __init__(self, structure: Any, *, operations: bool = False) -> None:
        self._logits_of = functools.partial(logits_of, operations=operations)
        self._structure = keras.tree.map_structure(_tensor_or_same, structure)
        self.tensors: list[tf.Tensor] = []
        """The tensors, in the order in which `filled` takes them."""
        for leaf in keras.tree.flatten(self._structure):
            if tf.is_tensor(leaf):
                self.tensors += tf.nest.flatten(leaf, expand_composites=True)
                self.tensors += [each for each in (mask_of(leaf), self._logits_of(leaf)) if each is not None]

    def filled(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Returns the structure with other tensors."""
        rest = iter(tensors)

        def fill(leaf: Any) -> Any:
            if not tf.is_tensor(leaf):
                return leaf
            parts = [next(rest) for _ in tf.nest.flatten(leaf, expand_composites=True)]
            packed = tf.nest.pack_sequence_as(leaf, parts, expand_composites=True)
            with_mask(packed, None if mask_of(leaf) is None else next(rest))
            return with_logits(packed, None if self._logits_of(leaf) is None else next(rest), leaf)

        return keras.tree.map_structure(fill, self._structure)

    def kinds(self) -> str:
        """Describes the structure: the dtypes of its tensors, and the values of all else."""

        def describe(leaf: Any) -> str:
            if not tf.is_tensor(leaf):
                return repr(leaf)
            beside = mask_of(leaf) is not None, self._logits_of(leaf) is not None
            return f"{type(leaf).__name__} {leaf.dtype.name} {beside}"

        return str(keras.tree.map_structure(describe, self._structure))


def _tensor_or_same(leaf: Any) -> Any:
    return tf.convert_to_tensor(leaf) if isinstance(leaf, keras.Variable | tf.Variable) else leaf


def _is_differentiable(tensor: tf.Tensor) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _trace(function: Callable[..., Any], specs: list[tf.TensorSpec]) -> None:
    tf.function(function, autograph=False).get_concrete_function(specs)
