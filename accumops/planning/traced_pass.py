"""The pass of a model over a micro-batch as a graph that runs anywhere: here, or in a process of its own.

The pass is traced, and nothing runs. Where it is loaded (`loaded_pass.py`), it gets variables of its own with the same
shapes, so that running it changes nothing of the model. The graph needs no Python code of the model.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accumops.ops.variables import tf_variable


class Leaf(NamedTuple):
    """A tensor of a batch."""

    shape: tuple[int | None, ...]
    """None for the samples, if the tensor is cut into micro-batches."""
    dtype: str


class Captured(NamedTuple):
    """What a graph uses besides its arguments."""

    kind: str
    """`"variable"`, `"value"`, or `"resource"`: a table or something else that exists in one process only."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: Any = None


@dataclasses.dataclass(frozen=True)
class TracedPass:
    """A pass forward and backward, as a graph."""

    graph: bytes
    """A serialized GraphDef."""
    leaves: tuple[Leaf, ...]
    """The tensors of a batch, which are the graph's first arguments."""
    captured: tuple[Captured, ...]
    """The graph's other arguments."""
    arguments: tuple[str, ...]
    """The names of all arguments."""
    gradients: tuple[tuple[int, tuple[str, ...]], ...]
    """For each gradient which of the captured variables it is for, and the names of its tensors: one, or three of
    `tf.IndexedSlices`."""
    jit_compile: bool
    """Whether XLA compiles the pass."""

    @property
    def stays_here(self) -> bool:
        """Whether it cannot run in another process."""
        return any(each.kind == "resource" for each in self.captured) or b"PyFunc" in self.graph

    @property
    def fingerprint(self) -> str:
        """Is equal for passes that compute the same, whatever names their parts have."""
        definition = tf.compat.v1.GraphDef.FromString(self.graph)
        library = {function.signature.name: function for function in definition.library.function}
        values = [np.asarray(each.value).tobytes() for each in self.captured if each.kind == "value"]
        kinds = [each[:3] for each in self.captured]
        described = (_without_names(definition.node, library), self.leaves, kinds, values, self.jit_compile)
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def batch_of(self, samples: int) -> list[tf.Tensor]:
        """Zeros for a micro-batch with so many samples."""
        return [tf.zeros(shape, leaf.dtype) for shape, leaf in zip(self._shapes(samples), self.leaves, strict=True)]

    def bytes_of_batch(self, samples: int) -> int:
        """The bytes of a batch with so many samples."""
        return sum(
            math.prod(shape) * tf.as_dtype(leaf.dtype).size
            for shape, leaf in zip(self._shapes(samples), self.leaves, strict=True)
        )

    def _shapes(self, samples: int) -> list[tuple[int, ...]]:
        return [tuple(samples if size is None else size for size in leaf.shape) for leaf in self.leaves]


def trace_pass(
    model: keras.Model,
    data: Any,
    whole: Sequence[tf.Tensor] = (),
    *,
    jit_compile: bool,
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> TracedPass:
    """Traces the pass of a model, compiled, over a micro-batch.

    Args:
        model: The model.
        data: A batch: a structure of tensors, with None for parts that it lacks.
        whole: The tensors of the batch that each micro-batch gets whole.
        jit_compile: Whether XLA compiles the pass.
        around: Makes the context in which the model runs in training.
    """
    uncut = {id(each) for each in whole}
    flat = keras.tree.flatten(data)
    tensors = [each for each in flat if each is not None]
    leaves = [
        Leaf((None, *tensor.shape[1:]) if cut else tuple(tensor.shape), tensor.dtype.name)
        for tensor in tensors
        for cut in [id(tensor) not in uncut and tensor.shape.rank > 0]
    ]

    weights = [tf_variable(each) for each in model.trainable_variables]

    def run(*arguments: tf.Tensor) -> list[Any]:
        rest = iter(arguments)
        given = [None if each is None else next(rest) for each in flat]
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(keras.tree.pack_sequence_as(data, given))
        with around(), tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        gradients = tape.gradient(loss, weights)
        return [[] if each is None else tf.nest.flatten(each, expand_composites=True) for each in gradients]

    function = tf.function(run, autograph=False, jit_compile=jit_compile)
    concrete = function.get_concrete_function(*(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves))
    variables = {id(variable.handle): variable for variable in concrete.variables}
    captured = [_captured(tensor, variables.get(id(tensor))) for tensor in concrete.captured_inputs]
    positions = {id(tensor): i for i, tensor in enumerate(concrete.captured_inputs)}
    names = iter(tensor.name for tensor in concrete.outputs)
    gradients = [
        (positions[id(variable.handle)], tuple(next(names) for _ in parts))
        for variable, parts in zip(weights, concrete.structured_outputs, strict=True)
        if parts
    ]
    return TracedPass(
        concrete.graph.as_graph_def().SerializeToString(deterministic=True),
        tuple(leaves),
        tuple(captured),
        tuple(tensor.name for tensor in concrete.inputs),
        tuple(gradients),
        jit_compile,
    )


def _captured(tensor: tf.Tensor, variable: tf.Variable | None) -> Captured:
    if variable is not None:
        return Captured("variable", tuple(variable.shape), variable.dtype.name)
    if tensor.dtype in (tf.resource, tf.variant):
        return Captured("resource", value=tensor)
    return Captured("value", tuple(tensor.shape), tensor.dtype.name, tensor.numpy())


def _without_names(nodes: Sequence[Any], library: Mapping[str, Any]) -> list[Any]:
    """Describes operations in their order: what each is, computes on and is set to, but not what it is called.

    Args:
        nodes: The operations.
        library: The functions that they may call, by name.
    """
    places = {node.name: str(i) for i, node in enumerate(nodes)}

    def place(name: str) -> str:
        control, node, rest = re.fullmatch(r"(\^?)([^:]+)(.*)", name).groups()  # type: ignore[union-attr]
        return control + places.get(node, "argument") + rest

    def setting(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "func":
            function = library.get(value.func.name)
            return value.func.name if function is None else _without_names(function.node_def, library)
        return value.SerializeToString(deterministic=True)

    return [
        (
            node.op,
            [place(name) for name in node.input],
            [(key, setting(node.attr[key])) for key in sorted(node.attr) if key not in _NAMES],
        )
        for node in nodes
    ]


_NAMES = ("_class", "_user_specified_name", "config_proto", "container", "shared_name")
"""Settings that name something, or that say how and not what."""
