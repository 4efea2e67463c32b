"""The loss scale of fp16 training."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740), on the device; 1 if not enabled."""

    _FIRST = 2.0**13
    _GROWTH_STEPS = 500

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), self._FIRST if enabled else 1.0, device=device)
        self._calm = torch.zeros((), device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"loss_scale": self.scale, "calm_steps": self._calm}

    def update(self, finite: Tensor) -> None:
        """Halve the scale after an overflow; double it after 500 steps without one."""
        if not self.enabled:
            return
        calm = torch.where(finite, self._calm + 1, torch.zeros_like(self._calm))
        grow = calm >= self._GROWTH_STEPS
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.copy_((self.scale * factor).clamp(1.0, 2.0**24))
        self._calm.copy_(torch.where(grow, torch.zeros_like(calm), calm))
