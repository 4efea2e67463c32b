"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), for Linear layers and convolutions.

    ΔW = (alpha / rank) · up · down

`down` (rank, in) projects to the inner dimension and `up` (out, rank) back. For a convolution `down` carries the kernel
(rank, in, kh, kw) and `up` is 1×1 (out, rank, 1, 1), as in LoCon; files with a Tucker core `mid` (rank, rank, kh, kw)
are applied and continued as they are.

In activation space neither ΔW nor W + ΔW is ever built. A Linear layer's whole forward is one autograd function, which
adds the low-rank product in place and keeps the layer's input and the rank-sized projection for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.base import ADAPTERS, Adapter, FrozenLayer, FrozenProduct
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.random import keyed_generator

__all__ = ["LoraAdapter"]


@ADAPTERS.register("LoRA")
class LoraAdapter(Adapter):
    """Low-rank adapter.

    Args:
        down: (rank, in) or (rank, in, *kernel).
        up: (out, rank) or (out, rank, 1, ...).
        mid: (rank, rank, *kernel) of a Tucker-decomposed convolution, else None.
        alpha: numerator of the scale alpha / rank.
    """

    algorithm = "lora"

    def __init__(self, down: Tensor, up: Tensor, *, alpha: float, mid: Tensor | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.mid = None if mid is None else nn.Parameter(mid)
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> LoraAdapter:
        kernel = layer.weight.shape[2:]
        down = torch.zeros((rank, *layer.weight.shape[1:]))
        up = torch.zeros((layer.out_features, rank, *(1,) * len(kernel)))
        # kaiming_uniform(a=√5), the default of torch's own layers, is uniform within 1/√fan_in.
        filled = down if zero == "up" else up
        bound = 1 / math.sqrt(filled[0].numel())
        filled.uniform_(-bound, bound, generator=keyed_generator(seed, "init", path))
        return cls(down, up, alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> LoraAdapter:
        if "dora_scale" in weights.tensors:
            raise LoraError("this LoRA is a DoRA (it has dora_scale tensors), which is not supported; use a plain LoRA")
        down, up, mid = (weights.tensors.get(name) for name in ("down", "up", "mid"))
        if down is None or up is None:
            raise LoraError(f"a LoRA layer needs both a down and an up matrix, got only {', '.join(weights.tensors)}")
        rank, kernel = down.shape[0], layer.weight.shape[2:]
        point = (1,) * len(kernel)
        if mid is None:
            fits = down.shape[1:] == layer.weight.shape[1:]
        else:
            fits = (
                layer.groups == 1
                and mid.shape == (rank, rank, *kernel)
                and down.shape[1:] == (*layer.weight.shape[1:2], *point)
            )
        if not (rank and fits and up.shape == (layer.out_features, rank, *point)):
            raise LoraError(
                f"a LoRA with down {tuple(down.shape)} and up {tuple(up.shape)} does not fit a layer with weight "
                f"{tuple(layer.weight.shape)}; it was made for another model"
            )
        alpha = float(rank) if weights.alpha is None else weights.alpha
        return cls(*(t.detach().to("cpu", torch.float32, copy=True) for t in (down, up)), alpha=alpha, mid=_copied(mid))

    def to_weights(self) -> AdapterWeights:
        tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.named_parameters()}
        return AdapterWeights(self.algorithm, tensors, self.alpha)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        factor = strength * self.scale
        down, up = self.down.float(), self.up.float()
        if self.mid is None:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        else:
            inner = torch.einsum("mn...,ni->mi...", self.mid.float(), down.flatten(1))
            delta = torch.einsum("om,mi...->oi...", up.flatten(1), inner)
        return torch.add(weight.float(), delta.to(weight.device), alpha=factor).to(weight.dtype)

    def beside(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        factor = strength * self.scale
        if not layer.is_conv:
            return F.linear(F.linear(x, self.down), self.up) * factor
        groups = layer.groups
        if self.mid is None:
            # Every group sees the same down matrix, since ΔW's rows share it.
            down = self.down if groups == 1 else self.down.repeat(groups, *(1,) * (self.down.ndim - 1))
            inner = layer.convolve(x, down, groups=groups)
        else:
            inner = layer.pointwise(x, self.down)
            inner = layer.convolve(inner, self.mid)
        return layer.pointwise(inner, self.up * factor, groups=groups)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        if isinstance(inner, FrozenProduct) and not layer.is_conv:
            return _linear_with_lora(x, layer.weight, inner.bias, self.down, self.up, strength * self.scale)
        return super().attached(inner, layer, x, strength)


class _LinearWithLora(torch.autograd.Function):
    """`x Wᵀ + b + factor · (x downᵀ) upᵀ` for x (..., in), with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, factor: float
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        inner = F.linear(x, down)
        y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up.t(), alpha=factor)
        ctx.save_for_backward(x, weight, inner, down, up)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_inner = _scaled(grad @ up, ctx.factor)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, down).view(x.shape)
        if ctx.needs_input_grad[3]:  # an adapter that runs below the trained one is frozen
            grad_down = grad_inner.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[4]:
            # This way round the narrow matrix is the one that is transposed, which is a quarter faster on a CPU.
            grad_up = _scaled(inner.view(-1, inner.shape[-1]).t() @ grad, ctx.factor).t()
        return grad_x, None, None, grad_down, grad_up, None


_linear_with_lora: Callable[..., Tensor] = _LinearWithLora.apply


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """In place, and not at all for the usual factor of 1."""
    return tensor if factor == 1 else tensor.mul_(factor)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float32, copy=True)
