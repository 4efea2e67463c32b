from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from lorasmith.families.conditionings import Conditioning
from lorasmith.sampling.sample import SamplingCancelledError, prepare_noise, sample_latents
from lorasmith.sampling.samplers import SAMPLERS, sigmas_for

DISCRETE, FLOW = DiscreteSchedule.scaled_linear(), FlowSchedule(3.0)
SHAPE = (2, 4, 3, 5)


def conditioning(value: float) -> Conditioning:
    return Conditioning({"context": torch.full((1, 7, 2), value)})


def predictor(schedule: NoiseSchedule, parameterization: str) -> Any:
    """The exact network for data that always equal the context's value."""

    def predict(latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        clean = conditioning.tensors["context"][:, :1, :1, None].expand_as(latents).float()
        level = schedule.at_sigma(schedule.sigma(time) if schedule is DISCRETE else time)
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
        noise = (latents.float() - alpha * clean) / sigma
        targets = {"epsilon": noise, "v": alpha * noise - sigma * clean, "flow": noise - clean}
        return targets[parameterization].to(latents.dtype)

    return predict


def sample(schedule: NoiseSchedule = DISCRETE, parameterization: str = "epsilon", **overrides: Any) -> Tensor:
    settings: dict[str, Any] = {
        "schedule": schedule,
        "parameterization": parameterization,
        "positive": [conditioning(1.5)],
        "negative": [conditioning(0.5)],
        "latents": torch.zeros(SHAPE),
        "noise": prepare_noise(7, SHAPE),
        "sigmas": sigmas_for(schedule, "simple", 6, sampler=overrides.get("sampler", "euler")),
        "sampler": "euler",
        "cfg": 1.0,
        "seed": 7,
    }
    return sample_latents(predictor(schedule, parameterization), **(settings | overrides))


def test_every_sampler_finds_the_data() -> None:
    for schedule, parameterization in [(DISCRETE, "epsilon"), (DISCRETE, "v"), (FLOW, "flow")]:
        for sampler in SAMPLERS:
            plain = sample(schedule, parameterization, sampler=sampler)
            guided = sample(schedule, parameterization, sampler=sampler, cfg=3.0)

            # UniPC leaves the noise of its last level, 0.001.
            torch.testing.assert_close(plain, torch.full(SHAPE, 1.5), rtol=0, atol=0.02)
            torch.testing.assert_close(guided, torch.full(SHAPE, 3.5), rtol=0, atol=0.02)


def test_noise_is_that_of_torchs_global_generator() -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(2**63 + 5)
        expected = torch.randn(SHAPE)
    finally:
        torch.set_rng_state(state)

    assert torch.equal(prepare_noise(2**63 + 5, SHAPE), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_step_noise_depends_on_the_seed_alone() -> None:
    short = sigmas_for(DISCRETE, "simple", 6)[:4]
    first, again, other = (sample(sampler="euler_ancestral", sigmas=short, seed=seed) for seed in (7, 7, 8))

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_no_step_returns_the_latents() -> None:
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(latents=latents, sigmas=sigmas_for(DISCRETE, "simple", 6, denoise=0.0)), latents)


def test_the_callback_hears_of_every_step() -> None:
    heard: list[tuple[int, int]] = []
    sample(callback=lambda step, total, denoised: heard.append((step, total)) or None)
    assert heard == [(step, 6) for step in range(6)]


def test_cancelling_stops_before_the_next_evaluation() -> None:
    heard: list[int] = []
    with pytest.raises(SamplingCancelledError, match="6 steps"):
        sample(callback=lambda step, *_: heard.append(step), cancelled=lambda: len(heard) == 2)
    assert heard == [0, 1]


def test_the_network_sees_its_own_dtype_and_pure_noise_of_unit_variance() -> None:
    seen: list[Tensor] = []

    def predict(latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.tensors["context"].dtype == torch.bfloat16
        seen.append(latents)
        return latents

    result = sample_latents(
        predict,
        schedule=DISCRETE,
        parameterization="epsilon",
        positive=[conditioning(0.0)],
        negative=[],
        latents=torch.zeros(SHAPE),
        noise=prepare_noise(7, SHAPE),
        sigmas=sigmas_for(DISCRETE, "normal", 2),
        sampler="euler",
        cfg=1.0,
        seed=7,
        dtype=torch.bfloat16,
    )

    assert result.dtype == torch.float32
    torch.testing.assert_close(seen[0], prepare_noise(7, SHAPE).bfloat16())


def test_a_side_that_is_left_out_has_the_clean_sample_zero() -> None:
    for schedule, parameterization in [(DISCRETE, "epsilon"), (DISCRETE, "v"), (FLOW, "flow")]:
        # As in ComfyUI: guided is 0 + cfg · (positive − 0), so that data of 1.5 become 3.
        never = replace(conditioning(0.5), span=(0.9999, 1.0))
        result = sample(schedule, parameterization, negative=[never], cfg=2.0)
        torch.testing.assert_close(result, torch.full(SHAPE, 3.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral", "lcm"])
@pytest.mark.parametrize(("schedule", "parameterization"), [(DISCRETE, "epsilon"), (FLOW, "flow")], ids=["eps", "flow"])
def test_a_run_in_two_parts_is_the_whole_run(
    schedule: NoiseSchedule, parameterization: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise between steps is numbered from the start of a run, and would differ.
    monkeypatch.setattr("lorasmith.sampling.sample.keyed_normal", lambda shape, *_: torch.ones(shape))
    sigmas = sigmas_for(schedule, "simple", 6)
    whole = sample(schedule, parameterization, sampler=sampler, sigmas=sigmas)
    first = sample(schedule, parameterization, sampler=sampler, sigmas=sigmas[:4])
    assert not torch.allclose(first, whole, atol=0.1)
    rest = sample(
        schedule,
        parameterization,
        sampler=sampler,
        sigmas=sigmas[3:],
        latents=first,
        noise=torch.zeros(SHAPE),
    )
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)


def test_every_sampler_stops_at_a_level() -> None:
    for sampler in SAMPLERS:
        sigmas = sigmas_for(FLOW, "simple", 6)[:4]
        noisy = sample(FLOW, "flow", sampler=sampler, sigmas=sigmas)
        signal, level = 1 - sigmas[-1].item(), sigmas[-1].item()
        assert (noisy * signal).mean().item() == pytest.approx(1.5 * signal, abs=0.35)
        assert (noisy * signal).std().item() == pytest.approx(level, rel=0.25)
