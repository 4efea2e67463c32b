"""Samplers against ComfyUI's numbers, against diffusers, and against the exact solution for Gaussian data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from lorasmith.sampling.samplers import SAMPLERS, sigmas_for

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("samplers.json").read_text(encoding="utf-8"))
SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": DiscreteSchedule.scaled_linear(),
    "flow": FlowSchedule(**GOLDEN["schedules"]["flow"]),
    "flux": FlowSchedule(**GOLDEN["schedules"]["flux"]),
}
DETERMINISTIC = ["euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc", "uni_pc_bh2"]
NOISY = ["euler_ancestral", "dpmpp_2m_sde", "lcm"]


def posterior_mean(schedule: NoiseSchedule, mean: float, spread: float) -> Callable[[Tensor, float], Tensor]:
    """The exact denoiser for an even mixture of N(mean, spread²) and N(−mean, spread²)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        signal = schedule.signal(sigma)
        variance = signal**2 * spread**2 + sigma**2
        centre = mean * torch.tanh(signal * mean * x / variance)
        return (signal * spread**2 * x + sigma**2 * centre) / variance

    return denoise


def solve(sampler: str, schedule: NoiseSchedule, x: Tensor, sigmas: Tensor, **overrides: Any) -> Tensor:
    settings = {
        "schedule": schedule,
        "noise": lambda step: torch.randn(x.shape, generator=torch.Generator().manual_seed(step)),
        "callback": lambda step, denoised: None,
    }
    denoise = overrides.pop("denoise", posterior_mean(schedule, 0.0, 0.5))
    return SAMPLERS[sampler].solve(denoise, x, sigmas, **(settings | overrides))


def of(run: dict[str, Any]) -> str:
    return f"{run['schedule']}, {run['scheduler']}, {run['steps']} steps, denoise {run['denoise']}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_results_are_comfyuis(sampler: str) -> None:
    noises = torch.tensor(GOLDEN["noises"])
    for run in GOLDEN["runs"]:
        schedule = SCHEDULES[run["schedule"]]
        sigmas = sigmas_for(schedule, run["scheduler"], run["steps"], denoise=run["denoise"], sampler=sampler)
        start = schedule.initial(noises[-1], torch.tensor(GOLDEN["latents"]), sigmas[0].item())

        denoise = posterior_mean(schedule, GOLDEN["mean"], GOLDEN["spread"])
        result = solve(sampler, schedule, start, sigmas, denoise=denoise, noise=lambda step: noises[step])

        expected = torch.tensor(run[sampler])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4, msg=lambda text, run=run: f"{of(run)}: {text}")


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_many_steps_reach_the_exact_solution(sampler: str, kind: str) -> None:
    # For Gaussian data the probability-flow ODE keeps x at the same number of standard deviations.
    schedule, spread = SCHEDULES[kind], 0.5
    sigmas = sigmas_for(schedule, "karras", 300, sampler=sampler)
    x = torch.linspace(-2, 2, 9) * sigmas[0]

    first = sigmas[0].item()
    deviation = math.hypot(schedule.signal(first) * spread, first)
    torch.testing.assert_close(solve(sampler, schedule, x, sigmas), x * spread / deviation, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep", "uni_pc", "uni_pc_bh2"])
def test_higher_order_beats_euler(sampler: str) -> None:
    schedule = SCHEDULES["discrete"]
    exact = solve("heun", schedule, torch.tensor([9.0]), sigmas_for(schedule, "karras", 2000))

    def error(name: str) -> float:
        result = solve(name, schedule, torch.tensor([9.0]), sigmas_for(schedule, "karras", 25, sampler=name))
        return (result - exact).abs().item()

    assert error(sampler) < 0.3 * error("euler")


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noisy_samplers_end_in_the_data_distribution(sampler: str, kind: str) -> None:
    schedule = SCHEDULES[kind]
    sigmas = sigmas_for(schedule, "karras", 250)
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(99))

    result = solve(sampler, schedule, schedule.initial(noise, torch.zeros(4000), sigmas[0].item()), sigmas)

    assert result.std().item() == pytest.approx(0.5, rel=0.06)
    assert result.mean().item() == pytest.approx(0.0, abs=0.03)


def test_every_step_is_told_once_and_one_step_is_enough() -> None:
    for kind in SCHEDULES:
        for sampler in SAMPLERS:
            schedule = SCHEDULES[kind]
            for steps in (1, 2, 5):
                sigmas = sigmas_for(schedule, "normal", steps, sampler=sampler)
                told: list[int] = []
                result = solve(
                    sampler, schedule, torch.ones(3), sigmas, callback=lambda step, _, told=told: told.append(step)
                )
                assert told == list(range(steps))
                assert result.isfinite().all()
                assert not torch.equal(result, torch.ones(3))


def test_noise_is_asked_for_by_the_samplers_that_add_some() -> None:
    for sampler in SAMPLERS:
        asked: list[int] = []

        def noise(step: int, asked: list[int] = asked) -> Tensor:
            asked.append(step)
            return torch.zeros(3)

        schedule = SCHEDULES["discrete"]
        solve(sampler, schedule, torch.ones(3), sigmas_for(schedule, "normal", 5, sampler=sampler), noise=noise)
        assert asked == ([0, 1, 2, 3] if sampler in NOISY else [])


@pytest.mark.parametrize(("sampler", "evaluations"), [("heun", 9), ("uni_pc", 5), ("dpmpp_2m", 5), ("euler", 5)])
def test_evaluations_per_run(sampler: str, evaluations: int) -> None:
    levels: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        levels.append(sigma)
        return x * 0

    schedule = SCHEDULES["flow"]
    solve(sampler, schedule, torch.ones(3), sigmas_for(schedule, "normal", 5, sampler=sampler), denoise=denoise)
    assert len(levels) == evaluations


def test_euler_is_diffusers_euler() -> None:
    from diffusers import EulerDiscreteScheduler

    schedule = SCHEDULES["discrete"]
    assert isinstance(schedule, DiscreteSchedule)
    peer = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    peer.set_timesteps(8)
    x = theirs = torch.tensor([10.0, -3.0, 0.5])
    denoise = posterior_mean(schedule, 0.8, 0.5)
    for timestep, sigma in zip(peer.timesteps, peer.sigmas[:-1], strict=True):
        epsilon = (theirs - denoise(theirs, sigma.item())) / sigma
        theirs = peer.step(epsilon, timestep, theirs).prev_sample

    torch.testing.assert_close(solve("euler", schedule, x, peer.sigmas, denoise=denoise), theirs, rtol=1e-5, atol=1e-5)


def test_samplers_that_are_not_there_are_refused_with_those_that_are() -> None:
    for name, hint in [("dpmpp_3m_sde", "did you mean 'dpmpp_2m_sde'"), ("dpm_2", ""), ("lms", "")]:
        with pytest.raises(OptionError, match=rf"unknown sampler '{name}'.*{hint}.*known are euler, .*uni_pc"):
            SAMPLERS[name]
