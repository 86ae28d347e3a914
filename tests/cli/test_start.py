"""How the commands start: without TensorFlow until they need it, and without its log when they do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

# Prints like TensorFlow while it is loaded: log lines in Abseil's format and in the one of older releases, and others.
_FAKE_TENSORFLOW = '''
import os, sys, warnings

os.write(2, b"""\\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795890382.356610   20166 port.cc:153] information
W0000 00:00:1795890382.356610   20166 placer.cc:1] a warning
E0000 00:00:1795890382.356610   20166 cuda_platform.cc:52] an error
2026-11-28 18:26:22.356610: I tensorflow/core/util/port.cc:153] older information
2026-11-28 18:26:22.356610: E external/xla/stream_executor/cuda.cc:9] older error
To enable the following instructions: AVX2, in other operations, rebuild TensorFlow.
libm.so: cannot be loaded
""")
warnings.warn("old NumPy")
print("printed", file=sys.stderr)
'''


def start(code, *arguments, path=(), level=None):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(_ROOT)])
    if level is not None:
        environment["TF_CPP_MIN_LOG_LEVEL"] = level
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def import_fake(directory, ending="", level=None):
    (directory / "tensorflow.py").write_text(_FAKE_TENSORFLOW + ending)
    code = (
        "from accumops.cli.quiet import import_tensorflow; import_tensorflow(); import sys; sys.stderr.write('after')"
    )
    return start(code, path=[directory], level=level)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["info", "--help"], 0),
        (["verify", "--help"], 0),
        (["demo", "--help"], 0),
        (["bench", "--help"], 0),
        (["nonsense"], 2),
        (["bench", "nonsense"], 2),
        (["verify", "--device", "tpu"], 2),
        (["demo", "--output", "no/such/directory/a.png"], 2),
    ],
    ids=str,
)
@pytest.mark.some_by_default(5)
def test_help_and_usage_errors_import_no_large_package(arguments, code):
    started = start(
        """
import sys
from accumops.cli import main
try:
    main()
finally:
    print([name for name in ("tensorflow", "keras", "numpy", "matplotlib", "sklearn") if name in sys.modules])
""",
        *arguments,
    )
    assert started.returncode == code, started.stderr
    assert started.stdout.splitlines()[-1] == "[]"


def test_log_lines_of_the_import_are_dropped_and_nothing_else(tmp_path):
    imported = import_fake(tmp_path)
    assert imported.returncode == 0
    lines = imported.stderr.splitlines()
    assert lines[0] == "libm.so: cannot be loaded"
    assert "UserWarning: old NumPy" in lines[1]
    assert lines[-2:] == ["printed", "after"]
    assert "error" not in imported.stderr
    assert "information" not in imported.stderr


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("0", ["information", "a warning", "an error", "older information", "older error"]),
        ("1", ["a warning", "an error", "older error"]),
        ("2", ["an error", "older error"]),
        ("", ["information", "a warning", "an error", "older information", "older error"]),
    ],
)
def test_level_of_the_user_is_kept(tmp_path, level, shown):
    imported = import_fake(tmp_path, "print(os.environ['TF_CPP_MIN_LOG_LEVEL'])", level=level)
    assert imported.stdout.strip() == level
    assert [line.split("] ")[1] for line in imported.stderr.splitlines() if "] " in line] == shown


def test_failed_import_is_an_error_with_what_was_printed(tmp_path):
    imported = import_fake(tmp_path, "raise ImportError('no symbol of that name')")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[0] == "libm.so: cannot be loaded"
    assert imported.stderr.splitlines()[-1] == "ImportError: no symbol of that name"


def test_crash_in_the_import_is_located(tmp_path):
    imported = import_fake(tmp_path, "os.abort()")
    assert imported.returncode < 0
    assert "Fatal Python error: Aborted" in imported.stderr
    assert "tensorflow.py" in imported.stderr


@pytest.mark.exhaustive
def test_demo_is_quiet(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    code = "from accumops.cli import main; main()"
    done = start(code, "demo", "--updates", "1", "--output", str(tmp_path / "loss.png"))
    assert done.returncode == 0
    assert done.stderr == ""
