"""What the calls of a graph cost: the bytes that each keeps and works on in a training step, and how long each takes.

The bytes are found in a trace of a training step, and nothing is run for it (`training_trace.py`). What a call works on
is found by going through its operations in order: each result is let go after its last use. Times are those of single
calls.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import Node, call_node
from accumops.adapters.keras_layer import StateRecorder, activation_of
from accumops.memory.segments import Region
from accumops.memory.training_trace import CallKey, TrainingTrace, root, size, spec_of

# The heavy operations of a forward pass. Among them are the loops of recurrent layers, and gradients of convolutions:
# transposed convolutions are such gradients.
_PRODUCTS = frozenset(
    (
        *("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "MatMul", "SparseTensorDenseMatMul"),
        *("Conv2D", "Conv3D", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNative"),
        *("CudnnRNN", "CudnnRNNV2", "CudnnRNNV3", "StatelessWhile", "While"),
    )
)
ELSEWHERE = 1 << 30


class Kept(NamedTuple):
    """A tensor that training without recompute keeps for the gradient."""

    size: int
    """Bytes."""
    behind_product: bool
    """Whether it depends on a convolution or matrix product of the call that makes it."""
    wanted_by: int
    """The position in its region of the first call whose gradient reads it; `ELSEWHERE` if none of the region does."""


class CallCosts(NamedTuple):
    """What a call of a graph costs."""

    kept: dict[str, Kept]
    """What it makes that is kept for the gradient, by the name of the tensor."""
    outputs: list[tuple[str, int]]
    """The name and the bytes of each output."""
    products: int
    """How many convolutions and matrix products it computes."""
    activates: bool = False
    """Whether its layer applies an activation function that can be computed by itself."""
    forward: int = 0
    """The most bytes of its own results that its forward pass has at a time."""
    arriving: int = 0
    """The bytes of gradients that are there when its gradient begins, gradients of weights apart."""
    backward: int = 0
    """The most bytes of gradients, and of what leads to them, that its gradient has at a time, with those that wait."""
    weight_gradients: int = 0
    """The bytes of the gradients of its weights."""


def costs_of(graph: keras.Function, regions: Sequence[Region], batch_size: int) -> list[list[CallCosts]]:
    """Returns what each call of each region costs in a training step.

    Args:
        graph: The graph.
        regions: Its regions.
        batch_size: Samples a batch.

    Raises:
        ValueError: If an input has a size that is not known, apart from the number of samples.
    """
    trace = TrainingTrace(graph, regions, batch_size)
    arriving = trace.arriving_at()

    def cost(key: CallKey, region: Region) -> CallCosts:
        if key not in trace.calls:
            return CallCosts({}, [], 0)
        forward, backward = trace.forward_of(key), trace.gradient_of(key)
        behind_products: set[str] = set()
        for operation in forward:
            if operation.type in _PRODUCTS or any(each.op.name in behind_products for each in operation.inputs):
                behind_products.add(operation.name)
        kept = {
            tensor.name: Kept(size(tensor), tensor.op.name in behind_products, wanted_by(tensor, key, region))
            for tensor in trace.kept_by(key)
        }
        results = [tensor for operation in backward for tensor in operation.outputs]
        return CallCosts(
            kept,
            [(root(tensor).name, size(root(tensor))) for tensor in trace.calls[key].outputs],
            products=sum(operation.type in _PRODUCTS for operation in forward),
            activates=activation_of(region.nodes[key[1] - region.begin].operation) is not None,
            forward=trace.most_at_a_time(forward, {}),
            arriving=sum(arriving[key].values()),
            backward=trace.most_at_a_time(backward, arriving[key]),
            weight_gradients=sum(size(tensor) for tensor in results if tensor.name in trace.weight_gradients),
        )

    def wanted_by(tensor: tf.Tensor, key: CallKey, region: Region) -> int:
        readers = trace.readers_of(tensor)
        own = range(region.begin, region.begin + len(region.nodes))
        positions = [i for of_graph, i in (each for each in readers if each) if of_graph == key[0] and i in own]
        return (key[1] if None in readers else min(positions, default=ELSEWHERE + region.begin)) - region.begin

    return [[cost((id(each.graph), each.begin + i), each) for i in range(len(each.nodes))] for each in regions]


def seconds_of(regions: Sequence[Region], batch_size: int) -> list[list[float]]:
    """Returns how long the forward pass of each call of each region takes. Calls that are alike are run once.

    Args:
        regions: The regions.
        batch_size: Samples a batch.
    """
    known: dict[str, float] = {}

    def seconds(node: Node) -> float:
        specs = [spec_of(tensor, batch_size) for tensor in node.keras_node.input_tensors]
        config = dict(node.operation.get_config()) if isinstance(node.operation, keras.Layer) else {}
        config.pop("name", None)
        key = f"{type(node.operation).__name__} {config} {specs}"
        if key not in known:
            values = {each: tf.zeros(spec.shape, spec.dtype) for each, spec in zip(node.inputs, specs, strict=True)}
            variables = node.operation.variables if isinstance(node.operation, keras.Layer) else []
            state = [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in variables]
            times = []
            for _ in range(2):
                start = time.perf_counter()
                with StateRecorder(state):
                    call_node(node, dict(values), {"training": True})
                times.append(time.perf_counter() - start)
            known[key] = min(times)
        return known[key]

    return [[seconds(node) for node in region.nodes] for region in regions]
