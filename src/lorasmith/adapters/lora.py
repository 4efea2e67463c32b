"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), for Linear layers and convolutions.

    ΔW = (alpha / rank) · up · down

`down` (rank, in) projects to the inner dimension and `up` (out, rank) back. For a convolution `down` carries the kernel
(rank, in, kh, kw) and `up` is 1×1 (out, rank, 1, 1), as in LoCon; with a Tucker core `mid` (rank, rank, kh, kw) between
them `down` is 1×1 too (Yeh et al. 2023, arXiv:2309.14859). Variants (`variants`) share `LowRank`.

In activation space neither ΔW nor W + ΔW is built: one autograd function (`linear_with_lora`) computes Linear layers
that share an input (q, k and v, say),

    y[samples of a run] = x Wᵀ + b + factor · (mask ∘ x downᵀ) upᵀ     with down, up, factor and mask of that run

The down matrices of a run are one product, their gradients another. The product with W is one for the samples of all
runs; the low-rank products are added to its rows in place. The backward pass needs the input and the rank-sized
projections alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, fill_uniform, misfit, scaled, squared_product, taken
from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct, unviewed
from lorasmith.core.adapter_state import COMFYUI, DIFFUSERS, SD_SCRIPTS, AdapterFormat, AdapterWeights, PeftKind, Shapes
from lorasmith.core.errors import OptionError
from lorasmith.core.quantized_products import Narrow
from lorasmith.core.random import keyed_generator
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.core.recomputation import current_call


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
    mask: Tensor | None = None  # factors of the inner dimension of each sample, (batch, rank); None for 1
    ranks: RankSchedule | None = None  # that make the mask of each evaluation; None where it is set otherwise

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

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
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
        # With a product by 1, a compiler of recomputed blocks takes `up` for something to recompute (torch 2.15).
        return layer.pointwise(self._masked(inner, layer), scaled(factor, up), groups=groups)

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
        # Some transformers have tokens before samples (ERNIE-Image).
        axis = int(len(shape) == 3 and not layer.is_conv and shape[0] != len(self.mask))
        if len(self.mask) != shape[axis]:
            raise OptionError(
                f"ranks of single samples need layers whose input begins with the batch ({len(self.mask)}), got one of "
                f"shape {tuple(shape)}; exclude such layers, or leave out rank_dropout, module_dropout and tlora"
            )
        channels = shape[1] if layer.is_conv else shape[-1]
        mask = self.mask.repeat(1, channels // self.rank)
        point = (1,) * (len(shape) - 2 - axis)
        if layer.is_conv:
            return mask.reshape(len(mask), channels, *point)
        return mask.reshape(*(1,) * axis, len(mask), *point, channels)


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
    squared_norm=lambda tensors: float(squared_product(tensors["up"], tensors["down"])),
    vital=("down", "up"),
    rows=lambda weights: {"up": 1},
    stacks=True,
    programs=frozenset({COMFYUI, DIFFUSERS, SD_SCRIPTS}),
    peft=PeftKind(name="LORA", alpha="lora_alpha", magnitudes=True, fields=_peft_fields),
)


class LowRankTerm(NamedTuple):
    """The low-rank change of one layer."""

    layer: int  # index among the layers
    factor: float
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    mask: Tensor | None  # broadcasts to (samples, ..., rank); None for 1


class RunTerms(NamedTuple):
    """The changes for the samples of one run."""

    terms: Sequence[LowRankTerm]
    samples: slice | None = None  # along the first dimension of the input; None for all


def linear_with_lora(
    x: Tensor, layers: Sequence[FrozenLayer], biases: Sequence[Tensor | None], runs: Sequence[RunTerms]
) -> tuple[Tensor, ...]:
    """The outputs (..., out) of Linear layers for one input x (samples, ..., in), with W and b frozen."""
    places = [(run.samples, [(term.layer, term.factor) for term in run.terms]) for run in runs]
    tensors = [tensor for run in runs for term in run.terms for tensor in (term.down, term.up, term.mask)]
    results: tuple[Tensor, ...] = _LinearWithLora.apply(x, layers, biases, places, *tensors)
    return results


