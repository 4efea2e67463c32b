"""The product of a layer whose weight has a change of its own size, as LoHa's and a full difference.

    y = (W + ΔW) x + b,   ΔW = build(factors)

ΔW exists only during a product: the backward pass rebuilds it from its factors, which are kept instead.
Half precision would round a small ΔW away in the sum with W, so there the two products are computed separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct

__all__ = ["change_alone", "changed_product"]

Build = Callable[..., Tensor]
"""From factors to ΔW, in the shape of the weight; differentiable."""


def changed_product(
    inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, build: Build, *factors: Tensor
) -> Tensor:
    """`inner(x) + ΔW x`, in one product where `inner` is the frozen layer itself.

    Args:
        inner: the layer's product, or that of the adapters below.
        layer: the layer that ΔW is for.
        x: its input, (..., in) or (batch, in, *size).
        build: makes ΔW from the factors.
        factors: trained tensors, kept for the backward pass.
    """
    if isinstance(inner, FrozenProduct):
        return _product(layer, build, True, inner.bias, x, *factors)
    return inner(x) + change_alone(layer, x, build, *factors)


def change_alone(layer: FrozenLayer, x: Tensor, build: Build, *factors: Tensor) -> Tensor:
    """`ΔW x`.

    Args:
        layer, x, build, factors: as for `changed_product`.
    """
    return _product(layer, build, False, None, x, *factors)


class _Product(torch.autograd.Function):
    """`ΔW x`, and `W x + b` with it if it is `on_top` of the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: FrozenLayer,
        build: Build,
        on_top: bool,
        bias: Tensor | None,
        x: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layer, ctx.build, ctx.on_top = layer, build, on_top
        change = build(*factors)
        if not on_top:
            return layer.product_with(change, x)
        weight = layer.weight
        if weight.element_size() < 4:
            return layer.product_with(weight, x, bias).add_(layer.product_with(change, x))
        return layer.product_with(weight + change, x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        of_input, of_factors = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        leaves = [factor.detach().requires_grad_(needed) for factor, needed in zip(factors, of_factors, strict=True)]
        with torch.enable_grad():
            change = ctx.build(*leaves)
        total = ctx.layer.weight + change.detach() if ctx.on_top else change.detach()
        grad_change, grad_x = ctx.layer.product_gradients(
            grads[0], total, x, of_weight=any(of_factors), of_input=of_input
        )
        found: dict[int, Tensor] = {}
        if grad_change is not None:
            trained = [number for number, needed in enumerate(of_factors) if needed]
            wanted = [leaves[number] for number in trained]
            gradients = torch.autograd.grad(change, wanted, grad_change.reshape(change.shape))
            found = dict(zip(trained, gradients, strict=True))
        return None, None, None, None, grad_x, *map(found.get, range(len(leaves)))


_product: Callable[..., Tensor] = _Product.apply
