"""Imports TensorFlow without the log lines that it prints on stderr.

`TF_CPP_MIN_LOG_LEVEL` silences most of TensorFlow's log: 1 hides information, 2 also warnings, 3 also errors. The
commands choose 3. TensorFlow logs harmless facts as errors, such as a machine without a GPU, and raises a Python
exception for each real error. A level that the user has set is left alone.

The variable does not reach the lines that TensorFlow prints while its libraries are loaded. So stderr is a file in
memory during the import of TensorFlow, and only then. Afterwards the file is printed without the log lines below the
level, whether the import has succeeded or failed: Python's warnings and the dynamic linker's complaints appear. If the
import kills the process, the file is lost; then `faulthandler` prints where that happened.
"""

import contextlib
import faulthandler
import os
import re
import sys
from collections.abc import Iterator
from typing import IO

_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
_SEVERITIES = b"IWEF"
_LOG_LINE = re.compile(
    rb"([IWEF])\d{4} [\d:.]+\s+\d+ [\w.]+:\d+\] "  # I0000 00:00:1795890382.356610   20166 port.cc:153] …
    rb"|[\d-]+ [\d:.]+: ([IWEF]) [\w./]+:\d+\] "  # 2026-11-28 18:26:22.356610: I tensorflow/core/util/port.cc:153] …
)
_ABOUT_LOG_LINES = (b"WARNING: All log messages before absl::InitializeLog()", b"To enable the following instructions:")


def import_tensorflow() -> None:
    """Imports TensorFlow, which logs nothing unless the user has set `TF_CPP_MIN_LOG_LEVEL`."""
    level = os.environ.setdefault(_VARIABLE, "3")
    if "tensorflow" in sys.modules:
        return
    with _filtered_stderr(int(level) if level.isdecimal() else 0):
        import tensorflow  # noqa: F401


@contextlib.contextmanager
def _filtered_stderr(level: int) -> Iterator[None]:
    """Holds back what the block writes to stderr, and then prints it without log lines below `level`."""
    if level == 0:
        yield
        return
    crashes_were_reported = faulthandler.is_enabled()
    with open(os.memfd_create("stderr"), "w+b") as held_back:
        stderr = os.dup(2)
        faulthandler.enable(stderr)
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            if crashes_were_reported:
                faulthandler.enable()
            else:
                faulthandler.disable()
            os.close(stderr)
            _print(held_back, level)


def _print(held_back: IO[bytes], level: int) -> None:
    held_back.seek(0)
    with open(2, "wb", closefd=False) as stderr:
        stderr.writelines(line for line in held_back if not _is_below(line, level))


def _is_below(line: bytes, level: int) -> bool:
    if found := _LOG_LINE.match(line):
        return _SEVERITIES.index(found.group(1) or found.group(2)) < level
    return line.startswith(_ABOUT_LOG_LINES)
