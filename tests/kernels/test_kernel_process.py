"""What the module does to its process: memory, threads, forks, the GIL and the interpreter's exit."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

LOAD = """
import importlib.machinery, importlib.util, os, sys, threading
import numpy as np
loader = importlib.machinery.ExtensionFileLoader("_kernels", sys.argv[1])
spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1], loader=loader)
kernels = importlib.util.module_from_spec(spec)
loader.exec_module(kernels)
def check(threads, size=1_000_000):
    accumulator, gradient = np.ones(size, np.float32), np.ones(size, np.float32)
    kernels.accumulate([accumulator], [gradient], scale=2, threads=threads)
    assert (accumulator == 3).all()
def native_threads():
    return len(os.listdir("/proc/self/task"))
"""


def run_python(extension_path, script):
    """Runs a script in a process of its own that has only NumPy and the extension."""
    result = subprocess.run(
        [sys.executable, "-c", LOAD + script, extension_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_calls_leave_memory_as_it_was(kernels):
    accumulators = [np.zeros(size, np.float32) for size in (1000, 20, 3)]
    gradients = [np.ones(size, np.float16) for size in (1000, 20, 3)]
    large, table = np.zeros((1000, 200), np.float32), np.zeros((50, 8), np.float32)
    values, indices, all_finite = np.ones((20, 8), np.float32), np.arange(20), np.ones(1, np.bool_)

    def calls(count):
        for _ in range(count):
            kernels.accumulate(accumulators, gradients, all_finite=all_finite)
            kernels.accumulate([memoryview(large)], [large + 1], threads=2)
            kernels.accumulate_rows(table, values, indices, threads=2)
            with pytest.raises(ValueError, match="gradients has 2"):
                kernels.accumulate(accumulators, gradients[:2])

    calls(200)
    before = resident_bytes()
    calls(2500)
    assert resident_bytes() - before < 1 << 20


def test_calls_of_the_other_kernels_leave_memory_as_it_was(kernels):
    arrays = [[np.ones(size, np.float32) for size in (1000, 20, 3)] for _ in range(4)]
    flags, scales, sums = np.ones(20, np.bool_), np.ones(3, np.float32), np.zeros(3)
    x, y = np.ones((100, 8), np.float32), np.ones((100, 8), np.float32)
    channels = [np.ones(8, np.float32) for _ in range(6)]
    count, window = np.zeros(1, np.int64), [np.array([0, 0, 3]), np.zeros((2, 8))]
    written = dict(zip(("mean", "rest", "variance", "inverse"), channels[2:], strict=True))

    def calls(repeats):
        for _ in range(repeats):
            kernels.update(
                "adam", arrays[0], arrays[1:3], accumulators=arrays[3], touched_rows=[None, flags, None],
                scales=scales, rate=1e-3, decays=[True, False, True],
            )  # fmt: skip
            kernels.squared_norms(arrays[0], sums)
            kernels.batch_norm(x, *channels[:2], y=y, count=count, mask=np.ones(100, np.bool_), **written)
            kernels.merge_moments([count, *channels[2:5]], window=window)
            with pytest.raises(ValueError, match="slots has 1 items"):
                kernels.update("adam", arrays[0], arrays[1:2], accumulators=arrays[3], rate=1.0)
            with pytest.raises(ValueError, match="axis is 5"):
                kernels.batch_norm(x, *channels[:2], y=y, count=count, axis=5, **written)

    calls(200)
    before = resident_bytes()
    calls(2000)
    assert resident_bytes() - before < 1 << 20


def test_threads_are_started_when_needed_and_kept(extension_path):
    run_python(
        extension_path,
        """
start = native_threads()
check(threads=1)
assert native_threads() == start
for _ in range(20):
    check(threads=3)
assert native_threads() == start + 2
check(threads=2)
check(threads=5)
assert native_threads() == start + 4
""",
    )


def test_a_mistyped_number_of_threads_does_not_exhaust_the_system(kernels):
    accumulator = np.zeros((3, 70_000), np.float32)
    kernels.accumulate([accumulator], [np.ones_like(accumulator)], threads=10**30)
    kernels.accumulate_rows(accumulator, np.ones_like(accumulator), np.arange(3), threads=10**30)
    np.testing.assert_array_equal(accumulator, 2)


def test_where_no_thread_can_be_started_the_caller_does_the_work(extension_path):
    run_python(
        extension_path,
        """
import resource
accumulator, gradient = np.zeros(200_000, np.float32), np.ones(200_000, np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))  # less than a thread's stack
start = native_threads()
for _ in range(10_000):  # work left for threads that never start must not pile up
    kernels.accumulate([accumulator], [gradient], threads=4)
assert native_threads() == start
assert (accumulator == 10_000).all()
""",
    )


def test_a_forked_child_has_threads_of_its_own(extension_path):
    run_python(
        extension_path,
        """
import warnings
warnings.simplefilter("ignore")  # Python warns of a fork in a process with threads, which is intended here
check(threads=4)
for generation in range(3):
    child = os.fork()
    if child != 0:
        status = os.waitpid(child, 0)[1]
        check(threads=4)
        os._exit(os.waitstatus_to_exitcode(status))
    assert native_threads() == 1
    check(threads=4)
    assert native_threads() == 4
""",
    )


def test_forks_while_other_threads_compute(extension_path):
    run_python(
        extension_path,
        """
import signal, warnings
warnings.simplefilter("ignore")
done = threading.Event()
def work():
    while not done.is_set():
        check(threads=3, size=300_000)
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        check(threads=3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done.set()
for worker in workers:
    worker.join()
""",
    )


def test_the_interpreter_exits_while_daemon_threads_compute(extension_path):
    script = """
started = [threading.Event() for _ in range(6)]
def work(event):
    accumulator, gradient = np.zeros(30_000, np.float32), np.ones(30_000, np.float32)
    while True:
        kernels.accumulate([accumulator], [gradient], threads=2)
        event.set()
for event in started:
    threading.Thread(target=work, args=(event,), daemon=True).start()
for event in started:
    event.wait()
print("end")
"""
    for _ in range(5):
        assert run_python(extension_path, script) == "end\n"


def test_many_python_threads_at_once(kernels):
    accumulators = [np.zeros(100_003, np.float32) for _ in range(6)]
    gradient = np.ones(100_003, np.float32)

    def work(accumulator):
        for _ in range(30):
            kernels.accumulate([accumulator], [gradient], threads=3)

    workers = [threading.Thread(target=work, args=(a,)) for a in accumulators]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(accumulators, 30)


def test_the_gil_is_free_while_the_kernel_runs(kernels):
    """Meanwhile another Python thread counts, which it could not do while the kernel held the GIL."""
    worker = threading.Thread(
        target=lambda: kernels.memory_bandwidth(1, bytes_per_array=1 << 20, repeats=2000), daemon=True
    )
    worker.start()
    turns = 0
    while worker.is_alive() and turns < 1000:
        turns += 1
        worker.join(1e-4)
    assert turns > 10
