"""Weights of noise levels against diffusers' and k-diffusion's forms, and at the ends of the schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.losses import WEIGHTINGS, diffusion_loss, loss_weights
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule, FlowSchedule, NoiseLevel, NoiseSchedule
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.batches import Batch

SD = DiscreteSchedule.scaled_linear()
STEPS = torch.tensor([0, 10, 100, 250, 500, 777, 999])
QUANTILES = torch.tensor([0.02, 0.3, 0.6, 0.97])
SCHEDULES: dict[str, NoiseSchedule] = {"epsilon": SD, "v": SD, "flow": FlowSchedule(3.0)}


def at_steps(steps: Tensor = STEPS) -> NoiseLevel:
    return SD.at((steps.double() + 0.5) / 1000)


def weights(
    level: NoiseLevel, weighting: str, parameterization: str, *, objective: str = "native", gamma: float = 5.0
) -> Tensor:
    return loss_weights(level, weighting=weighting, gamma=gamma, parameterization=parameterization, objective=objective)


def loss(parameterization: str, objective: str, weighting: str, gamma: float = 5.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    clean, noise, error = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3))
    level = SCHEDULES[parameterization].at(QUANTILES)
    losses = diffusion_loss(
        PARAMETERIZATIONS[parameterization].target(clean, noise, level) + 0.1 * error,
        Batch(clean, noise, level.noised(clean, noise), level, Conditioning({}), ()),
        parameterization=parameterization,
        objective=objective,
        loss_function="MSE",
    )
    return losses * weights(level, weighting, parameterization, objective=objective, gamma=gamma)


def test_min_snr_is_that_of_diffusers_scripts() -> None:
    for gamma in [1.0, 5.0, 20.0]:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import compute_snr

        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        snr = compute_snr(scheduler, STEPS)
        least = snr.clamp(max=gamma)
        epsilon, v = (weights(at_steps(), "min_snr", name, gamma=gamma) for name in ("epsilon", "v"))
        clean = weights(at_steps(), "min_snr", "epsilon", gamma=gamma, objective="x0")

        # diffusers' SNR is of fp32 products, ours of double-precision ones.
        for ours, theirs in ((epsilon, least / snr), (v, least / (snr + 1)), (clean, least)):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_soft_min_snr_is_that_of_k_diffusion(sigma_data: float) -> None:
    """There the network of Karras et al. is weighted, whose error is the clean sample's over c_out."""
    sigma = SD.sigmas[STEPS]
    theirs = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    ours = weights(at_steps(), "soft_min_snr", "epsilon", objective="x0", gamma=sigma_data**-2)

    torch.testing.assert_close(ours, theirs / c_out**2, rtol=1e-5, atol=0)


def test_a_flows_weights_are_those_of_its_clean_sample() -> None:
    level = FlowSchedule().at(torch.tensor([0.1, 0.31, 0.6, 0.9]))
    snr = (level.alpha / level.sigma) ** 2

    torch.testing.assert_close(weights(level, "min_snr", "flow"), snr.clamp(max=5) * level.sigma**2)
    torch.testing.assert_close(weights(level, "soft_min_snr", "flow"), snr * 5 / (snr + 5) * level.sigma**2)


def test_a_flows_weight_is_largest_where_gamma_is_reached() -> None:
    level = FlowSchedule().at(torch.linspace(0, 1, 10001))
    top = level.sigma[weights(level, "min_snr", "flow").argmax()].item()

    assert top == pytest.approx(1 / (1 + math.sqrt(5)), abs=1e-3)


def test_soft_min_snr_is_between_half_of_min_snr_and_all_of_it() -> None:
    level = at_steps(torch.arange(1000))
    ratio = weights(level, "soft_min_snr", "epsilon") / weights(level, "min_snr", "epsilon")

    assert bool(((ratio >= 0.4999) & (ratio <= 1)).all())
    assert ratio[0] > 0.99  # SNR 1170
    assert ratio[-1] > 0.99  # SNR 0.005
    assert ratio.min() == pytest.approx(0.5, abs=0.01)  # SNR 5


def test_weights_are_finite_at_both_ends() -> None:
    for name in WEIGHTINGS:
        for schedule, parameterization in [(FlowSchedule(), "flow"), (SD.zero_terminal(), "v"), (SD, "epsilon")]:
            for objective in ["native", "x0"]:
                found = weights(schedule.at(torch.tensor([0.0, 1.0])), name, parameterization, objective=objective)

                assert bool(found.isfinite().all())
                assert bool((found >= 0).all())


def test_a_weighted_squared_error_is_the_same_whatever_is_compared() -> None:
    for name in ["min_snr", "soft_min_snr"]:
        for parameterization in SCHEDULES:
            native, clean = (loss(parameterization, objective, name) for objective in ("native", "x0"))

            torch.testing.assert_close(native, clean, rtol=2e-3, atol=1e-7)


def test_the_loss_is_the_plain_one_times_the_weight() -> None:
    for objective in ["native", "x0"]:
        for parameterization in SCHEDULES:
            level = SCHEDULES[parameterization].at(QUANTILES)
            plain = loss(parameterization, objective, "none")

            for name in ("min_snr", "soft_min_snr"):
                weighted = loss(parameterization, objective, name, gamma=2.0)
                factor = weights(level, name, parameterization, objective=objective, gamma=2.0)
                torch.testing.assert_close(weighted, plain * factor)
            assert torch.equal(weights(level, "none", parameterization, objective=objective), torch.ones(4))


def test_an_unknown_weighting_is_named() -> None:
    with pytest.raises(OptionError, match=r"^unknown loss weighting 'min_snr5' \(did you mean 'min_snr'\?\)"):
        weights(at_steps(), "min_snr5", "epsilon")


def test_weights_of_flows_are_those_of_sd3s_scripts() -> None:
    for sigma in [0.01, 0.3, 0.5, 0.99]:
        level = FlowSchedule().at_sigma(torch.tensor([sigma]))
        expected = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}
        for name, weight in expected.items():  # of the clean picture; that of the prediction is sigma² times it
            assert weights(level, name, "flow", objective="x0").item() == pytest.approx(weight, rel=1e-5)
            assert weights(level, name, "flow").item() == pytest.approx(weight * sigma**2, rel=1e-5)


def test_debiased_and_p2_are_their_papers() -> None:
    level = at_steps()
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(
        weights(level, "debiased", "epsilon"), 1 / snr.clamp(max=1000).sqrt() * snr.clamp(max=1000) / snr
    )
    torch.testing.assert_close(weights(level, "p2", "epsilon"), 1 / (1 + snr))
    ends = FlowSchedule(3.0).at(torch.tensor([0.0, 0.5, 1.0]))
    for name in ("debiased", "p2", "sigma_sqrt", "cosmap"):
        assert bool(weights(ends, name, "flow").isfinite().all())
