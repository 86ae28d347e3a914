"""Where TensorFlow would place the operations of a function if there were a GPU, and what that costs.

No GPU is needed. The second of two logical CPU devices stands for it, so that a variable's device tells whether code
has asked for the CPU or left the choice to TensorFlow. All other operations are placed by TensorFlow's rules: where the
device is given, there; with a variable, where the variable is; else on the GPU if there is a kernel for the operation's
types, and else on the CPU. Each kernel's registration says which of its inputs and outputs are in host memory.

Loops and conditions are counted as TensorFlow lowers them: what goes through them is on the GPU, unless it is an int32
or they have a device. An Identity counts as nothing: Grappler takes it out where it would copy.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import kernels as kernel_registry

GPU = "/CPU:1"
"""The device that stands for the GPU."""

# They take their values from elsewhere and are placed with whatever uses them, run no kernel, or are taken out.
_FREE = {"Const", "NoOp", "Placeholder", "VarIsInitializedOp"}
_NO_LAUNCH = _FREE | {
    "Identity", "IdentityN", "ReadVariableOp", "Reshape", "ExpandDims", "Squeeze", "Shape", "ShapeN", "Size", "Rank",
    "StopGradient", "PreventGradient", "BroadcastGradientArgs", "BroadcastArgs", "Snapshot",
}  # fmt: skip
# Ops of this project whose kernel is more than one launch.
_LAUNCHES = {"AccumOps>BatchNorm": 3, "AccumOps>BatchNormGrad": 3, "AccumOps>SquaredNorms": 2}
_WINDOWS_OF_A_LAUNCH = 36  # of moments_cuda.cu
_METADATA = {"Shape", "ShapeN", "Size", "Rank"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_CONDITIONS = {"If", "StatelessIf"}
_LOOPS = {"While", "StatelessWhile"}
_ON_HOST = {tf.int32, tf.resource, tf.string, tf.variant}


@dataclasses.dataclass
class Placed:
    """What the operations of a function do on a machine with a GPU.

    Attributes:
        waits: For each tensor that the host reads from the GPU, what computes it and what reads it.
        uploads: The same for each tensor that goes to the GPU, a batch's own excepted. TensorFlow sends a tensor once,
            however many operations read it there.
        launches: How often each operation launches a kernel on the GPU; what is in a loop's body counts once.
    """

    waits: list[str] = dataclasses.field(default_factory=list)
    uploads: list[str] = dataclasses.field(default_factory=list)
    launches: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    _sent: set[Any] = dataclasses.field(default_factory=set)


def two_devices() -> None:
    """Makes the two logical devices. Called before TensorFlow has been used in the process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def placed(function: Any) -> Placed:
    """Places the operations of a concrete function."""
    result = Placed()
    where = {}
    for captured, placeholder in function.graph.captures:
        on_gpu = captured.dtype == tf.resource and captured.device.endswith("CPU:1")
        where[placeholder.name] = "gpu" if on_gpu else "host"
    for each in function.graph.inputs:
        where.setdefault(each.name, "host")
    _place(function.graph, where, result, "")
    return result


def _place(graph: Any, where: dict[str, str], result: Placed, path: str) -> list[str]:
    """Places the operations of a graph, whose inputs are at `where`. Returns where its outputs are."""
    for op in graph.get_operations():
        if op.type == "Placeholder" and op.outputs and op.outputs[0].name in where:
            continue
        inputs = [where[each.name] for each in op.inputs]
        if op.type in _CALLS and not _compiled(op):
            outputs = _call(graph, op, "f", inputs, result, path)
        elif op.type in _CONDITIONS:
            _read(op, 0, inputs[0], "host", result, path)
            inside = [_through(op, each, at) for each, at in zip(op.inputs[1:], inputs[1:], strict=True)]
            branches = [_call(graph, op, branch, inside, result, path) for branch in ("then_branch", "else_branch")]
            outputs = [_through(op, each, at) for each, at in zip(op.outputs, branches[0], strict=True)]
        elif op.type in _LOOPS:
            inside = [_through(op, each, at) for each, at in zip(op.inputs, inputs, strict=True)]
            for i, at in enumerate(inputs):
                if op.inputs[i].dtype != tf.resource:
                    _read(op, i, at, inside[i], result, path)
            condition = _call(graph, op, "cond", inside, result, path)
            if condition[0] == "gpu":
                result.waits.append(f"{path}{op.name}: the condition of a loop")
            _call(graph, op, "body", inside, result, path)
            outputs = inside
        else:
            outputs = _place_operation(op, inputs, result, path)
        for each, at in zip(op.outputs, outputs, strict=True):
            where[each.name] = at
    return [where[each.name] for each in getattr(graph, "outputs", [])]


