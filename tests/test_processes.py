"""Scripts that share one import of TensorFlow run and end as processes of their own do."""

import os
import signal
import subprocess
import sys

import processes
import pytest

START = """
import os, sys
from tensorflow.python.eager import context
with open(f"/proc/{os.getppid()}/cmdline") as command, open("/proc/self/status") as status:
    print("forkserver" in command.read(), [line.split()[1] for line in status if line.startswith("Threads")])
print(len(os.listdir(f"/proc/{os.getppid()}/task")), context.context()._context_handle)
print("tensorflow" in sys.modules, "keras" in sys.modules, "accumops" in sys.modules, __name__, sys.argv)
"""


def test_starts_with_tensorflow_imported_and_unused():
    """A process with other threads could not be forked safely, nor one that has used TensorFlow."""
    done = processes.run(START, 1, "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True ['1']",
        "1 None",
        "True True False __main__ ['-c', '1', 'two']",
    ]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("print('out'); print('err', file=sys.stderr)", 0),
        ("os.write(1, b'out'); os.write(2, b'err'); sys.exit(3)", 3),
        ("print('out'); raise ValueError('err')", 1),
        ("sys.stderr.write('err'); print('out', flush=True); os.abort()", -signal.SIGABRT),
        ("os.write(2, b'err'); print('out', flush=True); os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'out'); sys.exit('err')", 1),
    ],
)
def test_ends_as_a_process_of_its_own(script, code):
    script = f"import os, signal, sys\n{script}"
    forked = processes.run(script)
    own = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert forked.returncode == own.returncode == code
    assert forked.stdout == own.stdout
    assert forked.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]
    assert "err" in own.stderr or not own.stderr


def test_environment_is_todays(monkeypatch):
    monkeypatch.setenv("ACCUMOPS_TEST", "mine")
    script = "import os; print(os.environ['ACCUMOPS_TEST'], os.getenv('OTHER'), os.getcwd())"
    assert processes.run(script, environment={"OTHER": "one"}).stdout == f"mine one {os.getcwd()}\n"
    monkeypatch.delenv("ACCUMOPS_TEST")
    assert "KeyError: 'ACCUMOPS_TEST'" in processes.run(script).stderr


def test_a_file_in_a_directory_of_modules(tmp_path):
    (tmp_path / "beside.py").write_text("value = 7")
    file = tmp_path / "script.py"
    file.write_text("import beside, sys; print(beside.value, sys.argv, __file__)")
    assert processes.run(file, "a").stdout == f"7 {[str(file), 'a']} {file}\n"


def test_a_script_that_takes_too_long_is_killed():
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        processes.run("import time; print('begun', flush=True); time.sleep(60)", timeout=1)
    assert caught.value.stdout == "begun\n"


def test_a_script_that_runs_on(tmp_path):
    running = processes.Script("import time; print('a', flush=True); 1 / 0", output=tmp_path / "log")
    assert running.wait(60) == running.poll() == 1
    assert (tmp_path / "log").read_text().startswith("a\n")
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    running = processes.Script("import time; time.sleep(60)", output=tmp_path / "log")
    assert running.poll() is None
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
