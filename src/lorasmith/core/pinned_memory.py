"""Pinned host memory of exactly the size that is needed.

torch's allocator rounds each pinned tensor up to a power of two, so that 22 GiB of weights take 35. Here each buffer is
mapped by itself and registered with CUDA (`cudaHostRegister`), which rounds to pages. It is for what stays: registering
costs more than a copy.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class PinnedBuffer:
    """Bytes (size_bytes,) in pinned memory, in torch's own where registering fails; size_bytes must not be 0."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._device = device
        self._registered = _registered(size_bytes)
        pinned = self._registered
        self.bytes: Tensor = torch.empty(size_bytes, dtype=torch.uint8).pin_memory() if pinned is None else pinned

    def free(self) -> None:
        """Unregister the memory once the device has read it; the bytes stay readable."""
        if self._registered is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._registered.data_ptr())
            self._registered = None


def _registered(size_bytes: int) -> Tensor | None:
    mapped = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
    status = torch.cuda.cudart().cudaHostRegister(mapped.data_ptr(), size_bytes, 0)
    return mapped if int(status) == 0 else None
