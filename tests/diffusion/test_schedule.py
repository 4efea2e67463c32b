"""Noise schedules against diffusers' schedulers on the same numbers, and against their own formulas."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import (
    PARAMETERIZATIONS,
    DiscreteSchedule,
    FlowSchedule,
    NoiseLevel,
    NoiseSchedule,
    check_noising,
    per_sample,
    shifted,
)

SD = DiscreteSchedule.scaled_linear()
STEPS = torch.tensor([0, 1, 17, 250, 500, 777, 998, 999])


@cache
def diffusers_scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def at_steps(steps: torch.Tensor) -> NoiseLevel:
    return SD.at((steps.double() + 0.5) / 1000)


def test_signal_powers_are_those_of_diffusers() -> None:
    level = at_steps(torch.arange(1000))

    # diffusers multiplies a thousand factors in fp32; ours is the double-precision product.
    torch.testing.assert_close(level.alpha**2, diffusers_scheduler().alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert torch.equal(level.time, torch.arange(1000.0))


def test_noised_samples_and_velocities_are_those_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(len(STEPS), 4, 3, 3, generator=generator) for _ in range(2))
    level, scheduler = at_steps(STEPS), diffusers_scheduler()

    torch.testing.assert_close(level.noised(clean, noise), scheduler.add_noise(clean, noise, STEPS), rtol=0, atol=3e-5)
    velocity = PARAMETERIZATIONS["v"].target(clean, noise, level)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, STEPS), rtol=0, atol=3e-5)


def test_the_first_and_last_levels_are_the_published_ones() -> None:
    assert SD.sigmas[0].item() == pytest.approx(0.0292, abs=5e-5)
    assert SD.sigmas[-1].item() == pytest.approx(14.6146, abs=5e-4)
    assert bool((SD.sigmas.diff() > 0).all())


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_discrete_levels_preserve_variance(quantile: float) -> None:
    level = SD.at(torch.tensor([quantile]))

    assert (level.alpha**2 + level.sigma**2).item() == pytest.approx(1, abs=1e-6)
    assert level.time.item() == float(int(torch.tensor(quantile) * 1000))


def test_coefficients_keep_their_digits_where_there_is_little_noise() -> None:
    betas = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(3)]
    noise = 1 - math.prod(1 - beta for beta in betas)

    assert SD.at(torch.tensor([0.0025])).sigma.item() == pytest.approx(math.sqrt(noise), rel=2e-7)


def test_quantiles_become_steps() -> None:
    for quantile, step in [(0.0, 0), (0.0005, 0), (0.5, 500), (0.9995, 999), (1.0, 999)]:
        assert SD.at(torch.tensor([quantile])).time.item() == step


def test_samplers_levels_are_the_trainings() -> None:
    """x = x0 + ratio·noise scaled back is alpha·x0 + sigma·noise: one level in two forms."""
    trained, sampled = at_steps(STEPS), SD.at_sigma(SD.sigmas[STEPS])
    clean, noise = torch.randn(len(STEPS), 4), torch.randn(len(STEPS), 4)
    exploding = clean + per_sample(SD.sigmas[STEPS], clean) * noise

    torch.testing.assert_close(sampled.alpha, trained.alpha, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sampled.sigma, trained.sigma, rtol=1e-5, atol=1e-7)
    assert torch.equal(sampled.time, trained.time)
    torch.testing.assert_close(SD.model_input(exploding, sampled), trained.noised(clean, noise), rtol=1e-5, atol=1e-5)


def test_sigma_and_timestep_undo_each_other_on_the_table() -> None:
    torch.testing.assert_close(SD.sigma(torch.arange(1000)), SD.sigmas, rtol=1e-5, atol=1e-7)
    assert torch.equal(SD.timestep(SD.sigmas), torch.arange(1000.0))


def test_between_the_tables_entries_sigma_is_log_linear() -> None:
    expected = (SD.sigmas[100].log() * 0.75 + SD.sigmas[101].log() * 0.25).exp()

    torch.testing.assert_close(SD.sigma(torch.tensor(100.25)), expected, rtol=1e-5, atol=0)
    assert torch.equal(SD.sigma(torch.tensor([-5.0, 1e6])), SD.sigma(torch.tensor([0.0, 999.0])))


@given(st.floats(0.5, 12), st.floats(0, 1, exclude_max=True, width=32))
def test_flow_levels_are_straight_lines(shift: float, quantile: float) -> None:
    level = FlowSchedule(shift).at(torch.tensor([quantile]))
    u = torch.tensor(quantile).item()

    assert (level.alpha + level.sigma).item() == pytest.approx(1, abs=1e-6)
    assert level.sigma.item() == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5, abs=1e-7)
    assert torch.equal(level.time, level.sigma)


@given(st.floats(0.5, 12), st.floats(0.001, 1))
def test_shifting_back_by_the_inverse_gives_the_time(shift: float, time: float) -> None:
    there = shifted(torch.tensor(time, dtype=torch.float64), shift)

    assert shifted(there, 1 / shift).item() == pytest.approx(time, rel=1e-9)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_an_exponential_shift_is_a_shift_by_its_exponential(mu: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    time = torch.linspace(0.01, 1, 50)
    reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, time)

    torch.testing.assert_close(shifted(time, math.exp(mu)), reference, rtol=1e-5, atol=1e-6)


def test_a_flow_table_is_diffusers_shifted_one() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)

    torch.testing.assert_close(FlowSchedule(3.0).sigmas, reference, rtol=1e-5, atol=1e-6)


def test_levels_broadcast_over_whatever_follows_the_batch() -> None:
    for shape in [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)]:
        level = NoiseLevel(torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.0, 0.0]))
        noised = level.noised(torch.ones(shape), torch.ones(shape))

        assert noised.shape == shape
        assert bool((noised[0] == 12).all())
        assert bool((noised[1] == 23).all())


def test_levels_move_together() -> None:
    level = SD.at(torch.tensor([0.5])).to("meta")

    assert {level.alpha.device.type, level.sigma.device.type, level.time.device.type} == {"meta"}


def test_a_zero_terminal_schedule_is_diffusers_rescaled_one() -> None:
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    level = SD.zero_terminal().at((torch.arange(1000).double() + 0.5) / 1000)

    torch.testing.assert_close(level.alpha**2, reference.alphas_cumprod, rtol=5e-4, atol=1e-7)
    assert level.alpha[0] == SD.at(torch.zeros(1)).alpha


def test_the_last_step_of_a_zero_terminal_schedule_is_pure_noise() -> None:
    level = SD.zero_terminal().at(torch.tensor([0.9999]))
    clean, noise = torch.randn(1, 4), torch.randn(1, 4)

    assert (level.alpha.item(), level.sigma.item(), level.time.item()) == (0, 1, 999)
    assert torch.equal(level.noised(clean, noise), noise)
    assert torch.equal(PARAMETERIZATIONS["v"].target(clean, noise, level), -clean)
    assert torch.equal(PARAMETERIZATIONS["v"].clean(-clean, noise, level), clean)


def test_samplers_numbers_of_a_zero_terminal_schedule_are_finite() -> None:
    schedule = SD.zero_terminal()
    top = schedule.sigmas[-1:]
    noise = torch.randn(1, 4)
    level = schedule.at_sigma(top)

    assert bool(schedule.sigmas.isfinite().all())
    assert bool((schedule.sigmas.diff() > 0).all())
    assert schedule.timestep(schedule.sigmas).tolist() == list(range(1000))
    torch.testing.assert_close(schedule.sigma(torch.arange(1000)), schedule.sigmas, rtol=1e-5, atol=1e-7)
    seen = schedule.model_input(schedule.initial(noise, torch.zeros(1, 4), top.item()), level)
    torch.testing.assert_close(seen, noise)
    assert level.time.item() == 999


def test_a_flow_ends_in_pure_noise_as_it_is() -> None:
    flow = FlowSchedule(3.0)

    assert flow.zero_terminal() is flow
    assert flow.at(torch.ones(1)).alpha.item() == 0


@pytest.mark.parametrize(
    ("schedule", "parameterization", "sentence"),
    [
        (SD, "epsilon", "this model predicts epsilon, which does not depend on the picture in pure noise"),
        (FlowSchedule(), "flow", "this model is a flow, which ends in pure noise already; leave it out"),
    ],
)
def test_what_a_zero_terminal_schedule_is_not_for(
    schedule: NoiseSchedule, parameterization: str, sentence: str
) -> None:
    rule = f"^zero_terminal_snr is for v-prediction models with discrete timesteps, but {sentence}"

    with pytest.raises(OptionError, match=rule):
        check_noising(schedule, parameterization, zero_terminal_snr=True)
    check_noising(schedule, parameterization, zero_terminal_snr=False)
    check_noising(SD, "v", zero_terminal_snr=True)


def test_a_part_of_sampling_has_a_sigma() -> None:
    discrete, flow = DiscreteSchedule.scaled_linear(), FlowSchedule(3.0)
    for schedule in (discrete, flow):
        assert schedule.sigma_at(0.0) == math.inf
        assert schedule.sigma_at(1.0) == 0.0
    # ComfyUI's percent_to_sigma.
    assert [discrete.sigma_at(one) for one in (0.25, 0.5, 0.9)] == pytest.approx(
        [4.086081, 1.61558, 0.343705], abs=1e-5
    )
    assert flow.sigma_at(0.25) == pytest.approx(3 * 0.75 / (1 + 2 * 0.75))


def test_a_flow_counts_time_as_its_network_does() -> None:
    level = FlowSchedule(2.0, time_scale=1000.0).at(torch.tensor([0.5]))
    assert level.sigma.item() == pytest.approx(2 / 3)
    assert level.time.item() == pytest.approx(2000 / 3)


def test_every_twentieth_step_keeps_its_time() -> None:
    whole = DiscreteSchedule.scaled_linear()
    few = whole.every(20)
    torch.testing.assert_close(few.sigmas, whole.sigmas[19::20])
    level = few.at(torch.tensor([0.0, 0.999]))
    assert level.time.tolist() == [19, 999]
    assert torch.equal(level.sigma, whole.at(torch.tensor([0.0195, 0.9995])).sigma)
    assert torch.equal(few.timestep(few.sigmas), torch.arange(19, 1000, 20).float())
    torch.testing.assert_close(few.sigma(torch.arange(19, 1000, 20)), few.sigmas)
    assert few.zero_terminal().stride == 20
