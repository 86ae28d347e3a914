"""Recompute for a model that exists."""

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import graph_of
from accumops.adapters.keras_layer import layers_within
from accumops.adapters.tensorflow import without_strategy
from accumops.arguments import check_count
from accumops.memory.cuts import Costs, cheap_plan, costs_by_region, plan_for, plan_of_count, smallest_goal
from accumops.memory.layer_costs import CallCosts, costs_of, seconds_of
from accumops.memory.recompute import Recomputation
from accumops.memory.segments import Region, Segment, regions_of, run_regions
from accumops.renamed import explains_renamed
from accumops.sizes import bytes_from, readable

# The times of each graph's calls: measured once, so that a lower goal never gets segments that take more.
_SECONDS: weakref.WeakKeyDictionary[keras.Function, list[list[float]]] = weakref.WeakKeyDictionary()
_SAMPLE = 32  # the batch that sizes are compared for where no goal is given


@explains_renamed
def recompute_layers(
    model: keras.Model,
    *,
    memory: str | int | None = None,
    batch_size: int | None = None,
    segments: int | Sequence[str] | Callable[[keras.Layer], bool] | None = None,
    policy: str | None = None,
) -> keras.Model:
    """Has a model compute activations again in its backward pass, instead of keeping them.

    The model is cut into segments. Training keeps the tensors that lead from one segment to another, and computes the
    rest of a segment again when its gradient is wanted (`accumops.recompute`). Outputs, gradients and state are those
    without recompute, to the bit in TensorFlow on a CPU. Layers, weights, files and exports of the model stay as they
    are. A model that is saved and loaded, or cloned, recomputes nothing until this function is called for it.

    Call it before `compile`, and before the model is wrapped in a `GradientAccumulateModel`.

    Give one of `memory`, `segments` and `policy`. Where to cut is planned on what the layers keep for their gradients,
    found in a trace of a training step, and on the times of their forward passes. Graphs within the graph, such as a
    `keras.applications` model with a new head, are cut inside. A subclassed model is no graph that Keras knows: each of
    its layers that has layers or weights becomes a segment, and `memory` and `policy` are refused.

    Args:
        model: The model: functional, Sequential and built, or subclassed.
        memory: The most memory that a training step may take, in bytes or as `"4GB"`, `"500MiB"`: weights, their
            gradients, a batch and activations, without the slots of an optimizer or an accumulator. As little as
            possible is recomputed for it.
        batch_size: Samples a batch, for `memory`.
        segments: How many segments there may be; they are chosen for the smallest peak of activations. Or the names of
            the layers behind which to cut. Or a function that takes a layer and returns whether to cut behind it. The
            last segment is not recomputed: its gradient follows at once. 0 ends recompute.
        policy: `"cheap"`: no convolution or matrix product is computed again, only normalization, activations, dropout
            and sums. So is an activation function that Keras's `Dense`, `EinsumDense` or a convolution was given as an
            argument, but not those of separable convolutions and of classes that inherit from these layers.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument has another type.
        ValueError: If not exactly one of the three is given, the model is not built or is a `GradientAccumulateModel`,
            a name is no layer of the model, no plan keeps to `memory` (the message has the smallest goal that one
            keeps to), or the size of an input is not known. When the model is called: if a layer draws random numbers
            without a Keras seed of its own.

    Example:

    >>> net = keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=10)
    >>> net = accumops.recompute_layers(net, policy="cheap")
    >>> model = accumops.GradientAccumulateModel(net, micro_batch_size=8)

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", for the policy.
    """
    _check(model, memory, batch_size, segments, policy)
    if not _has_graph(model):
        _recompute_each_layer(model, segments, memory is not None or policy is not None)
        return model
    graph = graph_of(model)
    regions = regions_of(graph)
    if callable(segments) or (isinstance(segments, Sequence) and not isinstance(segments, str)):
        chosen = _cut_behind(model, regions, segments)
    elif segments in (0, 1):
        chosen = [[] for _ in regions]
    else:
        chosen = _planned(model, regions, memory, batch_size, segments)
    run_regions(regions, chosen)
    return model


def _planned(
    model: keras.Model,
    regions: Sequence[Region],
    memory: str | int | None,
    batch_size: int | None,
    segments: Any,
) -> list[list[Segment]]:
    calls, costs = without_strategy(lambda: measured(model, regions, batch_size if memory is not None else None))
    if memory is None:
        if segments is not None:
            return plan_of_count(costs, int(segments) - 1).segments
        return cheap_plan(costs, calls)
    assert batch_size is not None
    fixed = fixed_bytes(model, batch_size)
    plan = plan_for(costs, bytes_from("memory", memory) - fixed)
    if plan is None:
        raise ValueError(
            f"No plan keeps '{model.name}' with batches of {batch_size} to memory={memory!r}. The smallest goal that "
            f"one keeps to is {readable(smallest_goal(costs) + fixed)}, {readable(fixed)} of which are the weights "
            "and the batch. Give more memory or a smaller `batch_size`."
        )
    return plan.segments


