"""Starts of low-rank adapters by name: functions of a layer's weight and of the gradient before the first step.

What is trained is the difference from the start, so that the model does not change with it, and files hold a plain LoRA
of twice the rank.

    LoRA-GA     arXiv:2407.05000   singular vectors of the gradient: up of the second `rank` ones, down of the first
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lorasmith.adapters.catalogue import INITS
from lorasmith.adapters.variants import principal
from lorasmith.core.errors import OptionError


@dataclass(frozen=True)
class InitLayer:
    """A layer whose adapter computes W + scale · up @ down.

    Attributes:
        path: module path, in a text encoder with its component in front.
        weight: fp32 (out, in), a convolution's (out, in · kernel), with the LoRAs beneath.
        gradient: fp32 of the same shape, the mean over the draws of the run's first `init_steps` steps; None without.
        rank: of the adapter.
        scale: of the adapter.
        seed: of the run.
    """

    path: str
    weight: Tensor
    gradient: Tensor | None
    rank: int
    scale: float
    seed: int


Init = Callable[[InitLayer], tuple[Tensor, Tensor]]
"""Returns down (rank, in) and up (out, rank), a function of the layer alone."""

_GAMMA = 16  # of the paper's stable scale


@INITS.register("LoRA-GA")
def lora_ga(layer: InitLayer) -> tuple[Tensor, Tensor]:
    """Factors whose first step comes closest to the step of the full gradient (theorem 3.1), at the stable scale."""
    if layer.gradient is None:
        raise OptionError("init LoRA-GA needs a gradient; set init_steps to at least 1")
    left, _, right = principal(layer.gradient, 2 * layer.rank, seed=layer.seed, path=layer.path)
    size = len(left) ** 0.25 / math.sqrt(_GAMMA)
    return size * right[: layer.rank], size * left[:, -layer.rank :]
