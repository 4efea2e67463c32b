"""The scale alpha / rank of an adapter, and moving it between alpha and the tensors of a LoRA."""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import AdapterWeights, multiplied

T = TypeVar("T", bound=Hashable)


def checked_scale(value: object) -> float:
    """A number of a file that scales an adapter: alpha, rank or bound. Every such number passes here.

    Its bounds are wide, and narrow enough for products of a few such numbers to be finite in fp32's exponents.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        number = float(value)
    if math.isnan(number) or 0 < abs(number) < 1 / _LARGEST:
        shown = f"{value:g}" if isinstance(value, float) else repr(value)[:40]
        raise ValueError(f"be a number, 0 or of a size from {1 / _LARGEST:g} to {_LARGEST:g}, and is {shown}")
    return number


_LARGEST = 1e18


def rank_of(weights: AdapterWeights) -> int | None:
    """The r of the scale alpha / r, or None for adapters that have none (OFT, LoKr with two full factors)."""
    for role, axis in format_of(weights).rank_axes.items():
        if role in weights.tensors:
            return weights.tensors[role].shape[axis]
    return None


def scale_of(weights: AdapterWeights) -> float:
    """alpha / r; 1 where the file states no alpha or the algorithm has no rank."""
    rank = rank_of(weights)
    return 1.0 if weights.alpha is None or not rank else weights.alpha / rank


def full_alpha(weights: AdapterWeights) -> float:
    """The alpha that scales by one: the rank."""
    return float(rank_of(weights) or 1)


def idle_alpha(weights: AdapterWeights) -> float:
    """The alpha without effect: the rank of a scale, 0 for a bound."""
    return full_alpha(weights) if format_of(weights).bounded is None else 0.0


def loras_in(adapters: Mapping[T, AdapterWeights]) -> dict[T, AdapterWeights]:
    """The low-rank adapters among others, whose scale can be moved into their factors."""
    return {key: weights for key, weights in adapters.items() if format_of(weights).is_low_rank}


def scaled_by(weights: AdapterWeights, factor: float) -> AdapterWeights:
    """A LoRA with a factor multiplied into its matrices and a scale of 1.

    The down matrix gets a power of two near the factor's root and the up matrix the rest: all of a small factor on one
    side would push fp16 values below what fp16 can hold.
    """
    share = 2.0 ** round(math.log2(abs(factor)) / 2) if factor else 1.0
    tensors = {
        **weights.tensors,
        "down": multiplied(weights.tensors["down"], share),
        "up": multiplied(weights.tensors["up"], factor / share),
    }
    return replace(weights, tensors=tensors, alpha=full_alpha(weights))


def baked(weights: AdapterWeights) -> AdapterWeights:
    """A LoRA with its own scale multiplied into its matrices."""
    return scaled_by(weights, scale_of(weights))


def with_alpha(weights: AdapterWeights, alpha: float) -> AdapterWeights:
    """The same LoRA with another alpha, compensated in its up matrix."""
    up = multiplied(weights.tensors["up"], _alpha(weights) / alpha)
    return replace(weights, tensors={**weights.tensors, "up": up}, alpha=alpha)


def most_frequent_alpha(loras: Mapping[T, AdapterWeights]) -> tuple[float, dict[T, float]]:
    """The most frequent alpha (the larger of two, 0 without any LoRA), and the alpha of each LoRA."""
    alphas = {key: _alpha(weights) for key, weights in loras.items()}
    counts = collections.Counter(alphas.values())
    return max(counts, key=lambda alpha: (counts[alpha], alpha), default=0.0), alphas


def with_one_alpha(adapters: Mapping[T, AdapterWeights]) -> dict[T, AdapterWeights]:
    """Adapters whose LoRAs all have the most frequent alpha, with unchanged effect.

    diffusers needs that: it reads one alpha for all attention layers of a UNet's LoRA in kohya's layout.
    """
    common, alphas = most_frequent_alpha(loras_in(adapters))
    odd = {key for key, alpha in alphas.items() if common and alpha != common}
    return {key: with_alpha(weights, common) if key in odd else weights for key, weights in adapters.items()}


def _alpha(weights: AdapterWeights) -> float:
    return full_alpha(weights) if weights.alpha is None else weights.alpha
