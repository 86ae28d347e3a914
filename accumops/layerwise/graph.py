"""The calls of a model's graph as one list, those of graphs within it included."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import Node, call_node, graph_of, nodes_of
from accumops.adapters.keras_layer import layers_within
from accumops.adapters.keras_model import mask_of, with_mask
from accumops.window.coupling import couples

Key = tuple[tuple[int, ...], int]
"""A tensor of the graph: the calls of graphs that it is in, and the identity of the symbolic tensor. A graph that is
called twice has each of its tensors twice."""


class Call(NamedTuple):
    """A call of an operation."""

    node: Node
    place: tuple[int, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    casts: tuple[str, ...] = ()
    """For the call that hands a graph inputs of other dtypes than it was made for: their dtypes there."""

    @property
    def operation(self) -> Any:
        """What is called."""
        return self.node.operation

    def run(self, values: dict[Key, Any], settings: dict[str, Any]) -> None:
        """Makes the call. Without all of its inputs it is left out, as Keras does.

        Args:
            values: The tensors of the graph. Those of the call's outputs are added.
            settings: What the graph was called with besides its inputs, such as `training`.
        """
        if self.casts:
            for source, target, dtype in zip(self.inputs, self.outputs, self.casts, strict=True):
                if source in values:
                    values[target] = with_mask(tf.cast(values[source], dtype), mask_of(values[source]))
            return
        pairs = zip(self.node.inputs, self.inputs, strict=True)
        own = {identity: values[key] for identity, key in pairs if key in values}
        call_node(self.node, own, settings)
        values.update({key: own[key[1]] for key in self.outputs if key[1] in own})


class Graph(NamedTuple):
    """The calls of a graph."""

    calls: list[Call]
    inputs: list[Key]
    outputs: list[Key]
    bytes_of: dict[Key, int]
    """The bytes of a sample in each tensor, 0 where they are not known."""


def graph_of_calls(model: keras.Model) -> Graph:
    """Returns the calls of a model, in the order in which Keras makes them.

    Graphs within the graph are opened if they have layers that couple samples.

    Args:
        model: The model.

    Raises:
        ValueError: If the model is no graph that Keras knows, or such a layer is not called by a graph; with its name.
    """
    graph = _opened(model, model)
    sizes: dict[Key, int] = {}

    def walk(graph: keras.Function, place: tuple[int, ...], names: dict[int, Key]) -> Iterator[Call]:
        def key(identity: int) -> Key:
            return names.get(identity, (place, identity))

        for number, node in enumerate(nodes_of(graph)):
            inputs = tuple(map(key, node.inputs))
            outputs = tuple((place, each) for each in node.outputs)
            for each, tensor in zip(outputs, node.keras_node.outputs, strict=True):
                sizes[each] = _bytes_of_sample(tensor)
            operation = node.operation
            if not (isinstance(operation, keras.Layer) and _couples_within(operation)):
                yield Call(node, place, inputs, outputs)
                continue
            inner, inside = _opened(operation, model), (*place, number)
            given = node.keras_node.input_tensors
            if len(inner.inputs) != len(inputs) or any(
                len(a.shape) != len(b.shape) for a, b in zip(inner.inputs, given, strict=True)
            ):
                inside_it = next(each for each in layers_within(operation) if couples(each))
                raise ValueError(
                    f"{inside_it.coupled_because}, and its model '{operation.name}' is called within '{model.name}' "
                    "with other inputs than it was made for. Call it with tensors of the shapes of its inputs."
                )
            inner_names: dict[int, Key] = {}
            casts: list[tuple[Key, Key, str]] = []
            for each, outer, source in zip(inner.inputs, given, inputs, strict=True):
                inner_names[id(each)] = source if each.dtype == outer.dtype else (inside, id(each))
                if each.dtype != outer.dtype:
                    casts.append((source, (inside, id(each)), each.dtype))
                    sizes[inside, id(each)] = _bytes_of_sample(each)
            if casts:
                yield Call(node, inside, *zip(*casts, strict=True))
            yield from walk(inner, inside, inner_names)
            for outer, each in zip(node.keras_node.outputs, inner.outputs, strict=True):
                names[id(outer)] = inner_names.get(id(each), (inside, id(each)))

    names: dict[int, Key] = {}
    calls = list(walk(graph, (), names))
    made = {id(call.operation) for call in calls if isinstance(call.operation, keras.Layer)}
    for layer in layers_within(model):
        if couples(layer) and id(layer) not in made:
            raise ValueError(
                f"{layer.coupled_because}, and '{model.name}' cannot be cut there: another layer calls it in its code. "
                f"Use {layer.uncoupled} for it, or call it in a functional model."
            )
    outputs = [names.get(id(each), ((), id(each))) for each in graph.outputs]
    return Graph(calls, [((), id(each)) for each in graph.inputs], outputs, sizes)


def _opened(layer: keras.Layer, model: keras.Model) -> keras.Function:
    """The graph of a model within a model."""
    graph = graph_of(layer)
    if graph is None or not type(layer).call.__module__.startswith("keras."):
        what = f"'{model.name}'" if layer is model else f"'{layer.name}' within '{model.name}'"
        coupled = next(each for each in layers_within(layer) if couples(each))
        raise ValueError(
            f"{coupled.coupled_because}, and {what} cannot be cut there: only the code of {type(layer).__name__} knows "
            f"when it is called. Use a functional or Sequential model, or {coupled.uncoupled}."
        )
    return graph


def _couples_within(layer: keras.Layer) -> bool:
    """Whether there are layers that couple samples within a layer."""
    return any(couples(each) for each in layers_within(layer, include_self=False))


def _bytes_of_sample(tensor: keras.KerasTensor) -> int:
    return math.prod(1 if size is None else size for size in tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size
