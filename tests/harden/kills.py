"""Kills trainings by SIGKILL at random moments of `fit`, restarts them, and compares the bits that they end with.

python tests/harden/kills.py --seconds 60
"""

import json
import subprocess
import sys
import tempfile

from supervised import ROOT, Found, main

MOST = 1_000_000


def part(seconds):
    script = ROOT / "tests" / "training" / "killed.py"
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, script, directory, str(MOST), str(seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise Found(f"{script.name} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    if report["trainings"] != report["trainings with the bits of an undisturbed one"]:
        raise Found(done.stdout[-4000:])
    return report


if __name__ == "__main__":
    main(part)
