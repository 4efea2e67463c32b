"""Variants of an algorithm: other initializations and scales of a fresh adapter, and dropout.

DoRA        arXiv:2402.09353   a magnitude beside the direction (`dora`)
rsLoRA      arXiv:2312.03732   scale alpha / √rank instead of alpha / rank; saved as alpha · √rank, so that every
                               program computes the same
PiSSA       arXiv:2404.02948   start from the principal components
Tucker      arXiv:2309.14859   a core between the factors of a convolution (`lora`)
dropout     kohya's scripts    of inner dimensions, and of whole modules
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.algorithms import words_of
from lorasmith.adapters.dora import DoraAdapter, InputDora, OutputDora
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import Factors, LoraAdapter, LowRank
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.random import keyed_generator, keyed_normal

_DORA: dict[str, type[DoraAdapter]] = {"input": InputDora, "output": OutputDora}
_RSLORA_ALPHA = 4.0  # a scale of 1 at rank 16, so that the learning rate keeps its meaning there


@dataclass(frozen=True)
class Variant:
    """Variants, all off by default. `catalogue` lists those that each algorithm supports."""

    dora: str = "none"  # `none`, `input` or `output`
    rslora: bool = False
    pissa: bool = False
    tucker: bool = False

    def default_alpha(self, algorithm: str, rank: int) -> float:
        """Default of alpha: a scale of 1, no constraint."""
        default = words_of(algorithm).default_alpha
        if default is not None:
            return default
        return _RSLORA_ALPHA if self.rslora else float(rank)

    def stored_alpha(self, algorithm: str, alpha: float | None, rank: int, asked: int) -> float:
        """The alpha that gives a layer its scale in every program."""
        alpha = self.default_alpha(algorithm, asked) if alpha is None else alpha
        if words_of(algorithm).default_alpha is not None:
            return alpha
        return alpha * math.sqrt(rank) if self.rslora else alpha * rank / asked


def fresh_adapter(
    layer: FrozenLayer, algorithm: str, variant: Variant, *, rank: int, alpha: float, seed: int, path: str, zero: str
) -> Adapter:
    """A new adapter for a layer, exactly the identity."""
    create = ADAPTERS[algorithm].create
    if variant.pissa:
        create = PissaAdapter.create
    elif variant.tucker:
        create = LoraAdapter.create_tucker
    adapter = create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
    return adapter if variant.dora == "none" else _DORA[variant.dora].around(adapter, layer)


_OVERSAMPLING = 8
_ITERATIONS = 16  # as PEFT's pissa_niter_16; spectra of trained weights are flat, which fewer would show


class PissaAdapter(LowRank):
    """A LoRA's difference from its start.

    start_down: (rank, in) or (rank, in, *kernel); start_up: (out, rank) or (out, rank, 1, ...).
    """

    algorithm = "lora"

    def __init__(self, start_down: Tensor, start_up: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros_like(start_down))
        self.up = nn.Parameter(torch.zeros_like(start_up))
        self.alpha = alpha
        # Plain tensors, which keep fp32: the dtype of the differences would round the start.
        self._start = (start_down, start_up)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> Factors:
        if self._start[0].device != self.down.device:
            down, up = self._start
            self._start = (down.to(self.down.device), up.to(self.up.device))
        down, up = (tensor.to(self.down.dtype) for tensor in self._start)
        return Factors(torch.cat((self.down, down + self.down)), torch.cat((up, self.up), dim=1))

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> PissaAdapter:
        weight = layer.weight.detach().to("cpu", torch.float32)
        left, values, right = _principal(weight.flatten(1), rank, seed=seed, path=path)
        root = (values * (rank / alpha if alpha else 0.0)).sqrt()
        point = (1,) * len(weight.shape[2:])
        down = (root[:, None] * right).reshape(rank, *weight.shape[1:])
        return cls(down, (left * root).reshape(len(left), rank, *point), alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Adapter:
        """A plain LoRA of twice the rank, as which files hold a PiSSA."""
        return LoraAdapter.from_weights(weights, layer)

    def to_weights(self) -> AdapterWeights:
        with torch.no_grad():
            down, up, _ = self.factors()
        tensors = {"down": down.to("cpu", torch.float32), "up": up.to("cpu", torch.float32)}
        return AdapterWeights(self.algorithm, tensors, self.alpha * 2)


def _principal(weight: Tensor, rank: int, *, seed: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (rank,) of a matrix (out, in), with left (out, rank) and right (rank, in) vectors."""
    width = min(rank + _OVERSAMPLING, *weight.shape)
    basis = torch.linalg.qr(weight @ keyed_normal((weight.shape[1], width), seed, "init", path)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


class Dropout:
    """Makes the masks of a set of adapters and sets them."""

    def __init__(self, adapters: Mapping[str, Adapter], *, rank: float, module: float, seed: int) -> None:
        self.adapters = {
            path: part
            for path, adapter in (adapters.items() if rank or module else ())
            for part in adapter.modules()  # a DoRA has it inside; its magnitude is never dropped
            if isinstance(part, LowRank)
        }
        self._rank = rank
        self._module = module
        self._seed = seed

    def masks(self, draws: Sequence[int]) -> Tensor | None:
        """Factors of all inner dimensions, layer after layer, for each draw: (draws, sum of ranks); None for none."""
        if not self.adapters:
            return None
        return torch.stack([torch.cat([self._mask(path, draw) for path in self.adapters]) for draw in draws])

    @contextlib.contextmanager
    def masks_applied(self, masks: Tensor | None) -> Iterator[None]:
        """Run with masks that `masks` made, on the device and in the dtype of the adapters."""
        if masks is None:
            yield
            return
        parts = torch.split(masks, [adapter.rank for adapter in self.adapters.values()], dim=1)
        try:
            for adapter, part in zip(self.adapters.values(), parts, strict=True):
                adapter.mask = part
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.mask = None

    def _mask(self, path: str, draw: int) -> Tensor:
        rank = self.adapters[path].rank
        uniform = torch.rand(rank + 1, generator=keyed_generator(self._seed, "dropout", f"{draw}/{path}"))
        kept = (uniform[1:] >= self._rank) & (uniform[0] >= self._module)
        return kept / (1 - self._rank)
