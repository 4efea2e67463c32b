"""Sigma schedules of samplers, named as ComfyUI's schedulers.

A scheduler is a pure function of a noise schedule and a number of steps. Its sigmas are sampler sigmas (see
`diffusion.schedule`): strictly descending fp32 values that end in 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseSchedule
from lorasmith.sampling.samplers import SAMPLERS

__all__ = ["SIGMA_SCHEDULES", "SigmaSchedule", "sigmas_for"]

SigmaSchedule = Callable[[NoiseSchedule, int], Tensor]
"""(schedule, steps) → sigmas (steps + 1,)."""

SIGMA_SCHEDULES: Registry[SigmaSchedule] = Registry("scheduler")

KARRAS_RHO = 7.0
"""Exponent recommended by Karras et al. 2022; larger values make steps denser at low noise."""

FULL_DENOISE = 0.9999
"""Values of `denoise` from which on it counts as 1."""


def sigmas_for(
    schedule: NoiseSchedule, scheduler: str, steps: int, *, denoise: float = 1.0, sampler: str = "euler"
) -> Tensor:
    """Sigmas of one sampling run, as ComfyUI's KSampler chooses them.

    Args:
        schedule: the model's noise schedule.
        scheduler: registered name.
        steps: steps to take, at least 1.
        denoise: part of the schedule to use. Below 1 the sigmas of `steps / denoise` steps are computed and the last
            `steps` of them used; 0 for none.
        sampler: registered name of the sampler; some skip the level before 0.

    Returns:
        (steps + 1,) descending, ending in 0; empty for `denoise` 0. Shorter if the schedule's table has fewer entries,
        or a little longer for `ddim_uniform`, which steps evenly through the table.

    Raises:
        OptionError: an unknown scheduler or sampler.
    """
    levels = SIGMA_SCHEDULES[scheduler]
    discards = SAMPLERS[sampler].discards_penultimate_sigma
    if denoise <= 0:
        return torch.empty(0)
    total = steps if denoise > FULL_DENOISE else int(steps / denoise)
    sigmas = levels(schedule, total + discards)
    if discards:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    # More steps than table entries would repeat some; a multistep solver cannot divide by a step of size 0.
    sigmas = sigmas[torch.cat([torch.tensor([True]), sigmas.diff() < 0])]
    return sigmas if denoise > FULL_DENOISE else sigmas[-(steps + 1) :]


@SIGMA_SCHEDULES.register("simple")
def simple(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced entries of the schedule's table, from the top."""
    stride = len(schedule.sigmas) / steps
    picked = [len(schedule.sigmas) - 1 - int(step * stride) for step in range(steps)]
    return _down_to_zero(schedule.sigmas[picked])


@SIGMA_SCHEDULES.register("sgm_uniform")
def sgm_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in time, the last step starting one distance above the table's cleanest entry."""
    return _down_to_zero(schedule.sigma(_even_times(schedule, steps + 1)[:-1]))


@SIGMA_SCHEDULES.register("normal")
def normal(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in time, both ends of the table included."""
    return _down_to_zero(schedule.sigma(_even_times(schedule, steps)))


@SIGMA_SCHEDULES.register("karras")
def karras(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in the rho-th root of sigma (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    lowest, highest = (schedule.sigmas[end].item() ** (1 / KARRAS_RHO) for end in (0, -1))
    return _down_to_zero(torch.linspace(highest, lowest, steps) ** KARRAS_RHO)


@SIGMA_SCHEDULES.register("exponential")
def exponential(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in log sigma."""
    lowest, highest = (math.log(schedule.sigmas[end].item()) for end in (0, -1))
    return _down_to_zero(torch.linspace(highest, lowest, steps).exp())


@SIGMA_SCHEDULES.register("ddim_uniform")
def ddim_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every n-th entry of the table from the second one up (Song et al. 2020, arXiv:2010.02502)."""
    stride = max(len(schedule.sigmas) // steps, 1)
    return _down_to_zero(schedule.sigmas[1::stride].flip(0))


def _even_times(schedule: NoiseSchedule, count: int) -> Tensor:
    """(count,) timesteps from the schedule's noisiest to its cleanest."""
    start, end = schedule.timestep(schedule.sigmas[[-1, 0]]).tolist()
    return torch.linspace(start, end, count)


def _down_to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
