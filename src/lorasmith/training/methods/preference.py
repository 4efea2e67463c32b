"""Direct preference optimization on pairs of pictures (Diffusion-DPO, Wallace et al. 2023, arXiv:2311.12908).

    −log σ(−β/2 · m),   m = (L(picture) − L_frozen(picture)) − (L(opposite) − L_frozen(opposite))

L is the loss of a plain step, of whatever the model predicts, on the same caption, noise and level: the trained model
is to improve on the frozen one more for the preferred picture than for its opposite. On flows this is Flow-DPO (Liu et
al. 2025, arXiv:2501.13918) with a constant β. A fresh LoRA has a loss of log 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional

from lorasmith.training.methods.method import BuiltInMethod, Passes

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig


@dataclass(frozen=True)
class Preference(BuiltInMethod):
    """DPO of pictures over their opposites."""

    beta: float

    name = "pairs"
    replaces_goal = True
    needs_opposites = True

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return cls(config.dpo_beta) if config.pairs == "dpo" else None

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        # Each picture has a backward pass of its own, so that a step needs the memory of one: the margin is computed
        # before, and the terms have its value and its gradient.
        opposite = passes.opposite
        frozen = passes.losses(passes.frozen()) - opposite.losses(opposite.frozen())
        with torch.no_grad():
            preferred = passes.losses(passes.trained())
        rejected = opposite.losses(opposite.trained())
        margin = -self.beta / 2 * (preferred - rejected.detach() - frozen)
        slope = self.beta / 2 * torch.sigmoid(-margin)
        yield slope * (rejected.detach() - rejected) - functional.logsigmoid(margin)
        preferred = passes.losses(passes.trained())
        yield slope * (preferred - preferred.detach())
