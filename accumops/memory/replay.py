"""Replay: runs a stretch of a model again, and gets the same bits.

A stretch is a call of layers. What it returns depends on its inputs, on trainable variables, and on its state: every
other variable of the layers, such as seeds of dropout, moving statistics, and metrics. A run takes the state as tensors
and returns the new state as tensors; it assigns nothing. So a run from the same state draws the same random numbers and
normalizes by the same statistics, and whoever runs a stretch several times assigns the state once:

    stretch = Stretch(model)
    stretch.check(inputs)                           raises for layers whose state is not known
    state = stretch.state()
    first = stretch.run(state, inputs)              outputs, layer losses, and the state after them
    again = stretch.run(state, inputs)              the same bits
    stretch.assign(first.state)

The windows of `AccumBatchNormalization` are state that no output depends on. Runs leave them alone, unless they are
told to add the moments of their inputs: one of several runs over the same inputs has to.

Random numbers are the same within one compiler: XLA draws others from the same seed than TensorFlow does.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import StateRecorder, layer_that_added, layers_within, values_of, without_autocast
from accumops.adapters.keras_model import own_metrics, standing_for
from accumops.adapters.tensorflow import is_recorded, operations_within, without_strategy
from accumops.normalization.layer_calls import collecting_moments

State = Sequence[tf.Tensor]


class Run(NamedTuple):
    """What a run of a stretch gives."""

    outputs: Any
    losses: list[tf.Tensor]
    """What layers have added as losses (`add_loss`, activity regularizers), without regularizers of variables."""
    state: list[tf.Tensor]
    """The state after the run, in the order of `Stretch.variables`."""


class Stretch:
    """A call of layers that can be run again.

    Args:
        layers: The layer or model, built, or several.
        call: What a run calls, with the arguments of `run`. If None, the one layer, with `training=True`.
        variables: Variables that the call uses and that the layers do not have.
    """

    def __init__(
        self,
        layers: keras.Layer | Sequence[keras.Layer],
        call: Callable[..., Any] | None = None,
        variables: Sequence[keras.Variable] = (),
    ) -> None:
        layers = [layers] if isinstance(layers, keras.Layer) else list(layers)
        self._call = call or (lambda *args, **kwargs: layers[0](*args, training=True, **kwargs))
        self._layers = _each_once([part for layer in layers for part in layers_within(layer)])
        metrics = [metric for each in self._layers if not isinstance(each, keras.Model) for metric in own_metrics(each)]
        owners = [*layers, *metrics]
        known = _each_once([*(variable for owner in owners for variable in owner.variables), *variables])
        trainable = {id(variable) for layer in layers for variable in layer.trainable_variables}
        trainable |= {id(variable) for variable in variables if variable.trainable}
        self.trainable = [variable for variable in known if id(variable) in trainable]
        """The trainable variables."""
        self.variables = [variable for variable in known if id(variable) not in trainable]
        """The variables that are the state: once `check` has traced a run, those that it assigns."""
        self.unchanged: list[keras.Variable] = []
        """The other variables, once `check` has traced a run."""

    def state(self) -> list[tf.Tensor]:
        """The values of the state now."""
        return values_of(self.variables)

    def assign(self, state: State) -> None:
        """Sets the state."""
        for variable, value in zip(self.variables, state, strict=True):
            variable.assign(tf.stop_gradient(value))

    def run(
        self,
        state: State,
        *args: Any,
        collect_moments: bool | None = False,
        values: Sequence[tuple[keras.Variable, tf.Tensor]] = (),
        **kwargs: Any,
    ) -> Run:
        """Runs the stretch from a state. Assigns no variable.

        Gradients flow to trainable variables, and to `args`, as in any call.

        Args:
            state: The values of `variables`.
            *args: The arguments of the call.
            collect_moments: Whether windows of `AccumBatchNormalization` add the moments of this run; None leaves it to
                how the layers are called.
            values: Pairs of another variable and the value that the run takes for it.
            **kwargs: The keyword arguments of the call.

        Raises:
            ValueError: If the call assigns a Keras variable that is not in the state.
        """
        variables = self.variables
        with (
            collecting_moments(collect_moments),
            StateRecorder(list(zip(variables, state, strict=True)), values) as recorder,
        ):
            outputs = self._call(*args, **kwargs)
        for variable, scope in recorder.unknown:
            trainable = any(variable is each for each in self.trainable)
            raise ValueError(_unknown_state(variable, self._layer_in(scope), trainable))
        return Run(outputs, list(recorder.losses), [recorder.value_of(variable) for variable in variables])

    def check(self, *args: Any, **kwargs: Any) -> Any:
        """Traces one run, and raises for what replay cannot know.

        Args:
            *args: The arguments of a run, as tensors or `tf.TensorSpec`.
            **kwargs: Its keyword arguments.

        Returns:
            The outputs and the layers' losses, as `tf.TensorSpec`.

        Raises:
            ValueError: If the stretch draws random numbers that no Keras seed determines, or assigns a variable that
                Keras does not know; with the layer's name.
        """
        changed: list[keras.Variable] = []

        def trace(state: State, trainable: State, args: Any, kwargs: Any) -> Any:
            run = self.run(state, *args, values=list(zip(self.trainable, trainable, strict=True)), **kwargs)
            changed[:] = [
                variable
                for variable, before, after in zip(self.variables, state, run.state, strict=True)
                if after is not before
            ]
            return run.outputs, run.losses

        with without_autocast():
            specs = [
                [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]
                for variables in (self.variables, self.trainable)
            ]
        function = tf.function(trace, autograph=False)
        with standing_for(eagerly=tf.executing_eagerly()):
            concrete = without_strategy(lambda: function.get_concrete_function(*specs, args, kwargs))
        for tensor, _ in concrete.graph.captures:
            if tensor.dtype != tf.resource and is_recorded(tensor):
                raise ValueError(
                    f"What is to be recomputed uses a tensor from its surroundings that a gradient flows to: {tensor}. "
                    "The gradient would be lost. Pass the tensor as an argument."
                )
        for operation in operations_within(concrete.graph):
            if operation.op_def.is_stateful and operation.type not in _HARMLESS:
                where, what = self._layer_in(operation.name), _effect_of(operation.type)
                raise ValueError(
                    f"The layer '{where}' {what} ({operation.type}). It cannot be run again: the second run would "
                    "differ from the first. Draw random numbers from a `keras.random.SeedGenerator` that is an "
                    "attribute of the layer, and keep state in variables of `add_weight`."
                )
        ids = set(map(id, changed))
        self.unchanged += [variable for variable in self.variables if id(variable) not in ids]
        self.variables = changed
        return keras.tree.map_structure(
            lambda each: None if each is None else tf.TensorSpec(each.shape, each.dtype), concrete.structured_outputs
        )

    def layer_that_added(self, loss: tf.Tensor) -> keras.Layer | None:
        """The layer that has added a loss of a run, or None if the stretch does not know it."""
        return layer_that_added(loss, self._layers)

    def _layer_in(self, scope: str) -> str:
        """The innermost layer that the name of an operation or scope has in it, perhaps with a number after it."""
        names = {layer.name for layer in self._layers}
        for part in reversed(scope.split("/")):
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in names:
                    return name
        return self._layers[0].name if self._layers else scope.rpartition("/")[2]


def _each_once(things: Sequence[Any]) -> list[Any]:
    return list({id(each): each for each in things}.values())


def _unknown_state(variable: keras.Variable, layer: str, trainable: bool) -> str:
    if trainable:
        return (
            f"The layer '{layer}' assigns its trainable variable '{variable.path}' when it is called. It cannot be run "
            "again."
        )
    return (
        f"The layer '{layer}' changes '{variable.path}' when it is called, a variable that Keras does not find among "
        "its attributes, such as the global seed of `keras.random`. It cannot be run again: give it a "
        "`keras.random.SeedGenerator` as an attribute, and pass that as `seed`."
    )


def _effect_of(kind: str) -> str:
    if "Random" in kind or "Normal" in kind or "Uniform" in kind or kind in ("Multinomial", "RngReadAndSkip"):
        return "draws random numbers from a generator that Keras does not know"
    if "Assign" in kind or "Scatter" in kind:
        return "assigns a variable that Keras does not know"
    if "PyFunc" in kind:
        return "calls Python code"
    return "runs an operation with a state of its own"


# Operations that TensorFlow counts as stateful, and that give the same each time.
_HARMLESS = frozenset(
    [
        "Assert",
        "CudnnRNN",
        "CudnnRNNV2",
        "CudnnRNNV3",
        "HashTableV2",
        "If",
        "LookupTableFindV2",
        "LookupTableSizeV2",
        "NoOp",
        "Placeholder",
        "PlaceholderWithDefault",
        "PartitionedCall",
        "PrintV2",
        "ReadVariableOp",
        "ResourceGather",
        "ResourceGatherNd",
        "StatefulPartitionedCall",
        "VarHandleOp",
        "VarIsInitializedOp",
        "VariableShape",
        "While",
    ]
)
