"""Where and in which number format the frozen model runs while it is trained on, and fp16's loss scale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["LossScale", "held", "memory_format_for"]


def memory_format_for(module: nn.Module) -> torch.memory_format:
    """Channels-last for models with 2-D convolutions larger than 1×1, which run faster so."""
    convolutional = any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in module.modules())
    return torch.channels_last if convolutional else torch.contiguous_format


@contextlib.contextmanager
def held(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run `module` with its floating-point tensors in `dtype` on `device`.

    Converted copies stand in for the tensors meanwhile; the originals are kept and put back, bit for bit. A model that
    is already there is not copied.
    """
    layout = memory_format_for(module)
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in [*module.parameters(), *module.buffers()]:
            target = dtype if tensor.is_floating_point() else tensor.dtype
            wanted = layout if tensor.ndim == 4 else torch.preserve_format
            converted = tensor.data.to(device, target, memory_format=wanted)
            if converted is not tensor.data:
                originals.append((tensor, tensor.data))
                tensor.data = converted
        yield
    finally:
        for tensor, original in originals:
            tensor.data = original


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740), kept on the device.

    Args:
        device: where the scale lives.
        enabled: False makes it a constant 1.
    """

    _FIRST = 2.0**13
    _GROWTH_STEPS = 500

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), self._FIRST if enabled else 1.0, device=device)
        self._calm = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Halve the scale after an overflow; double it after many steps without one."""
        if not self.enabled:
            return
        self._calm = torch.where(finite, self._calm + 1, torch.zeros_like(self._calm))
        grow = self._calm >= self._GROWTH_STEPS
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(1.0, 2.0**24)
        self._calm = torch.where(grow, torch.zeros_like(self._calm), self._calm)
