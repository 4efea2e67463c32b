"""Measures of pictures by their features, rows of length 1: each is a cosine or one minus it."""

from __future__ import annotations

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


def adherence(asked: Tensor, base_asked: Tensor) -> float | None:
    """Mean cosine, at least 0, of what each wish changes with a LoRA and without; None for fewer than two wishes.

    Rows are pictures of one noise, of the trigger with a wish each: (wishes, features) with the LoRA, and of the base
    model. A wish changes the features by their difference from the mean over the wishes. 1 is as the base model follows
    prompts, 0 not at all.
    """
    if len(asked) < 2:
        return None
    with_lora, without = (F.normalize(one - one.mean(0), dim=1) for one in (asked, base_asked))
    return max(0.0, float((with_lora * without).sum(1).mean()))


def learnt(likeness: float, base_likeness: float, own: float | None) -> float:
    """Share of the way from the base model's likeness to that of the training pictures to one another, from 0 to 1.

    `own` is None for a single training picture, whose likeness to itself is 1.
    """
    whole = (1.0 if own is None else own) - base_likeness
    return min(1.0, max(0.0, (likeness - base_likeness) / max(whole, 1e-6)))
