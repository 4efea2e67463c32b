"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), for Linear layers and convolutions.

    ΔW = (alpha / rank) · up · down

`down` (rank, in) projects to the inner dimension and `up` (out, rank) back. For a convolution `down` carries the kernel
(rank, in, kh, kw) and `up` is 1×1 (out, rank, 1, 1), as in LoCon; with a Tucker core `mid` (rank, rank, kh, kw) between
them `down` is 1×1 too (Yeh et al. 2023, arXiv:2309.14859).

In activation space neither ΔW nor W + ΔW is built: `low_rank_products` adds the low-rank product to the layer's, for
layers with one input (q, k, v) together.

Variants share `LowRank`: PiSSA has other factors and dropout sets the mask (`variants`), `dora` wraps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, fill_uniform, misfit, saved, squared_product, taken
from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct
from lorasmith.adapters.low_rank_products import LowRankTerm, RunTerms, linear_with_lora
from lorasmith.core.adapter_state import COMFYUI, DIFFUSERS, SD_SCRIPTS, AdapterFormat, AdapterWeights, PeftKind, Shapes
from lorasmith.core.errors import OptionError
from lorasmith.core.random import keyed_generator


class Factors(NamedTuple):
    """The matrices of a low-rank product."""

    down: Tensor  # (inner, in) or (inner, in, *kernel)
    up: Tensor  # (out, inner) or (out, inner, 1, ...)
    # (inner, inner, *kernel) of a Tucker-decomposed convolution, whose down is 1×1; else None
    mid: Tensor | None = None


