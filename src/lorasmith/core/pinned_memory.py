"""Pinned host memory of exactly the size that is needed.

torch's allocator rounds each pinned tensor up to a power of two, so that 22 GiB of weights take 35. Here each piece is
mapped by itself and registered with CUDA (`cudaHostRegister`), which rounds to pages. It is for what stays: registering
costs more than a copy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, of each tensor in a piece


class PinnedMemory:
    """Copies of tensors in pinned memory; `free` unregisters all of them, after which no copy may be in flight."""

    def __init__(self, device: torch.device) -> None:
        self.size_bytes = 0  # registered
        self._device = device
        self._pieces: list[Tensor] = []  # which live at least until they are unregistered

    def copies(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors side by side in one piece, or each in memory of torch's where registering fails."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        if not end or not self._is_registered(piece := torch.frombuffer(mmap.mmap(-1, end), dtype=torch.uint8)):
            return tuple(tensor.pin_memory() for tensor in tensors)
        return tuple(
            piece[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for start, tensor in zip(starts, tensors, strict=True)
        )

    def free(self) -> None:
        """Unregister the memory once the device has read it."""
        if self._pieces:
            torch.cuda.synchronize(self._device)
        for piece in self._pieces:
            torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
        self._pieces.clear()
        self.size_bytes = 0

    def _is_registered(self, piece: Tensor) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.nbytes, 0)) != 0:
            return False
        self._pieces.append(piece)
        self.size_bytes += piece.nbytes
        return True
