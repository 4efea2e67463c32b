"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), for Linear layers and convolutions.

    ΔW = (alpha / rank) · up · down

`down` (rank, in) projects to the inner dimension and `up` (out, rank) back. For a convolution `down` carries the kernel
(rank, in, kh, kw) and `up` is 1×1 (out, rank, 1, 1), as in LoCon; with a Tucker core `mid` (rank, rank, kh, kw) between
them `down` is 1×1 too (Yeh et al. 2023, arXiv:2309.14859).

In activation space neither ΔW nor W + ΔW is ever built. A Linear layer's whole forward is one autograd function, which
adds the low-rank product in place and keeps the layer's input and the rank-sized projection for the backward pass;
layers that share their input are one function together.

Variants that are low-rank too share `LowRank`: `pissa` has other factors, `dropout` sets the mask, `dora` wraps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, FrozenLayer, FrozenProduct
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.random import keyed_generator

__all__ = ["Factors", "LoraAdapter", "LowRank", "SharedInput"]


class Factors(NamedTuple):
    """The matrices of a low-rank product.

    Attributes:
        down: (inner, in) or (inner, in, *kernel).
        up: (out, inner) or (out, inner, 1, ...).
        mid: (inner, inner, *kernel) of a Tucker-decomposed convolution, whose down is 1×1; else None.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None


class LowRank(Adapter):
    """An adapter that adds `scale · up · down`, whatever its factors are made of.

    Attributes:
        alpha: numerator of the scale alpha / rank.
        mask: what the inner dimension is multiplied with in a training step, (batch, rank); None for nothing.
    """

    compiles = True
    alpha: float
    mask: Tensor | None = None

    @property
    @abstractmethod
    def rank(self) -> int:
        """Denominator of the scale."""

    @abstractmethod
    def factors(self) -> Factors:
        """The factors as they are now; their inner dimension is the rank or a multiple of it."""

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
            # Every group sees the same down matrix, since ΔW's rows share it.
            shared = down.repeat(groups, *(1,) * (down.ndim - 1)) if groups > 1 else down
            inner = layer.convolve(x, shared, groups=groups)
        else:
            inner = layer.convolve(layer.pointwise(x, down), mid)
        return layer.pointwise(self._masked(inner, layer), up * factor, groups=groups)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        if isinstance(inner, FrozenProduct) and not layer.is_conv:
            down, up, _ = self.factors()
            mask = self._inner_mask((*x.shape[:-1], len(down)), layer)
            return _linear_with_lora(x, layer, inner.bias, down, up, strength * self.scale, mask)
        return super().attached(inner, layer, x, strength)

    def _masked(self, inner: Tensor, layer: FrozenLayer) -> Tensor:
        mask = self._inner_mask(inner.shape, layer)
        return inner if mask is None else inner * mask

    def _inner_mask(self, shape: tuple[int, ...], layer: FrozenLayer) -> Tensor | None:
        """The mask, shaped to meet the inner activations of `shape`."""
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
    """Low-rank adapter.

    Args:
        down, up, mid: as in `Factors`.
        alpha: numerator of the scale alpha / rank.
    """

    algorithm = "lora"
    summary = ALGORITHMS["LoRA"].summary
    rank_meaning = ALGORITHMS["LoRA"].rank_meaning

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
        _fill(down if zero == "up" else up, seed, path)
        return cls(down, up, alpha=alpha)

    @classmethod
    def create_tucker(
        cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str
    ) -> LoraAdapter:
        """A fresh adapter with a Tucker core, which a convolution larger than 1×1 has most of its parameters in.

        Layers for which a core would save nothing (see `has_core`) get a plain one.
        """
        if not cls.has_core(layer):
            return cls.create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
        kernel = layer.shape[2:]
        point = (1,) * len(kernel)
        down = torch.zeros((rank, layer.shape[1], *point))
        up = torch.zeros((layer.out_features, rank, *point))
        mid = torch.zeros((rank, rank, *kernel))
        _fill(down if zero == "up" else up, seed, path)
        _fill(mid, seed, f"{path}/mid")
        return cls(down, up, alpha=alpha, mid=mid)

    @staticmethod
    def has_core(layer: FrozenLayer) -> bool:
        """Whether a Tucker core makes sense: a kernel of more than one pixel, and no groups."""
        return math.prod(layer.shape[2:]) > 1 and layer.groups == 1

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> LoraAdapter:
        down, up, mid = (weights.tensors.get(name) for name in ("down", "up", "mid"))
        if down is None or up is None:
            raise LoraError(f"a LoRA layer needs both a down and an up matrix, got only {', '.join(weights.tensors)}")
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
        if not (rank and fits and up.shape == (layer.out_features, rank, *point)):
            raise LoraError(
                f"a LoRA with down {tuple(down.shape)} and up {tuple(up.shape)} does not fit a layer with weight "
                f"{tuple(layer.shape)}; it was made for another model"
            )
        alpha = float(rank) if weights.alpha is None else weights.alpha
        return cls(*(t.detach().to("cpu", torch.float32, copy=True) for t in (down, up)), alpha=alpha, mid=_copied(mid))

    def to_weights(self) -> AdapterWeights:
        tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.named_parameters()}
        return AdapterWeights(self.algorithm, tensors, self.alpha)


class SharedInput:
    """Linear layers that are given the same input (q, k and v), each with a low-rank adapter: one pass for all.

    Whichever is asked first computes the others too, and they find their result when they are asked for the same input:
    the down matrices make one product, and so do their gradients, and the gradient of the input is summed up in place.

    Args:
        members: adapter, layer and strength of each.

    Attributes:
        is_complete: whether none of them has got a further adapter since; else all are computed by themselves.
    """

    def __init__(self, members: Sequence[tuple[LowRank, FrozenLayer, float]]) -> None:
        self.is_complete = True
        self._members = members
        self._x: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    @staticmethod
    def takes(adapter: Adapter, layer: FrozenLayer) -> bool:
        """Whether an adapter on a layer can be a member."""
        return type(adapter).attached is LowRank.attached and not layer.is_conv

    def __call__(self, index: int, x: Tensor) -> Tensor | None:
        """`W x + b + change` of a member; None if it has to be computed by itself, as dropout wants it."""
        if self._x is not x or index not in self._results:
            if not self.is_complete or any(adapter.mask is not None for adapter, _, _ in self._members):
                return None
            downs, ups, layers, factors = [], [], [], []
            for adapter, layer, strength in self._members:
                down, up, _ = adapter.factors()
                downs.append(down)
                ups.append(up)
                layers.append(layer)
                factors.append(strength * adapter.scale)
            self._x = x
            self._results = dict(enumerate(_linear_group(x, layers, factors, *downs, *ups)))
        result = self._results.pop(index)
        if not self._results:
            self._x = None
        return result


class _LinearGroup(torch.autograd.Function):
    """`x Wᵢᵀ + bᵢ + factorᵢ · (x downᵢᵀ) upᵢᵀ` for x (..., in) and several layers i, with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[FrozenLayer], factors: Sequence[float], *downs_and_ups: Tensor
    ) -> tuple[Tensor, ...]:
        downs, ups = downs_and_ups[: len(layers)], downs_and_ups[len(layers) :]
        down = torch.cat(downs)
        ctx.ranks = [len(one) for one in downs]
        inner = F.linear(x, down)
        results = []
        for layer, factor, part, up in zip(layers, factors, _parts(inner, ctx.ranks), ups, strict=True):
            y = layer.times(x, layer.bias)
            y.view(-1, y.shape[-1]).addmm_(part, up.t(), alpha=factor)
            results.append(y)
        ctx.save_for_backward(x, inner, down, *ups)
        ctx.layers, ctx.factors = layers, factors
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, inner, down, *ups = ctx.saved_tensors
        grad_x: Tensor | None = None
        grad_inner = torch.zeros_like(inner) if None in grads else torch.empty_like(inner)
        grad_ups: list[Tensor | None] = []
        parts = zip(_parts(inner, ctx.ranks), _parts(grad_inner, ctx.ranks), strict=True)
        for layer, factor, up, grad, (part, grad_part) in zip(ctx.layers, ctx.factors, ups, grads, parts, strict=True):
            if grad is None:
                grad_ups.append(None)
                continue
            rows = grad.reshape(-1, up.shape[0])
            grad_part.copy_(_scaled(rows @ up, factor))
            wanted = ctx.needs_input_grad[3 + len(ctx.layers) + len(grad_ups)]
            grad_ups.append(_scaled(part.t() @ rows, factor).t() if wanted else None)
            if ctx.needs_input_grad[0]:
                grad_x = layer.grad_times(rows) if grad_x is None else layer.add_grad_times(grad_x, rows)
        flat = grad_inner.view(-1, grad_inner.shape[-1])
        if grad_x is not None:
            grad_x = grad_x.addmm_(flat, down).view(x.shape)
        grad_downs: Sequence[Tensor | None] = [None] * len(ctx.layers)
        if any(ctx.needs_input_grad[3 : 3 + len(ctx.layers)]):  # an adapter that runs below the trained one is frozen
            grad_downs = (flat.t() @ x.reshape(-1, x.shape[-1])).split(ctx.ranks)
        return grad_x, None, None, *grad_downs, *grad_ups