class LowRank(Adapter):
    """An adapter that adds `scale · up · down`; subclasses compute the factors."""

    compiles = True
    alpha: float  # numerator of the scale alpha / rank
    mask: Tensor | None = None  # factors of the inner dimension in a training step, (batch, rank); None for no dropout

    @property
    @abstractmethod
    def rank(self) -> int:
        """Denominator of the scale."""

    @abstractmethod
    def factors(self) -> Factors:
        """The current factors; their inner dimension is the rank or a multiple of it."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        down, up, mid = self.factors()
        down, up = down.float(), up.float()
        if mid is None:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        else:
            inner = torch.einsum("mn...,ni->mi...", mid.float(), down.flatten(1))
            delta = torch.einsum("om,mi...->oi...", up.flatten(1), inner)
        factor = strength * self.scale
        return torch.add(weight.float(), delta.to(weight.device), alpha=factor).to(weight.dtype)

    def beside(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        down, up, mid = self.factors()
        factor = strength * self.scale
        if not layer.is_conv:
            return F.linear(self._masked(F.linear(x, down), layer), up) * factor
        groups = layer.groups
        if mid is None:
            # Every group uses the same down matrix, since ΔW's rows share it.
            shared = down.repeat(groups, *(1,) * (down.ndim - 1)) if groups > 1 else down
            inner = layer.convolve(x, shared, groups=groups)
        else:
            inner = layer.convolve(layer.pointwise(x, down), mid)
        return layer.pointwise(self._masked(inner, layer), up * factor, groups=groups)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        if isinstance(inner, FrozenProduct) and not layer.is_conv:
            down, up, _ = self.factors()
            mask = self.inner_mask((*x.shape[:-1], len(down)), layer)
            term = LowRankTerm(0, strength * self.scale, down, up, mask)
            return linear_with_lora(x, (layer,), (inner.bias,), (RunTerms((term,)),))[0]
        return super().attached(inner, layer, x, strength)

    def _masked(self, inner: Tensor, layer: FrozenLayer) -> Tensor:
        mask = self.inner_mask(inner.shape, layer)
        return inner if mask is None else inner * mask

    def inner_mask(self, shape: tuple[int, ...], layer: FrozenLayer) -> Tensor | None:
        """The mask, broadcastable to inner activations of `shape`."""
        if self.mask is None:
            return None
        if len(self.mask) != shape[0]:
            raise OptionError(
                f"dropout needs layers whose input begins with the batch ({len(self.mask)}), got one of shape "
                f"{tuple(shape)}; exclude such layers or leave rank_dropout and module_dropout out"
            )
        channels = shape[1] if layer.is_conv else shape[-1]
        mask = self.mask.repeat(1, channels // self.rank)
        point = (1,) * (len(shape) - 2)
        return mask.reshape(len(mask), channels, *point) if layer.is_conv else mask.reshape(len(mask), *point, channels)


@ADAPTERS.register("LoRA")
class LoraAdapter(LowRank):
    """Low-rank adapter."""

    algorithm = "lora"

    def __init__(self, down: Tensor, up: Tensor, *, alpha: float, mid: Tensor | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.mid = None if mid is None else nn.Parameter(mid)
        self.alpha = alpha

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.mid)

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> LoraAdapter:
        point = (1,) * len(layer.shape[2:])
        down = torch.zeros((rank, *layer.shape[1:]))
        up = torch.zeros((layer.out_features, rank, *point))
        fill_uniform(down if zero == "up" else up, keyed_generator(seed, "init", path))
        return cls(down, up, alpha=alpha)

    @classmethod
    def create_tucker(
        cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str
    ) -> LoraAdapter:
        """A fresh adapter with a Tucker core, in which a convolution larger than 1×1 has most of its parameters.

        Layers for which a core saves nothing (see `has_core`) get a plain one. Arguments as for `create`.
        """
        if not cls.has_core(layer):
            return cls.create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
        kernel = layer.shape[2:]
        point = (1,) * len(kernel)
        down = torch.zeros((rank, layer.shape[1], *point))
        up = torch.zeros((layer.out_features, rank, *point))
        mid = torch.zeros((rank, rank, *kernel))
        fill_uniform(down if zero == "up" else up, keyed_generator(seed, "init", path))
        fill_uniform(mid, keyed_generator(seed, "init", f"{path}/mid"))
        return cls(down, up, alpha=alpha, mid=mid)

    @staticmethod
    def has_core(layer: FrozenLayer) -> bool:
        """Whether a Tucker core makes sense: a kernel of more than one pixel, and no groups."""
        return math.prod(layer.shape[2:]) > 1 and layer.groups == 1

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> LoraAdapter:
        tensors = taken(weights, ("down", "up"), ("mid",))
        down, up, mid = (tensors.get(name) for name in ("down", "up", "mid"))
        assert down is not None and up is not None
        rank, kernel = down.shape[0], layer.shape[2:]
        point = (1,) * len(kernel)
        if mid is None:
            fits = down.shape[1:] == layer.shape[1:]
        else:
            fits = (
                layer.groups == 1
                and mid.shape == (rank, rank, *kernel)
                and down.shape[1:] == (*layer.shape[1:2], *point)
            )
        if not (fits and up.shape == (layer.out_features, rank, *point)):
            raise misfit(weights, layer)
        return cls(down, up, alpha=float(rank) if weights.alpha is None else weights.alpha, mid=mid)

    def to_weights(self) -> AdapterWeights:
        return saved(self, self.algorithm, self.alpha)


def _weight_shape(shapes: Shapes) -> tuple[int, ...]:
    return shapes["up"][0], shapes["down"][1], *shapes["mid" if "mid" in shapes else "down"][2:]


def _canonical(weights: AdapterWeights, shape: tuple[int, ...] | None) -> AdapterWeights:
    """Factors with the dimensions of the layer's weight.

    Files flatten convolutions to two dimensions (ComfyUI's trainer), or give a Linear the 1×1 kernel of the convolution
    that another version of the model has in its place.
    """
    down, up = weights.tensors["down"], weights.tensors["up"]
    tensors = dict(weights.tensors)
    if shape is not None and "mid" not in tensors and math.prod(down.shape[1:]) == math.prod(shape[1:]):
        tensors["down"] = down.reshape(down.shape[0], *shape[1:])
    tensors["up"] = up.reshape(*up.shape[:2], *(1,) * (tensors["down"].ndim - 2))
    if "dora_scale" in tensors and tensors["dora_scale"].ndim == 1:
        tensors["dora_scale"] = tensors["dora_scale"].reshape(-1, *(1,) * (tensors["down"].ndim - 1))
    return replace(weights, tensors=tensors)


def _without_core(weights: AdapterWeights) -> AdapterWeights:
    if "mid" not in weights.tensors:
        return weights
    tensors = dict(weights.tensors)
    core, down = tensors.pop("mid").float(), tensors["down"].float()
    return replace(weights, tensors={**tensors, "down": torch.einsum("mn...,ni->mi...", core, down.flatten(1))})


def _peft_fields(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, Any]:
    dora = any("dora_scale" in weights.tensors for weights in adapters.values())
    return {"bias": "none", "use_dora": dora, "use_rslora": False}


LoraAdapter.format = AdapterFormat(
    suffixes={"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"},
    peft_suffixes={"down": ".lora_A.weight", "up": ".lora_B.weight"},
    needed=(frozenset({"down", "up"}),),
    rules=(
        {"down": "rank in kernel...", "up": "out rank 1..."},
        {"down": "rank in 1...", "up": "out rank 1...", "mid": "rank rank kernel..."},
    ),
    weight_shape=_weight_shape,
    canonical=_canonical,
    rank_axes={"down": 0},
    input_axes={"down": 1},
    cores=frozenset({"mid"}),
    without_core=_without_core,
    is_additive=True,
    is_low_rank=True,
    squared_norm=lambda tensors: squared_product(tensors["up"], tensors["down"]),
    vital=("down", "up"),
    rows=lambda weights: {"up": 1},
    stacks=True,
    programs=frozenset({COMFYUI, DIFFUSERS, SD_SCRIPTS}),
    peft=PeftKind(name="LORA", alpha="lora_alpha", magnitudes=True, fields=_peft_fields),
)
