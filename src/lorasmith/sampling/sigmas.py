"""Sigma schedules of samplers, named as ComfyUI's schedulers.

A scheduler is a pure function of a noise schedule and a number of steps. Its sigmas are sampler sigmas (see
`diffusion.schedule`): strictly descending fp32 values that end in 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseSchedule, shifted
from lorasmith.sampling.samplers import SAMPLERS

SigmaSchedule = Callable[[NoiseSchedule, int], Tensor]
"""(schedule, steps) → sigmas (steps + 1,)."""

SIGMA_SCHEDULES: Registry[SigmaSchedule] = Registry("scheduler")

KARRAS_RHO = 7.0
"""Exponent recommended by Karras et al. 2022; larger values make steps denser at low noise."""

BETA_SHAPE = 0.6
"""Both parameters of the beta distribution of `beta`; below 1 its density is highest at the ends."""

LINEAR_PART = 0.025  # part of the noise that `linear_quadratic` removes in its even half

FULL_DENOISE = 0.9999  # values of `denoise` from which it counts as 1


def sigmas_for(
    schedule: NoiseSchedule, scheduler: str, steps: int, *, denoise: float = 1.0, sampler: str = "euler"
) -> Tensor:
    """Sigmas of one sampling run as in ComfyUI's KSampler: (steps + 1,) descending, ending in 0; empty for `denoise` 0.

    With `denoise` below 1 they are the last `steps` of `steps / denoise` steps. There are fewer if the schedule's table
    is shorter, and a few more for `ddim_uniform`, which steps evenly through the table. Raises OptionError for unknown
    names.
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


@SIGMA_SCHEDULES.register("beta")
def beta(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Entries of the table at quantiles of a beta distribution, dense at both ends (Lee et al. 2024, arXiv:2407.12173).

    Quantiles that fall on the same entry are one step.
    """
    quantiles = beta_quantiles(1 - np.arange(steps) / steps, BETA_SHAPE)
    places = np.rint(quantiles * (len(schedule.sigmas) - 1)).astype(int)
    return _down_to_zero(schedule.sigmas[list(dict.fromkeys(places.tolist()))])


@SIGMA_SCHEDULES.register("linear_quadratic")
def linear_quadratic(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Half of the steps through the noisiest fortieth, evenly, then quadratic to 0, as in Mochi and Movie Gen."""
    linear = steps // 2
    if linear == 0:
        return _down_to_zero(schedule.sigmas[-1:].clone())
    noisy = LINEAR_PART
    quadratic = steps - linear
    # The quadratic part continues value and slope of the linear one and ends at 1.
    slope = noisy / linear
    curvature = (1 - noisy - slope * quadratic) / quadratic**2
    past = torch.arange(steps, dtype=torch.float64)
    rest = (past - linear).clamp(min=0)
    removed = slope * past + curvature * rest**2
    return _down_to_zero(((1 - removed) * schedule.sigmas[-1].double()).float())


@SIGMA_SCHEDULES.register("kl_optimal")
def kl_optimal(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in the arctangent of sigma (Sabour et al. 2024, arXiv:2404.14507)."""
    lowest, highest = (math.atan(schedule.sigmas[end].item()) for end in (0, -1))
    return _down_to_zero(torch.linspace(highest, lowest, steps).tan())


def flux2_sigmas(steps: int, patches: int) -> Tensor:
    """Sigmas of Flux.2, (steps + 1,) from 1 to 0; their shift depends on `steps` and on the patches of 16×16 px."""
    many_steps = 0.00016927 * patches + 0.45666666  # at 200 steps
    few_steps = 8.73809524e-05 * patches + 1.89833333  # at 10 steps
    slope = (many_steps - few_steps) / 190
    mu = many_steps if patches > 4300 else many_steps + slope * (steps - 200)
    return shifted(torch.linspace(1, 0, steps + 1), math.exp(mu))


@SIGMA_SCHEDULES.register("ddim_uniform")
def ddim_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every n-th entry of the table from the second one up (Song et al. 2020, arXiv:2010.02502)."""
    stride = max(len(schedule.sigmas) // steps, 1)
    return _down_to_zero(schedule.sigmas[1::stride].flip(0))


def beta_quantiles(probabilities: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """Quantiles of the symmetric beta distribution with both parameters `shape` > 0, by bisection."""
    low, high = np.zeros_like(probabilities), np.ones_like(probabilities)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_distribution(middle, shape) < probabilities
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _beta_distribution(x: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """The cumulative distribution at `x` by its power series, which converges fast below 1/2."""
    near = np.minimum(x, 1 - x)
    term, total = np.ones_like(near), np.ones_like(near)
    for n in range(60):
        term = term * near * (2 * shape + n) / (shape + 1 + n)
        total = total + term
    log_front = math.lgamma(2 * shape) - 2 * math.lgamma(shape) - math.log(shape)
    left: NDArray[np.float64] = math.exp(log_front) * (near * (1 - near)) ** shape * total
    return np.where(x <= 0.5, left, 1 - left)


def _even_times(schedule: NoiseSchedule, count: int) -> Tensor:
    """(count,) timesteps from the schedule's noisiest to its cleanest."""
    start, end = schedule.timestep(schedule.sigmas[[-1, 0]]).tolist()
    return torch.linspace(start, end, count)


def _down_to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
