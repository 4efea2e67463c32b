"""Measures of pictures by their features, rows of length 1: each is a cosine or one minus it."""

from __future__ import annotations

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
