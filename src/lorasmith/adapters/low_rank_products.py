"""Products of frozen Linear layers with low-rank changes, each a single autograd function.

The low-rank product is added in place to that of the layer; the backward pass needs the layer's input and the
rank-sized projection alone. Neither ΔW nor W + ΔW is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.frozen_layer import FrozenLayer


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
            # In this order the narrow matrix is transposed, which is a quarter faster on a CPU.
            grad_up = _scaled(inner.view(-1, inner.shape[-1]).t() @ grad, ctx.factor).t()
        return grad_x, None, None, grad_down, grad_up, None, None


linear_with_lora: Callable[..., Tensor] = _LinearWithLora.apply


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


linear_group: Callable[..., tuple[Tensor, ...]] = _LinearGroup.apply


def _parts(inner: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    """The columns of each layer, (rows, rank); views."""
    return torch.split(inner.view(-1, inner.shape[-1]), list(ranks), dim=1)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """`factor · tensor`, in place; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor.mul_(factor)
