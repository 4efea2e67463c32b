"""Opening untrusted files, atomic writing, and lock files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TypeAlias

from lorasmith.core.errors import OutputError
from lorasmith.core.fence import check_fence

MAX_TEXT_BYTES = 256 * 2**20
"""Size limit of text files that are read whole (graphs, records, captions), the longest of which have some MB."""


def open_regular(path: Path) -> BufferedReader:
    """An untrusted file, opened for reading; raises OSError, whose `strerror` says why.

    Pipes, sockets and devices are refused, as opening or reading them can block for ever; a name that no file can have
    is refused like a missing file.
    """
    try:
        _refuse_irregular(path.stat())  # before opening, which already has effects on some devices
        # Without blocking, in case a pipe has taken the file's place since.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a zero byte or a lone surrogate
        raise FileNotFoundError(errno.ENOENT, "no file can have this name") from error
    file = open(descriptor, "rb")  # noqa: PTH123, SIM115 - the descriptor has no path, and the caller closes it
    try:
        _refuse_irregular(os.fstat(descriptor))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, *, at_most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of an untrusted file; raises OSError as `open_regular`, or if it has more than `at_most` bytes."""
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes")
    return content


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file; False if the name is invalid or cannot be looked up."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


Stamp: TypeAlias = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp:
    """Time of change in ns, size in bytes and number of a file, as a cache key; zeros if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0, 0
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path that replaces `target` (fsync, then `os.replace`) on success. Raises OutputError.

    The block writes the file. What a killed process has left is removed by the
    first write of another process to the folder.
    """
    with temporary_folder(target) as folder, _explaining(target):
        temporary = folder / "new"
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        check_fence()
        temporary.replace(target)
        _flush_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that replaces `target` when the block ends without an exception.

    Until then, and on failure, the old folder stays. If the process is killed between the two moves, `restore_folders`
    puts it back; what it has written otherwise is removed by the next call for `target`. Raises OutputError.
    """
    ensure_folder(target.parent)
    restore_folders(target.parent)
    remove_left(target.parent)
    with temporary_folder(target) as temporary, _explaining(target):
        fresh, old = temporary / "new", temporary / "old" / target.name
        try:
            fresh.mkdir()
            yield fresh
            check_fence()
            if target.exists():
                old.parent.mkdir()
                target.rename(old)
            fresh.rename(target)
            _flush_folder(target.parent)
        finally:
            if old.exists() and not target.exists():  # the second of the two moves failed
                old.rename(target)


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` for what is not complete yet, removed afterwards. Raises OutputError.

    It is locked as long as its process lives, so that the next one can tell what a killed process has left. The lock is
    a file of its own, as some systems do not let a locked file be written.
    """
    ensure_folder(target.parent)
    if (parent := os.fspath(target.parent)) not in _TIDIED:
        _TIDIED.add(parent)
        remove_left(target.parent)
    with contextlib.ExitStack() as held:
        for attempt in reversed(range(10)):  # another process may have removed it before it was locked
            temporary = target.with_name(f".{target.name[:_KEPT]}.{secrets.token_hex(4)}.tmp")
            with _explaining(target):
                temporary.mkdir()
            held.callback(shutil.rmtree, temporary, ignore_errors=True)  # Windows removes no folder of an open file
            try:
                held.enter_context(locked(temporary / _LOCK, f"{temporary} is being removed"))
                break
            except OutputError:
                if not attempt:
                    raise
        held.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


_LOCK = "lorasmith.lock"
"""A file in the folder of `temporary_folder`, locked as long as its process lives."""

_TIDIED: set[str] = set()
"""Folders in which this process has removed what killed ones had left."""


def remove_left(parent: Path) -> None:
    """Remove the temporary folders that killed processes have left in `parent`; none where there are no locks."""
    for lock in parent.glob(f".*.tmp/{_LOCK}"):
        left = lock.parent
        if left.is_symlink() or lock.is_symlink() or not is_regular(lock):
            continue
        with contextlib.suppress(OutputError), locked(lock, f"{left} is in use", surely=True):
            if all(os.path.lexists(parent / old.name) for old in left.glob("old/*")):  # else it is to be restored
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            left.rmdir()


