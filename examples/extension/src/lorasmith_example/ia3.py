"""(IA)³ (Liu et al. 2022, arXiv:2205.05638) on the outputs of a layer: `attached(x) = (1 + scales) ∘ (W x) + b`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter, misfit, taken, wide
from lorasmith.adapters.catalogue import Algorithm
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights


class Ia3Adapter(Adapter):
    algorithm = "ia3"  # the name of the entry point in lower case
    transforms_output = True  # so that the bias is added afterwards
    compiles = True
    format = AdapterFormat(
        suffixes={"scales": ".ia3_scales"},  # of keys in files; no other algorithm may have it
        needed=(frozenset({"scales"}),),
        rules=({"scales": "out 1"},),
        weight_shape=lambda shapes: (shapes["scales"][0],),
        vital=("scales",),
        rows=lambda weights: {"scales": 1},
        programs=frozenset(),
    )
    about = Algorithm(
        summary="Scales each output of a layer by a learnt factor; files are tiny.",
        rank_meaning="",  # the setting has none here, and alpha neither
        default_alpha=1.0,
        unused=frozenset({"rank", "alpha", "zero_init"}),
        learning_rate_factor=30.0,  # the paper trains with 3e-3
    )

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.scales = nn.Parameter(scales)

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> Ia3Adapter:
        return cls(torch.zeros(layer.out_features, 1))

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Ia3Adapter:
        scales = taken(weights, ["scales"])["scales"]
        if scales.shape != (layer.out_features, 1):
            raise misfit(weights, layer)
        return cls(scales)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        scales = wide(self.scales).to(weight.device).reshape(-1, *(1,) * (weight.ndim - 1))
        return (wide(weight) * (1 + strength * scales)).to(weight.dtype)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        y = inner(x)
        return y + y * layer.channelwise(strength * self.scales.flatten())
