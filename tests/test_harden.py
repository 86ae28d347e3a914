"""The parts of `make harden` run, and what they find is told."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import accumops

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
harden = importlib.import_module("harden")

# The parts that need no TensorFlow are quick to start.
QUICK = ("malformed_kernels", "same_bits", "forks")


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part in QUICK else pytest.mark.exhaustive) for part in harden.PARTS]
)
@pytest.mark.some_by_default(2)
def test_a_part_writes_a_line(part, tmp_path):
    record = tmp_path / "record.json"
    record.write_text('{"kills": {"kills": 3}}')
    command = [sys.executable, ROOT / "tools" / "harden.py", part, "--minutes", "0.01", "--record", record]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads(record.read_text())
    assert list(lines) == [name for name in harden.PARTS if name in (part, "kills")]
    assert {"seconds", "cpu", "commit"} < set(lines[part])
    counts = [value for name, value in lines[part].items() if name not in ("seconds", "cpu", "commit")]
    assert any(isinstance(count, int) and count > 0 for count in counts)
    assert len(record.read_text().splitlines()) == len(lines) + 2


CALLS = """
import sys
sys.path.insert(0, {directory!r})
import malformed_kernels, malformed_ops
from accumops.ops import library

state, module = malformed_ops.State(), library.load()[0]
names = {{name.removeprefix("accum_ops_") for name in dir(module) if name.startswith("accum_ops_")}}
names = {{name for name in names if "eager_fallback" not in name}}
assert names == set(malformed_ops.CALLS), names ^ set(malformed_ops.CALLS)
for op, calls in malformed_ops.CALLS.items():
    for call in calls:
        malformed_ops.run(state, op, call, "eager")
kernels, arena = malformed_kernels.load_kernels(), malformed_kernels.Arena()
for name, arguments in malformed_kernels.CALLS.items():
    arena.restart()
    positional, keywords = arguments(arena)
    getattr(kernels, name)(*positional, **keywords)
"""


@pytest.mark.skipif(accumops.ops.library.load()[0] is None, reason="the fused ops do not load")
def test_what_is_damaged_are_right_calls_of_every_op():
    script = CALLS.format(directory=str(ROOT / "tests" / "harden"))
    done = processes.run(script)
    assert done.returncode == 0, done.stderr


def test_what_a_part_finds_is_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "kills.py").write_text("import sys; sys.exit('a process ended with -11')")
    record = tmp_path / "record.json"
    monkeypatch.setattr(harden, "SCRIPTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["harden.py", "kills", "--record", str(record)])
    assert harden.main()
    assert "a process ended with -11" in capfd.readouterr().err
    assert not record.exists()


def test_a_part_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harden.py", "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        harden.main()
    assert "no such part: nonsense" in capsys.readouterr().err


DIES = """
import os, sys
sys.path.insert(0, {directory!r})
from supervised import main, repeat

def work(seed, deadline, progress):
    progress.value = 7
    os.kill(os.getpid(), 11)

if __name__ == "__main__":
    main(lambda seconds: repeat(work, seconds))
"""


def test_a_process_that_dies_is_named_with_its_seed(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES.format(directory=str(ROOT / "tests" / "harden")))
    done = subprocess.run([sys.executable, script, "--seconds", "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "With seed 0, in number 7, the process ended with -11" in done.stderr
