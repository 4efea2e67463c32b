"""Pinned host memory of exactly the size that is needed, and copies of a model's weights to a GPU through some of it.

torch's allocator rounds each pinned tensor up to a power of two, so that 22 GiB of weights take 35. Here each buffer is
mapped by itself and registered with CUDA (`cudaHostRegister`), which rounds to pages. It is for what is used again and
again: registering costs more than a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.byte_layout import ByteLayout
from lorasmith.core.mapped_files import release_pages


class PinnedBuffer:
    """Bytes (size_bytes,) in pinned memory, in torch's own where registering fails; size_bytes must not be 0.

    Memory is unregistered with the buffer: a range that is mapped later at an address still registered is refused.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        pinned = _registered(size_bytes)
        self.bytes: Tensor = torch.empty(size_bytes, dtype=torch.uint8).pin_memory() if pinned is None else pinned
        self._unregister: Callable[[], object] | None = None
        if pinned is not None:
            self._unregister = end = weakref.finalize(self, _unregistered, pinned, device)
            end.atexit = False  # CUDA ends first

    def free(self) -> None:
        """Unregister the memory once the device has read it; the bytes stay readable."""
        if self._unregister is not None:
            self._unregister()


_BUFFER_BYTES = 2**25

_LEAST_BYTES = 2**20
"""Bytes of the first tensor for which buffers are made."""


class DeviceCopies:
    """Copies of tensors on a device; those of host memory reach a GPU through two pinned buffers of 32 MiB.

    The host fills one buffer, which for memory-mapped tensors is when the file is read, while the device copies the
    other. Copies, and conversions of dtype and layout, are queued on the current stream, so that results need no event
    before their use. Buffers exist from the first large tensor until `close`; if memory cannot be pinned, tensors are
    copied directly. Pages of memory-mapped tensors are released once they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: PinnedBuffer | None = None
        self._halves: list[_Half] = []  # the one to be filled first
        self._uses_buffers = device.type == "cuda"

    def to(self, tensor: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """`tensor.to(device, dtype, memory_format=memory_format)`."""
        if self._needs_buffers(tensor):
            like = tensor.to("meta", dtype, memory_format=memory_format)
            moved = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=self.device)
            self.copy(tensor, moved)
        else:
            moved = tensor.to(self.device, dtype, memory_format=memory_format)
        if moved is not tensor:
            release_pages(tensor)
        return moved

    def copy(self, source: Tensor, target: Tensor) -> None:
        """`target.copy_(source)`, for a target on the device."""
        if self._needs_buffers(source):
            for piece, part in _pieces(source, target):
                self._copy_piece(piece, part)
        else:
            target.copy_(source, non_blocking=True)
        release_pages(source)

    def close(self) -> None:
        """Free the buffers, once the device has read them."""
        self._halves.clear()
        if self._pinned is not None:
            self._pinned.free()
            self._pinned = None

    def _needs_buffers(self, source: Tensor) -> bool:
        if not self._uses_buffers or source.device.type != "cpu" or not source.numel() or source.is_pinned():
            return False
        if self._pinned is None and source.nbytes >= _LEAST_BYTES:
            try:
                self._pinned = PinnedBuffer(2 * _BUFFER_BYTES, self.device)
                self._halves = [_Half(memory) for memory in self._pinned.bytes.chunk(2)]
            except (RuntimeError, OSError):  # the system limits pinned memory
                self._uses_buffers = False
        return self._pinned is not None

    def _copy_piece(self, piece: Tensor, target: Tensor) -> None:
        place = self._halves[0].layout.add(piece)
        if place.stop > _BUFFER_BYTES:
            self._halves[0].copied = torch.cuda.current_stream(self.device).record_event()
            self._halves.reverse()
            self._halves[0].empty()
            place = self._halves[0].layout.add(piece)
        staged = place.view(self._halves[0].memory)
        staged.copy_(piece)
        release_pages(piece)
        if staged.dtype != target.dtype or staged.stride() != target.stride():  # the device converts
            staged = torch.empty_like(staged, device=self.device).copy_(staged, non_blocking=True)
        target.copy_(staged, non_blocking=True)


@dataclass
class _Half:
    """One of the two buffers."""

    memory: Tensor  # (bytes,)
    layout: ByteLayout = field(default_factory=ByteLayout)
    copied: torch.cuda.Event | None = None  # when the device has read all of it

    def empty(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        self.layout = ByteLayout()


def _pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both of at most a buffer's size, in the order of the source's memory."""
    count = -(-source.nbytes // _BUFFER_BYTES)
    if count == 1:
        yield source, target
        return
    outermost = max((one for one in range(source.ndim) if source.shape[one] > 1), key=source.stride)
    size = -(-source.shape[outermost] // count)
    for piece, part in zip(source.split(size, outermost), target.split(size, outermost), strict=True):
        yield from _pieces(piece, part)


def _registered(size_bytes: int) -> Tensor | None:
    mapped = torch.frombuffer(_mapped(size_bytes), dtype=torch.uint8)
    is_done = _succeeds(torch.cuda.cudart().cudaHostRegister, mapped.data_ptr(), size_bytes, 0)
    return mapped if is_done else None


def _unregistered(registered: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _succeeds(torch.cuda.cudart().cudaHostUnregister, registered.data_ptr())


def _mapped(size_bytes: int) -> mmap.mmap:
    """Anonymous memory, on Linux in huge pages where it has them, as registering asks for each page by itself."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size_bytes)
    mapped = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    with contextlib.suppress(OSError):  # of kernels without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _succeeds(call: Callable[..., Any], *args: int) -> bool:
    """Whether a function of the CUDA runtime succeeds. If not, its error is not left to the next launch of a kernel."""
    if int(call(*args)) == 0:
        return True
    if (forget := _forgetting_errors()) is not None:
        forget()
    return False


@functools.cache
def _forgetting_errors() -> Callable[[], int] | None:
    """`cudaGetLastError` of the runtime that torch has loaded, and has no binding for; None where it is not found."""
    version = str(torch.version.cuda).partition(".")[0]
    try:  # torch loads its libraries so that all see their names, except on Windows
        library = ctypes.CDLL(f"cudart64_{version}.dll" if sys.platform == "win32" else None)
        found: Callable[[], int] = library.cudaGetLastError
    except (OSError, AttributeError):
        return None
    return found