def _place_operation(op: tf.Operation, inputs: list[str], result: Placed, path: str) -> list[str]:
    if op.type in ("Identity", "IdentityN"):
        return inputs
    if op.type in _FREE:
        return ["host" if each.dtype == tf.resource else "free" for each in op.outputs]
    place = _place_of(op, inputs)
    kernel = _gpu_kernel(op) if place == "gpu" else None
    in_host_memory = _in_host_memory(op, kernel)
    for i, at in enumerate(inputs):
        wanted = "host" if place == "host" or in_host_memory.inputs[i] else "gpu"
        if op.inputs[i].dtype != tf.resource:
            _read(op, i, at, wanted, result, path)
    if place == "gpu" and op.type not in _NO_LAUNCH and not all(in_host_memory.outputs or [False]):
        result.launches[op.type] += _launches_of(op)
    if op.outputs and op.outputs[0].dtype == tf.resource:
        return inputs[:1] or ["host"]
    return ["host" if place == "host" or each else "gpu" for each in in_host_memory.outputs]


def _launches_of(op: tf.Operation) -> int:
    if op.type == "AccumOps>Accumulate" and op.get_attr("squared_norms"):
        return 2  # the second one sums what the chunks have found
    if op.type == "AccumOps>Update":
        return 1 + op.get_attr("I")  # the first one corrects the rate
    if op.type in ("AccumOps>AddToWindows", "AccumOps>EndWindows"):
        return math.ceil(op.get_attr("window_parts") / 2 / _WINDOWS_OF_A_LAUNCH)
    return _LAUNCHES.get(op.type, 1)


def _place_of(op: tf.Operation, inputs: list[str]) -> str:
    if op.device:
        return "gpu" if op.device.endswith("CPU:1") else "host"
    resources = [at for at, each in zip(inputs, op.inputs, strict=True) if each.dtype == tf.resource]
    if resources:
        return "gpu" if "gpu" in resources else "host"
    if op.type in _METADATA:
        return "host" if inputs[0] == "host" else "gpu"
    return "gpu" if _gpu_kernel(op) is not None or _compiled(op) else "host"


def _read(op: tf.Operation, i: int, at: str, wanted: str, result: Placed, path: str) -> None:
    """Notes what it takes to bring an input from where it is to where it is wanted."""
    if "free" in (at, wanted) or at == wanted:
        return
    source = op.inputs[i].op
    if all("compile_loss" in each or "gradient_tape" in each for each in (source.name, op.name)):
        return  # Keras's own
    edge = f"{path}{source.name} ({source.type}, {op.inputs[i].dtype.name}) -> {op.name} ({op.type})"
    if at == "gpu":
        result.waits.append(edge)
    elif source.type not in ("IteratorGetNext", "IdentityN") and op.inputs[i].ref() not in result._sent:
        result._sent.add(op.inputs[i].ref())
        result.uploads.append(edge)


def _through(op: tf.Operation, tensor: tf.Tensor, at: str) -> str:
    """Where a value is that has gone through a condition or a loop."""
    if tensor.dtype == tf.resource:
        return at
    if op.device:
        return "gpu" if op.device.endswith("CPU:1") else "host"
    return "host" if tensor.dtype in _ON_HOST else "gpu"


def _call(graph: Any, op: tf.Operation, attribute: str, inputs: list[str], result: Placed, path: str) -> list[str]:
    name = op.get_attr(attribute).name
    inner = graph._get_function(name).graph
    where = {each.name: at for each, at in zip(inner.inputs, inputs, strict=True)}
    return _place(inner, where, result, f"{path}{op.name}/")


def _compiled(op: tf.Operation) -> bool:
    with contextlib.suppress(ValueError):
        return bool(op.get_attr("_XlaMustCompile"))
    return False


@functools.cache
def _kernels(op_type: str) -> list[Any]:
    return [each for each in kernel_registry.get_registered_kernels_for_op(op_type).kernel if each.device_type == "GPU"]


def _gpu_kernel(op: tf.Operation) -> Any:
    for kernel in _kernels(op.type):
        if all(_type_of(op, each.name) in _allowed(each) for each in kernel.constraint):
            return kernel
    return None


def _type_of(op: tf.Operation, attribute: str) -> Any:
    value = op.get_attr(attribute)
    return value if not isinstance(value, list) else (value[0] if value else None)


def _allowed(constraint: Any) -> list[tf.DType]:
    return [tf.as_dtype(each) for each in constraint.allowed_values.list.type]


@dataclasses.dataclass
class _HostMemory:
    inputs: list[bool]
    outputs: list[bool]


def _in_host_memory(op: tf.Operation, kernel: Any) -> _HostMemory:
    names = set(kernel.host_memory_arg) if kernel is not None else set()

    def flags(arguments: Sequence[Any], tensors: Sequence[tf.Tensor]) -> list[bool]:
        result: list[bool] = []
        for argument in arguments:
            number = 1
            if argument.number_attr:
                number = op.get_attr(argument.number_attr)
            elif argument.type_list_attr:
                number = len(op.get_attr(argument.type_list_attr))
            result += [argument.name in names] * number
        result += [False] * (len(tensors) - len(result))
        return result

    return _HostMemory(
        flags(op.op_def.input_arg, op.inputs),
        [
            flag or each.dtype in (tf.string, tf.variant, tf.resource)
            for flag, each in zip(flags(op.op_def.output_arg, op.outputs), op.outputs, strict=True)
        ],
    )
