"""What accumops uses of TensorFlow beyond its public interface."""

import concurrent.futures
import contextvars
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from accumops.adapters.upstream import relies_on, sample


@sample("<tf.function's concrete function>")
def _concrete_function() -> Any:
    return tf.function(lambda: tf.constant(0)).get_concrete_function()


@sample("<a function's graph>")
def _function_graph() -> Any:
    return tf.function(lambda: tf.constant(0)).get_concrete_function().graph


@sample("<a distributed variable>")
def _distributed_variable() -> Any:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        return tf.Variable(0.0)


@relies_on(
    "tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext(graph)",
    feature="counters on the host: without it they are where XLA can see them; barriers of the reference under XLA",
)
def xla_compiles_this(*, unknown: bool = True) -> bool:
    """Whether XLA will compile the function that is being traced.

    Args:
        unknown: What to return where this cannot be told.
    """
    try:
        from tensorflow.python.ops import control_flow_util

        question = control_flow_util.GraphOrParentsInXlaContext
    except (ImportError, AttributeError):
        return unknown
    return bool(question(tf.compat.v1.get_default_graph()))


@relies_on(
    "<tf.function's concrete function>._call_flat(tensors, captured)",
    feature="quick calls of train functions: without it each call looks the function up again",
)
def bound_call(concrete: Any, argument: Any) -> Callable[[], Any] | None:
    """Returns a function that calls a concrete function with an argument that is flattened once.

    None if this TensorFlow cannot do it. The function keeps the argument's tensors alive, but not the argument.

    Args:
        concrete: The concrete function.
        argument: Its only argument, such as a dataset's iterator.
    """
    if not hasattr(concrete, "_call_flat"):
        return None
    parts = tf.nest.flatten(argument, expand_composites=True)
    captured = list(concrete.captured_inputs)
    return lambda: concrete._call_flat(parts, captured)


@relies_on(
    "<a function's graph>.outer_graph",
    feature="the warning of layers that were called before they were built, and windows that several calls share",
)
def enclosing_graphs() -> list[tf.Graph]:
    """The graph of the function that is being traced, and those of the functions around it; none in eager execution."""
    graphs = []
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        graphs.append(graph)
        graph = getattr(graph, "outer_graph", None)
    return graphs


def enclosing_functions() -> list[int]:
    """The function that is being traced and the functions around it, each by the identity of its graph.

    The last item is 0 and stands for eager execution.
    """
    return [*map(id, enclosing_graphs()), 0]


@relies_on(
    "tensorflow.__internal__.distribute.strategy_supports_no_merge_call()",
    feature="windows under tf.distribute",
)
def replicas_cannot_merge() -> bool:
    """Whether replicas cannot hand over to code that runs once for all of them, as in functions that XLA compiles."""
    return bool(tf.__internal__.distribute.strategy_supports_no_merge_call())


@relies_on("<a distributed variable>.values", feature="windows under tf.distribute")
def components_of(variable: tf.Variable) -> tuple[tf.Variable, ...]:
    """The components of a distributed variable, one for each of this process's replicas; else the variable itself."""
    return tuple(variable.values) if isinstance(variable, tf.distribute.DistributedValues) else (variable,)


@relies_on("<a distributed variable>.distribute_strategy", feature="windows under tf.distribute")
def distribution_of(variable: tf.Variable) -> tf.distribute.Strategy | None:
    """The strategy that distributes a variable, or None."""
    return variable.distribute_strategy if isinstance(variable, tf.distribute.DistributedValues) else None


@relies_on("<a function's graph>._functions", feature="the check that layers can be run again")
def operations_within(graph: tf.Graph) -> list[tf.Operation]:
    """The operations of a function's graph, and of the functions that it calls."""
    found, graphs, seen = [], [graph], set()
    while graphs:
        each = graphs.pop()
        if id(each) not in seen:
            seen.add(id(each))
            found.extend(each.get_operations())
            graphs.extend(inner.graph for inner in each._functions.values() if hasattr(inner, "graph"))
    return found


@relies_on(
    "tensorflow.python.eager.record.should_record_backprop(tensors)",
    feature="the error for gradients that recompute would lose",
)
def is_recorded(tensor: tf.Tensor) -> bool:
    """Whether a `tf.GradientTape` watches a tensor, or what it was computed from. False where this cannot be told."""
    try:
        from tensorflow.python.eager import record

        question = record.should_record_backprop
    except (ImportError, AttributeError):
        return False
    return bool(question([tensor]))


def without_strategy(function: Callable[[], Any]) -> Any:
    """Calls a function where no `tf.distribute` strategy is open, and returns its result.

    Strategies are open for a thread. Within one, a function that replicas synchronize in cannot be traced for itself.
    """
    if not tf.distribute.has_strategy():
        return function()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(contextvars.copy_context().run, function).result()


@relies_on(
    "tensorflow.python.client.device_lib.list_local_devices()",
    feature="the default memory limit on a GPU: without it `memory_limit` must be given",
)
def memory_limit_of_device(device: str) -> int:
    """The bytes that TensorFlow may have on a device.

    Args:
        device: The device's name, such as `"GPU:0"`.

    Raises:
        ValueError: If this cannot be found.
    """
    try:
        from tensorflow.python.client import device_lib

        devices = device_lib.list_local_devices()
    except (ImportError, AttributeError):
        devices = []
    found = [each.memory_limit for each in devices if each.name.endswith(f"device:{device}")]
    if not found:
        raise ValueError(f"The memory of {device} cannot be found. Give `memory_limit`.")
    return int(found[0])
