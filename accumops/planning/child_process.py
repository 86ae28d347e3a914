"""Runs functions in another process, which has its own memory and its own TensorFlow settings."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
_SERVE = "from accumops.planning.child_process import serve; serve()"


class ChildProcessFailed(RuntimeError):
    """The function raised an error in the other process, or that process died."""


class ChildProcess:
    """A new Python process that runs functions on demand. As a context manager it ends the process.

    Args:
        environment: Environment variables for the process, in addition to those of this one.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )

    def __enter__(self) -> "ChildProcess":
        return self

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def was_killed(self) -> bool:
        """Whether the process was ended from outside, such as by Linux where memory ran out."""
        return self._process.poll() == -signal.SIGKILL

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Runs a function in the process, and waits for its result.

        Args:
            function: A function of a module. The process imports it by its name, so changes that this process has made
                to the module have no effect.
            **arguments: The function's arguments, which JSON must be able to hold.

        Returns:
            The function's result, after a round trip through JSON.

        Raises:
            ChildProcessFailed: If the function raised an error, or the process is dead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([function.__module__, function.__name__, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is dead, so reading its answer below fails as well
        answer = self._process.stdout.readline()
        if not answer:
            raise ChildProcessFailed(self._last_message())
        result, problem = json.loads(answer)
        if problem is not None:
            raise ChildProcessFailed(problem)
        return result

    def _last_message(self) -> str:
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages if line.strip()]
        return f"the process ended with {self._process.wait()}: {lines[-1] if lines else 'no message'}"


def problem_text(error: BaseException) -> str:
    """Returns an error as a note: its type, and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def serve() -> None:
    """The new process's loop: runs a function for each line of stdin, and answers with a line on stdout."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # prints of the function go to stderr, so that stdout has answers only
        for line in sys.stdin:
            module, name, arguments = json.loads(line)
            result, problem = None, None
            try:
                result = getattr(importlib.import_module(module), name)(**arguments)
            except Exception as error:
                problem = problem_text(error)
            print(json.dumps([result, problem]), file=answers, flush=True)
