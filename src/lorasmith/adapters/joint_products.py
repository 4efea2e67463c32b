"""Products of frozen Linear layers with the low-rank changes of several runs, in one autograd function.

    y[samples of run r] = x Wᵀ + b + factor · (mask ∘ x downᵀ) upᵀ     with down, up, factor and mask of run r

The product with W is one for the samples of all runs, the low-rank products are added to their rows in place. As in
`low_rank_products`, the backward pass needs the input and the rank-sized projections alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.frozen_layer import FrozenLayer


class LowRankTerm(NamedTuple):
    """The low-rank change of one run on one layer."""

    layer: int  # index among the layers
    start: int  # the run's samples, along the first dimension of the input
    end: int
    factor: float
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    mask: Tensor | None  # broadcasts to (samples, ..., rank); None for 1


def joint_linear(x: Tensor, layers: Sequence[FrozenLayer], terms: Sequence[LowRankTerm]) -> tuple[Tensor, ...]:
    """The outputs of Linear layers with one input. x: (samples, ..., in)."""
    places = [(one.layer, one.start, one.end, one.factor) for one in terms]
    tensors = [tensor for one in terms for tensor in (one.down, one.up, one.mask)]
    results: tuple[Tensor, ...] = _JointLinear.apply(x, layers, places, *tensors)  # type: ignore[no-untyped-call]
    return results


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[FrozenLayer],
        places: Sequence[tuple[int, int, int, float]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = [layer.times(x, layer.bias) for layer in layers]
        inners = []
        for (layer, start, end, factor), (down, up, mask) in zip(places, _threes(tensors), strict=True):
            inner = F.linear(x[start:end], down)
            if mask is not None:
                inner.mul_(mask)
            _rows(results[layer][start:end]).addmm_(_rows(inner), up.t(), alpha=factor)
            inners.append(inner)
        ctx.save_for_backward(x, *inners, *tensors)
        ctx.layers, ctx.places = layers, places
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inners, tensors = saved[: len(ctx.places)], saved[len(ctx.places) :]
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for layer, grad in zip(ctx.layers, grads, strict=True):
                if grad is not None:
                    rows = _rows(grad)
                    grad_x = layer.grad_times(rows) if grad_x is None else layer.add_grad_times(grad_x, rows)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        found: list[Tensor | None] = []
        for (layer, start, end, factor), inner, (down, up, mask) in zip(
            ctx.places, inners, _threes(tensors), strict=True
        ):
            grad = grads[layer]
            if grad is None:
                found += (None, None, None)
                continue
            rows = _rows(grad[start:end])
            grad_inner = (rows @ up).mul_(factor)
            if mask is not None:
                grad_inner.view(inner.shape).mul_(mask)
            if grad_x is not None:
                _rows(grad_x[start:end]).addmm_(grad_inner, down)
            # In this order the narrow matrix is transposed, which is faster on a CPU.
            grad_up = (_rows(inner).t() @ rows).mul_(factor).t()
            found += (grad_inner.t() @ _rows(x[start:end]), grad_up, None)
        return grad_x, None, None, *found


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as a matrix; a view of contiguous tensors."""
    return tensor.reshape(-1, tensor.shape[-1])


def _threes(tensors: Sequence[Any]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))
