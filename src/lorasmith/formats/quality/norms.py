"""How much an adapter changes its weight, from its tensors alone.

The Frobenius norm of a product of narrow matrices comes from products of their rank, and that of a Kronecker product
from its factors' norms, so that no matrix of the weight's size is made; LoHa's is summed over a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.names.spelling import ModuleTensors, scale_of, without_core

__all__ = ["squared_change"]

_ROWS = 512  # of LoHa's change that are made at a time


def squared_change(module: ModuleTensors) -> float | None:
    """Squared Frobenius norm of what a module's tensors add at strength 1.

    None where the change depends on the weight: OFT, BOFT, GLoRA. DoRA's magnitudes, which do so too, are left out.
    """
    total = sum(float(tensor.float().square().sum()) for tensor in module.differences.values())
    weights = module.adapter
    if weights is None:
        return total
    if weights.algorithm not in _SQUARES:
        return None
    plain = without_core(weights)
    return total + scale_of(plain) ** 2 * _SQUARES[plain.algorithm](plain)


def _lora(weights: AdapterWeights) -> float:
    return _product(weights.tensors["up"], weights.tensors["down"])


def _lokr(weights: AdapterWeights) -> float:
    square = 1.0
    for name in ("lokr_w1", "lokr_w2"):
        if name in weights.tensors:
            square *= float(weights.tensors[name].float().square().sum())
        else:
            square *= _product(weights.tensors[f"{name}_a"], weights.tensors[f"{name}_b"])
    return square


def _loha(weights: AdapterWeights) -> float:
    if "hada_t1" in weights.tensors:
        first, second = (_with_core(weights.tensors, number) for number in "12")
        return float((first * second).square().sum())
    first_up, first_down, second_up, second_down = (
        weights.tensors[f"hada_{name}"].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    total = 0.0
    for start in range(0, len(first_up), _ROWS):
        rows = slice(start, start + _ROWS)
        total += float(((first_up[rows] @ first_down) * (second_up[rows] @ second_down)).square().sum())
    return total


_SQUARES: Mapping[str, Callable[[AdapterWeights], float]] = {"lora": _lora, "lokr": _lokr, "loha": _loha}


def _product(up: Tensor, down: Tensor) -> float:
    """Squared norm of up · down, from two rank × rank products."""
    up, down = up.flatten(1).float(), down.flatten(1).float()
    # Rounding can leave a zero norm a little below zero.
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def _with_core(tensors: Mapping[str, Tensor], number: str) -> Tensor:
    core, outer, inner = (
        tensors[f"hada_{name}{number}{end}"].float() for name, end in (("t", ""), ("w", "_a"), ("w", "_b"))
    )
    return torch.einsum("ij...,ip,jq->pq...", core, outer, inner)
