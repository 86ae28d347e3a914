"""Runs the long versions of the tests that hold accumops' promises, each for a limited time: `make harden MINUTES=10`.

    python tools/harden.py [--minutes M] [--record FILE] [PART …]

A part is a script in tests/harden. One that has found nothing wrong writes one line to the record: what it has counted,
the seconds, the processor and the commit. docs/promises.md says which promise each part holds.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "harden"
RECORD = ROOT / "benchmarks" / "results" / "harden-cpu.json"
PARTS = (
    "malformed_kernels",
    "malformed_ops",
    "same_bits",
    "overlapping",
    "forks",
    "windows",
    "allocations",
    "full_disk",
    "kills",
)


def main() -> int:
    """Runs the parts that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each part, about (10)")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file to write to")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.parts} - {*PARTS})
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}. There are: {', '.join(PARTS)}")
    commit, failed = _commit(), []
    for part in arguments.parts or PARTS:
        started = time.monotonic()
        print(f"{part}: about {arguments.minutes:g} minutes", flush=True)
        report = _run(part, 60 * arguments.minutes)
        seconds = round(time.monotonic() - started)
        if report is None:
            failed.append(part)
            continue
        print(f"{part}: {', '.join(f'{name} {value}' for name, value in report.items())}, in {seconds} s", flush=True)
        _write(arguments.record, part, {**report, "seconds": seconds, "cpu": _cpu(), "commit": commit})
    if failed:
        print(f"Something is wrong: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _run(part: str, seconds: float) -> dict[str, int] | None:
    """Runs a part. Returns what it has counted; None if it has found something wrong, which it prints."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"{part}.py", "--seconds", str(seconds)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return report
    print(done.stdout, end="")
    print(f"{part}: ended with {done.returncode}", file=sys.stderr)
    return None


def _write(record: Path, part: str, line: dict[str, object]) -> None:
    """Puts a part's line into the record, in place of the one that is there."""
    lines = json.loads(record.read_text()) if record.exists() else {}
    lines[part] = line
    ordered = [name for name in PARTS if name in lines]
    body = ",\n".join(f" {json.dumps(name)}: {json.dumps(lines[name])}" for name in ordered)
    record.write_text(f"{{\n{body}\n}}\n")


def _cpu() -> str:
    """The processor's name, and how many of its cores there are."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{match[1] if match else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit, with a + if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if changed else ''}"


if __name__ == "__main__":
    sys.exit(main())
