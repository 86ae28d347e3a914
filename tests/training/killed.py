"""Kills trainings by SIGKILL at random moments of `fit` and restarts them: `killed.py DIRECTORY KILLS [SECONDS]`.

With SECONDS it makes fewer kills if it takes longer than that.

TensorFlow is imported once: each life of a training is a fork of this process, which never uses TensorFlow itself. The
last line of the output is a report in JSON.
"""

import functools
import itertools
import json
import math
import mmap
import os
import pathlib
import signal
import sys
import time

import numpy as np
from backed_up import fit, make, state

import accumops
from accumops.training.backup_files import BackupFiles

CASES = [
    ("plain", "epoch", {"run_eagerly": True}),
    ("accum_steps", 1, {"jit_compile": False}),
    ("optimizer", 2, {"run_eagerly": True}),
    ("micro_batch_size", 1, {"jit_compile": False}),
    ("plain", 3, {"jit_compile": True}),
    ("scheduled", 2, {"run_eagerly": True}),
    ("batch_norm", 2, {"jit_compile": False}),
]
EPOCHS = 5  # ends in mid-window, where windows are of 3 or 4 batches
BEFORE_FIT, IN_FIT, IN_BACKUP, DONE = range(4)


def live(case, directory, phase):
    """A life of a training. Writes what it ends with to the directory."""
    kind, save_freq, options = case

    def mark(function):
        @functools.wraps(function)
        def marked(*args):
            phase[0] = IN_BACKUP
            try:
                return function(*args)
            finally:
                phase[0] = IN_FIT

        return marked

    for name in ("prepare", "read", "write", "delete"):
        setattr(BackupFiles, name, mark(getattr(BackupFiles, name)))
    model = make(kind, **options)
    phase[0] = IN_FIT
    history = fit(model, accumops.BackupAndRestore(directory / "backup", save_freq), epochs=EPOCHS)
    phase[0] = DONE
    last = history.history["loss"][-1] if history.epoch else float("nan")
    np.savez(directory / "end.npz", loss=last, **state(model))


def fork(case, directory):
    """Starts a life and returns its process and its phase, in memory that both share."""
    phase = mmap.mmap(-1, 1)
    process = os.fork()
    if process:
        return process, phase
    code = 1
    try:
        live(case, directory, phase)
        code = 0
    finally:
        os._exit(code)


def wait(process):
    """Waits for a life's end; it must be a good one."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code != 0:
        raise RuntimeError(f"a training failed with {code}")


def undisturbed(case, directory):
    """Trains without a kill. Returns the end, and how many seconds `fit` took."""
    directory.mkdir()
    process, phase = fork(case, directory)
    while phase[0] == BEFORE_FIT:
        time.sleep(0.001)
    started = time.monotonic()
    wait(process)
    return np.load(directory / "end.npz"), time.monotonic() - started


def kill_later(process, phase, seconds):
    """Kills a life after so many seconds of its `fit`. Returns the phase it was in; None if it was over before."""
    while phase[0] == BEFORE_FIT:
        time.sleep(0.001)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if phase[0] == DONE:
            wait(process)
            return None
        time.sleep(0.0005)
    os.kill(process, signal.SIGSTOP)  # the process must not reach another phase before it is killed
    found = phase[0]
    if found == DONE:
        os.kill(process, signal.SIGCONT)
        wait(process)
        return None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return found


def run(directory, kills, seconds=math.inf):
    deadline = time.monotonic() + seconds
    accumops.build_info()  # loads the compiled ops, so that all lives have them, or none
    rng = np.random.default_rng(0)
    report = {"kills": 0, "kills within a backup": 0, "kills that left something unfinished": 0, "trainings": 0}
    report["trainings with the bits of an undisturbed one"] = 0
    references = {}

    def enough():
        return report["kills"] == kills or time.monotonic() > deadline

    for number in itertools.count():
        index = number % len(CASES)
        case = CASES[index]
        if index not in references:
            references[index] = undisturbed(case, directory / f"undisturbed_{index}")
        wanted, seconds = references[index]
        here = directory / f"killed_{number}"
        here.mkdir()
        while not (here / "end.npz").exists():
            process, phase = fork(case, here)
            if enough():
                wait(process)
                break
            found = kill_later(process, phase, rng.uniform(0, seconds))
            if found is not None:
                backups = list(here.glob("backup/*"))
                report["kills"] += 1
                report["kills within a backup"] += found == IN_BACKUP
                report["kills that left something unfinished"] += any("unfinished" in path.name for path in backups)
        got = np.load(here / "end.npz")
        assert wanted.files == got.files
        # There is no loss if the last kill came after the last epoch.
        names = wanted.files[1:] if np.isnan(got["loss"]) else wanted.files
        different = [name for name in names if not np.array_equal(wanted[name], got[name])]
        for name in different:
            print(f"{case}, training {number}: '{name}' differs by", np.abs(got[name] - wanted[name]).max(), flush=True)
        report["trainings"] += 1
        report["trainings with the bits of an undisturbed one"] += not different
        if enough():
            return report


if __name__ == "__main__":
    print(json.dumps(run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))))