_Places = Sequence[tuple[slice | None, Sequence[tuple[int, float]]]]
"""Samples of each run, None for all; layer and factor of its terms."""


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
        call = current_call()
        kept = () if call is None else call.kept
        is_needed = call is None or not call.is_unused
        shared: dict[object, Any] = {}
        # On a GPU narrow products are bound by bandwidth: the first one writes a result that the frozen one adds to, or
        # is added inside of the frozen one.
        narrow_first = _first_terms(places, layers) if is_needed and _adds_to_narrow(x) else {}
        results = [
            unviewed(layer.times(x, bias, shared))
            if is_needed and index not in narrow_first
            else x.new_empty((*x.shape[:-1], 0 if layer.adds_narrow and is_needed else layer.out_features))
            for index, (layer, bias) in enumerate(zip(layers, biases, strict=True))
        ]
        inners, joined_downs = [], []
        ups: Sequence[Any] = tensors[1::3]
        masks = tensors[2::3]
        first = 0
        for run, (samples, terms) in enumerate(places):
            last = first + len(terms)
            down = _joined(tensors[3 * first : 3 * last : 3], 0)
            inner = kept[run] if kept else F.linear(_at(x, samples), down)
            for term, ((layer, factor), part, up, mask) in enumerate(
                zip(terms, _parts(inner, ups[first:last]), ups[first:last], masks[first:last], strict=True), first
            ):
                if mask is not None and not kept:
                    part.mul_(mask)
                if not is_needed:
                    continue
                if narrow_first.get(layer) == term and layers[layer].adds_narrow:
                    narrow = Narrow(_rows(part), up.t(), factor)
                    results[layer] = unviewed(layers[layer].times(x, biases[layer], shared, narrow))
                    continue
                rows = _rows(_at(results[layer], samples))
                if narrow_first.get(layer) == term:
                    _narrow_product(rows, _rows(part), up, biases[layer], factor)
                    layers[layer].add_times(rows, _rows(x))
                else:
                    rows.addmm_(_rows(part), up.t(), alpha=factor)
            inners.append(inner)
            joined_downs.append(down)
            first = last
        if call is not None:
            call.ends(inners, ctx)
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
        # As in the forward pass, the narrow product is written first where frozen ones add to it.
        narrow_first = ctx.needs_input_grad[0] and _adds_all_to_narrow(ctx.layers, ctx.places, x)
        grad_x = None if narrow_first or not ctx.needs_input_grad[0] else _through_frozen(ctx.layers, grads, x)
        found: list[Tensor | None] = []
        first = 0
        for (samples, terms), inner, down in zip(ctx.places, inners, downs, strict=True):
            last = first + len(terms)
            needed = ctx.needs_input_grad[4 + 3 * first : 4 + 3 * last]  # an adapter below the trained one is frozen
            grad_parts: list[Tensor] = []
            grad_ups: list[Tensor | None] = []
            parts = _parts(inner, ups[first:last])
            # A compiler joins them itself.
            joined = None if len(terms) == 1 or torch.compiler.is_compiling() else torch.empty_like(_rows(inner))
            places = [None] * len(terms) if joined is None else _parts(joined, ups[first:last])
            for index, ((layer, factor), part, place) in enumerate(zip(terms, parts, places, strict=True)):
                up, mask, grad = ups[first + index], masks[first + index], grads[layer]
                if grad is None:
                    grad_parts.append(inner.new_zeros(_rows(part).shape) if place is None else place.zero_())
                    grad_ups.append(None)
                    continue
                rows = _rows(_at(grad, samples))
                grad_part = _scaled(torch.mm(rows, up, out=place), factor)
                if mask is not None:
                    grad_part.view(part.shape).mul_(mask)
                grad_parts.append(grad_part)
                grad_ups.append(_scaled(_outer(rows, _rows(part)), factor) if needed[3 * index + 1] else None)
            joined = _joined(grad_parts, 1) if joined is None else joined
            if narrow_first:
                grad_x = _through_frozen(ctx.layers, grads, x, Narrow(joined, down))
            elif grad_x is not None:
                _rows(_at(grad_x, samples)).addmm_(joined, down)
            grad_downs: Sequence[Tensor | None] = [None] * len(terms)
            if any(needed[::3]):
                grad_downs = _parts(joined.t() @ _rows(_at(x, samples)), ups[first:last], 0)
            for grad_down, grad_up in zip(grad_downs, grad_ups, strict=True):
                found += (grad_down, grad_up, None)
            first = last
        return grad_x, None, None, None, *found


