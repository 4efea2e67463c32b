"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) with several prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.families.base import Conditioning, collate

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents (batch, ...), time (batch,), conditioning of that batch) → prediction in the latents' shape."""


def guided(
    predict: Predict,
    *,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    cfg: float,
    batch: int,
    sigma_at: Callable[[float], float] = lambda progress: math.inf if progress <= 0 else 0.0,
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, float]]:
    """The guided prediction `negative + cfg · (positive − negative)` as a function of (latents, time, sigma).

    Several conditionings of one side are averaged, shorter batches repeated to `batch`. Those of weight 0 are not
    computed: with `cfg` 1 `negative` may be empty. Conditionings of equal tensor shapes run as one batch, others
    separately: repeating a shorter context is correct for cross-attention, but not for joint attention to text and
    image.

    The function returns the prediction, and the weight of the sides that it lacks because the spans of all of their
    conditionings (by `sigma_at`) exclude the sigma; ComfyUI takes 0 as the clean sample of such a side. Raises
    OptionError if a side with non-zero weight has no conditioning.
    """
    sides = (_side("positive", positive, cfg, batch), _side("negative", negative, 1 - cfg, batch))
    joined: dict[Hashable, list[_Forward]] = {}

    def prediction(latents: Tensor, time: Tensor, sigma: float) -> tuple[Tensor, float]:
        active = tuple(
            tuple(sigma_at(one.span[0]) >= sigma >= sigma_at(one.span[1]) for one in conditionings)
            for _, conditionings in sides
        )
        if active not in joined:
            joined[active] = _forwards(sides, active)
        total = torch.zeros_like(latents, dtype=torch.float32)
        for weights, conditioning in joined[active]:
            copies = len(weights)
            answer = predict(latents.repeat(copies, *(1,) * (latents.ndim - 1)), time.repeat(copies), conditioning)
            for weight, part in zip(weights, answer.float().chunk(copies), strict=True):
                total += weight * part
        return total, sum(weight for (weight, _), chosen in zip(sides, active, strict=True) if not any(chosen))

    return prediction


_Side = tuple[float, list[Conditioning]]  # weight and conditionings of a side, none if the weight is 0
_Forward = tuple[list[float], Conditioning]  # weights of the prompts in a batch, and the batch


def _side(side: str, conditionings: Sequence[Conditioning], weight: float, batch: int) -> _Side:
    if weight == 0:
        return 0.0, []
    if not conditionings:
        raise OptionError(
            f"sampling needs at least one {side} conditioning, got none; encode a prompt, which may be empty"
        )
    return weight, [_repeated(conditioning, batch) for conditioning in conditionings]


def _forwards(sides: Sequence[_Side], active: Sequence[Sequence[bool]]) -> list[_Forward]:
    """The batches of the active conditionings, which share the weight of their side."""
    groups: dict[Hashable, list[tuple[float, Conditioning]]] = {}
    for (weight, conditionings), chosen in zip(sides, active, strict=True):
        for conditioning in (one for one, is_active in zip(conditionings, chosen, strict=True) if is_active):
            shapes = frozenset((key, tensor.shape[1:]) for key, tensor in conditioning.tensors.items())
            groups.setdefault(shapes, []).append((weight / sum(chosen), conditioning))
    return [
        ([weight for weight, _ in group], collate([conditioning for _, conditioning in group], repeatable=False))
        for group in groups.values()
    ]


def _repeated(conditioning: Conditioning, batch: int) -> Conditioning:
    """`conditioning` for exactly `batch` latents: repeated in order, or truncated."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(math.ceil(batch / len(tensor)), *(1,) * (tensor.ndim - 1))[:batch]

    tensors = {key: repeated(tensor) for key, tensor in conditioning.tensors.items()}
    mask = None if conditioning.mask is None else repeated(conditioning.mask)
    return replace(conditioning, tensors=tensors, mask=mask)
