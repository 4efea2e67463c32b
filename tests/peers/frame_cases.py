"""Clips that are drawn from their first or last frame: what is compared between ComfyUI and us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import models
import tiny_wan
from tiny_parts import TinyFamily
from torch import Tensor

SIZE = {"width": 64, "height": 96}
FRAMES = 9


@dataclass(frozen=True)
class Case:
    """A model, the node that gives it frames, and which it gives."""

    tiny: TinyFamily
    node: str
    pictures: tuple[str, ...] = ("start",)
    sees_pictures: bool = False  # whether the model attends to states of an image encoder


_BOTH = ("start", "end")
CASES = {
    "wan2.2 i2v": Case(tiny_wan.WAN_I2V, "WanImageToVideo"),
    "wan2.2 flf2v": Case(tiny_wan.WAN_I2V, "WanFirstLastFrameToVideo", _BOTH),
    "wan2.2 last frame": Case(tiny_wan.WAN_I2V, "WanFirstLastFrameToVideo", ("end",)),
    "wan2.1 i2v": Case(tiny_wan.WAN21_I2V, "WanImageToVideo", sees_pictures=True),
    "wan2.1 flf2v": Case(tiny_wan.WAN21_FLF2V, "WanFirstLastFrameToVideo", _BOTH, sees_pictures=True),
    "wan2.2 5b": Case(tiny_wan.WAN_5B, "Wan22ImageToVideoLatent"),
}


def picture(which: str) -> Tensor:
    """IMAGE (1, height, width, 3) in [0, 1], wider than the clip."""
    return models.seeded(which, (1, 80, 112, 3), seed=0, std=0.2, mean=0.5).clamp(0, 1)


def noisy(shape: Sequence[int]) -> Tensor:
    """A sampler's state, of scaled latents."""
    return models.seeded("noisy", tuple(shape), seed=0)
