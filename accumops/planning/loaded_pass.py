"""A traced pass, loaded: it has variables of its own, and adds its gradients to accumulators of its own."""

import time
from typing import Any, NamedTuple

import tensorflow as tf

from accumops.memory.device_memory import DeviceMemory
from accumops.ops import library
from accumops.planning.traced_pass import TracedPass
from accumops.window.accumulator import GradientAccumulator

_RUNS = 4  # timed runs, if they are short
_LONG = 2.0  # seconds of timed runs that are enough
_SLOW = 3.0  # seconds from which on one run says enough


class Point(NamedTuple):
    """What a micro-batch takes."""

    micro_batch_size: int
    peak: int
    """The most bytes above variables and accumulators."""
    seconds: float
    """The time of forward and backward, and of the addition of the gradients."""


class LoadedPass:
    """Runs a pass over micro-batches of zeros.

    Args:
        traced: The pass.
        memory: Counts the memory.
    """

    def __init__(self, traced: TracedPass, memory: DeviceMemory) -> None:
        library.load()  # the graph may have operations of accumops
        self._traced = traced
        self._memory = memory
        self._captured = [
            each.value
            if each.kind == "resource"
            else tf.Variable(tf.zeros(each.shape, each.dtype))
            if each.kind == "variable"
            else tf.constant(each.value, each.dtype)
            for each in traced.captured
        ]
        definition = tf.compat.v1.GraphDef.FromString(traced.graph)
        placeholders = {name.partition(":")[0] for name in traced.arguments}
        for i in reversed(range(len(definition.node))):
            if definition.node[i].name in placeholders:  # XLA compiles none, also if nothing uses it
                del definition.node[i]
        wanted = [name for _, names in traced.gradients for name in names]

        def run(*arguments: tf.Tensor) -> list[tf.Tensor]:
            graph: Any = tf.compat.v1.get_default_graph()
            resources = [each.handle if isinstance(each, tf.Variable) else each for each in self._captured]
            captured = [graph.capture(each) for each in resources]
            given = dict(zip(traced.arguments, [*arguments, *captured], strict=True))
            return tf.graph_util.import_graph_def(definition, given, wanted, name="")

        compiled = tf.function(run, autograph=False, jit_compile=True) if traced.jit_compile else run
        accumulator = self._accumulator = GradientAccumulator(None)
        accumulator.build([self._captured[i] for i, _ in traced.gradients])

        specs = None if traced.jit_compile else [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in traced.leaves]

        @tf.function(autograph=False, input_signature=specs)
        def step(*arguments: tf.Tensor) -> None:
            rest = iter(compiled(*arguments))
            accumulator.accumulate([_gradient([next(rest) for _ in names]) for _, names in traced.gradients])

        self._step = step
        self._is_traced = False
        accumulator.reset()
        self._start = memory.now()

    def measure(self, samples: int) -> Point:
        """Runs micro-batches with so many samples, and returns what one takes."""
        batch = self._traced.batch_of(samples)
        self._memory.forget_peak()
        first = self._timed(batch)  # traces, and lets XLA compile
        seconds = [first] if self._is_traced and first > _SLOW else []
        self._is_traced = not self._traced.jit_compile
        while len(seconds) < _RUNS and (not seconds or sum(seconds) < _LONG):
            seconds.append(self._timed(batch))
        return Point(samples, self._memory.peak() - self._start, min(seconds))

    def _timed(self, batch: list[tf.Tensor]) -> float:
        start = time.perf_counter()
        self._step(*batch)
        tf.test.experimental.sync_devices()
        return time.perf_counter() - start


def _gradient(tensors: list[tf.Tensor]) -> tf.Tensor | tf.IndexedSlices:
    return tensors[0] if len(tensors) == 1 else tf.IndexedSlices(*tensors)
