"""Diffusion time in training: uniform numbers for draws, and pure maps from them to quantiles of the schedule.

Working on uniform numbers keeps every distribution keyed (one number per draw), stratifiable and independent of the
device. A quantile of 0 is the cleanest end of the schedule, 1 the noisiest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.core.choices import TimestepDistribution
from lorasmith.core.random import keyed_generator, keyed_uniform
from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseSchedule, shifted

__all__ = ["TIMESTEP_DISTRIBUTIONS", "QuantileMap", "quantile_map", "uniform_numbers"]

QuantileMap = Callable[[Tensor, tuple[int, int]], Tensor]
"""Uniform numbers (batch,) and (height, width) of the latents → quantiles (batch,)."""

TIMESTEP_DISTRIBUTIONS: Registry[Callable[[Tensor], Tensor]] = Registry("timestep distribution")

_INSIDE = 1e-6  # keeps the normal quantile function finite at both ends
_LEVELS = 10  # 1024 strata: two draws closer than that are alike to a model


@TIMESTEP_DISTRIBUTIONS.register("uniform", "shifted")
def _uniform(u: Tensor) -> Tensor:
    """Every point of the schedule alike (Ho et al. 2020); `shifted` is this with the shift that suits the size."""
    return u


@TIMESTEP_DISTRIBUTIONS.register("logit_normal", "sigmoid")
def _logit_normal(u: Tensor) -> Tensor:
    """`sigmoid(N(0, 1))`: more of the middle, where flows are hardest (Esser et al. 2024, section 3.1)."""
    normal: Tensor = torch.special.ndtri(u.clamp(_INSIDE, 1 - _INSIDE))
    return normal.sigmoid()


def uniform_numbers(draws: Sequence[int], *, seed: int, stratified: bool) -> Tensor:
    """Numbers in [0, 1] of global draw indices, (len(draws),) fp32.

    Stratified ones are a scrambled van der Corput sequence (Owen 1995): of 2^k neighbouring draws that begin at a
    multiple of 2^k, one falls in each of 2^k equal parts of the range, anywhere in it (k up to 10). Every number is
    still uniform over seeds; steps of any size cover the range, and so do the small steps that momentum averages over.
    Images meet the sequence in the epochs' random orders, so that none of them keeps to a part of the range.
    """
    numbers = [keyed_uniform(seed, "timestep", draw) for draw in draws]
    if stratified:
        numbers = [(_stratum(draw, seed) + inside) / 2**_LEVELS for draw, inside in zip(draws, numbers, strict=True)]
    return torch.tensor(numbers)


def quantile_map(distribution: TimestepDistribution, shift: float | None, schedule: NoiseSchedule) -> QuantileMap:
    """Where uniform numbers fall on a schedule.

    `shift` is that of diffusion time as a whole: a flow's levels are `shifted(distribution(u), shift)`, and the flow's
    own shift is not added to it (kohya's `discrete_flow_shift`, diffusers' `shift`). Discrete schedules have no shift
    of their own; there it moves the step index.

    Args:
        distribution: of the uniform numbers.
        shift: None for the one that suits the size of the picture with `shifted`, the schedule's own with the others.
        schedule: what the quantiles are for.
    """
    time = TIMESTEP_DISTRIBUTIONS[distribution]
    by_size = shift is None and distribution == "shifted"
    whole = schedule.shift if shift is None else shift

    def quantiles(u: Tensor, size: tuple[int, int]) -> Tensor:
        # One shift after another is their product, so what the schedule applies itself is divided out.
        return shifted(time(u), (schedule.resolution_shift(*size) if by_size else whole) / schedule.shift)

    return quantiles


def _stratum(draw: int, seed: int) -> int:
    """The stratum of a draw: each block of draws goes through all of them once, in an order of its own.

    The order is a binary tree's: neighbours part at its root, draws of equal parity one level below, and so on, with a
    coin at each node for which of the two goes left.
    """
    block, position = divmod(draw, 2**_LEVELS)
    coins = torch.randint(2, (2**_LEVELS,), generator=keyed_generator(seed, "strata", block)).tolist()
    stratum, node = 0, 1
    for _ in range(_LEVELS):
        position, digit = divmod(position, 2)
        stratum = 2 * stratum + (digit ^ coins[node])
        node = 2 * node + digit
    return stratum
