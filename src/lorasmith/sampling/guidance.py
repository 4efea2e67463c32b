"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) with several prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.families.base import Conditioning, collate

__all__ = ["Predict", "guided"]

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents (batch, ...), time (batch,), conditioning of that batch) → prediction in the latents' shape."""


def guided(
    predict: Predict,
    *,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    cfg: float,
    batch: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided prediction `negative + cfg · (positive − negative)` as a function of (latents, time).

    Several conditionings of one side are averaged. Those of weight 0 are not computed: with `cfg` 1 the negative is not
    used. Conditionings of equal tensor shapes run as one batch, others separately: repeating a shorter context is
    correct for cross-attention, but not for joint attention to text and image.

    Args:
        predict: the network.
        positive: at least one conditioning, of any batch size; shorter ones are repeated to `batch`.
        negative: the same; may be empty when `cfg` is 1.
        cfg: guidance scale.
        batch: number of latents.

    Raises:
        OptionError: a side with non-zero weight has no conditioning.
    """
    weighted = [*_shares("positive", positive, cfg), *_shares("negative", negative, 1 - cfg)]
    groups: dict[frozenset[tuple[str, torch.Size]], list[tuple[float, Conditioning]]] = {}
    for weight, conditioning in weighted:
        shapes = frozenset((key, tensor.shape[1:]) for key, tensor in conditioning.tensors.items())
        groups.setdefault(shapes, []).append((weight, _repeated(conditioning, batch)))
    forwards = [
        ([weight for weight, _ in group], collate([conditioning for _, conditioning in group], repeatable=False))
        for group in groups.values()
    ]

    def prediction(latents: Tensor, time: Tensor) -> Tensor:
        total = torch.zeros_like(latents, dtype=torch.float32)
        for weights, conditioning in forwards:
            copies = len(weights)
            answer = predict(latents.repeat(copies, *(1,) * (latents.ndim - 1)), time.repeat(copies), conditioning)
            for weight, part in zip(weights, answer.float().chunk(copies), strict=True):
                total += weight * part
        return total

    return prediction


def _shares(side: str, conditionings: Sequence[Conditioning], weight: float) -> list[tuple[float, Conditioning]]:
    """(share of the weight, conditioning) of a side; empty if the weight is 0."""
    if weight == 0:
        return []
    if not conditionings:
        raise OptionError(
            f"sampling needs at least one {side} conditioning, got none; encode a prompt, which may be empty"
        )
    return [(weight / len(conditionings), conditioning) for conditioning in conditionings]


def _repeated(conditioning: Conditioning, batch: int) -> Conditioning:
    """`conditioning` for exactly `batch` latents: repeated in order, or truncated."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(math.ceil(batch / len(tensor)), *(1,) * (tensor.ndim - 1))[:batch]

    tensors = {key: repeated(tensor) for key, tensor in conditioning.tensors.items()}
    return Conditioning(tensors, conditioning.text, None if conditioning.mask is None else repeated(conditioning.mask))
