"""Update rules over the flat master buffer, gated on the device: a non-finite step changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorasmith.core.registry import Registry

__all__ = ["OPTIMIZERS", "GatedOptimizer"]

Groups = list[dict[str, Any]]

OPTIMIZERS: Registry[Callable[[Groups, float], Optimizer]] = Registry("optimizer")
"""Name → (torch's parameter groups with their learning rates, weight decay) → optimizer."""

OPTIMIZERS.register("AdamW")(lambda groups, decay: torch.optim.AdamW(groups, weight_decay=decay, fused=True))
OPTIMIZERS.register("Adam")(lambda groups, decay: torch.optim.Adam(groups, fused=True))
OPTIMIZERS.register("SGD")(lambda groups, decay: torch.optim.SGD(groups, fused=True))
OPTIMIZERS.register("RMSprop")(lambda groups, decay: torch.optim.RMSprop(groups))


class GatedOptimizer:
    """An optimizer whose step takes effect only where a device-side flag says so, without asking the device.

    Fused optimizers read the flag themselves (it is what gradient scalers give them); others are undone with a copy.

    Args:
        name: registered optimizer.
        groups: parts of the flat master buffer, whose `grad` must be set, with their learning rates.
    """

    def __init__(self, name: str, groups: Sequence[tuple[Tensor, float]], *, weight_decay: float) -> None:
        self._flats = [flat for flat, _ in groups]
        self._optimizer = OPTIMIZERS[name]([{"params": [flat], "lr": rate} for flat, rate in groups], weight_decay)
        self._reads_flag = getattr(self._optimizer, "_step_supports_amp_scaling", False)

    @torch.no_grad()
    def step(self, proceed: Tensor) -> None:
        """Update the buffers if `proceed` (0-d bool, on the buffers' device) is true."""
        if self._reads_flag:
            self._optimizer.found_inf = (~proceed).to(torch.float32)  # type: ignore[attr-defined]
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.step()
            return
        before = [tensor.clone() for tensor in self._state()]
        self._optimizer.step()
        # State that the first step has just made has no value to go back to; it starts from zero.
        before += [torch.zeros_like(tensor) for tensor in self._state()[len(before) :]]
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(torch.where(proceed, tensor, old))

    def _state(self) -> list[Tensor]:
        """The buffers, then the optimizer's state of the same shapes, in a fixed order.

        Step counters are left out: RMSprop, the one optimizer that comes here, does not use its own.
        """
        kept = [
            tensor
            for flat in self._flats
            for tensor in self._optimizer.state.get(flat, {}).values()
            if isinstance(tensor, Tensor) and tensor.shape == flat.shape
        ]
        return [*self._flats, *kept]
