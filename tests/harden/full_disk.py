"""Leaves a random number of bytes free on the disk before a backup: `fit` raises an OSError or goes on, the last backup
stays whole, and a training that goes on from it ends with the bits of an undisturbed one.

The disk is a small tmpfs, where this process may mount one, or a limit on the size of files.

    python tests/harden/full_disk.py --seconds 60
"""

import contextlib
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from supervised import ROOT, Found, main, repeat

sys.path.append(str(ROOT / "tests" / "training"))
import backed_up

import accumops
from accumops.training.backup_files import BackupFiles

KIND = "eager"
TRIALS_OF_A_PROCESS = 50


class AtBackup(keras.callbacks.Callback):
    """Does something before a batch of `fit`, by its number."""

    def __init__(self, number, act):
        super().__init__()
        self._left, self._act = number, act

    def on_train_batch_begin(self, batch, logs=None):
        if self._left == 0:
            self._act()
        self._left -= 1


@contextlib.contextmanager
def small_disk(directory, size):
    """A tmpfs of so many bytes in a directory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True, capture_output=True)


def can_mount():
    with tempfile.TemporaryDirectory() as directory:
        try:
            with small_disk(directory, 1 << 16):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def train(directory, *callbacks):
    model = backed_up.make(KIND)
    backed_up.fit(model, accumops.BackupAndRestore(directory, save_freq=1, delete_checkpoint=False), *callbacks)
    return backed_up.state(model)


def bytes_of(directory):
    return sum(path.stat().st_size for path in pathlib.Path(directory).rglob("*"))


def check(directory):
    """Checks what a failed training has left, and returns the number of its backup."""
    whole, damages = BackupFiles(directory).read()
    if damages or len(whole) != 1:
        raise Found(f"a full disk has left {[each.path for each in whole]}, and damages: {damages}")
    return whole[0].path


def fill(directory, free):
    """Leaves so many bytes free on the disk of a directory."""
    left = os.statvfs(directory)
    size = left.f_bavail * left.f_frsize - free
    if size > 0:
        (pathlib.Path(directory) / "filling").write_bytes(bytes(size))


def trial(random_, wanted, size, mounts):
    """Trains until the disk is full, and then once more. Returns whether it was ever full."""
    before = random_.randrange(1, backed_up.BATCHES * backed_up.EPOCHS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as top, contextlib.ExitStack() as stack:
        on_tmpfs = mounts and random_.random() < 0.5
        if on_tmpfs:
            stack.enter_context(small_disk(top, 16 * size + (1 << 20)))
        directory = pathlib.Path(top) / "backup"
        free = random_.randrange(0, 12 * size)  # with less than some 8 times its size it is not begun

        def restrict():
            check(directory)
            if on_tmpfs:
                fill(top, free)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max(free, 1), limits[1]))

        full = False
        try:
            train(directory, AtBackup(before, restrict))
        except OSError:
            full = True
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            (pathlib.Path(top) / "filling").unlink(missing_ok=True)
        check(directory)
        try:
            backed_up.check_same(train(directory), wanted)
        except AssertionError as error:
            raise Found(f"not the bits of an undisturbed training: {error}") from error
    return full


def work(seed, deadline, progress, mounts):
    with tempfile.TemporaryDirectory() as directory:
        wanted = train(pathlib.Path(directory) / "undisturbed")
        size = bytes_of(directory)
    random_, full = random.Random(seed), 0
    for number in range(TRIALS_OF_A_PROCESS):
        progress.value = number
        full += trial(random_, wanted, size, mounts)
        if time.time() > deadline:
            break
    return {"trainings": number + 1, "trainings on a full disk": full}


def part(seconds):
    mounts = can_mount()
    return repeat(work, seconds, preload=["tensorflow", "keras"], mounts=mounts) | {"tmpfs": mounts}


if __name__ == "__main__":
    main(part)
