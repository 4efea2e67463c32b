"""Tensors on memory-mapped files: read from disk on first access, and releasable afterwards.

A model of 24 GB is loaded in a second and uses no memory until its weights are placed on a device. Pages that were read
stay resident until the system evicts them, or `release_pages` does once a copy exists. Where a file system maps no
files, and where a tensor is not aligned, each tensor is read into memory of its own.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import mmap
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorasmith.core.files import open_regular


class FileState(NamedTuple):
    """A file's identity; if it is equal at two times, so is the content."""

    path: str  # absolute, with links resolved
    size: int  # in bytes
    modified: int  # mtime in ns
    changed: int  # ctime in ns
    inode: int  # 0 where the file system has none


def file_state(path: Path) -> FileState:
    """The current state of a file. Raises OSError."""
    return _state(path, path.stat())


# Linux refuses writable mappings larger than its memory, unless they reserve none; Python 3.11 lacks the name.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A memory-mapped file whose bytes are accessible as tensors, which keep the mapping alive.

    The file must not be modified while tensors use it; replacing it is harmless. Where its file system has no mappings,
    it stays open, and a warning says so once for each file. Raises OSError, ValueError if empty.
    """

    def __init__(self, path: Path) -> None:
        file = open_regular(path)
        self.size = os.fstat(file.fileno()).st_size  # in bytes
        self._file: BufferedReader | None = None
        self._lock = threading.Lock()  # of its position
        self._mapping: _Mapping | None = None
        try:
            self._bytes = _mapped(file.fileno())
        except OSError as error:
            if error.errno not in _NO_MAPPINGS:
                file.close()
                raise
            warnings.warn(
                f"the file system of {path} maps no files into memory, so that its tensors are read when they are "
                "used, which is slower and takes memory; copy it to a local disk",
                stacklevel=2,
            )
            self._file = file
            weakref.finalize(self, file.close)
            return
        except ValueError:
            file.close()
            raise
        state = _state(path, os.fstat(file.fileno()))
        file.close()
        start = torch.frombuffer(self._bytes, dtype=torch.uint8).data_ptr()
        self._mapping = _Mapping(start, start + len(self._bytes), state, weakref.ref(self._bytes))
        _remember(self._mapping)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor at an offset in bytes: on the mapping, so that nothing is read yet, or a copy if it is unaligned.

        Raises ValueError if it reaches beyond the file, OSError if the file is not mapped and cannot be read.
        """
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        size = count * dtype.itemsize
        if not 0 <= offset <= self.size - size:
            raise ValueError(f"a tensor ends at byte {offset + size:,} of {self.size:,}")
        if self._file is not None:
            raw = torch.empty(size, dtype=torch.uint8)
            with self._lock:
                self._file.seek(offset)
                read = self._file.readinto(raw.numpy().data)
            if read != size:
                raise OSError(errno.EIO, "it became shorter")
        elif offset % dtype.itemsize == 0:
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))
        else:
            raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=size, offset=offset).clone()
        return raw.view(dtype).reshape(tuple(shape))

    def release_pages(self, tensor: Tensor) -> None:
        """As `release_pages`, for tensors on this file only."""
        if (
            tensor.numel()
            and self._mapping is not None
            and self._mapping.start <= tensor.data_ptr() < self._mapping.stop
        ):
            _release(self._mapping, tensor)


def place_on_file(tensor: Tensor) -> tuple[FileState, int] | None:
    """The file that a tensor lies on, as it was when mapped, and the offset in bytes; None for other tensors."""
    mapping = _mapping_of(tensor)
    return None if mapping is None else (mapping.file, tensor.data_ptr() - mapping.start)


def may_stay_mapped() -> bool:
    """Whether the process can hold one more mapping.

    Before Python 3.13 each mapping occupies a file descriptor. The process's soft limit of these is raised before half
    of it is mappings.
    """
    if not _USES_DESCRIPTOR:
        return True
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * len(_STARTS) + 256
    if soft != resource.RLIM_INFINITY and 2 * len(_STARTS) >= soft:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
            soft = max(soft, raised)
    return soft == resource.RLIM_INFINITY or 2 * len(_STARTS) < soft


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a tensor on a `MappedFile` until the next access, on systems with `madvise`."""
    if (mapping := _mapping_of(tensor)) is not None:
        _release(mapping, tensor)


# What file systems without mappings answer: FUSE and virtio without a cache, the shared folders of WSL and containers.
_NO_MAPPINGS = (errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS)

_USES_DESCRIPTOR = sys.platform != "win32" and sys.version_info < (3, 13)


def _mapped(descriptor: int) -> mmap.mmap:
    """A file mapped copy-on-write, as torch has no read-only tensors."""
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    others: dict[str, Any] = {} if _USES_DESCRIPTOR else {"trackfd": False}
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=writable, **others)


@dataclass(frozen=True)
class _Mapping:
    """A mapping with live tensors: addresses from `start` to `stop`."""

    start: int
    stop: int
    file: FileState
    memory: weakref.ref[mmap.mmap]


_STARTS: list[int] = []  # start addresses of all mappings with live tensors, sorted

_MAPPINGS: dict[int, _Mapping] = {}


def _remember(mapping: _Mapping) -> None:
    _MAPPINGS[mapping.start] = mapping
    bisect.insort(_STARTS, mapping.start)
    memory = mapping.memory()
    assert memory is not None
    weakref.finalize(memory, _forget, mapping.start).atexit = False


def _forget(start: int) -> None:
    del _MAPPINGS[start]
    _STARTS.pop(bisect.bisect_left(_STARTS, start))


def _mapping_of(tensor: Tensor) -> _Mapping | None:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    start = tensor.data_ptr()
    place = bisect.bisect_right(_STARTS, start)
    mapping = _MAPPINGS[_STARTS[place - 1]] if place else None
    return mapping if mapping is not None and start < mapping.stop else None


def _release(mapping: _Mapping, tensor: Tensor) -> None:
    memory = mapping.memory()
    if memory is None or not hasattr(mmap.mmap, "madvise"):
        return
    offset = tensor.data_ptr() - mapping.start
    elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    stop = min(offset + elements * tensor.element_size(), mapping.stop - mapping.start)
    # Whole pages only: a tensor shares its first and last page with its neighbours, which may be in use.
    first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        memory.madvise(mmap.MADV_DONTNEED, first, length)


def _state(path: Path, stat: os.stat_result) -> FileState:
    return FileState(os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
