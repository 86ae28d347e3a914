"""A step in which an allocation fails is made again, and ends as if memory had not run out."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "failing_allocations.so"
    compiler = os.environ.get("CXX", "g++")
    source = HERE / "failing_allocations.cc"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    ("optimizer", "stride"),
    [
        ("adam", 80),  # the last of them where the window closes
        *(
            pytest.param(optimizer, 1, marks=pytest.mark.exhaustive)
            for optimizer in ("adam", "clipped", "averaged", "scaled", "adagrad")
        ),
    ],
)
def test_each_allocation_of_a_window(library, optimizer, stride):
    script = HERE / "allocation_failures.py"
    # oneDNN's allocator takes its memory in large pieces, of which few can fail.
    environment = {"LD_PRELOAD": str(library), "TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, script, library, optimizer, str(stride)],
        env={**os.environ, **environment, "ACCUMOPS_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    count, outcomes = re.search(r"^(\d+) (\{.*\})$", done.stdout, re.MULTILINE).groups()
    assert int(count) > 100
    assert "wrong" not in outcomes
    assert "4 right" in outcomes
