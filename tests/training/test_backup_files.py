"""A backup is there whole or not at all, wherever the process dies; a damaged one is found."""

import os
import resource

import pytest
from deaths import Clock, Death

from accumops.training.backup_files import BackupFiles


def write(directory, number, clock=None, keep=()):
    """Writes a backup that is made of a number."""
    clock = clock or Clock()

    def write_files(path):
        clock.write(os.path.join(path, "weights"), bytes([number]) * 1000)
        clock.write(os.path.join(path, "state"), bytes([number]))

    return BackupFiles(directory).write({"number": number}, write_files, keep)


def numbers(directory):
    """The numbers of the whole backups, the newest first, after a check of their files. None may be damaged."""
    whole, damages = BackupFiles(directory).read()
    assert damages == []
    for backup in whole:
        for name, size in (("weights", 1000), ("state", 1)):
            with open(os.path.join(backup.path, name), "rb") as file:
                assert file.read() == bytes([backup.record["number"]]) * size
    return [backup.record["number"] for backup in whole]


def deaths(directory, monkeypatch, prepare, act):
    """Dies at each moment of an action, each time in a directory of its own, and yields the directories."""
    for moment in range(1, 200):
        path = directory / str(moment)
        prepare(path)
        with Clock(moment).rules_files(monkeypatch) as clock:
            try:
                act(path, clock)
            except Death:
                pass
            else:
                assert clock.moments == moment - 1
                assert moment > 5
                return
        yield path
    raise AssertionError("the action does not end")


@pytest.mark.parametrize("keeps", [False, True])
def test_a_death_at_any_moment_of_a_write(tmp_path, monkeypatch, keeps):
    """Leaves the old backups or the new one, and what is left of others is removed by the next start."""
    found = []

    def prepare(path):
        write(path, 2, keep=[write(path, 1)])

    def act(path, clock):
        newest = BackupFiles(path).read()[0][0].path
        BackupFiles(path).prepare()
        write(path, 3, clock, [newest] if keeps else [])

    for path in deaths(tmp_path, monkeypatch, prepare, act):
        BackupFiles(path).prepare()
        assert all(name.startswith("backup-") for name in os.listdir(path))
        found.append(numbers(path))
    # First the old ones are there, then the new one with some of them, then what is kept.
    assert found == sorted(found, key=lambda each: (max(each), -len(each)))
    assert found[0] == [2, 1]
    assert [3, 2, 1] in found
    prepare(tmp_path / "alive")
    act(tmp_path / "alive", Clock())
    assert numbers(tmp_path / "alive") == ([3, 2] if keeps else [3])


def test_a_death_at_any_moment_of_the_first_write(tmp_path, monkeypatch):
    found = []
    for path in deaths(tmp_path, monkeypatch, lambda path: None, lambda path, clock: write(path / "new", 1, clock)):
        BackupFiles(path / "new").prepare()
        found.append(numbers(path / "new"))
    assert found == sorted(found)
    assert {len(each) for each in found} == {0, 1}


def test_a_death_at_any_moment_of_a_deletion(tmp_path, monkeypatch):
    """The oldest goes first."""
    found = []

    def prepare(path):
        write(path, 2, keep=[write(path, 1)])

    for path in deaths(tmp_path, monkeypatch, prepare, lambda path, clock: BackupFiles(path).delete()):
        found.append(numbers(path) if path.exists() else None)
        BackupFiles(path).delete()
        assert not path.exists()
    assert [2, 1] in found
    assert [2] in found
    assert [] in found
    assert [1] not in found


def test_a_death_during_the_cleaning(tmp_path, monkeypatch):
    def prepare(path):
        write(path, 1)
        for number in (1, 2):
            unfinished = path / f"unfinished-0000000{number}-0"
            unfinished.mkdir()
            for name in "abc":
                (unfinished / name).touch()

    for path in deaths(tmp_path, monkeypatch, prepare, lambda path, clock: BackupFiles(path).prepare()):
        assert numbers(path) == [1]
        BackupFiles(path).prepare()
        assert len(os.listdir(path)) == 1


def test_all_is_on_the_disk_before_the_name_and_the_name_before_a_deletion(tmp_path, monkeypatch):
    old = write(tmp_path, 1)
    with Clock().rules_files(monkeypatch) as clock:
        path = write(tmp_path, 2, clock)
    unfinished = next(entry.split()[1] for entry in clock.log if entry.startswith("mkdir"))
    names = sorted(os.listdir(path))
    renamed = clock.log.index(f"rename {unfinished}")
    before, after = clock.log[:renamed], clock.log[renamed + 1 :]
    assert names == ["backup.json", "state", "weights"]
    files = [f"fsync {unfinished}/{name}" for name in names]
    assert sorted(entry for entry in before if entry.startswith("fsync")) == [f"fsync {unfinished}", *files]
    assert before[-1] == f"fsync {unfinished}"
    assert max(i for i, entry in enumerate(before) if entry.startswith(("write", "create"))) < before.index(files[0])
    assert after[1] == f"fsync {tmp_path}"
    assert after[2] == f"rename {old}"


def test_new_directories_are_on_the_disk_in_their_parents(tmp_path, monkeypatch):
    with Clock().rules_files(monkeypatch) as clock:
        BackupFiles(tmp_path / "a" / "b").prepare()
    assert [entry for entry in clock.log if not entry.startswith("open")] == [
        f"mkdir {tmp_path}/a",
        f"fsync {tmp_path}",
        f"mkdir {tmp_path}/a/b",
        f"fsync {tmp_path}/a",
    ]


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flip(path):
    with open(path, "r+b") as file:
        byte = file.read(20)[-1]
        file.seek(19)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", [truncate, flip, os.remove, lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("name", ["weights", "backup.json"])
def test_damage_is_found_and_named(tmp_path, damage, name):
    old = write(tmp_path, 1)
    path = write(tmp_path, 2, keep=[old])
    damage(os.path.join(path, name))
    whole, (problem,) = BackupFiles(tmp_path).read()
    assert [backup.path for backup in whole] == [old]
    assert problem.startswith(f"{os.path.basename(path)}: '{name}' ")
    write(tmp_path, 3, keep=[old])
    assert numbers(tmp_path) == [3, 1]


def test_a_directory_without_files_is_damaged(tmp_path):
    (tmp_path / "backup-00000001").mkdir()
    whole, damages = BackupFiles(tmp_path).read()
    assert whole == []
    assert "'backup.json' cannot be read" in damages[0]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["backup-00000001"]
    assert numbers(tmp_path) == [1]


def test_numbers_grow_beyond_their_width(tmp_path):
    os.rename(write(tmp_path, 1), tmp_path / "backup-99999999")
    old = str(tmp_path / "backup-99999999")
    assert write(tmp_path, 2, keep=[old]) == str(tmp_path / "backup-100000000")
    assert numbers(tmp_path) == [2, 1]


def test_other_files_stay(tmp_path):
    for name in ("backup-old", "unfinished-letter", "notes.txt"):
        (tmp_path / name).mkdir()
    write(tmp_path, 1)
    BackupFiles(tmp_path).prepare()
    BackupFiles(tmp_path).delete()
    assert sorted(os.listdir(tmp_path)) == ["backup-old", "notes.txt", "unfinished-letter"]


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        BackupFiles(tmp_path / "file").prepare()
    with pytest.raises(FileExistsError):
        BackupFiles(tmp_path / "file" / "backups").prepare()
