"""Schedulers against ComfyUI's numbers (tests/sampling/golden/make_samplers.py) and against their own rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from lorasmith.sampling.samplers import SIGMA_SCHEDULES, beta_quantiles, flux2_sigmas, sigmas_for

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("samplers.json").read_text(encoding="utf-8"))
SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": DiscreteSchedule.scaled_linear(),
    "flow": FlowSchedule(**GOLDEN["schedules"]["flow"]),
    "flux": FlowSchedule(**GOLDEN["schedules"]["flux"]),
}


def test_sigmas_are_comfyuis() -> None:
    for sampler in ["euler", "uni_pc"]:
        for scheduler in SIGMA_SCHEDULES:
            runs = [run for run in GOLDEN["runs"] if run["scheduler"] == scheduler]
            assert runs
            for run in runs:
                sigmas = sigmas_for(
                    SCHEDULES[run["schedule"]], scheduler, run["steps"], denoise=run["denoise"], sampler=sampler
                )

                expected = torch.tensor(run["uni_pc_sigmas" if sampler == "uni_pc" else "sigmas"])
                settings = f"{run['schedule']}, {run['steps']} steps, denoise {run['denoise']}"
                torch.testing.assert_close(
                    sigmas, expected, rtol=3e-6, atol=0, msg=lambda text, settings=settings: f"{settings}: {text}"
                )


def test_sigmas_fall_strictly_to_zero() -> None:
    for kind in SCHEDULES:
        for scheduler in SIGMA_SCHEDULES:
            for steps in (1, 2, 25, 999, 1500):
                sigmas = sigmas_for(SCHEDULES[kind], scheduler, steps)

                assert sigmas.dtype == torch.float32
                assert sigmas[-1] == 0
                assert (sigmas.diff() < 0).all(), steps
                assert sigmas[0] <= SCHEDULES[kind].sigmas[-1] * (1 + 1e-6)


def test_denoise_takes_the_last_steps_of_a_longer_run() -> None:
    for scheduler in ["normal", "karras", "simple", "sgm_uniform", "exponential"]:
        schedule = SCHEDULES["discrete"]

        assert torch.equal(sigmas_for(schedule, scheduler, 6, denoise=0.45), sigmas_for(schedule, scheduler, 13)[-7:])
        assert torch.equal(sigmas_for(schedule, scheduler, 6, denoise=0.99995), sigmas_for(schedule, scheduler, 6))
        assert len(sigmas_for(schedule, scheduler, 6, denoise=0.0)) == 0


def test_unknown_schedulers_are_refused_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"unknown scheduler 'turbo'.*known are simple, sgm_uniform, normal"):
        sigmas_for(SCHEDULES["discrete"], "turbo", 4)


# As ComfyUI 0.33's get_schedule answers: the second to fourth sigma.
FLUX2 = {
    (4, 4096): (0.967384, 0.908144, 0.7672),
    (20, 4096): (0.994191, 0.987814, 0.980784),
    (20, 1536): (0.992665, 0.98464, 0.975823),
    (50, 12288): (0.998388, 0.996714, 0.994975),
}


def test_flux2_sigmas_are_comfyuis() -> None:
    for steps, patches in FLUX2:
        sigmas = flux2_sigmas(steps, patches)
        assert len(sigmas) == steps + 1
        assert sigmas[[0, -1]].tolist() == [1, 0]
        assert sigmas[1:4].tolist() == pytest.approx(FLUX2[steps, patches], abs=1e-6)


def test_beta_quantiles_are_those_of_the_arcsine_and_uniform_distributions() -> None:
    probabilities = np.linspace(0, 1, 101)
    assert beta_quantiles(probabilities, 0.5) == pytest.approx(np.sin(np.pi * probabilities / 2) ** 2, abs=1e-12)
    assert beta_quantiles(probabilities, 1.0) == pytest.approx(probabilities, abs=1e-12)
