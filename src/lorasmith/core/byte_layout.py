"""Tensors side by side in one buffer of bytes, so that one copy or one collective moves all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as kernels require


@dataclass(frozen=True, eq=False)
class ByteRange:
    """Where a tensor is in a buffer, from byte `start` to `stop`."""

    start: int
    stop: int
    dtype: torch.dtype
    laid: tuple[int, ...]  # its shape with the dimensions in memory order
    order: tuple[int, ...]  # index in `laid` of each of its dimensions

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in a buffer of any dtype; it has the memory format of the one that the place was made for."""
        taken = buffer.view(torch.uint8)[self.start : self.stop]
        return taken.view(self.dtype).view(self.laid).permute(self.order)


class ByteLayout:
    """Aligned places of tensors in a buffer of `size_bytes`."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def add(self, tensor: Tensor) -> ByteRange:
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        back = tuple(order.index(dimension) for dimension in range(tensor.ndim))
        start = self.size_bytes
        self.size_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        laid = tuple(tensor.shape[dimension] for dimension in order)
        return ByteRange(start, start + tensor.nbytes, tensor.dtype, laid, back)
