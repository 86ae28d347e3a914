"""Where the memory of training goes, as a table and a picture."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import graph_of, inputs_of
from accumops.adapters.keras_layer import StateRecorder, values_of
from accumops.adapters.tensorflow import without_strategy
from accumops.arguments import check_count
from accumops.memory.cuts import Costs, costs_by_region, taken_by
from accumops.memory.device_memory import DeviceMemory, ResidentMemory, memory_counter
from accumops.memory.layer_costs import CallCosts, costs_of
from accumops.memory.pictures import figure_of
from accumops.memory.segments import Segment, regions_of, running_in, segments_by_region
from accumops.memory.training_trace import spec_of
from accumops.optimizer.optimizer import GradientAccumulateOptimizer

_LAYERS_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The memory of a training step with a batch size, in bytes, beside weights, accumulators and slots."""

    batch_size: int
    recomputes: bool
    """Whether the model's segments are recomputed, or all activations kept."""
    inputs: int
    """The batch."""
    activations: int
    """What the forward pass keeps for the gradient."""
    backward: int
    """What is added while gradients are computed: gradients, what leads to them, and recomputed activations."""
    measured: int | None
    """The measured peak above the memory before the step, or None if it has not been measured."""

    @property
    def predicted(self) -> int:
        """The predicted peak, the batch included."""
        return self.inputs + self.activations + self.backward


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """The activations that the call of a layer keeps for the gradient, in bytes a sample."""

    name: str
    all_kept: float
    """Without recompute."""
    as_it_is: float
    """With the model's segments. What a segment keeps counts for its last layer."""


