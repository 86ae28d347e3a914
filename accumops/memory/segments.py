"""A graph of layers that is run in segments, some of which are recomputed."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import Node, call_node, graph_of, nodes_of, run_of, set_run
from accumops.adapters.keras_layer import activation_of, with_activation
from accumops.memory.recompute import Recomputation, with_value


class Region(NamedTuple):
    """Calls of a graph that follow each other, without a call of another graph among them."""

    graph: keras.Function
    begin: int
    """The position of its first call, among those of the graph."""
    nodes: list[Node]
    used_elsewhere: set[int]
    """The outputs of the graph, and what calls outside of the region use, by the identities of symbolic tensors."""


class Segment(NamedTuple):
    """Calls of a graph that are run together."""

    begin: int
    """The position of its first call, among those of the graph."""
    end: int
    """The position behind its last call."""
    recomputed: bool
    saved: tuple[int, ...] = ()
    """The positions of calls in it whose products are kept all the same: they are not computed again."""


def regions_of(graph: keras.Function) -> list[Region]:
    """The regions of a graph, and those of the graphs that it calls, each once, in the order of the calls.

    A graph that is called has segments of its own: a segment does not reach into it, and none begins within it and ends
    behind it.
    """
    seen: set[int] = set()

    def walk(graph: keras.Function) -> Iterator[Region]:
        seen.add(id(graph))
        nodes = nodes_of(graph)
        inner = [graph_of(node.operation) for node in nodes]
        ends = [i for i, each in enumerate(inner) if each is not None]
        for begin, end in zip([0, *(i + 1 for i in ends)], [*ends, len(nodes)], strict=True):
            others = {each for node in (*nodes[:begin], *nodes[end:]) for each in node.inputs}
            yield Region(graph, begin, nodes[begin:end], others | {id(each) for each in graph.outputs})
            if end < len(nodes) and id(inner[end]) not in seen:
                yield from walk(inner[end])

    return [region for region in walk(graph) if region.nodes]


def run_in_segments(graph: keras.Function, segments: Sequence[Segment]) -> None:
    """Has a graph run its calls in segments.

    Args:
        graph: The graph.
        segments: The segments that are recomputed or not, in their order. Calls that are in no segment run as they are.
    """
    set_run(graph, _Run(graph, segments) if any(segment.recomputed for segment in segments) else None)


def segments_of(graph: keras.Function) -> list[Segment]:
    """Returns the segments that a graph runs in; none if it runs as Keras does."""
    run = run_of(graph)
    return run.segments if isinstance(run, _Run) else []


def segments_by_region(regions: Sequence[Region]) -> list[list[Segment]]:
    """The segments of each region that its graph runs in now."""
    return [
        [each for each in segments_of(region.graph) if region.begin <= each.begin < region.begin + len(region.nodes)]
        for region in regions
    ]


def run_regions(regions: Sequence[Region], segments: Sequence[Sequence[Segment]]) -> None:
    """Has graphs run in segments.

    Args:
        regions: All regions of a graph.
        segments: The segments of each.
    """
    for graph in _graphs_of(regions):
        parts = [part for region, part in zip(regions, segments, strict=True) if region.graph is graph]
        run_in_segments(graph, list(itertools.chain(*parts)))


@contextlib.contextmanager
def running_in(regions: Sequence[Region], segments: Sequence[Sequence[Segment]]) -> Iterator[None]:
    """Has graphs run in segments, for a while."""
    before = [(graph, segments_of(graph)) for graph in _graphs_of(regions)]
    run_regions(regions, segments)
    try:
        yield
    finally:
        for graph, own in before:
            run_in_segments(graph, own)


def _graphs_of(regions: Sequence[Region]) -> list[keras.Function]:
    return list({id(region.graph): region.graph for region in regions}.values())


class _Run:
    """Runs a graph in segments.

    Args:
        graph: The graph.
        segments: The segments.
    """

    def __init__(self, graph: keras.Function, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        nodes = nodes_of(graph)
        parts: list[_Part] = []
        position = 0
        for segment in segments:
            parts.append(_Part(nodes, Segment(position, segment.begin, False), graph))
            parts.append(_Part(nodes, segment, graph))
            position = segment.end
        parts.append(_Part(nodes, Segment(position, len(nodes), False), graph))
        self._parts = [part for part in parts if part.nodes]
        self._inputs, self._outputs = [id(each) for each in graph.inputs], [id(each) for each in graph.outputs]

    def __call__(self, tensors: list[Any], settings: dict[str, Any]) -> list[Any]:
        values = dict(zip(self._inputs, tensors, strict=True))
        for part in self._parts:
            part.run(values, settings)
        return [values[each] for each in self._outputs]


class _Part:
    """The calls of a segment.

    Args:
        nodes: All calls of the graph.
        segment: The segment.
        graph: The graph.
    """

    def __init__(self, nodes: list[Node], segment: Segment, graph: keras.Function) -> None:
        self.nodes = nodes[segment.begin : segment.end]
        made = {each for node in self.nodes for each in node.outputs}
        used = {each for node in nodes[segment.end :] for each in node.inputs} | {id(each) for each in graph.outputs}
        self._inputs = sorted({each for node in self.nodes for each in node.inputs} - made)
        self._outputs = [each for node in self.nodes for each in node.outputs if each in used]
        layers = [node.operation for node in self.nodes if isinstance(node.operation, keras.Layer)]
        layers = list({id(layer): layer for layer in layers}.values())
        self._saved = {position - segment.begin for position in segment.saved}
        self._recomputation = Recomputation(self._call, layers, saves=True) if segment.recomputed else None

    def run(self, values: dict[int, Any], settings: dict[str, Any]) -> None:
        """Makes the calls, and adds their outputs to the values."""
        if self._recomputation is None:
            for node in self.nodes:
                call_node(node, values, settings)
            return
        given = {each: values[each] for each in self._inputs if each in values}
        values.update(self._recomputation(given, settings))

    def _call(
        self, values: dict[int, Any], settings: dict[str, Any], *, saved: Sequence[Any] | None
    ) -> tuple[dict[int, Any], list[Any]]:
        """Makes the calls.

        Args:
            values: The inputs.
            settings: What the graph was called with besides.
            saved: The products to keep, of the first run; None in the first run.

        Returns:
            The outputs that later calls use, and the products to keep.
        """
        values = dict(values)
        kept: list[Any] = []
        rest = iter(saved or ())

        def keep(product: tf.Tensor) -> tf.Tensor:
            kept.append(product if saved is None else with_value(product, next(rest)))
            return kept[-1]

        for i, node in enumerate(self.nodes):
            if i not in self._saved:
                call_node(node, values, settings)
            elif activation := activation_of(node.operation):
                with with_activation(node.operation, _composed(keep, activation)):
                    call_node(node, values, settings)
            else:
                call_node(node, values, settings)
                values.update({each: keep(values[each]) for each in node.outputs})
        return {each: values[each] for each in self._outputs if each in values}, kept


def _composed(first: Callable[[tf.Tensor], tf.Tensor], second: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    return lambda tensor: second(first(tensor))
