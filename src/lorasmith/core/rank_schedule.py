"""Ranks by noise level, as T-LoRA has them (Soboleva et al. 2025, arXiv:2507.05964).

    r(t) = ⌊((T − t) / T)^alpha · (R − r_min)⌋ + r_min

At time t of T, of a LoRA of rank R the first r(t) inner dimensions are used: r_min of them in pure noise, all near the
clean end. `t / T` is the share of diffusion time (`NoiseSchedule.share`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings make schedules, and are read without torch
    from torch import Tensor


@dataclass(frozen=True)
class RankSchedule:
    """How many ranks are used at a noise level."""

    min_rank: int  # in pure noise; all of a layer's ranks where it has fewer
    alpha: float  # exponent: above 1 fewer ranks are used between the ends
    copies: int = 1  # consecutive inner dimensions of a file for each rank in training

    def ranks(self, share: Tensor, rank: int) -> Tensor:
        """r(t), int64 (batch,), of a layer of `rank` for shares of diffusion time (batch,), 0 clean to 1 noise."""
        import torch

        least = min(self.min_rank, rank)
        part = (1 - share.to("cpu", torch.float64)).clamp(0, 1) ** self.alpha
        return (part * (rank - least) + _ROUNDING).floor().long() + least

    def mask(self, share: Tensor, rank: int) -> Tensor:
        """Factors 0 and 1 of the inner dimensions, fp32 (batch, rank); `rank` counts copies."""
        import torch

        used = self.ranks(share, rank // self.copies)
        return (torch.arange(rank) // self.copies < used[:, None]).float()

    def start(self, index: int, rank: int) -> float:
        """The share of diffusion time from which a rank is used, down to 0; `index` and `rank` without copies."""
        least = min(self.min_rank, rank)
        if index < least:
            return 1.0
        part: float = ((index + 1 - least) / (rank - least)) ** (1 / self.alpha)
        return 1 - part


_ROUNDING = 1e-5  # of levels in fp32, as parts of a rank
