"""Measures of pictures by their features, rows of length 1: each is a cosine or one minus it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def likeness(drawn: Tensor, others: Tensor) -> float:
    """Mean cosine of each drawn picture with each other one."""
    return float((drawn @ others.T).mean())


def self_likeness(pictures: Tensor) -> float | None:
    """Mean cosine of two of the pictures; None for fewer than two."""
    count = len(pictures)
    if count < 2:
        return None
    return float(((pictures @ pictures.T).sum() - count) / (count * (count - 1)))


def diversity(drawn: Tensor) -> float | None:
    """Mean distance of two of the pictures, 0 for equal ones; None for fewer than two."""
    found = self_likeness(drawn)
    return None if found is None else 1 - found


def nearest(drawn: Tensor, others: Tensor) -> float:
    """Mean cosine of each drawn picture with the other one that is most alike."""
    return float((drawn @ others.T).amax(1).mean())


def drift(before: Tensor, after: Tensor) -> float:
    """Mean distance of pictures of the same noise and text, drawn without and with a LoRA."""
    return float(1 - (before * after).sum(1).mean())


def adherence(drawn: Sequence[Tensor], base: Sequence[Tensor]) -> float | None:
    """How surely wishes are recognised, from 0 for chance to 1 as with the base model; None for fewer than two.

    Each tensor is (wishes, width): features, colours and the like of pictures of one noise, of the trigger with a wish
    each, drawn with the LoRA and by the base model. A wish changes them by the difference from the mean over all
    wishes; it is recognised by the directions of these changes.
    """
    count = len(base[0])
    if count < 2:
        return None
    found, best = (_recognised(features, base) - 1 / count for features in (drawn, base))
    return min(1.0, max(0.0, found / best)) if best > 0 else 0.0


_SHARPNESS = 5.0  # of the softmax by which wishes are recognised


def _recognised(drawn: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Mean probability of each wish among all."""
    alike = [_changes(features) @ _changes(other).T for features, other in zip(drawn, base, strict=True)]
    return float((_SHARPNESS * torch.stack(alike).mean(0)).softmax(1).diagonal().mean())


def _changes(found: Tensor) -> Tensor:
    """Directions of the differences from the mean, rows of length 1."""
    return F.normalize(found - found.mean(0), dim=1)


def learnt(likeness: float, base_likeness: float, own: float | None) -> float:
    """Share of the way from the base model's likeness to that of the training pictures to one another, from 0 to 1.

    `own` is None for a single training picture, whose likeness to itself is 1.
    """
    whole = (1.0 if own is None else own) - base_likeness
    return min(1.0, max(0.0, (likeness - base_likeness) / max(whole, 1e-6)))
