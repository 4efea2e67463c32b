"""Variants of an algorithm: other initializations and scales of a fresh adapter.

DoRA        arXiv:2402.09353   a magnitude beside the direction (`dora`)
rsLoRA      arXiv:2312.03732   scale alpha / √rank instead of alpha / rank; saved as alpha · √rank, so that every
                               program computes the same
PiSSA       arXiv:2404.02948   start from the principal components (`pissa`)
Tucker      arXiv:2309.14859   a core between the factors of a convolution (`lora`)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.algorithms import words_of
from lorasmith.adapters.dora import DoraAdapter, InputDora, OutputDora
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.pissa import PissaAdapter

__all__ = ["Variant", "fresh_adapter"]

_DORA: dict[str, type[DoraAdapter]] = {"input": InputDora, "output": OutputDora}
_RSLORA_ALPHA = 4.0  # a scale of 1 at rank 16, so that the learning rate keeps its meaning there


@dataclass(frozen=True)
class Variant:
    """Variants, all off by default. `catalogue` lists those that each algorithm supports.

    Attributes:
        dora: `none`, `input` or `output`.
        rslora, pissa, tucker: see above.
    """

    dora: str = "none"
    rslora: bool = False
    pissa: bool = False
    tucker: bool = False

    def default_alpha(self, algorithm: str, rank: int) -> float:
        """Default of alpha: a scale of 1, no constraint."""
        default = words_of(algorithm).default_alpha
        if default is not None:
            return default
        return _RSLORA_ALPHA if self.rslora else float(rank)

    def stored_alpha(self, algorithm: str, alpha: float | None, rank: int, asked: int) -> float:
        """The alpha that gives a layer its scale in every program.

        Args:
            algorithm: registered name.
            alpha: as in the settings, None for the default.
            rank: the layer's rank.
            asked: the rank in the settings; a capped layer keeps the scale of that rank.
        """
        alpha = self.default_alpha(algorithm, asked) if alpha is None else alpha
        if words_of(algorithm).default_alpha is not None:
            return alpha
        return alpha * math.sqrt(rank) if self.rslora else alpha * rank / asked


def fresh_adapter(
    layer: FrozenLayer, algorithm: str, variant: Variant, *, rank: int, alpha: float, seed: int, path: str, zero: str
) -> Adapter:
    """A new adapter for a layer, exactly the identity.

    Args:
        layer: the layer it is for.
        algorithm: registered name.
        variant: initialization, and a DoRA around it.
        alpha: as stored (`Variant.stored_alpha`).
        rank, seed, path, zero: as for `Adapter.create`.
    """
    create = ADAPTERS[algorithm].create
    if variant.pissa:
        create = PissaAdapter.create
    elif variant.tucker:
        create = LoraAdapter.create_tucker
    adapter = create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
    return adapter if variant.dora == "none" else _DORA[variant.dora].around(adapter, layer)