_linear_group: Callable[..., tuple[Tensor, ...]] = _LinearGroup.apply


def _parts(inner: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    """The columns of each layer, (rows, rank); views."""
    return torch.split(inner.view(-1, inner.shape[-1]), list(ranks), dim=1)


class _LinearWithLora(torch.autograd.Function):
    """`x Wᵀ + b + factor · (mask ∘ x downᵀ) upᵀ` for x (..., in), with the layer's W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: FrozenLayer,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        factor: float,
        mask: Tensor | None,
    ) -> Tensor:
        y = layer.times(x, bias)
        inner = F.linear(x, down)
        if mask is not None:
            inner.mul_(mask)
        y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up.t(), alpha=factor)
        ctx.save_for_backward(x, inner, down, up, mask)
        ctx.layer, ctx.factor = layer, factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, down, up, mask = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_inner = _scaled(grad @ up, ctx.factor)
        if mask is not None:
            grad_inner.view(inner.shape).mul_(mask)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.layer.grad_times(grad).addmm_(grad_inner, down).view(x.shape)
        if ctx.needs_input_grad[3]:  # an adapter that runs below the trained one is frozen
            grad_down = grad_inner.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[4]:
            # This way round the narrow matrix is the one that is transposed, which is a quarter faster on a CPU.
            grad_up = _scaled(inner.view(-1, inner.shape[-1]).t() @ grad, ctx.factor).t()
        return grad_x, None, None, grad_down, grad_up, None, None


_linear_with_lora: Callable[..., Tensor] = _LinearWithLora.apply


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """In place, and not at all for the usual factor of 1."""
    return tensor if factor == 1 else tensor.mul_(factor)


def _fill(tensor: Tensor, seed: int, key: str) -> None:
    """kaiming_uniform(a=√5), the default of torch's own layers, which is uniform within 1/√fan_in."""
    bound = 1 / math.sqrt(tensor[0].numel())
    tensor.uniform_(-bound, bound, generator=keyed_generator(seed, "init", key))


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float32, copy=True)
