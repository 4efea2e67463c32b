"""Solvers of the reverse diffusion and their sigma schedules, named as ComfyUI's samplers and schedulers.

A sampler's state is `x = signal(sigma) · x0 + sigma · noise` with the noise schedule's `signal`: 1 for a discrete
schedule in its variance-exploding form, `1 − sigma` for a flow. For both the probability-flow ODE is `dx/dsigma = (x −
x0(x, sigma)) / sigma`, so deterministic solvers work for both; those that add noise use `signal`.

Sigmas are Python floats: coefficients are computed in double precision on the host, and no step synchronizes with the
device.

A scheduler is a pure function of a noise schedule and a number of steps; its sigmas (see `diffusion.schedule`) are
strictly descending fp32 values that end in 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseSchedule, shifted

Denoise = Callable[[Tensor, float], Tensor]  # (state, sigma) → the predicted clean sample

StepNoise = Callable[[int], Tensor]  # step → standard normal values of the state's shape, on its device

StepCallback = Callable[[int, Tensor], None]  # (step, predicted clean sample), once per step


class Solver(Protocol):
    """Integrates a state along descending sigmas."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        schedule: NoiseSchedule,
        noise: StepNoise,
        callback: StepCallback,
    ) -> Tensor:
        """The state at the last sigma.

        Args:
            denoise: the guided model.
            x: (batch, ...) fp32 state at `sigmas[0]`.
            sigmas: (steps + 1,) strictly descending; the last one is 0, or the level to stop at.
            schedule: of the sigmas.
            noise: random noise of a step, for solvers that add some.
            callback: called once per step.
        """


@dataclass(frozen=True)
class Sampler:
    """A named sampler.

    Attributes:
        solve: the solver.
        discards_penultimate_sigma: whether it uses the sigmas of one more step without the level before 0, where its
            high order gains nothing.
    """

    solve: Solver
    discards_penultimate_sigma: bool = False


def _as_sampler(name: str, thing: Any) -> Sampler:
    """The sampler of a registered solver."""
    if isinstance(thing, Sampler):
        return thing
    if not callable(thing):
        raise TypeError("it must be a solver")
    return Sampler(thing)


SAMPLERS: Registry[Sampler] = Registry("sampler", group="samplers", checked=_as_sampler)

FLOW_START = 1 - 1e-4
"""Start time of a flow for solvers in log signal-to-noise ratio, which is −∞ at time 1."""

