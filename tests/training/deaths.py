"""Deaths for tests: from some moment on nothing that the process does has an effect, as after a SIGKILL.

A moment is before an operation on files, in the middle of a write, or where a test says so with `tick`.
"""

import contextlib
import os
import shutil

from accumops.training import backup_files


class Death(BaseException):
    """The process has died. No `except Exception` catches it."""


class Clock:
    """Counts moments and raises `Death` at one, and at all after it.

    Args:
        last: The number of the moment, counted from 1, or None for a process that lives.
    """

    def __init__(self, last=None):
        self.last = last
        self.moments = 0
        self.log = []

    def tick(self, what=""):
        self.moments += 1
        if self.last is not None and self.moments >= self.last:
            raise Death
        self.log.append(what)

    @contextlib.contextmanager
    def rules_files(self, monkeypatch):
        """All operations on files of `backup_files` are moments."""
        with monkeypatch.context() as patch:
            patch.setattr(backup_files, "os", _Module(os, self, ["mkdir", "rename", "fsync", "rmdir", "open", "close"]))
            patch.setattr(backup_files, "shutil", _Files(self))
            patch.setattr(backup_files, "open", self._open, raising=False)
            yield self

    def write(self, path, content):
        """Writes a file in two parts, with a moment before, between and after them."""
        self.tick(f"create {path}")
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            self.tick(f"write {path}")
            file.write(content[len(content) // 2 :])
        self.tick(f"written {path}")

    def _open(self, path, mode="r", **kwargs):
        self.tick(f"open {path}")
        return _Torn(open(path, mode, **kwargs), self) if "w" in mode else open(path, mode, **kwargs)


class _Module:
    def __init__(self, module, clock, names):
        self._module, self._clock, self._names = module, clock, names
        self._opened = {}

    def __getattr__(self, name):
        function = getattr(self._module, name)
        if name not in self._names:
            return function

        def call(*args):
            if name == "close":  # a process that dies closes its files, too
                return function(*args)
            self._clock.tick(f"{name} {self._opened.get(args[0], args[0])}")
            result = function(*args)
            if name == "open":
                self._opened[result] = args[0]
            return result

        return call


class _Files:
    """`shutil`, whose rmtree has a moment before each file."""

    def __init__(self, clock):
        self._clock = clock

    def __getattr__(self, name):
        return getattr(shutil, name)

    def rmtree(self, path, ignore_errors=False):
        for name in sorted(os.listdir(path)):
            self._clock.tick(f"remove {path}/{name}")
            os.remove(os.path.join(path, name))
        self._clock.tick(f"rmdir {path}")
        shutil.rmtree(path, ignore_errors)


class _Torn:
    """A text file whose writes are torn by a death."""

    def __init__(self, file, clock):
        self._file, self._clock = file, clock

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, text):
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        self._clock.tick("write")
        self._file.write(text[len(text) // 2 :])
