"""Distributions of diffusion time in training: pure maps from a uniform number to a quantile of the schedule.

Working on uniform numbers keeps every distribution keyed (one number per draw), stratifiable and independent of the
device. A quantile of 0 is the cleanest end of the schedule, 1 the noisiest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.core.registry import Registry

__all__ = ["TIMESTEP_DISTRIBUTIONS"]

TIMESTEP_DISTRIBUTIONS: Registry[Callable[[Tensor], Tensor]] = Registry("timestep distribution")

_INSIDE = 1e-6  # keeps the normal quantile function finite at both ends


@TIMESTEP_DISTRIBUTIONS.register("uniform")
def _uniform(u: Tensor) -> Tensor:
    """Every point of the schedule alike (Ho et al. 2020)."""
    return u


@TIMESTEP_DISTRIBUTIONS.register("logit_normal", "sigmoid")
def _logit_normal(u: Tensor) -> Tensor:
    """`sigmoid(N(0, 1))`: more of the middle, where flows are hardest (Esser et al. 2024, section 3.1)."""
    normal: Tensor = torch.special.ndtri(u.clamp(_INSIDE, 1 - _INSIDE))
    return normal.sigmoid()
