"""LoKr: a Kronecker product (KronA, Edalati et al. 2022, arXiv:2212.10650; for diffusion models Yeh et al. 2023,
arXiv:2309.14859).

    ΔW = scale · (w1 ⊗ w2),   w1 (out_l, in_m),   w2 (out_k, in_n[, kh, kw]),   out = out_l · out_k,   in = in_m · in_n

Either factor is whole (`lokr_w1`, `lokr_w2`) or a product (`lokr_w1_a` · `lokr_w1_b`, likewise w2, that of a
convolution with an optional Tucker core `lokr_t2`). With both whole the scale is 1 and alpha has no effect; else it is
alpha / rank, the rank being that of w2 if that is a product. A fresh adapter has both whole, as in ComfyUI's trainer:
`rank` is the factor, and out_l and in_m are the largest divisors not above it or the root of their dimension.
Parameters: out_l · in_m + out_k · in_n · kh · kw.

In activation space, with x seen as a matrix (in_m, in_n) and y as (out_l, out_k), it is two small products,

    y += scale · w1 x w2ᵀ

the first of which the backward pass repeats, so that only x is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, fill_uniform, misfit, scaled, squared_product, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct, change_alone, unviewed
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights, PeftKind, Shapes, Tensors
from lorasmith.core.random import keyed_generator

_WHOLE, _PARTS = ("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")


@ADAPTERS.register("LoKr")
class LokrAdapter(Adapter):
    """Kronecker product."""

    algorithm = "lokr"

    def __init__(self, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.alpha = alpha

    @property
    def scale(self) -> float:
        """Factor of the product at strength 1."""
        rank = _rank(self._tensors())
        return self.alpha / rank if rank else 1.0

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> LokrAdapter:
        """w2 starts at zero for `up`, as in LyCORIS, and w1 for `down`, as in ComfyUI and PEFT."""
        (out_l, out_k), (in_m, in_n) = (factorization(size, rank) for size in layer.shape[:2])
        tensors = {"lokr_w1": torch.zeros(out_l, in_m), "lokr_w2": torch.zeros(out_k, in_n, *layer.shape[2:])}
        filled = tensors["lokr_w1" if zero == "up" else "lokr_w2"]
        fill_uniform(filled, keyed_generator(seed, "init", path))
        return cls(tensors, alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> LokrAdapter:
        needed = [
            name
            for whole in _WHOLE
            for name in ([whole] if whole in weights.tensors else [part for part in _PARTS if part.startswith(whole)])
        ]
        tensors = taken(weights, needed, () if "lokr_w2" in needed else ("lokr_t2",))
        try:
            w1, w2 = _factors(tensors, layer.shape)
            fits = w1.ndim == 2 and w2.shape[2:] == layer.shape[2:]
            fits = fits and (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]) == layer.shape[:2]
        except RuntimeError:  # parts that do not even fit each other
            fits = False
        if not fits:
            raise misfit(weights, layer)
        return cls(tensors, alpha=float(_rank(tensors) or 1) if weights.alpha is None else weights.alpha)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        w1, w2 = (wide(factor).to(weight.device) for factor in _factors(self._tensors(), weight.shape))
        return torch.add(wide(weight), _kronecker(weight.shape, w1, w2), alpha=strength * self.scale).to(weight.dtype)

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        return self._product(layer, False, None, x, strength)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        if isinstance(inner, FrozenProduct) and layer.groups == 1:
            return self._product(layer, True, inner.bias, x, strength)
        return super().attached(inner, layer, x, strength)

    def _product(self, layer: FrozenLayer, on_top: bool, bias: Tensor | None, x: Tensor, strength: float) -> Tensor:
        """`(W + strength · ΔW) x + b`, or ΔW's part alone if it is not `on_top` of the layer."""
        w1, w2 = _factors(self._tensors(), layer.shape)
        factor = strength * self.scale
        if layer.groups > 1:  # w1 would mix channels of different groups
            return change_alone(layer, x, partial(_kronecker, layer.shape), w1 * factor, w2)
        if not layer.is_conv:
            return _kronecker_product(layer, on_top, bias, x, w1, w2, factor)
        w2 = w2.flatten(1) if _is_pointwise(layer) else w2
        return _kronecker_product(layer, on_top, bias, x.movedim(1, -1), w1, w2, factor).movedim(-1, 1)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class _KroneckerProduct(torch.autograd.Function):
    """`(W + factor · w1 ⊗ w2) x + b`, without W and b if not `on_top`, for x and the result (batch, ..., channels).

    w1 mixes the in_m parts of the channels, moved to the front for that, into out_l; the layer's product with w2
    then treats those as a larger batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: FrozenLayer,
        on_top: bool,
        bias: Tensor | None,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(x, w1, w2)
        ctx.layer, ctx.on_top, ctx.factor = layer, on_top, factor
        mixed = _mixed(scaled(factor, w1), _parts_first(x, w1.shape[1]))
        if on_top:
            with layer.weight_acquired() as whole:
                weight = whole.flatten(1) if w2.ndim == 2 else whole
                y = _last(layer.product_with(weight, _second(x, weight), bias), weight).contiguous()
            if w2.ndim == 2:
                y.view(-1, len(w1), len(w2)).transpose(0, 1).baddbmm_(mixed, w2.t().expand(len(w1), -1, -1))
                return unviewed(y)
        change = _last(layer.product_with(w2, _second(mixed.view(-1, *x.shape[1:-1], w2.shape[1]), w2)), w2)
        parts = change.reshape(len(w1), -1, len(w2)).transpose(0, 1)
        if not on_top:
            return parts.reshape(len(x), *change.shape[1:-1], -1)
        y.view(parts.shape).add_(parts)
        return unviewed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2 = ctx.saved_tensors
        of_x, of_w1, of_w2 = ctx.needs_input_grad[3:6]
        first, parts = scaled(ctx.factor, w1), _parts_first(x, w1.shape[1])
        grad_w2, grad_mixed = _small_gradients(ctx.layer, grads[0], w2, _mixed(first, parts), x)
        grad_x = grad_w1 = None
        if of_w1:
            grad_w1 = scaled(ctx.factor, grad_mixed.flatten(1) @ parts.flatten(1).t())
        if of_x:
            added = _mixed(first.t(), grad_mixed).transpose(0, 1)
            if not ctx.on_top:
                grad_x = added.reshape(x.shape)
            else:
                with ctx.layer.weight_acquired() as whole:
                    weight = whole.flatten(1) if w2.ndim == 2 else whole
                    _, grad_x = ctx.layer.product_gradients(
                        _second(grads[0], weight), weight, _second(x, weight), of_weight=False, of_input=True
                    )
                    grad_x = _last(grad_x, weight).contiguous()
                grad_x.view(added.shape).add_(added)
        return None, None, None, grad_x, grad_w1, grad_w2 if of_w2 else None, None


_kronecker_product: Callable[..., Tensor] = _KroneckerProduct.apply


def _small_gradients(
    layer: FrozenLayer, grad: Tensor, w2: Tensor, mixed: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients of w2 and of `mixed` (out_l, rows, in_n); `grad` is that of the result (batch, ..., channels)."""
    count = len(mixed)
    if w2.ndim == 2:
        grad_parts = grad.reshape(-1, count, len(w2)).transpose(0, 1)
        return torch.bmm(mixed.mT, grad_parts).sum(0).t(), torch.bmm(grad_parts, w2.expand(count, -1, -1))
    grad_parts = _parts_first(grad, count).view(-1, *grad.shape[1:-1], len(w2))
    rows = mixed.view(-1, *x.shape[1:-1], mixed.shape[-1])
    grad_w2, grad_rows = layer.product_gradients(
        _second(grad_parts, w2), w2, _second(rows, w2), of_weight=True, of_input=True
    )
    assert grad_rows is not None
    return grad_w2, _last(grad_rows, w2).reshape(mixed.shape)


