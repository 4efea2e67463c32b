"""Tensors on memory-mapped files: read from disk on first access, and releasable afterwards.

A model of 24 GB is loaded in a second and uses no memory until its weights are placed on a device. Pages that were read
are resident until the system evicts them; `release_pages` returns them once a copy exists.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.files import open_regular

__all__ = ["MappedFile", "release_pages"]

_MAPPED: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
"""All mappings with live tensors, with their start address."""


# Linux refuses writable mappings larger than its memory, unless they reserve none; Python 3.11 lacks the name.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A memory-mapped file whose bytes are accessible as tensors. Tensors keep the mapping alive.

    Args:
        path: the file; it must not be modified while tensors use it (replacing it by another file is harmless).

    Raises:
        OSError, ValueError: the file cannot be opened, or is empty.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self._bytes = _mapped(file.fileno())
        _MAPPED[self._bytes] = torch.frombuffer(self._bytes, dtype=torch.uint8).data_ptr()

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor at an offset in the file; nothing is read yet.

        Args:
            offset: in bytes.
            dtype: of the tensor.
            shape: of the tensor.
        """
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).reshape(tuple(shape))


def _mapped(descriptor: int) -> mmap.mmap:
    """A file, mapped copy-on-write, as torch has no read-only tensors."""
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=writable)


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a tensor on a `MappedFile`; they are read again on the next access.

    Does nothing for other tensors, and on systems without `madvise`.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap.mmap, "madvise") or not tensor.numel():
        return
    start = tensor.data_ptr()
    for mapping, address in list(_MAPPED.items()):
        if address <= start < address + len(mapping):
            elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            stop = min(start + elements * tensor.element_size(), address + len(mapping))
            # Whole pages only: a tensor shares its first and last page with its neighbours, which may be in use.
            first = -(-(start - address) // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (stop - address) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                mapping.madvise(mmap.MADV_DONTNEED, first, length)
            return
