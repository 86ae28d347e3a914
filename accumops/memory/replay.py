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

from accumops.adapters.keras_layer import StateRecorder, layer_losses, layers_within
from accumops.adapters.keras_model import own_metrics
from accumops.adapters.tensorflow import operations_within
from accumops.normalization.layer import collecting_moments

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
        layer: The layer or model, built.
        call: What a run calls, with the arguments of `run`. If None, the layer, with `training=True`.
    """

    def __init__(self, layer: keras.Layer, call: Callable[..., Any] | None = None) -> None:
        self.layer = layer
        self._call = call or (lambda *args, **kwargs: layer(*args, training=True, **kwargs))
        trainable = {id(variable) for variable in layer.trainable_variables}
        layers = [each for each in layers_within(layer) if not isinstance(each, keras.Model)]
        metrics = [metric for each in layers for metric in own_metrics(each)]
        variables = [*layer.variables, *(variable for metric in metrics for variable in metric.variables)]
        self.variables = [variable for variable in variables if id(variable) not in trainable]
        """The variables that are the state: once `check` has traced a run, those that it assigns."""

    def state(self) -> list[tf.Tensor]:
        """The values of the state now."""
        return [tf.identity(tf.convert_to_tensor(variable)) for variable in self.variables]

    def assign(self, state: State) -> None:
        """Sets the state."""
        for variable, value in zip(self.variables, state, strict=True):
            variable.assign(tf.stop_gradient(value))

    def run(self, state: State, *args: Any, collect_moments: bool = False, **kwargs: Any) -> Run:
        """Runs the stretch from a state. Assigns no variable.

        Gradients flow to trainable variables, and to `args`, as in any call.

        Args:
            state: The values of `variables`.
            *args: The arguments of the call.
            collect_moments: Whether windows of `AccumBatchNormalization` add the moments of this run.
            **kwargs: The keyword arguments of the call.

        Raises:
            ValueError: If the call assigns a Keras variable that is not in the state.
        """
        variables = self.variables
        with (
            collecting_moments(collect_moments),
            StateRecorder(list(zip(variables, state, strict=True))) as recorder,
        ):
            outputs = self._call(*args, **kwargs)
            losses = layer_losses(self.layer)
        for variable, scope in recorder.unknown:
            trainable = any(variable is each for each in self.layer.trainable_variables)
            raise ValueError(_unknown_state(variable, self._layer_in(scope), trainable))
        return Run(outputs, losses, [recorder.value_of(variable) for variable in variables])

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

        def trace(*args: Any, **kwargs: Any) -> Any:
            state = self.state()
            run = self.run(state, *args, **kwargs)
            changed[:] = [
                variable
                for variable, before, after in zip(self.variables, state, run.state, strict=True)
                if after is not before
            ]
            return run.outputs, run.losses

        concrete = tf.function(trace, autograph=False).get_concrete_function(*args, **kwargs)
        for operation in operations_within(concrete.graph):
            if operation.op_def.is_stateful and operation.type not in _HARMLESS:
                where, what = self._layer_in(operation.name), _effect_of(operation.type)
                raise ValueError(
                    f"The layer '{where}' {what} ({operation.type}). It cannot be run again: the second run would "
                    "differ from the first. Draw random numbers from a `keras.random.SeedGenerator` that is an "
                    "attribute of the layer, and keep state in variables of `add_weight`."
                )
        self.variables = changed
        return keras.tree.map_structure(
            lambda each: None if each is None else tf.TensorSpec(each.shape, each.dtype), concrete.structured_outputs
        )

    def _layer_in(self, scope: str) -> str:
        """The innermost layer that the name of an operation or scope has in it, perhaps with a number after it."""
        names = {layer.name for layer in layers_within(self.layer)}
        for part in reversed(scope.split("/")):
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in names:
                    return name
        return self.layer.name


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