def _parts_first(x: Tensor, count: int) -> Tensor:
    """x (batch, ..., channels) as (count, rows, channels / count), contiguous."""
    return x.reshape(-1, count, x.shape[-1] // count).transpose(0, 1).contiguous()


def _mixed(w1: Tensor, parts: Tensor) -> Tensor:
    """w1 (out_l, in_m) times parts (in_m, rows, n): (out_l, rows, n)."""
    return (w1 @ parts.flatten(1)).view(-1, *parts.shape[1:])


def _second(x: Tensor, weight: Tensor) -> Tensor:
    """Channels moved from the last dimension to the second, where a convolution has them."""
    return x.movedim(-1, 1) if weight.ndim > 2 else x


def _last(x: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_second`."""
    return x.movedim(1, -1) if weight.ndim > 2 else x


def _factors(tensors: Mapping[str, Tensor], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """w1 (out_l, in_m) and w2 (out_k, in_n, *kernel) for a weight of this shape."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        return w1, tensors["lokr_w2"]
    a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:
        return w1, torch.einsum("ij...,ip,jr->pr...", tensors["lokr_t2"], a, b)
    return w1, (a @ b.flatten(1)).reshape(len(a), -1, *shape[2:])


def _rank(tensors: Tensors) -> int | None:
    return rank_in({name: tensor.shape for name, tensor in tensors.items()})


def _kronecker(shape: torch.Size, w1: Tensor, w2: Tensor) -> Tensor:
    """The product in the shape of the weight."""
    return torch.einsum("lm,kn...->lkmn...", w1, w2).reshape(shape)


def _is_pointwise(layer: FrozenLayer) -> bool:
    """Whether a convolution is a Linear layer on channels."""
    module = layer.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (
        layer.groups == 1
        and max(module.kernel_size) == max(module.stride) == 1
        and (module.padding == "valid" or module.padding == "same" or not any(module.padding))
    )


def _weight_shape(shapes: Shapes) -> tuple[int, ...]:
    (out_l, in_m), (out_k, in_n, *kernel) = factor_shapes(shapes)
    return out_l * out_k, in_m * in_n, *kernel


def _without_core(weights: AdapterWeights) -> AdapterWeights:
    if "lokr_t2" not in weights.tensors:
        return weights
    tensors = dict(weights.tensors)
    rank = _rank(tensors)
    scale = 1.0 if weights.alpha is None or not rank else weights.alpha / rank
    core, outer, inner = (tensors.pop(f"lokr_{name}").float() for name in ("t2", "w2_a", "w2_b"))
    tensors["lokr_w2"] = torch.einsum("ij...,ip,jq->pq...", core, outer, inner).contiguous() * scale
    return replace(weights, tensors=tensors, alpha=float(_rank(tensors) or 1))


def _squared_norm(tensors: Tensors) -> float:
    square = 1.0
    for name in _WHOLE:
        if name in tensors:
            square *= float(tensors[name].float().square().sum())
        else:
            square *= float(squared_product(tensors[f"{name}_a"], tensors[f"{name}_b"]))
    return square


def _rows(weights: AdapterWeights) -> dict[str, int] | None:
    tensors = weights.tensors
    if "lokr_t2" in tensors:
        return None
    first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    return {first: tensors["lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"].shape[0]}


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """(a, b) with a · b = dimension and a ≤ b, a as large as possible but not above `factor`.

    This is ComfyUI's rule. LyCORIS' is the same up to the root of the dimension; beyond it a factor that divides the
    dimension gives (dimension / factor, factor) there. Loaders read the shapes from the file.
    """
    a = next(a for a in range(min(factor, math.isqrt(dimension)), 0, -1) if dimension % a == 0)
    return a, dimension // a


def factor_shapes(shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two factors, (out_l, in_m) and (out_k, in_n[, kh, kw]), whether they are whole or products."""
    found: list[tuple[int, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            found.append(tuple(shapes[name]))
        elif name == "lokr_w2" and "lokr_t2" in shapes:
            found.append((shapes[f"{name}_a"][1], shapes[f"{name}_b"][1], *shapes["lokr_t2"][2:]))
        else:
            found.append((shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]))
    return found[0], found[1]


def rank_in(shapes: Shapes) -> int | None:
    """Denominator of the scale alpha / rank; None for two whole factors."""
    return next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)


def peft_fields(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, Any]:
    """Fields of PEFT's configuration for LoKrs."""
    factors = [_KroneckerSizes.of(weights, kernels[path]) for path, weights in adapters.items()]
    return {
        "use_effective_conv2d": any("lokr_t2" in weights.tensors for weights in adapters.values()),
        "decompose_both": any(not sizes.whole_first for sizes in factors),
        "decompose_factor": _best_factor(factors),
    }


def peft_misfits(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, str]:
    """Module path → reason, for LoKrs of other sizes than PEFT's rule gives. Arguments as `peft_fields`."""
    factors = {path: _KroneckerSizes.of(weights, kernels[path]) for path, weights in adapters.items()}
    factor = _best_factor(list(factors.values()))
    both = any(not sizes.whole_first for sizes in factors.values())
    reason = f"PEFT makes LoKr's factors by one rule for all modules (decompose_factor, here {factor}), of other sizes"
    return {path: reason for path, sizes in factors.items() if not sizes.made_by(factor, both)}


@dataclass(frozen=True)
class _KroneckerSizes:
    """A LoKr's sizes: out = out_l · out_k and in = in_m · in_n channels, and which factors are whole."""

    out: tuple[int, int]
    inside: tuple[int, int]
    rank: int
    whole_first: bool
    whole_second: bool

    @classmethod
    def of(cls, weights: AdapterWeights, kernel: int) -> _KroneckerSizes:
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        (out_l, in_m), (out_k, *inner) = factor_shapes(shapes)
        in_n = inner[0] // kernel if len(inner) == 1 else inner[0]  # a flat factor has the kernel in its columns
        rank = rank_in(shapes) or max(out_k, in_n)
        return cls((out_l, out_k), (in_m, in_n), rank, "lokr_w1" in shapes, "lokr_w2" in shapes)

    def made_by(self, factor: int, decompose_both: bool) -> bool:
        """Whether PEFT's rule gives factors of these sizes."""
        whole_first = not (decompose_both and self.rank < max(self.out[0], self.inside[0]) / 2)
        whole_second = self.rank >= max(self.out[1], self.inside[1]) / 2
        return (
            _factorized(math.prod(self.out), factor) == self.out
            and _factorized(math.prod(self.inside), factor) == self.inside
            and (whole_first, whole_second) == (self.whole_first, self.whole_second)
        )


def _best_factor(factors: Sequence[_KroneckerSizes]) -> int:
    """The `decompose_factor` that gives most of the adapters their sizes."""
    both = any(not sizes.whole_first for sizes in factors)
    candidates = sorted({-1, *(sizes.out[0] for sizes in factors), *(sizes.inside[0] for sizes in factors)})
    return max(candidates, key=lambda factor: sum(sizes.made_by(factor, both) for sizes in factors))


def _factorized(size: int, factor: int) -> tuple[int, int]:
    """PEFT's factorization of a size: `factor` and the quotient, or if it does not divide the size, the most equal two
    divisors of which the smaller is at most `factor` (any, for −1)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


_FIRST = ({"lokr_w1": "out_l in_m"}, {"lokr_w1_a": "out_l rank_1", "lokr_w1_b": "rank_1 in_m"})
_SECOND = ({"lokr_w2": "out_k in_n kernel..."}, {"lokr_w2_a": "out_k rank", "lokr_w2_b": "rank in_n"})
_CORED = {"lokr_w2_a": "rank out_k", "lokr_w2_b": "rank in_n", "lokr_t2": "rank rank kernel..."}

LokrAdapter.format = AdapterFormat(
    suffixes={name: f".{name}" for name in (*_WHOLE, *_PARTS, "lokr_t2")},
    needed=tuple(frozenset(first | second) for first in _FIRST for second in _SECOND),
    rules=tuple(first | second for first in _FIRST for second in (*_SECOND, _CORED)),
    weight_shape=_weight_shape,
    rank_axes={"lokr_w2_b": 0, "lokr_w1_b": 0},  # the second factor decides, as in LyCORIS
    cores=frozenset({"lokr_t2"}),
    without_core=_without_core,
    is_additive=True,
    squared_norm=_squared_norm,
    vital=(*_WHOLE, *_PARTS),
    rows=_rows,
    size=lambda shapes: max(factor_shapes(shapes)[0]),
    comfyui_lacks={"lokr_t2": "it fails to merge a LoKr with a Tucker core"},
    peft=PeftKind(
        name="LOKR",
        fields=peft_fields,
        misfits=peft_misfits,
        unscaled=lambda tensors: max(tensors["lokr_w2"].shape[:2]),  # leaves both factors whole
        scaled="lokr_w1",
    ),
)
