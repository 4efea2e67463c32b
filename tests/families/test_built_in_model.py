"""The model that comes with the package: it sees, reads and paints, and is the same model in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.folders import ASSETS
from lorasmith.families.base import Conditioning, collate
from lorasmith.families.model import Model

PICTURES = sorted((ASSETS / "input" / "high-contrast").glob("*.png"))


@pytest.fixture(scope="module")
def pipeline(tiny: Model) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        tiny.path, safety_checker=None, feature_extractor=None, torch_dtype=torch.float32, local_files_only=True
    )


def pixels_of(picture: Path, side: int) -> Tensor:
    """(1, 3, side, side) in [−1, 1]."""
    with Image.open(picture) as image:
        array = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_pictures_survive_the_autoencoder(tiny: Model, picture: Path) -> None:
    pixels = pixels_of(picture, tiny.defaults.resolution)
    latents = tiny.autoencoder.encode(pixels)
    again = tiny.autoencoder.decode(latents)

    assert latents.shape == (1, 4, *(side // tiny.components.latent.downscale for side in pixels.shape[2:]))
    # A share of the variance: 1 is a grey square, and fine lines of icons cost a small autoencoder up to a fifth.
    assert (again - pixels).square().mean() < 0.25 * pixels.var()


def test_latents_are_about_as_large_as_the_noise_they_meet(tiny: Model) -> None:
    pixels = torch.cat([pixels_of(picture, tiny.defaults.resolution) for picture in PICTURES])
    latents = tiny.components.latent.to_model(tiny.autoencoder.encode(pixels))

    assert 0.5 < latents.std() < 2


@torch.no_grad()
def test_predictions_are_those_of_diffusers(tiny: Model, pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    time = torch.tensor([999.0, 40.0])

    prediction = tiny.denoiser.predict(latents, time, Conditioning({"context": context}))
    torch.testing.assert_close(prediction, pipeline.unet(latents, time, encoder_hidden_states=context).sample)


@torch.no_grad()
def test_a_generated_picture_is_the_one_that_diffusers_generates(tiny: Model, pipeline: Any) -> None:
    """Prompt to pixels through our functions, with diffusers' scheduler between them, against its whole pipeline."""
    steps, guidance, prompt = 4, 3.0, "a red apple on a white background"
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        prompt, latents=noise.clone(), num_inference_steps=steps, guidance_scale=guidance, output_type="np"
    ).images

    both = collate([tiny.text_encoder.encode(""), tiny.text_encoder.encode(prompt)])
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    latents = noise
    for time in scheduler.timesteps:
        without, with_prompt = tiny.denoiser.predict(torch.cat([latents] * 2), time.float().expand(2), both).chunk(2)
        latents = scheduler.step(without + guidance * (with_prompt - without), time, latents).prev_sample
    pixels = tiny.autoencoder.decode(tiny.components.latent.from_model(latents))
    found = (pixels / 2 + 0.5).permute(0, 2, 3, 1).numpy()

    assert expected.std() > 0.1  # a picture, not a grey square
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_its_schedule_and_prediction_are_read_from_its_scheduler(tiny: Model, pipeline: Any) -> None:
    level = tiny.components.schedule.at(torch.tensor([0.25]))

    assert tiny.components.parameterization == "v"
    torch.testing.assert_close(level.alpha**2, pipeline.scheduler.alphas_cumprod[250:251], rtol=1e-5, atol=0)
