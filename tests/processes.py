"""Runs scripts in processes of their own that do not each import TensorFlow and Keras, which takes seconds.

One process, the server, imports them and runs none of their operations. It forks a child for each script. The server
starts with the first script and ends with the process that runs the tests.

TensorFlow reads some environment variables while it is imported, `TF_CPP_MIN_LOG_LEVEL` among them. A script has these
as the server had them. Where they matter, and where the import itself is tested, `subprocess` is the right choice.

`that_counts` is a process of another kind, for functions that measure memory.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import types

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tensorflow", "keras"])


class Script:
    """A running script. Its members are those of `subprocess.Popen` with the same names.

    Args:
        script: Python code, or the path of a file.
        *arguments: The script's `sys.argv[1:]`, which are converted to strings.
        output: The path of the file for stdout.
        errors: The path of the file for stderr; None for the same file.
        environment: Environment variables, in addition to those of this process.
    """

    def __init__(self, script, *arguments, output, errors=None, environment=None):
        _start_server()
        self.args = [str(script), *map(str, arguments)]
        self._process = _processes.Process(
            target=_run,
            args=(script, self.args[1:], os.environ | (environment or {}), os.getcwd(), output, errors),
            daemon=True,
        )
        self._process.start()

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def kill(self):
        self._process.kill()


def run(script, *arguments, environment=None, timeout=None):
    """Runs a script to its end, as `subprocess.run` does: returns its exit code and what it wrote, as text.

    A script that a signal ended has the exit code -signal. One that takes longer than the timeout, in seconds, is
    killed, and raises `subprocess.TimeoutExpired`.
    """
    with tempfile.TemporaryDirectory() as directory:
        output, errors = (pathlib.Path(directory) / name for name in ("stdout", "stderr"))
        running = Script(script, *arguments, output=output, errors=errors, environment=environment)
        try:
            code = running.wait(timeout)
        except subprocess.TimeoutExpired as expired:
            running.kill()
            running.wait()
            expired.stdout, expired.stderr = output.read_text(), errors.read_text()
            raise
        return subprocess.CompletedProcess(running.args, code, output.read_text(), errors.read_text())


def that_counts():
    """A `ChildProcess` whose TensorFlow counts what its allocator gives out on the CPU. It imports what tests can.

    TensorFlow's allocator counts there with oneDNN on, which by default it is on some processors only.
    """
    from accumops.planning.child_process import ChildProcess

    path = os.pathsep.join(filter(None, sys.path))
    return ChildProcess({"TF_ENABLE_ONEDNN_OPTS": "1", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": path})


def _start_server():
    """Starts the server, unless it runs, without the threads of OpenBLAS: a process with one thread can be forked."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def _run(script, arguments, environment, directory, output, errors):
    """The child's work. An exception leaves through multiprocessing, which prints it and exits with 1."""
    for descriptor, path in ((1, output), (2, errors)):
        if path is None:
            os.dup2(1, descriptor)
        else:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    is_path = isinstance(script, os.PathLike)
    sys.argv = [str(script) if is_path else "-c", *arguments]
    if is_path:
        sys.path.insert(0, str(script.parent))
    code = script.read_text() if is_path else textwrap.dedent(script)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if is_path:
        main.__file__ = str(script)
    try:
        exec(compile(code, str(script) if is_path else "<string>", "exec"), vars(main))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
