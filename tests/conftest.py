"""Fixtures that run a test over both backends and the ways TensorFlow executes. TensorFlow is imported when used.

XLA takes long to compile, and TensorFlow to trace the many operations of the reference. So by default these run in some
cases of each test, and in all with `-m exhaustive`. So do tests that are marked with `some_by_default(n)`: n of their
cases run by default.
"""

import collections
import gc
import os
import zlib

import pytest

BACKENDS = ("fused", "reference")
MODES = ("eager", "graph", "xla")
# By default these backends and modes run one in so many of a test's cases, and the first one besides. The first one is
# left out where XLA would compile the reference.
SOME_OF_MANY = {("fused", "xla"): 12, ("reference", "xla"): 48, ("reference", "graph"): 4}
# These start first, so that no process has one of them left when the others are done.
LONGEST = {
    "test_the_kernels",
    "test_each_allocation_of_a_window",
    "test_a_window_takes_the_memory_of_one_micro_batch",
    "test_found_for_real",
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The backend's name; accumops uses it during the test."""
    import accumops

    before = accumops.get_backend()
    accumops.set_backend(request.param)
    yield request.param
    accumops.set_backend(before)


@pytest.fixture(params=MODES)
def mode(request):
    """`mode(function)` runs a function eagerly, as a `tf.function`, or compiled by XLA, as `mode.name` says."""
    import tensorflow as tf

    def wrap(function):
        if request.param == "eager":
            return function
        return tf.function(function, jit_compile=request.param == "xla")

    wrap.name = request.param
    return wrap


@pytest.fixture
def rng(request):
    """A random generator that is the same on every run and differs between tests."""
    import zlib

    import numpy as np

    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _small_heap():
    """Has Python's collector leave out what tests before have made: it would look at millions of objects."""
    yield
    gc.freeze()


@pytest.fixture
def resident_bytes():
    """A function that returns how much memory this process has now."""

    def read():
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    return read


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    mark_some_of_many(items)
    mark_some_by_default(items)
    skip_without_a_gpu(items)
    items.sort(key=lambda item: getattr(item, "originalname", None) not in LONGEST)


def mark_some_of_many(items):
    seen = collections.Counter()
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        way = case.get("backend"), str(case.get("mode"))
        if way not in SOME_OF_MANY or item.get_closest_marker("exhaustive"):
            continue
        test = (item.parent, item.originalname, way)
        first = not seen[test] and way != ("reference", "xla")
        # By name, so that the cases are the same ones in each run, and spread over all arguments.
        if not first and zlib.crc32(item.name.encode()) % SOME_OF_MANY[way]:
            item.add_marker(pytest.mark.exhaustive)
        seen[test] += 1


def mark_some_by_default(items):
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("some_by_default") and not item.get_closest_marker("exhaustive"):
            cases[item.parent, item.originalname].append(item)
    for each in cases.values():
        number = each[0].get_closest_marker("some_by_default").args[0]
        # The first one, and those whose names come first in an order that is spread over all arguments.
        for item in sorted(each[1:], key=lambda item: zlib.crc32(item.name.encode()))[number - 1 :]:
            item.add_marker(pytest.mark.exhaustive)


def skip_without_a_gpu(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="TensorFlow sees no CUDA device"))
