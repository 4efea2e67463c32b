"""Tensors on memory-mapped files: read from disk when they are touched, out of memory again when they are released.

A model of 24 GB is loaded in a second and costs no memory until its weights are placed where they are used. Pages that
were read count as resident until the system needs them elsewhere; `release_pages` gives them back once a copy exists.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MappedFile", "release_pages"]

_MAPPED: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
"""Every mapping that a tensor lies in, with the address where it begins."""


class MappedFile:
    """A file whose bytes can be had as tensors. Tensors keep the mapping alive.

    Args:
        path: the file; it must not be written to while tensors lie on it (replacing it by another file is harmless).

    Raises:
        OSError, ValueError: the file cannot be opened, or is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy-on-write, as torch has no read-only tensors.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _MAPPED[self._bytes] = torch.frombuffer(self._bytes, dtype=torch.uint8).data_ptr()

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor of `shape` that begins `offset` bytes into the file; no byte of it is read yet."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).reshape(tuple(shape))


def release_pages(tensor: Tensor) -> None:
    """Let the system drop the pages of a tensor that lies on a `MappedFile`; they are read again when next touched.

    Tensors that lie elsewhere are left alone, and so are all where the system has no `madvise`.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap.mmap, "madvise") or not tensor.numel():
        return
    start = tensor.data_ptr()
    for mapping, address in list(_MAPPED.items()):
        if address <= start < address + len(mapping):
            elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            stop = min(start + elements * tensor.element_size(), address + len(mapping))
            # Whole pages alone: a tensor shares its first and last page with its neighbours, which may be in use.
            first = -(-(start - address) // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (stop - address) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                mapping.madvise(mmap.MADV_DONTNEED, first, length)
            return