def measured(
    model: keras.Model, regions: Sequence[Region], batch_size: int | None
) -> tuple[list[list[CallCosts]], list[Costs]]:
    """Returns what the calls of each region cost, and what segments of them cost.

    Args:
        model: The model.
        regions: Its regions.
        batch_size: Samples a batch. None compares activations alone. The gradients of weights take as much whatever is
            recomputed, and with few samples they would hide how much activations take.
    """
    graph = graph_of(model)
    calls = costs_of(graph, regions, _SAMPLE if batch_size is None else batch_size)
    if batch_size is None:
        calls = [[call._replace(weight_gradients=0) for call in of_region] for of_region in calls]
    if graph not in _SECONDS:
        _SECONDS[graph] = seconds_of(regions, 1)
    return calls, costs_by_region(regions, calls, _SECONDS[graph])


def fixed_bytes(model: keras.Model, batch_size: int) -> int:
    """Returns the bytes of weights and of a batch."""

    def size(shape: Sequence[int | None], dtype: str) -> int:
        return math.prod(batch_size if each is None else each for each in shape) * tf.as_dtype(dtype).size

    weights = sum(size(variable.shape, variable.dtype) for variable in model.variables)
    return weights + sum(size(tensor.shape, tensor.dtype) for tensor in model.inputs)


def _cut_behind(
    model: keras.Model, regions: Sequence[Region], where: Sequence[str] | Callable[[keras.Layer], bool]
) -> list[list[Segment]]:
    """Segments that end behind some layers, and at the ends of regions."""
    if not callable(where):
        names = {node.operation.name for region in regions for node in region.nodes}
        unknown = [name for name in where if name not in names]
        if unknown:
            raise ValueError(f"`segments` names {unknown}, which are no layers in the graph of '{model.name}'.")
    chosen = []
    for region in regions:
        behind = [
            i + 1
            for i, node in enumerate(region.nodes)
            if (where(node.operation) if callable(where) else node.operation.name in where)
        ]
        positions = [region.begin + i for i in sorted({0, *behind, len(region.nodes)})]
        chosen.append([Segment(begin, end, True) for begin, end in itertools.pairwise(positions)])
    chosen[-1].pop()  # its gradient follows at once
    return chosen


def _recompute_each_layer(model: keras.Model, segments: Any, planned: bool) -> None:
    """Has each layer of a subclassed model recompute its call."""
    if planned or (segments is not None and not callable(segments) and segments != 0):
        raise ValueError(
            f"'{model.name}' is a subclassed model, whose graph only the code of {type(model).__name__} knows: it "
            "cannot be cut by `memory`, `policy`, names or a number of segments. Each of its layers can be a segment: "
            "give `segments=lambda layer: True`, or a function that says for which layers."
        )
    for layer in model.layers:
        vars(layer).pop("call", None)
        has_parts = bool(layer.weights) or len(layers_within(layer)) > 1
        if segments != 0 and has_parts and segments(layer):
            again = Recomputation(layer.call, [layer])
            vars(layer)["call"] = functools.wraps(layer.call)(
                lambda *args, again=again, **kwargs: again(*args, **kwargs)
            )


def _has_graph(model: keras.Model) -> bool:
    """Whether calls of a model are nothing but runs through a graph of layers that Keras knows."""
    return graph_of(model) is not None and type(model).call.__module__.startswith("keras.")


def _check(model: Any, memory: Any, batch_size: Any, segments: Any, policy: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if keras.saving.get_registered_name(type(model)) == "accumops>GradientAccumulateModel":
        raise ValueError(
            f"'{model.name}' is a GradientAccumulateModel: give the model that it wraps before it is wrapped."
        )
    given = [
        name for name, value in (("memory", memory), ("segments", segments), ("policy", policy)) if value is not None
    ]
    if len(given) != 1:
        raise ValueError(f"Give one of `memory`, `segments` and `policy`. Received: {', '.join(given) or 'none'}")
    if not model.built:
        raise ValueError(f"The model '{model.name}' is not built: give it a `keras.Input`, call it, or `build` it.")
    if policy not in (None, "cheap"):
        raise ValueError(f"`policy` must be 'cheap'. Received: {policy!r}")
    if memory is not None:
        bytes_from("memory", memory)
        if batch_size is None:
            raise ValueError("`memory` needs `batch_size`, the samples of a batch or micro-batch.")
    if batch_size is not None:
        check_count("batch_size", batch_size, "a number of samples")
    if isinstance(segments, bool | str | float):
        raise TypeError(
            "`segments` must be a number of segments, a list of names of layers, or a function of a layer. "
            f"Received: {segments!r}"
        )
    if isinstance(segments, int) and segments < 0:
        raise ValueError(f"`segments` must be at least 0. Received: {segments}")
