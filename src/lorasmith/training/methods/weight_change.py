"""A penalty on the change of the weights, λ Σ ‖ΔW‖², against forgetting (arXiv:2505.19519).

ΔW = s · up · down is never built: ‖up · down‖² = tr(upᵀ up · down downᵀ), of two rank × rank products. A decay of both
matrices is another thing, as it also shrinks what does not change the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter, squared_product
from lorasmith.adapters.lora import LowRank
from lorasmith.core.errors import OptionError
from lorasmith.training.methods.method import BuiltInMethod

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig
    from lorasmith.training.trainable import Facts


@dataclass(frozen=True)
class WeightChange(BuiltInMethod):
    """The penalty at a weight."""

    weight: float

    name = "weight_change"

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return cls(config.weight_change) if config.weight_change else None

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        if not adapters:
            raise OptionError("weight_change is of the layers of a LoRA, and there are none; leave it out")
        fit = (isinstance(adapter, LowRank) and adapter.factors().mid is None for adapter in adapters.values())
        if not all(fit):
            raise OptionError("weight_change is of low-rank adapters alone; choose LoRA without DoRA and tucker")

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        total = []
        for adapter in adapters.values():
            assert isinstance(adapter, LowRank)
            down, up, _ = adapter.factors()
            total.append(adapter.scale**2 * squared_product(up, down))
        return self.weight * torch.stack(total).sum()
