"""Full: a difference of the weight's own size, as in ordinary fine-tuning (LyCORIS' Full).

    W' = W + diff

Files call it `diff`; there is no rank and no alpha. Every program that knows it adds strength · diff. The parameter is
as large as the weight, in memory and on disk; nothing else is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, misfit, scaled, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer, change_alone, changed_product
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights


@ADAPTERS.register("Full")
class FullAdapter(Adapter):
    """Full difference."""

    algorithm = "full"

    def __init__(self, diff: Tensor) -> None:
        super().__init__()
        self.diff = nn.Parameter(diff)

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> FullAdapter:
        return cls(torch.zeros(layer.shape))

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> FullAdapter:
        diff = taken(weights, ["diff"])["diff"]
        if diff.shape != layer.shape:
            raise misfit(weights, layer)
        return cls(diff)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return torch.add(wide(weight), wide(self.diff).to(weight.device), alpha=strength).to(weight.dtype)

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        return change_alone(layer, x, partial(scaled, strength), self.diff)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        return changed_product(inner, layer, x, partial(scaled, strength), self.diff)


FullAdapter.format = AdapterFormat(
    suffixes={},
    needed=(),
    rules=(),
    weight_shape=lambda shapes: tuple(shapes["diff"]),
    is_additive=True,
    difference="diff",
)
