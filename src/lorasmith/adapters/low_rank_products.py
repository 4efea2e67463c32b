"""Products of frozen Linear layers that share an input with low-rank changes, in one autograd function.

    y[samples of a run] = x Wᵀ + b + factor · (mask ∘ x downᵀ) upᵀ     with down, up, factor and mask of that run

A run has changes on some of the layers (q, k and v, say): its down matrices are one product, their gradients another.
The product with W is one for the samples of all runs; the low-rank products are added to its rows in place. The
backward pass needs the input and the rank-sized projections alone. Neither ΔW nor W + ΔW is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.frozen_layer import FrozenLayer


class LowRankTerm(NamedTuple):
    """The low-rank change of one layer."""

    layer: int  # index among the layers
    factor: float
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    mask: Tensor | None  # broadcasts to (samples, ..., rank); None for 1


class RunTerms(NamedTuple):
    """The changes for the samples of one run, along the first dimension of the input; all samples for None."""

    terms: Sequence[LowRankTerm]
    start: int | None = None
    end: int | None = None


def linear_with_lora(
    x: Tensor, layers: Sequence[FrozenLayer], biases: Sequence[Tensor | None], runs: Sequence[RunTerms]
) -> tuple[Tensor, ...]:
    """The outputs (..., out) of Linear layers for one input x (samples, ..., in), with W and b frozen."""
    places = [(slice(run.start, run.end), [(term.layer, term.factor) for term in run.terms]) for run in runs]
    tensors = [tensor for run in runs for term in run.terms for tensor in (term.down, term.up, term.mask)]
    results: tuple[Tensor, ...] = _LinearWithLora.apply(x, layers, biases, places, *tensors)  # type: ignore[no-untyped-call]
    return results


_Places = Sequence[tuple[slice, Sequence[tuple[int, float]]]]
"""Samples of each run, layer and factor of its terms."""


class _LinearWithLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[FrozenLayer],
        biases: Sequence[Tensor | None],
        places: _Places,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = [layer.times(x, bias) for layer, bias in zip(layers, biases, strict=True)]
        inners, joined_downs = [], []
        ups: Sequence[Any] = tensors[1::3]
        masks = tensors[2::3]
        first = 0
        for samples, terms in places:
            last = first + len(terms)
            down = _joined(tensors[3 * first : 3 * last : 3], 0)
            inner = F.linear(x[samples], down)
            for (layer, factor), part, up, mask in zip(
                terms, _parts(inner, ups[first:last]), ups[first:last], masks[first:last], strict=True
            ):
                if mask is not None:
                    part.mul_(mask)
                _rows(results[layer][samples]).addmm_(_rows(part), up.t(), alpha=factor)
            inners.append(inner)
            joined_downs.append(down)
            first = last
        ctx.save_for_backward(x, *inners, *joined_downs, *ups, *masks)
        ctx.layers, ctx.places = layers, places
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        runs, count = len(ctx.places), sum(len(terms) for _, terms in ctx.places)
        x, *saved = ctx.saved_tensors
        inners, downs = saved[:runs], saved[runs : 2 * runs]
        ups, masks = saved[2 * runs : 2 * runs + count], saved[2 * runs + count :]
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        grad_x = _through_frozen(ctx.layers, grads, x) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        first = 0
        for (samples, terms), inner, down in zip(ctx.places, inners, downs, strict=True):
            last = first + len(terms)
            needed = ctx.needs_input_grad[4 + 3 * first : 4 + 3 * last]  # an adapter below the trained one is frozen
            grad_parts: list[Tensor] = []
            grad_ups: list[Tensor | None] = []
            parts = _parts(inner, ups[first:last])
            for index, ((layer, factor), part) in enumerate(zip(terms, parts, strict=True)):
                up, mask, grad = ups[first + index], masks[first + index], grads[layer]
                if grad is None:
                    grad_parts.append(inner.new_zeros(_rows(part).shape))
                    grad_ups.append(None)
                    continue
                rows = _rows(grad[samples])
                grad_part = _scaled(rows @ up, factor)
                if mask is not None:
                    grad_part.view(part.shape).mul_(mask)
                grad_parts.append(grad_part)
                # In this order the narrow matrix is transposed, which is a quarter faster on a CPU.
                grad_ups.append(_scaled(_rows(part).t() @ rows, factor).t() if needed[3 * index + 1] else None)
            joined = _joined(grad_parts, 1)
            if grad_x is not None:
                _rows(grad_x[samples]).addmm_(joined, down)
            grad_downs: Sequence[Tensor | None] = [None] * len(terms)
            if any(needed[::3]):
                grad_downs = torch.split(joined.t() @ _rows(x[samples]), [part.shape[-1] for part in parts])
            for grad_down, grad_up in zip(grad_downs, grad_ups, strict=True):
                found += (grad_down, grad_up, None)
            first = last
        return grad_x, None, None, None, *found


def _through_frozen(layers: Sequence[FrozenLayer], grads: Sequence[Tensor | None], x: Tensor) -> Tensor | None:
    """The gradient to x through the frozen weights, summed in place; None if no result is used."""
    total: Tensor | None = None
    for layer, grad in zip(layers, grads, strict=True):
        if grad is not None:
            rows = _rows(grad)
            total = layer.grad_times(rows) if total is None else layer.add_grad_times(total, rows)
    return None if total is None else total.view(x.shape)


def _joined(tensors: Sequence[Any], dim: int) -> Any:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def _parts(inner: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inner activations (..., rank) of each layer; views."""
    return torch.split(inner, [up.shape[1] for up in ups], dim=-1)


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as a matrix; a view of contiguous tensors and of slices of their features."""
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """`factor · tensor`, in place; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor.mul_(factor)
