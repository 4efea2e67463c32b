"""Atomic files: the old one or the new one, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorasmith.core import files
from lorasmith.core.errors import OutputError
from lorasmith.core.files import (
    atomic_folder,
    atomic_path,
    check_writable,
    ensure_folder,
    is_folder,
    is_regular,
    locked,
    open_regular,
    read_regular,
    restore_folders,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fail(error: int):
    def failing(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return failing


def irregular(folder: Path, kind: str) -> Path:
    """A file that is none: reading a pipe that nobody writes to blocks."""
    path = folder / f"{kind}.png"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # addresses of sockets are short
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="files of POSIX systems")
@pytest.mark.parametrize("kind", ["named pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_without_blocking(tmp_path: Path, kind: str) -> None:
    path = irregular(tmp_path, kind)
    for read in (open_regular, read_regular):
        with pytest.raises(OSError, match=f"it is a {kind}, not a file"):
            read(path)
    assert not is_regular(path)
    assert is_folder(path) == (kind == "folder")


@pytest.mark.skipif(sys.platform == "win32", reason="files of POSIX systems")
def test_a_pipe_that_takes_a_files_place_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, file = irregular(tmp_path, "named pipe"), tmp_path / "file"
    file.touch()
    status = file.stat()
    monkeypatch.setattr("pathlib.Path.stat", lambda _: status)
    with pytest.raises(OSError, match="it is a named pipe"):
        open_regular(pipe)


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    for name in ["x" * 300, "a\0b", "\ud800", "/".join("x" * 2000)]:
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
        assert not is_regular(tmp_path / name)
        assert not is_folder(tmp_path / name)


def test_text_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes(b"12345")

    assert read_regular(tmp_path / "note.txt", at_most=5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_regular(tmp_path / "note.txt", at_most=4)


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


def test_a_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("2")
    assert names(target) == ["b"]
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "b").write_text("3")
        raise ZeroDivisionError
    assert (target / "b").read_text() == "2"
    assert names(target.parent) == ["model"]


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename = Path.rename

    def once(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EBUSY, "busy")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OutputError, match=r"cannot be written \(busy\)"), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_was_killed_between_its_two_moves_is_moved_back(tmp_path: Path) -> None:
    target = tmp_path / "a model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    killed = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from lorasmith.core.files import atomic_folder

        rename = Path.rename
        Path.rename = lambda path, to: os._exit(9) if path.name == "new" else rename(path, to)
        with atomic_folder(Path(sys.argv[1])) as folder:
            (folder / "a").write_text("new")
        """
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(target)], check=False)
    assert ended.returncode == 9 and not target.exists()

    restore_folders(tmp_path)
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["a model"]
    restore_folders(tmp_path)
    restore_folders(tmp_path / "gone")


@pytest.mark.parametrize("how", ["atomic_path", "atomic_folder"])
def test_what_a_killed_process_has_written_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path, how: str) -> None:
    killed = textwrap.dedent(
        f"""
        import os, sys
        from pathlib import Path
        from lorasmith.core.files import {how}

        with {how}(Path(sys.argv[1])) as place:
            (place / "a" if place.is_dir() else place).write_text("new")
            os._exit(9)
        """
    )
    target = tmp_path / "a model"
    subprocess.run([sys.executable, "-c", killed, str(target)], check=False)
    assert len(names(tmp_path)) == 1
    write_atomic(tmp_path / "another", "")
    assert names(tmp_path) == ["another"]
    with getattr(files, how)(target) as first:
        files.remove_left(tmp_path)
        assert names(tmp_path) == [first.parent.name, "another"]
        with getattr(files, how)(target) as second:
            (second / "b" if second.is_dir() else second).write_text("2")
        (first / "b" if first.is_dir() else first).write_text("1")
    assert names(tmp_path) == ["a model", "another"]
    assert next(path for path in (target / "b", target) if path.is_file()).read_text() == "1"


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX systems")
def test_what_is_not_surely_of_a_killed_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    for folder in (precious, tmp_path / ".of a pipe.tmp", tmp_path / ".of others.tmp"):
        folder.mkdir()
    for file in (precious / "lorasmith.lock", tmp_path / ".of others.tmp" / "lock"):
        file.touch()
    os.mkfifo(tmp_path / ".of a pipe.tmp" / "lorasmith.lock")
    (tmp_path / ".a link.tmp").symlink_to(precious)
    before = sorted(tmp_path.rglob("*"))
    files.remove_left(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    (left := tmp_path / ".left.tmp" / "lorasmith.lock").parent.mkdir()
    left.touch()
    with monkeypatch.context() as without_locks:
        without_locks.setattr(files, "_lock", fail(errno.ENOLCK))
        files.remove_left(tmp_path)
        assert left.exists()
    files.remove_left(tmp_path)
    assert not left.parent.exists()


def test_what_another_name_has_now_is_not_moved_back(tmp_path: Path) -> None:
    for place in (".model.x.tmp/old/model", "model", ".other.x.tmp/old/model", ".mine/old/y", ".a.tmp/old/y"):
        (tmp_path / place).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    restore_folders(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_below_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="must be a folder but is a file"), atomic_folder(tmp_path / "file" / "out"):
        raise AssertionError("never entered")


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
@pytest.mark.parametrize("where", ["os.fsync", "os.mkdir", "pathlib.Path.replace", "pathlib.Path.write_bytes"])
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


def test_a_folder_is_tried_before_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_writable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert names(tmp_path) == [], "nothing is made"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="must be a folder but is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot be made because .*file is a file"):
        check_writable(tmp_path / "file" / "inner")
    for error, sentence in (
        (errno.EROFS, r"cannot be written \(Read-only file system\)"),
        (errno.ENOSPC, "disk is full"),
    ):
        monkeypatch.setattr("tempfile.TemporaryFile", fail(error))
        with pytest.raises(OutputError, match=sentence):
            check_writable(tmp_path / "new")


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
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock, calls = tmp_path / ".lock", files._lock, []

    def late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()  # by the process before, between opening and locking
        lock(descriptor)

    monkeypatch.setattr(files, "_lock", late)
    with (
        locked(path, "it is taken"),
        pytest.raises(OutputError, match="it is taken"),
        locked(path, "it is taken"),
    ):
        pass
    assert len(calls) == 3


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
