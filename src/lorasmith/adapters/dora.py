"""DoRA: weight-decomposed adaptation (Liu et al. 2024, arXiv:2402.09353), around any adapter that adds to the weight.

    V = W + ΔW,   W' = m ∘ V / ‖V‖,   m = ‖W‖ at the start

Per output the norm is that of a row of the weight, as in the paper, PEFT and LyCORIS: g(y) = (m / ‖V‖) ∘ y. Per input
it is that of a column, as in the first implementations, the kind that ComfyUI reproduces (per output it divides by ‖W‖
instead): f(x) = (m / ‖V‖) ∘ x. `dora_scale` holds m, (out, 1, ...) or (1, in, ...).

‖V‖ is a constant in the backward pass (section 4.3). Strength s gives W + s (W' − W), as in ComfyUI. The trained
parameter is the change of m since the start, which half precision can hold where it would round m itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.algorithms import words_of
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import LoraAdapter, LowRank
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


class DoraAdapter(Adapter):
    """Direction from another adapter, magnitude of its own.

    start: magnitudes at the start, (out, 1, ...) or (1, in, ...), fp32.
    """

    algorithm = "dora"
    reads_weight = True
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
        with torch.no_grad():
            norm = _norm_of_sum(self.inner, layer.weight, self.axis)
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
        added = self.inner.beside(x, layer, strength)
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
        added = self.inner.beside(adapted, layer, strength)
        return y if added is None else y + added


def dora_from_weights(weights: AdapterWeights, layer: FrozenLayer) -> DoraAdapter:
    """The adapter of tensors with a `dora_scale`, on the axis given by its shape."""
    if "dora" not in words_of(weights.algorithm).variants:
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
