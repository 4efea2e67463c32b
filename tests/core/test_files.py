"""Atomic files: the old one or the new one, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lorasmith.core import files
from lorasmith.core.errors import OutputError
from lorasmith.core.files import atomic_path, ensure_folder, locked, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fail(error: int):
    def failing(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return failing


def test_content_is_written_with_the_folders_it_needs(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one" / "note.txt"
    write_atomic(target, "käse")

    assert target.read_bytes() == "käse".encode()
    assert names(target.parent) == ["note.txt"]


def test_bytes_replace_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "lora.safetensors"
    target.write_bytes(b"old and longer")
    write_atomic(target, b"new")

    assert target.read_bytes() == b"new"


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        write_atomic(tmp_path / "a", "")
    finally:
        assert os.umask(previous) == 0o022  # and the process's own mask is as before

    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_the_old_file_survives_a_failed_block(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "state"
    target.write_text("old")

    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error

    assert target.read_text() == "old"
    assert names(tmp_path) == ["state"]


def test_the_content_reaches_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "state", []
    synced = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(target.exists()), synced(handle)))
    write_atomic(target, "new")

    assert seen == [False, True]  # the second time it is the name


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errno.ENOSPC, "{} was not written because the disk is full; free some space and save again"),
        (errno.EACCES, "{} cannot be written (Permission denied); check the folder's permissions"),
    ],
    ids=["full", "denied"],
)
@pytest.mark.parametrize("where", ["os.fsync", "tempfile.mkstemp", "pathlib.Path.replace", "pathlib.Path.write_bytes"])
def test_a_disk_that_refuses_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, sentence: str, where: str
) -> None:
    target = tmp_path / "state"
    target.write_text("old")
    monkeypatch.setattr(where, fail(error))

    with pytest.raises(OutputError) as caught:
        write_atomic(target, "new")

    assert str(caught.value) == sentence.format(target)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["state"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("")

    with pytest.raises(OutputError) as caught:
        write_atomic(blocker / "state", "new")
    assert str(caught.value) == f"{blocker} must be a folder but is a file; move it away or choose another output"

    with pytest.raises(OutputError) as caught:
        ensure_folder(blocker / "one" / "two")
    assert str(caught.value) == (
        f"{blocker / 'one' / 'two'} cannot be made because {blocker} is a file; choose another output"
    )


def test_a_folder_where_the_file_should_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()

    with pytest.raises(OutputError, match=r"state cannot be written \(Is a directory\)"):
        write_atomic(tmp_path / "state", "new")
    assert names(tmp_path) == ["state"]


def test_ensure_folder_returns_the_folder_and_takes_one_that_is_there(tmp_path: Path) -> None:
    assert ensure_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert ensure_folder(tmp_path / "a" / "b").is_dir()


def test_a_mount_that_flushes_no_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    write_atomic(tmp_path / "state", "new")
    assert (tmp_path / "state").read_text() == "new"


def test_a_lock_is_held_by_one_and_let_go(tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".lock", "it is taken"),
        pytest.raises(OutputError, match="it is taken; wait for it"),
        locked(tmp_path / ".lock", "it is taken"),
    ):
        pass
    with locked(tmp_path / ".lock", "it is taken"):
        pass


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(files, "_lock", fail(error))
    with locked(tmp_path / ".lock", "it is taken"):
        pass


def test_a_lock_in_a_folder_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlib.Path.open", fail(errno.EACCES))
    sentence = r"\.lock cannot be written \(Permission denied\)"
    with pytest.raises(OutputError, match=sentence), locked(tmp_path / ".lock", "it is taken"):
        pass
