"""Runs Python with a sanitizer in it, for kernels that were compiled with that sanitizer."""

import os
import subprocess
import sys

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


def run(sanitizer, directory, *arguments):
    """Runs Python with arguments.

    Args:
        sanitizer: "address" or "thread".
        directory: The folder of the kernels that the scripts in benchmarks/gpu load.
        *arguments: The arguments of Python.

    Returns:
        The exit status, and what stdout and stderr got.
    """
    library = subprocess.run(
        ["g++", f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ACCUMOPS_KERNELS_DIR": str(directory),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        # The thread sanitizer of GCC 12 wants the addresses of a process where they always were.
        ["setarch", "-R", sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout
