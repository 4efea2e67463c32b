"""Variants of an algorithm: other initializations and scales of a fresh adapter, magnitudes, and dropout.

    DoRA        arXiv:2402.09353   a magnitude beside the direction, around any adapter that adds to the weight
    rsLoRA      arXiv:2312.03732   scale alpha / √rank instead of alpha / rank; saved as alpha · √rank, so that every
                                   program computes the same
    PiSSA       arXiv:2404.02948   start from the principal components; `inits` has starts from the gradient
    Tucker      arXiv:2309.14859   a core between the factors of a convolution (`lora`)
    T-LoRA      arXiv:2507.05964   fewer ranks the noisier the sample (`core.rank_schedule`), and an orthogonal start
    dropout     kohya's scripts    of inner dimensions, and of whole modules

DoRA (Liu et al. 2024) is

    V = W + ΔW,   W' = m ∘ V / ‖V‖,   m = ‖W‖ at the start

Per output the norm is that of a row of the weight, as in the paper, PEFT and LyCORIS: g(y) = (m / ‖V‖) ∘ y. Per input
it is that of a column, as in the first implementations, the kind that ComfyUI reproduces (per output it divides by ‖W‖
instead): f(x) = (m / ‖V‖) ∘ x. `dora_scale` holds m, (out, 1, ...) or (1, in, ...).

‖V‖ is a constant in the backward pass (section 4.3). Strength s gives W + s (W' − W), as in ComfyUI. The trained
parameter is the change of m since the start, which half precision can hold where it would round m itself.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.algorithms import facts_of
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import Factors, LoraAdapter, LowRank
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.random import keyed_generator, keyed_normal
from lorasmith.core.rank_schedule import RankSchedule


class DoraAdapter(Adapter):
    """Direction from another adapter, magnitude of its own.

    start: magnitudes at the start, (out, 1, ...) or (1, in, ...), fp32.
    """

    algorithm = "dora"
    reads_weight = True
    is_additive = False
    compiles = True
    axis: ClassVar[int]
    """Dimension of the weight that the magnitudes are for."""

    def __init__(self, inner: Adapter, start: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = nn.Parameter(torch.zeros_like(start))
        self._start = start  # a plain tensor, which stays in fp32 when the adapter is cast

    @classmethod
    def around(cls, inner: Adapter, layer: FrozenLayer) -> Self:
        """A DoRA around a fresh adapter of `layer`; together they are exactly the identity."""
        return cls(inner, _norm(layer.weight.detach(), cls.axis).cpu())

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> Self:
        """The paper's kind, around a LoRA."""
        inner = LoraAdapter.create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
        return cls.around(inner, layer)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Self:
        tensors = dict(weights.tensors)
        start = tensors.pop("dora_scale").detach().to("cpu", torch.float32, copy=True)
        shape = [1] * len(layer.shape)
        shape[cls.axis] = -1
        return cls(
            ADAPTERS[weights.algorithm].from_weights(replace(weights, tensors=tensors), layer), start.reshape(shape)
        )

    def to_weights(self) -> AdapterWeights:
        weights = self.inner.to_weights()
        return replace(weights, tensors={**weights.tensors, "dora_scale": self._magnitude().detach().cpu()})

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        full = weight.float()
        direction = self.inner.merged(full)
        adapted = direction + direction * self._excess(_norm(direction.detach(), self.axis))
        return torch.add(full, adapted - full, alpha=strength).to(weight.dtype)

    def _magnitude(self) -> Tensor:
        if self._start.device != self.magnitude.device:
            self._start = self._start.to(self.magnitude.device)
        return self._start + self.magnitude.float()

    def _excess(self, norm: Tensor) -> Tensor:
        """m / ‖V‖ − 1 in fp32. A row or column of zeros has no direction and stays zero."""
        return self._magnitude() / norm.clamp(min=torch.finfo(norm.dtype).tiny) - 1

    def _excess_now(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        """The same for the layer's current weight, as a vector in the dtype of its activations."""
        with torch.no_grad(), layer.weight_acquired() as weight:
            norm = _norm_of_sum(self.inner, weight, self.axis)
        return self._excess(norm).flatten().to(x.dtype)


class OutputDora(DoraAdapter):
    """Magnitudes per output: g of the contract."""

    axis = 0
    transforms_output = True

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        excess = layer.channelwise(self._excess_now(x, layer))
        if strength == 1:
            y = self.inner.attached(inner, layer, x, 1.0)
            return y + y * excess
        y = inner(x)
        y = y + y * (strength * excess)
        added = self.inner.delta(x, layer, strength)
        return y if added is None else y + added + added * excess


class InputDora(DoraAdapter):
    """Magnitudes per input: f of the contract."""

    axis = 1
    transforms_input = True

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        excess = layer.channelwise(self._excess_now(x, layer).repeat(layer.groups))
        adapted = x + x * excess
        if strength == 1:
            return self.inner.attached(inner, layer, adapted, 1.0)
        y = inner(x + x * (strength * excess))
        added = self.inner.delta(adapted, layer, strength)
        return y if added is None else y + added


def dora_from_weights(weights: AdapterWeights, layer: FrozenLayer) -> DoraAdapter:
    """The adapter of tensors with a `dora_scale`, on the axis given by its shape."""
    if "dora" not in facts_of(weights.algorithm).variants:
        takers = ", ".join(name for name, facts in ALGORITHMS.items() if "dora" in facts.variants)
        raise LoraError(
            f"dora_scale must come with {takers}, got one with {weights.algorithm}; remove it from the file"
        )
    scale = weights.tensors["dora_scale"]
    outputs, inputs = layer.shape[:2]
    if scale.numel() == outputs == len(scale):
        return OutputDora.from_weights(weights, layer)
    if scale.numel() == inputs and scale.ndim > 1 and len(scale) == 1:
        return InputDora.from_weights(weights, layer)
    raise LoraError(
        f"a dora_scale of shape {tuple(scale.shape)} does not fit a layer with weight {tuple(layer.shape)}; "
        "it was made for another model"
    )


def _norm(weight: Tensor, axis: int) -> Tensor:
    """Norm of a weight's slice at each index of `axis`, in fp32; other dimensions become 1."""
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    norm: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=torch.float32)
    return norm


def _norm_of_sum(inner: Adapter, weight: Tensor, axis: int) -> Tensor:
    """`_norm` of the weight plus an adapter's change; of a low-rank one without building the sum.

    ‖W + s B A‖² = ‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖², row by row or column by column.
    """
    if not isinstance(inner, LowRank) or (factors := inner.factors()).mid is not None:
        return _norm(inner.merged(weight.float()), axis)
    flat, down, up = weight.flatten(1), factors.down.flatten(1), factors.up.flatten(1)
    if axis == 0:
        cross = ((flat @ down.T).float() * up.float()).sum(1)
        square = ((up.float() @ (down.float() @ down.T.float())) * up.float()).sum(1)
    else:
        # A column of a convolution is an input channel: its kernel's entries add up.
        cross = ((up.T @ flat).float() * down.float()).sum(0).reshape(weight.shape[1], -1).sum(1)
        square = (((up.T.float() @ up.float()) @ down.float()) * down.float()).sum(0)
        square = square.reshape(weight.shape[1], -1).sum(1)
    norm, scale = _norm(weight, axis), inner.scale
    return (norm.square() + (2 * scale * cross + scale**2 * square).reshape(norm.shape)).clamp(min=0).sqrt()


_DORA: dict[str, type[DoraAdapter]] = {"input": InputDora, "output": OutputDora}
_RSLORA_ALPHA = 4.0  # a scale of 1 at rank 16, so that the learning rate keeps its meaning there


@dataclass(frozen=True)
class Variant:
    """Variants, all off by default. `catalogue` lists those that each algorithm supports."""

    dora: str = "none"  # `none`, `input` or `output`
    rslora: bool = False
    pissa: bool = False
    tucker: bool = False
    started: bool = False  # from a start that is set before the first step (`inits`)
    orthogonal: bool = False  # T-LoRA's start

    def default_alpha(self, algorithm: str, rank: int) -> float:
        """Default of alpha: a scale of 1, no constraint."""
        default = facts_of(algorithm).default_alpha
        if default is not None:
            return default
        return _RSLORA_ALPHA if self.rslora else float(rank)

    def stored_alpha(self, algorithm: str, alpha: float | None, rank: int, asked: int) -> float:
        """The alpha that gives a layer its scale in every program."""
        alpha = self.default_alpha(algorithm, asked) if alpha is None else alpha
        if facts_of(algorithm).default_alpha is not None:
            return alpha
        return alpha * math.sqrt(rank) if self.rslora else alpha * rank / asked


def fresh_adapter(
    layer: FrozenLayer, algorithm: str, variant: Variant, *, rank: int, alpha: float, seed: int, path: str, zero: str
) -> Adapter:
    """A new adapter for a layer, exactly the identity."""
    create = ADAPTERS[algorithm].create
    if variant.pissa:
        create = PissaAdapter.create
    elif variant.orthogonal:
        create = OrthogonalAdapter.create
    elif variant.started:
        create = StartedAdapter.create
    elif variant.tucker:
        create = LoraAdapter.create_tucker
    adapter = create(layer, rank=rank, alpha=alpha, seed=seed, path=path, zero=zero)
    return adapter if variant.dora == "none" else _DORA[variant.dora].around(adapter, layer)


_OVERSAMPLING = 8
_ITERATIONS = 16  # as PEFT's pissa_niter_16; spectra of trained weights are flat, which fewer would show


class StartedAdapter(LowRank):
    """A LoRA's difference from its start, of zeros until it is set.

    start: down (rank, in) or (rank, in, *kernel), and up (out, rank) or (out, rank, 1, ...), fp32.
    """

    algorithm = "lora"

    def __init__(self, start_down: Tensor, start_up: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros_like(start_down))
        self.up = nn.Parameter(torch.zeros_like(start_up))
        self.alpha = alpha
        # Plain tensors, which keep fp32: the dtype of the differences would round the start.
        self.start = (start_down, start_up)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> Factors:
        if self.start[0].device != self.down.device:
            down, up = self.start
            self.start = (down.to(self.down.device), up.to(self.up.device))
        down, up = (tensor.to(self.down.dtype) for tensor in self.start)
        return Factors(torch.cat((self.down, down + self.down)), torch.cat((up, self.up), dim=1))

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> StartedAdapter:
        point = (1,) * len(layer.shape[2:])
        down, up = torch.zeros(rank, *layer.shape[1:]), torch.zeros(layer.shape[0], rank, *point)
        return cls(down, up, alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Adapter:
        """A plain LoRA of twice the rank, as which files hold one."""
        return LoraAdapter.from_weights(weights, layer)

    def to_weights(self) -> AdapterWeights:
        with torch.no_grad():
            down, up, _ = self.factors()
        tensors = {"down": down.to("cpu", torch.float32), "up": up.to("cpu", torch.float32)}
        return AdapterWeights(self.algorithm, tensors, self.alpha * 2)


class PissaAdapter(StartedAdapter):
    """A LoRA's difference from the principal components of the weight."""

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> PissaAdapter:
        weight = layer.weight.detach().to("cpu", torch.float32)
        left, values, right = principal(weight.flatten(1), rank, seed=seed, path=path)
        root = (values * (rank / alpha if alpha else 0.0)).sqrt()
        point = (1,) * len(weight.shape[2:])
        down = (root[:, None] * right).reshape(rank, *weight.shape[1:])
        return cls(down, (left * root).reshape(len(left), rank, *point), alpha=alpha)


class OrthogonalAdapter(StartedAdapter):
    """A LoRA's difference from an orthogonal start (T-LoRA, section 3.3).

    That is the last singular vectors and values of a matrix of the weight's shape with entries N(0, 1/rank²). Its
    vectors are uniform and independent of its values, so they are drawn as such, without a decomposition of that size.
    """

    @classmethod
    def create(
        cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str
    ) -> OrthogonalAdapter:
        outputs, inputs = layer.shape[0], math.prod(layer.shape[1:])
        left = torch.linalg.qr(keyed_normal((outputs, rank), seed, "init", f"{path}/left")).Q
        right = torch.linalg.qr(keyed_normal((inputs, rank), seed, "init", f"{path}/right")).Q.T
        values = gaussian_singular_values(outputs, inputs)[-rank:] / rank
        root = (values * (rank / alpha if alpha else 0.0)).sqrt()
        point = (1,) * len(layer.shape[2:])
        down = (root[:, None] * right).reshape(rank, *layer.shape[1:])
        return cls(down, (left * root).reshape(outputs, rank, *point), alpha=alpha)

    def to_weights(self) -> AdapterWeights:
        """The two parts of each rank come one after the other, so that a file begins with the ranks that come first."""
        weights = super().to_weights()
        order = torch.arange(2 * self.rank).reshape(2, -1).T.flatten()
        return replace(weights, tensors={"down": weights.tensors["down"][order], "up": weights.tensors["up"][:, order]})


@functools.lru_cache(maxsize=64)  # models repeat few shapes
def gaussian_singular_values(rows: int, columns: int) -> Tensor:
    """Typical singular values, fp32 descending, of a matrix (rows, columns) of independent standard normal entries.

    They are quantiles of their limiting density (Marchenko and Pastur 1967), of which the squares are those of
    eigenvalues between (√columns ± √rows)².
    """
    few, many = sorted((rows, columns))
    low, high = math.sqrt(many) - math.sqrt(few), math.sqrt(many) + math.sqrt(few)
    grid = torch.linspace(low, high, 4096, dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    share = (((high**2 - middle**2) * (middle**2 - low**2)).sqrt() / middle).cumsum(0)
    wanted = (torch.arange(few, dtype=torch.float64) + 0.5) / few * share[-1]
    return middle[torch.searchsorted(share, wanted).clamp(max=len(middle) - 1)].flip(0).float()


def principal(weight: Tensor, rank: int, *, seed: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (rank,) of a matrix (out, in), with left (out, rank) and right (rank, in) vectors."""
    width = min(rank + _OVERSAMPLING, *weight.shape)
    basis = torch.linalg.qr(weight @ keyed_normal((weight.shape[1], width), seed, "init", path).to(weight.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def droppable(adapters: Mapping[str, Adapter]) -> dict[str, LowRank]:
    """The adapters that have dropout. A DoRA has one inside; its magnitude is never dropped."""
    parts = ((path, part) for path, adapter in adapters.items() for part in adapter.modules())
    return {path: part for path, part in parts if isinstance(part, LowRank)}


def rank_ordered(adapters: Mapping[str, Adapter]) -> dict[str, LowRank]:
    """The adapters of which the first ranks can be used alone: plain LoRAs."""
    plain = ((path, adapter) for path, adapter in adapters.items() if isinstance(adapter, LowRank))
    return {path: adapter for path, adapter in plain if adapter.factors().mid is None}


class RankMasks:
    """Makes and sets the masks of the inner dimensions of adapters: dropout, and T-LoRA's ranks by noise level."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        *,
        rank_dropout: float,
        module_dropout: float,
        seed: int,
        schedule: RankSchedule | None,
    ) -> None:
        leveled = {} if schedule is None else rank_ordered(adapters)
        self.adapters = (droppable(adapters) if rank_dropout or module_dropout else {}) | leveled
        self._rank = rank_dropout
        self._module = module_dropout
        self._seed = seed
        self._schedule = schedule
        self._leveled = leveled

    def masks(self, draws: Sequence[int], share: Tensor) -> Tensor | None:
        """Factors of all inner dimensions, layer after layer, for each draw: (draws, sum of ranks); None for none.

        `share` is that of diffusion time of each draw, (draws,).
        """
        dropped = None
        if self.adapters and (self._rank or self._module):
            dropped = torch.stack([torch.cat([self._mask(path, draw) for path in self.adapters]) for draw in draws])
        levels = self.at(share)
        return levels if dropped is None else dropped if levels is None else dropped * levels

    def at(self, share: Tensor) -> Tensor | None:
        """The same without dropout, for shares of diffusion time (batch,)."""
        if self._schedule is None or not self._leveled:
            return None
        schedule = self._schedule
        by_rank = {rank: schedule.mask(share, rank) for rank in {adapter.rank for adapter in self.adapters.values()}}
        whole = [
            by_rank[adapter.rank] if path in self._leveled else torch.ones(len(share), adapter.rank)
            for path, adapter in self.adapters.items()
        ]
        return torch.cat(whole, dim=1)

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