UNIPC_LAST_SIGMA = 0.001  # instead of 0, which its step size cannot reach


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """Euler's method for the probability-flow ODE; with these sigmas equal to DDIM (Song et al., arXiv:2010.02502)."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        x = denoised.lerp(x, sigma_next / sigma)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """Euler steps past the next level, then fresh noise back up to it, as in DDPM (Ho et al., arXiv:2006.11239)."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        lower = sigma_next**2 / sigma
        x = denoised.lerp(x, lower / sigma)
        if sigma_next > 0:
            # Adding noise reduces the signal in a flow: the rest of the state keeps its share of noise.
            kept = schedule.signal(sigma_next) / schedule.signal(lower)
            x = kept * x + math.sqrt(sigma_next**2 - (kept * lower) ** 2) * noise(step)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """Heun's method of second order (Karras et al. 2022, arXiv:2206.00364, algorithm 1): two evaluations per step."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        slope = (x - denoised) / sigma
        ahead = x + slope * (sigma_next - sigma)
        slope_ahead = (ahead - denoise(ahead, sigma_next)) / sigma_next
        x = x + (slope + slope_ahead) * (0.5 * (sigma_next - sigma))
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) in `lambda = −log sigma`.

    The last step is of first order and ends at the clean sample.
    """
    previous: Tensor | None = None
    last_width = 0.0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        aim = denoised
        if sigma_next > 0:
            width = math.log(sigma / sigma_next)
            if previous is not None:
                aim = denoised + (denoised - previous) * (width / (2 * last_width))
            last_width = width
        x = aim.lerp(x, sigma_next / sigma)
        previous = denoised
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095), midpoint form.

    Each step draws its noise independently, like the increments of a Brownian path over disjoint intervals, so the
    distribution of pictures is the same as with a Brownian tree.
    """
    levels = sigmas.tolist()
    if schedule.signal(levels[0]) <= 0:
        levels[0] = schedule.sigma(torch.tensor(FLOW_START)).item()
    previous: Tensor | None = None
    last_width = 0.0
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        if sigma_next == 0:
            return denoised
        signal = schedule.signal(sigma_next)
        width = math.log(signal / sigma_next) - math.log(schedule.signal(sigma) / sigma)
        gain = -signal * math.expm1(-2 * width)
        x = (sigma_next / sigma * math.exp(-width)) * x + gain * denoised
        if previous is not None:
            x = x + (0.5 * gain * width / last_width) * (denoised - previous)
        x = x + (sigma_next * math.sqrt(-math.expm1(-2 * width))) * noise(step)
        previous, last_width = denoised, width
    return x


def lcm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1): denoise, then add noise."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = denoise(x, sigma)
        callback(step, x)
        if sigma_next > 0:
            x = schedule.signal(sigma_next) * x + sigma_next * noise(step)
    return x


def uni_pc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    schedule: NoiseSchedule,
    noise: StepNoise,
    callback: StepCallback,
    b: Callable[[float], float] = lambda h: h,
) -> Tensor:
    """UniPC of order 3 (Zhao et al. 2023, arXiv:2302.04867) in `lambda = −log sigma`; `b` is the paper's ±B(h).

    The corrector reuses the evaluation at the predicted point, so a step needs one evaluation. The order increases from
    1 at the start and decreases to 1 at the end; the last step is not corrected.
    """
    levels = sigmas.tolist()
    levels[-1] = levels[-1] or UNIPC_LAST_SIGMA
    steps = len(levels) - 1
    highest_order = max(1, min(3, steps - 1))
    known = [(levels[0], denoise(x, levels[0]))]
    callback(0, known[0][1])
    for step in range(1, steps + 1):
        order = min(highest_order, step, steps + 1 - step)
        update = _UniPCUpdate(x, known[-order:], levels[step], b)
        x = update.predicted()
        if step < steps:
            denoised = denoise(x, levels[step])
            callback(step, denoised)
            x = update.corrected(denoised)
            known.append((levels[step], denoised))
    return x if sigmas[-1] > 0 else x / schedule.signal(UNIPC_LAST_SIGMA)


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, schedule: NoiseSchedule, noise: StepNoise, callback: StepCallback
) -> Tensor:
    """Refined exponential solver of second order (Zhang & Chen 2023, arXiv:2308.02157) in `lambda = −log sigma`.

    The first step is of first order; a last one to 0 ends at the clean sample.
    """
    previous: Tensor | None = None
    last_width = 0.0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        callback(step, denoised)
        if sigma_next == 0 or previous is None:
            x = denoised.lerp(x, sigma_next / sigma)
        else:
            width = math.log(sigma / sigma_next)
            phi_1 = -math.expm1(-width) / width
            older = (phi_1 - 1) / last_width
            x = math.exp(-width) * x + width * ((phi_1 - older) * denoised + older * previous)
        if sigma_next > 0:
            last_width = math.log(sigma / sigma_next)
        previous = denoised
    return x


SAMPLERS.register("euler")(Sampler(euler))
SAMPLERS.register("euler_ancestral")(Sampler(euler_ancestral))
SAMPLERS.register("heun")(Sampler(heun))
SAMPLERS.register("dpmpp_2m")(Sampler(dpmpp_2m))
SAMPLERS.register("dpmpp_2m_sde", "dpmpp_2m_sde_gpu")(Sampler(dpmpp_2m_sde))
SAMPLERS.register("ddim")(Sampler(euler))
SAMPLERS.register("lcm")(Sampler(lcm))
SAMPLERS.register("res_multistep")(Sampler(res_multistep))
SAMPLERS.register("uni_pc")(Sampler(uni_pc, discards_penultimate_sigma=True))
SAMPLERS.register("uni_pc_bh2")(
    Sampler(functools.partial(uni_pc, b=lambda h: -math.expm1(-h)), discards_penultimate_sigma=True)
)


class _UniPCUpdate:
    """One UniPC step to `sigma`, in the paper's notation for data prediction.

    `x` is the state at the newest level; `known` has (sigma, clean sample) of the last `order` evaluations, oldest
    first.
    """

    def __init__(self, x: Tensor, known: list[tuple[float, Tensor]], sigma: float, b: Callable[[float], float]) -> None:
        current, self._newest = known[-1]
        h = math.log(current / sigma)
        older = list(reversed(known[:-1]))
        self._ratios = [math.log(current / level) / h for level, _ in older]
        self._differences = [
            (denoised - self._newest) / ratio for (_, denoised), ratio in zip(older, self._ratios, strict=True)
        ]
        self._b = b(h)
        self._right_side = _phi_moments(-h, len(known)) * (h / self._b)
        self._first_order = self._newest.lerp(x, sigma / current)

    def predicted(self) -> Tensor:
        """UniP: the step from known evaluations."""
        return self._with(self._differences, self._weights(self._ratios))

    def corrected(self, denoised: Tensor) -> Tensor:
        """UniC: the step with the evaluation at the predicted point in addition."""
        return self._with([*self._differences, denoised - self._newest], self._weights([*self._ratios, 1.0]))

    def _weights(self, ratios: list[float]) -> list[float]:
        """Weights for the order conditions; for one unknown 1/2, as in the authors' code, for every h."""
        if len(ratios) < 2:
            return [0.5] * len(ratios)
        nodes = torch.tensor(ratios, dtype=torch.float64)
        powers = torch.stack([nodes**power for power in range(len(ratios))])
        solution: list[float] = torch.linalg.solve(powers, self._right_side[: len(ratios)]).tolist()
        return solution

    def _with(self, differences: list[Tensor], weights: list[float]) -> Tensor:
        x = self._first_order
        for difference, weight in zip(differences, weights, strict=True):
            x = x + (self._b * weight) * difference
        return x


def _phi_moments(h: float, count: int) -> Tensor:
    """(count,) values `n! · phi_{n+1}(h)` for n = 1..count, in fp64, with `phi_1 = (e^h − 1)/h` and its recurrence."""
    moments, phi = [], math.expm1(h) / h
    for n in range(1, count + 1):
        phi = (phi - 1 / math.factorial(n)) / h
        moments.append(math.factorial(n) * phi)
    return torch.tensor(moments, dtype=torch.float64)


SigmaSchedule = Callable[[NoiseSchedule, int], Tensor]
"""(schedule, steps) → sigmas (steps + 1,)."""

SIGMA_SCHEDULES: Registry[SigmaSchedule] = Registry("scheduler", group="sigma_schedules")

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
