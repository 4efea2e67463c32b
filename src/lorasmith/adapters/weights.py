"""Tensors of one module, as in files, to adapters and back: shared by the algorithms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError

__all__ = ["fill_uniform", "misfit", "saved", "squared_product", "taken", "wide"]


def taken(weights: AdapterWeights, needed: Iterable[str], optional: Sequence[str] = ()) -> dict[str, Tensor]:
    """Copies of an adapter's tensors in fp32 on the CPU, by canonical name.

    Args:
        weights: the adapter.
        needed: names that must be there.
        optional: further names that may be.

    Raises:
        LoraError: a needed tensor is missing, one is unknown, or one is no matrix.
    """
    needed = tuple(needed)
    if not set(needed) <= weights.tensors.keys() or not weights.tensors.keys() <= {*needed, *optional}:
        also = f", and may have {', '.join(optional)}" if optional else ""
        raise LoraError(
            f"an adapter of the kind {weights.algorithm} needs {', '.join(needed)}{also}; "
            f"this one has {', '.join(weights.tensors) or 'nothing'}; get a complete file"
        )
    for name, tensor in weights.tensors.items():
        if tensor.ndim < 2 or not tensor.numel():
            raise LoraError(
                f"{name} of an adapter of the kind {weights.algorithm} must be a matrix, got shape "
                f"{tuple(tensor.shape)}; get an intact file"
            )
    return {name: _copy(tensor) for name, tensor in weights.tensors.items()}


def saved(adapter: nn.Module, algorithm: str, alpha: float | None) -> AdapterWeights:
    """An adapter as data: copies in fp32 on the CPU.

    Args:
        adapter: has parameters with the canonical names.
        algorithm: registered name.
        alpha: numerator of the scale, None for none.
    """
    return AdapterWeights(algorithm, {name: _copy(p) for name, p in adapter.named_parameters()}, alpha)


def misfit(weights: AdapterWeights, layer: FrozenLayer) -> LoraError:
    """The error for tensors whose shapes do not fit a layer."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in weights.tensors.items())
    return LoraError(
        f"an adapter of the kind {weights.algorithm} with {shapes} does not fit a layer with weight "
        f"{tuple(layer.shape)}; it was made for another model"
    )


def fill_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """kaiming_uniform(a=√5), the default of torch's own layers, which is uniform within 1/√fan_in."""
    bound = 1 / math.sqrt(tensor[0].numel())
    tensor.uniform_(-bound, bound, generator=generator)


def squared_product(up: Tensor, down: Tensor) -> float:
    """Squared Frobenius norm of up (out, rank, ...) · down (rank, in, ...), from two rank × rank products."""
    up, down = up.flatten(1).float(), down.flatten(1).float()
    # Rounding can leave a zero norm a little below zero.
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