@dataclasses.dataclass(frozen=True)
class MemoryProfile:
    """Where the memory of training goes. `print` shows it as a table, and `plot` as a picture."""

    model: str
    """The model's name."""
    weights: int
    """Bytes of trainable variables."""
    state: int
    """Bytes of the other variables of the model, such as moving statistics."""
    accumulators: int
    """Bytes of accumulators; 0 if the model's optimizer has none yet."""
    slots: int
    """Bytes of the optimizer's variables; 0 if it has none yet."""
    steps: tuple[StepMemory, ...]
    """Training steps: for each batch size without recompute, and, if the model recomputes, as it is."""
    layers: tuple[LayerMemory, ...]
    """The layers, in the order of their calls."""
    measured_by: str | None
    """Who measured: TensorFlow's allocator or the operating system; None if nothing was measured."""

    @property
    def variables(self) -> int:
        """Bytes of all variables."""
        return self.weights + self.state + self.accumulators + self.slots

    def __str__(self) -> str:
        fixed = ("weights", "state", "accumulators", "slots")
        lines = [f"Memory of training '{self.model}', in MiB", ""]
        lines += [f"{name:<26}{_mib(getattr(self, name))}" for name in fixed]
        heads = [f"{step.batch_size} samples{', recomputed' if step.recomputes else ''}" for step in self.steps]
        lines += ["", f"{'a training step':<26}" + "".join(f"{head:>24}" for head in heads)]
        parts = ["inputs", "activations", "backward", "predicted", *(["measured"] if self.measured_by else [])]
        lines += [f"{name:<26}" + "".join(_mib(getattr(step, name), 24) for step in self.steps) for name in parts]
        lines += [f"{'with all variables':<26}" + "".join(_mib(self.variables + s.predicted, 24) for s in self.steps)]
        if self.measured_by:
            lines += ["", f"Measured by {self.measured_by}, above the memory before the step."]
        recomputes = any(step.recomputes for step in self.steps)
        lines += ["", f"{'activations a sample, KiB':<42}{'kept':>10}{'recomputed' if recomputes else '':>12}"]
        most = sorted(self.layers, key=lambda layer: -layer.all_kept)[:_LAYERS_SHOWN]
        for layer in (each for each in self.layers if each in most):
            now = f"{layer.as_it_is / 2**10:>12.1f}" if recomputes else ""
            lines.append(f"{layer.name[:41]:<42}{layer.all_kept / 2**10:>10.1f}{now}")
        others = [layer for layer in self.layers if layer not in most]
        if others:
            now = f"{sum(layer.as_it_is for layer in others) / 2**10:>12.1f}" if recomputes else ""
            name = f"{len(others)} other layers"
            lines.append(f"{name:<42}{sum(layer.all_kept for layer in others) / 2**10:>10.1f}{now}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the memory of each training step as a bar of its parts. Needs matplotlib.

        Args:
            path: The file, whose ending says the format: `.png`, `.pdf`, `.svg`.

        Raises:
            ImportError: If matplotlib is missing.
        """
        figure = figure_of(8, 1.6 + 0.5 * len(self.steps))
        axes = figure.add_subplot()
        names = [f"{step.batch_size} samples{chr(10) + 'recomputed' if step.recomputes else ''}" for step in self.steps]
        parts = {name: [getattr(self, name)] * len(self.steps) for name in ("weights", "accumulators", "slots")}
        parts |= {name: [getattr(s, name) for s in self.steps] for name in ("inputs", "activations", "backward")}
        left = [0.0] * len(self.steps)
        shades = ("#08306b", "#2171b5", "#6baed6", "#bdbdbd", "#fd8d3c", "#fdd0a2")
        for (name, sizes), shade in zip(parts.items(), shades, strict=True):
            if any(sizes):
                widths = [size / 2**20 for size in sizes]
                axes.barh(range(len(names)), widths, left=left, label=name, color=shade)
                left = [start + width for start, width in zip(left, widths, strict=True)]
        for i, step in enumerate(self.steps):
            if step.measured is not None:
                total = (self.weights + self.accumulators + self.slots + step.measured) / 2**20
                axes.plot([total, total], [i - 0.4, i + 0.4], color="black", label=None if i else "measured")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("MiB")
        axes.set_title(f"Memory of training '{self.model}'", fontsize=10)
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def memory_profile(
    model: keras.Model, batch_sizes: int | Sequence[int], *, measure: bool = True, jit_compile: bool = False
) -> MemoryProfile:
    """Says where the memory of training goes: variables, activations by layer, gradients.

    The prediction is found in a trace of a training step and counts the bytes of tensors, each let go after its last
    use. The measurement runs one training step for each batch size, without an update: no variable changes. It is
    what TensorFlow's allocator has given out, which may be up to twice a tensor's size; on a CPU the allocator counts
    tensors of 256 KiB and more. Where the allocator does not count, the operating system
    does: on a CPU under XLA, and with `TF_ENABLE_ONEDNN_OPTS=0`. It cannot see memory that TensorFlow keeps and uses
    again.

    A model that recomputes (`recompute_layers`) is shown without recompute and as it is.

    Args:
        model: A functional model, a Sequential model that is built, or a `GradientAccumulateModel` around one. Once it
            has been trained, its accumulators and the slots of its optimizer count, too.
        batch_sizes: Samples a batch or micro-batch, one number or several.
        measure: Whether to run training steps. They take the memory that is asked for.
        jit_compile: Whether the measured steps are compiled by XLA.

    Returns:
        The profile. `print` it for a table; `profile.plot("memory.png")` draws it.

    Raises:
        TypeError: If `model` is not a Keras model, or a batch size is no int.
        ValueError: If `model` is no graph that Keras knows, such as a subclassed model, a batch size is less than 1, or
            the size of an input is not known.

    Example:

    >>> net = keras.Sequential([keras.Input((64,)), *(keras.layers.Dense(64, "relu") for _ in range(6))])
    >>> profile = accumops.memory_profile(accumops.recompute_layers(net, segments=3), 8)
    >>> all_kept, recomputed = profile.steps
    >>> recomputed.activations < all_kept.activations
    True
    """
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    for size in sizes:
        check_count("batch_sizes", size, "the samples of a batch, or a list of them")
    net = _network_of(model)
    graph = graph_of(net)
    regions = regions_of(graph)
    chosen = segments_by_region(regions)
    plain: list[list[Segment]] = [[] for _ in regions]
    memory = memory_of_device(jit_compile=jit_compile) if measure else None
    steps: list[StepMemory] = []
    layers: tuple[LayerMemory, ...] = ()
    for size in sizes:
        calls = without_strategy(functools.partial(costs_of, graph, regions, size))
        costs = costs_by_region(regions, calls, [[0.0] * len(each) for each in calls])
        inputs = sum(_bytes_of(spec_of(each, size)) for each in graph.inputs)
        for segments in [plain, chosen] if any(chosen) else [plain]:
            taken = taken_by(costs, calls, segments)
            measured = None
            if memory is not None:
                with running_in(regions, segments):
                    measured = peak_of_step(graph, size, memory, jit_compile=jit_compile)
            backward = round(taken.peak - taken.kept)
            steps.append(StepMemory(size, segments is chosen, inputs, round(taken.kept), backward, measured))
        layers = _layers(costs, calls, chosen, size)
    return MemoryProfile(
        net.name,
        layers=layers,
        steps=tuple(steps),
        measured_by=memory.name if memory else None,
        **_variables_of(model, net),
    )


def _network_of(model: Any) -> keras.Model:
    """The model whose graph is profiled, checked."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    is_wrapped = keras.saving.get_registered_name(type(model)) == "accumops>GradientAccumulateModel"
    net = model.model if is_wrapped else model
    if graph_of(net) is None:
        raise ValueError(
            f"'{net.name}' is a subclassed model, or a Sequential model that is not built: Keras knows no graph of its "
            "layers. `memory_profile` needs a functional model, or a Sequential one with a `keras.Input`."
        )
    return net


def _variables_of(model: keras.Model, net: keras.Model) -> dict[str, int]:
    """The bytes of the variables of training, by kind."""
    optimizer = getattr(model, "optimizer", None)
    of_optimizer = list(optimizer.variables) if optimizer is not None else []
    accumulators = []
    if isinstance(optimizer, GradientAccumulateOptimizer) and optimizer.accumulator.built:
        accumulators = optimizer.accumulator.accumulators
    every, ours = (sum(_bytes_of(each) for each in group) for group in (of_optimizer, accumulators))
    return {
        "weights": sum(_bytes_of(each) for each in net.trainable_variables),
        "state": sum(_bytes_of(each) for each in net.non_trainable_variables),
        "accumulators": ours,
        "slots": every - ours,
    }


def _layers(
    costs: Sequence[Costs],
    calls: Sequence[Sequence[CallCosts]],
    segments: Sequence[Sequence[Segment]],
    batch_size: int,
) -> tuple[LayerMemory, ...]:
    found = []
    for each, of_region, chosen in zip(costs, calls, segments, strict=True):
        for i, node in enumerate(each.region.nodes):
            position = each.region.begin + i
            around = next((segment for segment in chosen if segment.begin <= position < segment.end), None)
            if around is None:
                now = each.plain[i]
            else:
                is_last = position == around.end - 1
                now = each.keep[around.begin - each.region.begin, i + 1] if is_last else 0.0
                keeps_product = position in around.saved and (of_region[i].activates or not is_last)
                now += sum(size for _, size in of_region[i].outputs) if keeps_product else 0
            found.append(LayerMemory(node.operation.name, each.plain[i] / batch_size, float(now) / batch_size))
    return tuple(found)


def memory_of_device(*, jit_compile: bool = False) -> DeviceMemory:
    """Returns what counts the memory of training steps: TensorFlow's allocator, or else the operating system.

    Args:
        jit_compile: Whether XLA compiles the steps. On a CPU its memory does not come from the allocator.
    """
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
    if device == "CPU:0" and jit_compile:
        return ResidentMemory()
    return memory_counter(device)


def peak_of_step(graph: keras.Function, batch_size: int, memory: DeviceMemory, *, jit_compile: bool = False) -> int:
    """Runs a training step that changes no variable, and returns its peak in bytes above the memory before.

    Args:
        graph: The graph of layers.
        batch_size: Samples a batch.
        memory: Counts the memory.
        jit_compile: Whether XLA compiles the step.
    """

    @tf.function(autograph=False, jit_compile=jit_compile)
    def step(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        state, weights = graph.non_trainable_variables, graph.trainable_variables
        of_weights = values_of(weights)
        with tf.GradientTape() as tape:
            tape.watch(of_weights)
            values = list(zip(weights, of_weights, strict=True))
            with StateRecorder(list(zip(state, values_of(state), strict=True)), values):
                results = graph(keras.tree.pack_sequence_as(inputs_of(graph), tensors), training=True)
            floats = [each for each in keras.tree.flatten(results) if each.dtype.is_floating]
            loss = tf.add_n([tf.reduce_sum(tf.cast(each, tf.float32)) for each in floats])
        return [each for each in tape.gradient(loss, of_weights) if each is not None]

    specs = [spec_of(each, batch_size) for each in graph.inputs]
    step.get_concrete_function(specs)
    before = memory.now()
    memory.forget_peak()
    step([tf.zeros(spec.shape, spec.dtype) for spec in specs])
    return memory.peak() - before


def _bytes_of(each: Any) -> int:
    return math.prod(each.shape) * tf.as_dtype(each.dtype).size


def _mib(size: float, width: int = 12) -> str:
    return f"{size / 2**20:>{width}.1f}"