def _through_frozen(
    layers: Sequence[FrozenLayer], grads: Sequence[Tensor | None], x: Tensor, narrow: Narrow | None = None
) -> Tensor | None:
    """The gradient to x through the frozen weights and a narrow product, summed in place; None if no result is used."""
    total = None if narrow is None or layers[0].adds_narrow else narrow.part @ narrow.second
    for layer, grad in zip(layers, grads, strict=True):
        if grad is not None:
            rows = _rows(grad)
            if total is not None:
                total = layer.add_grad_times(total, rows)
            else:
                total = layer.grad_times(rows, narrow) if layer.adds_narrow else layer.grad_times(rows)
    return None if total is None else total.view(x.shape)


def _adds_to_narrow(x: Tensor) -> bool:
    """Whether frozen products add to the first narrow one, which sums both in fp32."""
    return x.device.type == "cuda" and not torch.compiler.is_compiling()


def _adds_all_to_narrow(layers: Sequence[FrozenLayer], places: _Places, x: Tensor) -> bool:
    """Whether the frozen gradient of all layers adds to the narrow one of all samples."""
    is_one = len(places) == 1 and places[0][0] is None and _adds_to_narrow(x)
    return is_one and (all(one.adds_products for one in layers) or all(one.adds_narrow for one in layers))


def _first_terms(places: _Places, layers: Sequence[FrozenLayer]) -> dict[int, int]:
    """The index of the first term of each layer, of layers where that is for all samples and products can be added."""
    found: dict[int, int | None] = {}
    index = 0
    for samples, terms in places:
        for layer, _ in terms:
            adds = layers[layer].adds_products or layers[layer].adds_narrow
            found.setdefault(layer, index if samples is None and adds else None)
            index += 1
    return {layer: term for layer, term in found.items() if term is not None}


def _narrow_product(y: Tensor, part: Tensor, up: Tensor, bias: Tensor | None, factor: float) -> None:
    """`y = factor · part upᵀ + bias`."""
    if bias is None:
        y.addmm_(part, up.t(), beta=0, alpha=factor)
    else:
        torch.addmm(bias, part, up.t(), alpha=factor, out=y)


def _joined(tensors: Sequence[Any], dim: int) -> Any:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def _parts(joined: Tensor, ups: Sequence[Tensor], dim: int = -1) -> Sequence[Tensor]:
    """What is each layer's along a dimension of all ranks, such as its inner activations (..., rank); views."""
    return (joined,) if len(ups) == 1 else torch.split(joined, [up.shape[1] for up in ups], dim=dim)


def _at(tensor: Tensor, samples: slice | None) -> Tensor:
    return tensor if samples is None else tensor[samples]


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as a matrix; a view of contiguous tensors and of slices of their features."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _outer(rows: Tensor, part: Tensor) -> Tensor:
    """rowsᵀ part, (out, rank), of rows (n, out) and part (n, rank)."""
    # On a CPU it is a quarter faster to transpose the narrow matrix; autograd keeps a contiguous one without a copy.
    return (part.t() @ rows).t() if rows.device.type == "cpu" else rows.t() @ part


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """`factor · tensor`, in place; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor.mul_(factor)
