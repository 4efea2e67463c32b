"""LoHa: a Hadamard product of two low-rank products (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; for diffusion
models Yeh et al. 2023, arXiv:2309.14859).

    ΔW = (alpha / rank) · (w1_a · w1_b) ∘ (w2_a · w2_b)

`hada_w*_a` is (out, rank) and `hada_w*_b` (rank, in), flattened to (rank, in·kh·kw) for a convolution. With Tucker
cores `hada_t*` (rank, rank, kh, kw) the factors are (rank, out) and (rank, in), and each product is
Σ_ij t[i, j, ...] a[i, out] b[j, in]. ΔW has up to rank² as its rank, from 2 · rank · (in + out) parameters.

An entry-by-entry product has no form in activation space: ΔW is built for each product (`changed_product`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, misfit, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer, change_alone, changed_product
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights, PeftKind, Shapes, Tensors
from lorasmith.core.random import keyed_generator

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@ADAPTERS.register("LoHa")
class LohaAdapter(Adapter):
    """Adapter from two low-rank products."""

    algorithm = "loha"

    def __init__(self, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        super().__init__()
        for name in (*_FACTORS, *_CORES):
            if name in tensors:
                self.register_parameter(name, nn.Parameter(tensors[name]))
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """Inner dimension of both products."""
        return self.get_parameter("hada_w1_b").shape[0]

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> LohaAdapter:
        """Normal factors as LyCORIS', of which one is zero: w2_a as there, or w1_b as in ComfyUI.

        ComfyUI's own initialization has means where standard deviations were meant. With either factor at zero the
        first product has standard deviation 0.1 · √rank in the other, so that both learn at the same speed.
        """
        up, down = (layer.out_features, rank), (rank, layer.in_features)
        generator = keyed_generator(seed, "init", path)

        def normal(shape: tuple[int, int], std: float) -> Tensor:
            return torch.empty(shape).normal_(0, std, generator=generator)

        if zero == "up":
            values = normal(up, 0.1), normal(down, 1), torch.zeros(up), normal(down, 1)
        else:
            values = normal(up, 1), torch.zeros(down), normal(up, 0.1), normal(down, 1)
        return cls(dict(zip(_FACTORS, values, strict=True)), alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> LohaAdapter:
        cored = bool(weights.tensors.keys() & set(_CORES))
        tensors = taken(weights, (*_FACTORS, *_CORES) if cored else _FACTORS)
        out, inside, kernel = layer.out_features, layer.shape[1], layer.shape[2:]
        rank = len(tensors["hada_w1_b"])
        up, down = ((rank, out), (rank, inside)) if cored else ((out, rank), (rank, layer.in_features))
        expected = dict(zip((*_FACTORS, *_CORES), (up, down, up, down, *[(rank, rank, *kernel)] * 2), strict=True))
        if any(tuple(tensor.shape) != expected[name] for name, tensor in tensors.items()):
            raise misfit(weights, layer)
        return cls(tensors, alpha=float(rank) if weights.alpha is None else weights.alpha)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        change = self._build(weight.shape, strength)(*map(wide, self.parameters()))
        return (wide(weight) + change.to(weight.device)).to(weight.dtype)

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor:
        return change_alone(layer, x, self._build(layer.shape, strength), *self.parameters())

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        return changed_product(inner, layer, x, self._build(layer.shape, strength), *self.parameters())

    def _build(self, shape: torch.Size, strength: float) -> Callable[..., Tensor]:
        return partial(_hadamard, strength * self.alpha / self.rank, shape)


def _hadamard(
    scale: float,
    shape: torch.Size,
    first_a: Tensor,
    first_b: Tensor,
    second_a: Tensor,
    second_b: Tensor,
    *cores: Tensor,
) -> Tensor:
    """ΔW in the shape of the weight, from parameters in the order of their registration."""
    if cores:
        first, second = (
            torch.einsum("ij...,ip,jr->pr...", core, a, b)
            for core, a, b in zip(cores, (first_a * scale, second_a), (first_b, second_b), strict=True)
        )
        return first * second
    return ((first_a * scale) @ first_b * (second_a @ second_b)).reshape(shape)


def _weight_shape(shapes: Shapes) -> tuple[int, ...]:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    return (a[1], b[1], *shapes["hada_t1"][2:]) if "hada_t1" in shapes else (a[0], b[1])


def _squared_norm(tensors: Tensors) -> float:
    """Of the change, of which a few rows are made at a time."""
    first_a, first_b, second_a, second_b = (tensors[name].float() for name in _FACTORS)
    if "hada_t1" in tensors:
        shape, cores = torch.Size(), (tensors[name].float() for name in _CORES)
        return float(_hadamard(1.0, shape, first_a, first_b, second_a, second_b, *cores).square().sum())
    total = 0.0
    for start in range(0, len(first_a), _ROWS):
        rows = slice(start, start + _ROWS)
        total += float(((first_a[rows] @ first_b) * (second_a[rows] @ second_b)).square().sum())
    return total


_ROWS = 512

LohaAdapter.format = AdapterFormat(
    suffixes={name: f".{name}" for name in (*_FACTORS, *_CORES)},
    needed=(frozenset(_FACTORS),),
    rules=(
        dict(zip(_FACTORS, ("out rank", "rank in") * 2, strict=True)),
        dict(zip((*_FACTORS, *_CORES), (*("rank out", "rank in") * 2, *("rank rank kernel...",) * 2), strict=True)),
    ),
    weight_shape=_weight_shape,
    rank_axes={"hada_w1_b": 0},
    input_axes={"hada_w1_b": 1},
    cores=frozenset(_CORES),
    is_additive=True,
    squared_norm=_squared_norm,
    vital=_FACTORS,
    rows=lambda weights: None if "hada_t1" in weights.tensors else {"hada_w1_a": 1, "hada_w2_a": 1},
    stacks=True,
    peft=PeftKind(
        name="LOHA",
        fields=lambda adapters, kernels: {
            "use_effective_conv2d": any("hada_t1" in weights.tensors for weights in adapters.values())
        },
    ),
)
