import os

import pytest

from accumops.benchmark import memory
from accumops.planning.child_process import ChildProcess, ChildProcessFailed


@pytest.fixture(scope="module")
def process():
    with ChildProcess({"ACCUMOPS_BACKEND": "reference", "CUDA_VISIBLE_DEVICES": "-1"}) as process:
        yield process


def test_functions_run_there(process):
    assert process.call(os.getpid) not in (os.getpid(), os.getppid())
    assert process.call(os.getenv, key="ACCUMOPS_BACKEND") == "reference"
    # The function's own print must not be taken for its answer.
    assert process.call(os.system, command="echo printed") == 0


def test_error_is_passed_on_and_the_process_lives(process):
    with pytest.raises(ChildProcessFailed, match=r"^FileNotFoundError: .*no such directory"):
        process.call(os.listdir, path="no such directory")
    assert process.call(os.getenv, key="no such variable") is None


def test_peak_is_that_of_the_windows(process):
    """Weights, slots and accumulators of the model take at least 16 bytes a value."""
    arguments = {"problem": "MLP 2048x4", "contender": "accumops, micro_batch_size", "samples": 32, "device": "CPU"}
    values = 4 * (2048 * 2048 + 2048) + 2048 * 10 + 10
    assert 16 * values < process.call(memory.peak_bytes, **arguments) < 16 * 16 * values


def test_dead_process_is_named():
    with ChildProcess() as process:
        with pytest.raises(ChildProcessFailed, match="the process ended with"):
            process.call(os.abort)
        with pytest.raises(ChildProcessFailed, match="the process ended with"):
            process.call(os.getpid)
