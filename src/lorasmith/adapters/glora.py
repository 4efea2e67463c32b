"""GLoRA: a low-rank change of the weight's inputs and one added to it (Chavan et al. 2023, arXiv:2306.07967), in
LyCORIS' form.

    W' = W + (alpha / rank) · (W · a1 · a2 + b1 · b2)
    attached(x) = W (x + s a1 a2 x) + s b1 b2 x + b,   s = alpha / rank

a1 (in, rank) and a2 (rank, in) work on input channels, 1×1 for a convolution; b1 (out, rank) and b2 (rank, in[, kh,
kw]) are a LoRA's up and down, with an optional Tucker core bm (rank, rank, kh, kw) between them. A convolution in
groups has its channels changed within their group, alike in all of them. Files of LyCORIS before version 2 have each
pair swapped. Parameters: rank · (3 · in + out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, fill_uniform, misfit, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights
from lorasmith.core.random import keyed_generator

T = TypeVar("T")

_NAMES = ("a1", "a2", "b1", "b2")


@ADAPTERS.register("GLoRA")
class GloraAdapter(Adapter):
    """Adapter of a layer's inputs and of its weight."""

    algorithm = "glora"
    transforms_input = True
    compiles = True

    def __init__(self, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        super().__init__()
        self.a1, self.a2, self.b1, self.b2 = (nn.Parameter(tensors[name]) for name in _NAMES)
        self.bm = nn.Parameter(tensors["bm"]) if "bm" in tensors else None
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """Inner dimension of both products."""
        return self.a2.shape[0]

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> GloraAdapter:
        tensors = {name: torch.zeros(shape) for name, shape in _shapes(layer, rank).items()}
        generator = keyed_generator(seed, "init", path)
        for name in ("a2", "b2") if zero == "up" else ("a1", "b1"):
            fill_uniform(tensors[name], generator)
        return cls(tensors, alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> GloraAdapter:
        tensors_read = taken(weights, _NAMES, ("bm",))
        old = {**tensors_read, **_swapped(tensors_read)}
        tensors = _shaped(tensors_read, layer) or _shaped(old, layer)
        if tensors is None:
            raise misfit(weights, layer)
        alpha = weights.alpha
        return cls(tensors, alpha=float(len(tensors["a2"])) if alpha is None else alpha)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        a1, a2, b1, b2 = (wide(p).to(weight.device).flatten(1) for p in (self.a1, self.a2, self.b1, self.b2))
        full = wide(weight)
        change = torch.einsum("oi...,ir,rj->oj...", full, a1, a2)
        if self.bm is None:
            change = change + (b1 @ b2).reshape(weight.shape)
        else:
            change = change + torch.einsum("om,mn...,ni->oi...", b1, wide(self.bm).to(weight.device), b2)
        return torch.add(full, change, alpha=strength * self.alpha / self.rank).to(weight.dtype)

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        up = self.b1 * (strength * self.alpha / self.rank)
        if not layer.is_conv:
            return F.linear(F.linear(x, self.b2), up)
        groups = layer.groups
        if self.bm is None:
            inner = layer.convolve(x, _for_each_group(self.b2, groups), groups=groups)
        else:
            inner = layer.pointwise(x, _for_each_group(self.b2, groups), groups=groups)
            inner = layer.convolve(inner, _for_each_group(self.bm, groups), groups=groups)
        return layer.pointwise(inner, up, groups=groups)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        up = self.a1 * (strength * self.alpha / self.rank)
        if layer.is_conv:
            groups = layer.groups
            change = layer.pointwise(x, _for_each_group(self.a2, groups), groups=groups)
            change = layer.pointwise(change, _for_each_group(up, groups), groups=groups)
        else:
            change = F.linear(F.linear(x, self.a2), up)
        return inner(x + change) + self.delta(x, layer, strength)


def _shapes(layer: FrozenLayer, rank: int, *, cored: bool = False) -> dict[str, tuple[int, ...]]:
    inside, kernel = layer.shape[1], layer.shape[2:]
    point = (1,) * len(kernel)
    shapes: dict[str, tuple[int, ...]] = {
        "a1": (inside, rank, *point),
        "a2": (rank, inside, *point),
        "b1": (layer.out_features, rank, *point),
        "b2": (rank, inside, *(point if cored else kernel)),
    }
    return {**shapes, "bm": (rank, rank, *kernel)} if cored else shapes


def _shaped(tensors: Mapping[str, Tensor], layer: FrozenLayer) -> dict[str, Tensor] | None:
    """The tensors in the dimensions for a layer, which some files flatten; None if they do not fit."""
    rank = len(tensors["a2"])
    shapes = _shapes(layer, rank, cored="bm" in tensors)
    flat = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    if any(tensor.flatten(1).shape != flat[name] for name, tensor in tensors.items()):
        return None
    return {name: tensor.reshape(shapes[name]) for name, tensor in tensors.items()}


def _for_each_group(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution in groups with the same change in each group."""
    return weight if groups == 1 else weight.repeat(groups, *(1,) * (weight.ndim - 1))


def _canonical(weights: AdapterWeights, shape: tuple[int, ...] | None) -> AdapterWeights:
    """The tensors of LyCORIS before version 2 under their present names."""
    tensors = weights.tensors
    if shape is None:
        is_old = tensors["a2"].shape[0] > tensors["a2"].shape[1]  # no rank is larger than the inputs
    else:
        is_old = tensors["b1"].shape[0] != shape[0] == tensors["b2"].shape[0]
    return replace(weights, tensors={**tensors, **_swapped(tensors)}) if is_old else weights


def _swapped(tensors: Mapping[str, T]) -> dict[str, T]:
    return {name: tensors[other] for name, other in zip(_NAMES, ("a2", "a1", "b2", "b1"), strict=True)}


# The convolution's kernel may be flattened into the columns of b2.
_PLAIN = {"a1": "in rank 1...", "a2": "rank in 1...", "b1": "out rank 1...", "b2": "rank columns kernel..."}
GloraAdapter.format = AdapterFormat(
    suffixes={name: f".{name}.weight" for name in (*_NAMES, "bm")},
    needed=(frozenset(_NAMES),),
    rules=(_PLAIN, {**_PLAIN, "b2": "rank columns 1...", "bm": "rank rank kernel..."}, _swapped(_PLAIN)),
    canonical=_canonical,
    weight_shape=lambda shapes: (shapes["b1"][0],),
    rank_axes={"b2": 0},
    rows=lambda weights: {"b1": 1},
    all_rows=frozenset({"b1"}),  # the inputs change for all rows
)
