"""Sampling from parts gives what KSampler gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.nodes.sampling import Guider, Noise
from lorasmith.sampling.samplers import sigmas_for


@pytest.fixture
def whole(bench: Any, tiny: Model, captions: list[Conditioning]) -> torch.Tensor:
    """What KSampler makes of the first prompt."""
    values = {"seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    empty = bench.one("EmptyLatentImage", width=64, height=64)
    prompts = {"positive": captions[:1], "negative": captions[1:2]}
    samples: torch.Tensor = bench.one("KSampler", model=tiny.denoiser, **values, **prompts, latent_image=empty)[
        "samples"
    ]
    return samples


def test_parts_make_what_ksampler_makes(
    bench: Any, tiny: Model, captions: list[Conditioning], whole: torch.Tensor
) -> None:
    sampler = bench.one("KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = bench.one("BasicScheduler", model=tiny.denoiser, scheduler="karras", steps=3)
    empty = bench.one("EmptyLatentImage", width=64, height=64)
    prompts = {"positive": captions[:1], "negative": captions[1:2], "cfg": 2.0}
    parts = {"sampler": sampler, "sigmas": sigmas, "latent_image": empty}

    (result,), (clean,) = bench.call("SamplerCustom", model=tiny.denoiser, noise_seed=5, **prompts, **parts).outputs
    assert torch.equal(result["samples"], whole)
    assert torch.equal(clean["samples"], whole)  # the last step ends at the clean prediction

    guider = bench.one("CFGGuider", model=tiny.denoiser, **prompts)
    noise = bench.one("RandomNoise", noise_seed=5)
    assert torch.equal(bench.one("SamplerCustomAdvanced", noise=noise, guider=guider, **parts)["samples"], whole)


def test_the_clean_output_of_an_early_stop_is_its_last_prediction(
    bench: Any, tiny: Model, captions: list[Conditioning]
) -> None:
    guider = bench.one("BasicGuider", model=tiny.denoiser, conditioning=captions[:1])
    sigmas = bench.one("BasicScheduler", model=tiny.denoiser, scheduler="normal", steps=4)
    (noisy,), (clean,) = bench.call(
        "SamplerCustomAdvanced",
        noise=bench.one("RandomNoise"),
        guider=guider,
        sampler="euler",
        sigmas=sigmas[:3],
        latent_image=bench.one("EmptyLatentImage", width=64, height=64),
    ).outputs
    assert noisy["samples"].std() > 1.5 * clean["samples"].std()
    continued = bench.one(
        "SamplerCustomAdvanced",
        noise=bench.one("DisableNoise"),
        guider=guider,
        sampler="euler",
        sigmas=sigmas[2:],
        latent_image=noisy,
    )
    assert continued["samples"].std() < noisy["samples"].std()


def test_a_basic_guider_has_no_negative(bench: Any, tiny: Model, captions: list[Conditioning]) -> None:
    guider = bench.one("BasicGuider", model=tiny.denoiser, conditioning=captions)
    assert guider == Guider(tiny.denoiser, captions, (), 1.0)
    assert bench.one("DisableNoise") == Noise(0, is_empty=True)


def test_sigmas_of_a_part_of_the_schedule(bench: Any, tiny: Model) -> None:
    def sigmas(**changes: Any) -> torch.Tensor:
        result: torch.Tensor = bench.one("BasicScheduler", model=tiny.denoiser, scheduler="simple", **changes)
        return result

    schedule = tiny.denoiser.diffusion.schedule
    assert torch.equal(sigmas(steps=6, denoise=0.5), sigmas_for(schedule, "simple", 12)[-7:])
    assert len(sigmas(steps=6, denoise=0.0)) == 0


def test_flux2_sigmas_follow_size_and_steps(bench: Any) -> None:
    def second(**changes: int) -> float:
        sigmas = bench.one("Flux2Scheduler", **changes)
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        return float(sigmas[1])

    assert second(steps=4, width=1024, height=1024) == pytest.approx(0.967384, abs=1e-5)
    assert second(steps=4, width=512, height=512) < second(steps=4, width=1024, height=1024)
    assert second(steps=50) > second(steps=20)
