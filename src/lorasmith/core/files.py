"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import OutputError

__all__ = ["atomic_path", "ensure_folder", "locked", "write_atomic"]


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path in `target`'s folder that replaces `target` when the block ends well.

    The file is flushed to disk before it takes the name (fsync, then `os.replace`), and removed when the block raises.

    Raises:
        OutputError: the folder cannot be made, the disk is full, or the target cannot be written.
    """
    ensure_folder(target.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise _explained(target, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; what people save is meant to be readable like any other file of theirs.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        raise _explained(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(target: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `target` atomically. Raises OutputError."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def ensure_folder(folder: Path) -> Path:
    """`folder`, made with its parents where missing. Raises OutputError, naming the file that stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{folder} must be a folder but is a file; move it away or choose another output") from error
    except NotADirectoryError as error:
        blocker = next(parent for parent in folder.parents if parent.exists() and not parent.is_dir())
        raise OutputError(f"{folder} cannot be made because {blocker} is a file; choose another output") from error
    except OSError as error:
        raise _explained(folder, error) from error
    return folder


@contextlib.contextmanager
def locked(path: Path, owned: str) -> Iterator[None]:
    """Hold a lock file, which the system lets go of whatever ends the process.

    Args:
        path: the file; it stays behind, empty.
        owned: what to say when another process holds it.

    Raises:
        OutputError: another process holds it, or the file cannot be written.
    """
    try:
        file = path.open("a")
    except OSError as error:
        raise _explained(path, error) from error
    with file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno in _BUSY:
                raise OutputError(f"{owned}; wait for it, or choose another output") from error
            # Any other means that this file system has no locks, and a run there is better than none.
        yield


_BUSY = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


def _lock(descriptor: int) -> None:
    """Raises OSError when another process has the lock, with one of `_BUSY`, or there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush_folder(folder: Path) -> None:
    """Have a new name on the disk too, where system (Windows cannot open folders) and file system can."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # network and FUSE mounts refuse it for folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(target: Path, error: OSError) -> OutputError:
    if error.errno == errno.ENOSPC:
        return OutputError(f"{target} was not written because the disk is full; free some space and save again")
    return OutputError(f"{target} cannot be written ({error.strerror or error}); check the folder's permissions")


def _umask() -> int:
    # Reading the umask means setting it: there is no other call. Done once per save, so the race is harmless.
    current = os.umask(0)
    os.umask(current)
    return current