@contextlib.contextmanager
def _explaining(target: Path) -> Iterator[None]:
    """OSErrors as OutputErrors that name `target`."""
    try:
        yield
    except OSError as error:
        raise _explained(target, error) from error


def restore_folders(parent: Path) -> None:
    """Move back the folders that `atomic_folder` had moved away in `parent` when its process was killed."""
    for old in parent.glob(".*.tmp/old/*") if is_folder(parent) else ():
        temporary, target = old.parents[1], parent / old.name
        if temporary.name.startswith(f".{target.name[:_KEPT]}.") and not os.path.lexists(target):
            with contextlib.suppress(OSError):  # another process was faster, or the folder is read-only
                old.rename(target)
                shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(target: Path, content: bytes | str) -> None:
    """Write `content` atomically, text as UTF-8 with lone surrogates as JSON's escapes. Raises OutputError."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def folder_once(target: Path, owned: str, make: Callable[[Path], None]) -> Path:
    """`target`, which `make` fills the first time, completely or not at all. OutputError, starting with `owned`, if
    another process is at it.
    """
    if not is_folder(target):
        ensure_folder(target.parent)
        with locked(target.with_name(f"{target.name}.lock"), owned):
            if not is_folder(target):  # made by another process, just now
                with atomic_folder(target) as temporary:
                    make(temporary)
    return target


def ensure_folder(folder: Path) -> Path:
    """Create `folder` and its parents if missing. Raises OutputError, naming a file that is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{folder} must be a folder but is a file; move it away or choose another output") from error
    except NotADirectoryError:
        check_parents(folder)
        raise
    except OSError as error:
        raise _explained(folder, error) from error
    return folder


def check_parents(folder: Path) -> None:
    """Raise OutputError if a folder cannot be made because a file is in the way."""
    blocker = next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None)
    if blocker is not None:
        raise OutputError(f"{folder} cannot be made because {blocker} is a file; choose another output")


def check_writable(folder: Path) -> Path:
    """`folder`, after trying to write a file there, or where it will be created. Raises OutputError."""
    check_parents(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} must be a folder but is a file; move it away or choose another output")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
            file.flush()  # a full disk is noticed here
    except OSError as error:
        raise _explained(folder, error) from error
    return folder


def is_full(error: BaseException) -> bool:
    """Whether an OSError, or the OutputError that it caused, is of a full disk or quota."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL


@contextlib.contextmanager
def locked(path: Path, owned: str, *, surely: bool = False) -> Iterator[None]:
    """Hold a lock on a file, released however the process ends; the file is removed afterwards.

    Raises OutputError, starting with `owned`, if it is taken, and with `surely` also if the file system has no locks.
    """
    with contextlib.ExitStack() as opened:
        for _ in range(10):  # more often only where files have no numbers
            opened.close()
            try:
                file = opened.enter_context(path.open("a"))
            except OSError as error:
                raise _explained(path, error) from error
            try:
                _lock(file.fileno())
            except OSError as error:
                if surely or error.errno in _BUSY:
                    raise OutputError(f"{owned}; wait for it, or choose another output") from error
                # Any other error means that the file system has no locks; the run continues without.
            if _is_open(file, path):  # and was not removed by the process that had locked it
                break
        try:
            yield
        finally:
            is_ours = _is_open(file, path)
            if sys.platform == "win32":  # it removes no open file, and so none that another process has opened since
                opened.close()
            if is_ours:
                with contextlib.suppress(OSError):
                    path.unlink()


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False as for `is_regular`."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def entry_is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def entry_is_link(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link, or a junction of Windows."""
    return entry.is_symlink() or bool(getattr(entry, "is_junction", bool)())  # Python 3.12


_KEPT = 40  # characters of a name in that of its temporary file, which is longer

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def _refuse_irregular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, not a file")


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT}) if hasattr(errno, "EDQUOT") else frozenset({errno.ENOSPC})
_BUSY = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


def _lock(descriptor: int) -> None:
    """Raise OSError if another process has the lock (errno in `_BUSY`), or locks are not supported."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_open(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the file system supports it."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # network and FUSE mounts refuse fsync of folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(target: Path, error: OSError) -> OutputError:
    if is_full(error):
        return OutputError(f"{target} was not written because the disk is full; free some space and save again")
    return OutputError(f"{target} cannot be written ({error.strerror or error}); check the folder's permissions")
