"""Backups in a directory, each of which is there whole or not at all, wherever the process is killed.

    DIRECTORY/
      backup-00000006/           a backup; a later one has a higher number
        model.weights.h5 …       what the caller writes
        backup.json              the caller's record, and size and checksum of each file
      unfinished-00000007-…/     being written, or being deleted

A backup is written as `unfinished-…`. Its files and the directory are forced to the disk, and then it is renamed, which
is one step for the filesystem. Only then are older backups deleted, and each loses its name first. So a name
`backup-…` stands for a whole backup, unless the disk has failed. The checksums find that, and also what a filesystem
leaves that does not rename a directory in one step.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import Any

_WHOLE, _UNFINISHED, _RECORD = "backup-", "unfinished-", "backup.json"
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Backup:
    """A backup that is whole."""

    path: str
    """The directory with its files."""
    record: dict[str, Any]
    """What the caller gave with it."""


class BackupFiles:
    """The backups in a directory.

    Args:
        directory: The directory. It is created when it is needed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)

    def prepare(self) -> None:
        """Creates the directory, and removes what a kill has left unfinished."""
        self.directory = os.path.abspath(self.directory)  # the working directory may change later
        _make_directory(self.directory)
        for path in self._paths(_UNFINISHED):
            shutil.rmtree(path)

    def read(self) -> tuple[list[Backup], list[str]]:
        """Reads all backups.

        Returns:
            The whole ones, the newest first; and what is wrong with each of the others.
        """
        whole, damages = [], []
        for path in reversed(self._paths(_WHOLE)):
            try:
                whole.append(Backup(path, _checked_record(path)))
            except DamagedError as error:
                damages.append(f"{os.path.basename(path)}: {error}")
        return whole, damages

    def write(self, record: dict[str, Any], write_files: Callable[[str], None], keep: Sequence[str] = ()) -> str:
        """Writes a backup, and then deletes the others.

        Args:
            record: What `read` returns with it. JSON has to be able to hold it.
            write_files: Writes the files into the directory that it is given.
            keep: Paths of backups to keep.

        Returns:
            The backup's path.

        Raises:
            OSError: If it cannot be written. The backups that were there before still are.
        """
        _make_directory(self.directory)  # it may have been deleted since
        paths = self._paths(_WHOLE)
        number = int(os.path.basename(paths[-1])[len(_WHOLE) :]) + 1 if paths else 1
        path = os.path.join(self.directory, f"{_WHOLE}{number:08d}")
        unfinished = self._unfinished(path)
        os.mkdir(unfinished)
        try:
            write_files(unfinished)
            _write_record(unfinished, record)
            for name in os.listdir(unfinished):
                _force_to_disk(os.path.join(unfinished, name))
            _force_directory_to_disk(unfinished)
            os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may be the disk that is full
            raise
        _force_directory_to_disk(self.directory)
        for other in paths:
            if other not in keep:
                self._delete(other)
        return path

    def delete(self) -> None:
        """Deletes all backups, the oldest first, and the directory if nothing else is in it."""
        if not os.path.isdir(self.directory):
            return
        for path in self._paths(_WHOLE):
            self._delete(path)
        for path in self._paths(_UNFINISHED):
            shutil.rmtree(path)
        if not os.listdir(self.directory):
            os.rmdir(self.directory)

    def _delete(self, path: str) -> None:
        unfinished = self._unfinished(path)
        os.rename(path, unfinished)
        shutil.rmtree(unfinished)

    def _unfinished(self, path: str) -> str:
        number = os.path.basename(path)[len(_WHOLE) :]
        return os.path.join(self.directory, f"{_UNFINISHED}{number}-{uuid.uuid4().hex[:8]}")

    def _paths(self, prefix: str) -> list[str]:
        """The directories with a prefix, by their numbers."""
        found = []
        for name in os.listdir(self.directory):
            number = name[len(prefix) :].partition("-")[0]
            if name.startswith(prefix) and number.isdecimal():
                found.append((int(number), os.path.join(self.directory, name)))
        return [path for _, path in sorted(found)]


def check_room(directory: str, size: int) -> None:
    """Raises an OSError if the disk of a directory has no room for a file of so many bytes."""
    room = shutil.disk_usage(directory).free
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        room = room if limit == resource.RLIM_INFINITY else min(room, limit)
    if room < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size} bytes are needed, and {room} free", directory)


class DamagedError(Exception):
    """A backup is not as it was written."""


def _write_record(directory: str, record: dict[str, Any]) -> None:
    files = {name: _size_and_checksum(os.path.join(directory, name)) for name in sorted(os.listdir(directory))}
    text = json.dumps({"record": record, "files": files})
    with open(os.path.join(directory, _RECORD), "w", encoding="utf-8") as file:
        file.write(f"{zlib.crc32(text.encode()):08x}\n{text}\n")


def _checked_record(directory: str) -> dict[str, Any]:
    """Returns a backup's record, after a check of all its files."""
    try:
        with open(os.path.join(directory, _RECORD), encoding="utf-8") as file:
            checksum, _, text = file.read().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"'{_RECORD}' cannot be read ({error})") from error
    text = text.removesuffix("\n")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise DamagedError(f"'{_RECORD}' is not as it was written")
    content = json.loads(text)
    for name, (size, checksum) in content["files"].items():
        path = os.path.join(directory, name)
        try:
            found_size, found_checksum = _size_and_checksum(path)
        except OSError as error:
            raise DamagedError(f"'{name}' cannot be read ({error})") from error
        if found_size != size:
            raise DamagedError(f"'{name}' has {found_size} bytes, and was written with {size}")
        if found_checksum != checksum:
            raise DamagedError(f"'{name}' is not as it was written")
    record: dict[str, Any] = content["record"]
    return record


def _size_and_checksum(path: str) -> tuple[int, str]:
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, f"{checksum:08x}"


def _make_directory(path: str) -> None:
    """Creates a directory and its parents where they are missing, and forces their names to the disk."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directory(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):  # else another process was faster
            raise
    _force_directory_to_disk(parent)


def _force_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)  # Windows forces only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _force_directory_to_disk(path: str) -> None:
    """Forces the names in a directory to the disk, where the system can: Windows and some network disks cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
