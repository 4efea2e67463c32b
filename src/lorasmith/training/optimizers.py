"""Update rules over the flat master buffer, gated on the device: a non-finite step changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorasmith.core.registry import Registry

__all__ = ["OPTIMIZERS", "GatedOptimizer"]

OPTIMIZERS: Registry[Callable[[Tensor, float, float], Optimizer]] = Registry("optimizer")
"""Name → (flat parameter, learning rate, weight decay) → optimizer."""

OPTIMIZERS.register("AdamW")(lambda flat, lr, decay: torch.optim.AdamW([flat], lr=lr, weight_decay=decay, fused=True))
OPTIMIZERS.register("Adam")(lambda flat, lr, decay: torch.optim.Adam([flat], lr=lr, fused=True))
OPTIMIZERS.register("SGD")(lambda flat, lr, decay: torch.optim.SGD([flat], lr=lr, fused=True))
OPTIMIZERS.register("RMSprop")(lambda flat, lr, decay: torch.optim.RMSprop([flat], lr=lr))


class GatedOptimizer:
    """An optimizer whose step takes effect only where a device-side flag says so, without asking the device.

    Fused optimizers read the flag themselves (it is what gradient scalers give them); others are undone with a copy.

    Args:
        name: registered optimizer.
        flat: the flat master buffer; its `grad` must be set.
    """

    def __init__(self, name: str, flat: Tensor, *, learning_rate: float, weight_decay: float) -> None:
        self._flat = flat
        self._optimizer = OPTIMIZERS[name](flat, learning_rate, weight_decay)
        self._reads_flag = getattr(self._optimizer, "_step_supports_amp_scaling", False)

    @torch.no_grad()
    def step(self, proceed: Tensor) -> None:
        """Update the buffer if `proceed` (0-d bool, on the buffer's device) is true."""
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
        """The buffer, then the optimizer's state of the same shape, in a fixed order.

        Step counters are left out: RMSprop, the one optimizer that comes here, does not use its own.
        """
        state = self._optimizer.state.get(self._flat, {})
        return [self._flat, *(t for t in state.values() if isinstance(t, Tensor) and t.shape == self._flat.shape)]
