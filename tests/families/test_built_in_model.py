"""The model that comes with the package is an ordinary checkpoint: diffusers loads it and draws the same pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import ARCHITECTURE
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, built_in_models
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import prepare_noise

CONFIGS = BUILT_IN_BASE / "models" / "configs" / BUILT_IN
PICTURES = sorted((BUILT_IN_BASE / "input" / "high-contrast").glob("*.png"))
PROMPT, SEED = "a cat, on a blue background", 3


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """diffusers' own loading of the file."""
    return StableDiffusionPipeline.from_single_file(
        str(built_in_models()[BUILT_IN]), config=str(CONFIGS), local_files_only=True, torch_dtype=torch.float32
    )


def drawn_by(pipe: Any) -> np.ndarray:
    """diffusers' picture from the noise that `generate` starts with, as (height, width, 3) in [0, 1]."""
    pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.scheduler.set_timesteps(20)
    top = float(pipe.scheduler.init_noise_sigma)
    # diffusers scales the first state by sigma, ComfyUI and `generate` by sqrt(1 + sigma²).
    noise = prepare_noise(SEED, (1, 4, 16, 16)) * math.sqrt(1 + top**2) / top
    pictures = pipe(PROMPT, latents=noise, guidance_scale=3.0, num_inference_steps=20, output_type="np").images
    return np.asarray(pictures[0])


def ours(model: Model) -> np.ndarray:
    return np.asarray(generate(model, PROMPT, seed=SEED, cfg=3.0)[0], np.float32) / 255


@pytest.mark.slow
def test_diffusers_draws_the_same_from_the_single_file(pipe: Any, tiny: Model) -> None:
    assert np.abs(drawn_by(pipe) - ours(tiny)).max() < 2 / 255


@pytest.mark.slow
def test_diffusers_draws_the_same_from_a_folder(pipe: Any, tiny: Model, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "folder")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert np.abs(drawn_by(again) - ours(tiny)).max() < 2 / 255
    assert np.abs(ours(load_model(tmp_path / "folder")) - ours(tiny)).max() < 1.5 / 255


def test_it_is_small() -> None:
    checkpoint = built_in_models()[BUILT_IN]
    assert checkpoint.stat().st_size < 25e6
    assert {tensor.dtype for tensor in load_file(checkpoint).values()} == {torch.float16}


def test_the_vocabulary_is_the_first_part_of_clips(tiny: Model, pipe: Any) -> None:
    text = "a hippopotamus on a light-blue background!"
    assert tiny.components.tokenizers["text_encoder"](text).input_ids == pipe.tokenizer(text).input_ids


def pixels_of(picture: Path, side: int) -> Tensor:
    """(1, 3, side, side) in [−1, 1]."""
    with Image.open(picture) as image:
        array = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


def test_pictures_survive_the_autoencoder_and_are_about_as_large_as_the_noise_they_meet(tiny: Model) -> None:
    pixels = torch.cat([pixels_of(picture, tiny.defaults.resolution) for picture in PICTURES[::3]])
    latents = tiny.autoencoder.encode(pixels)
    again = tiny.autoencoder.decode(latents)

    assert latents.shape[1:] == (4, *(side // tiny.components.latent.downscale for side in pixels.shape[2:]))
    # A share of the variance: 1 is a grey square, and fine lines of icons cost a small autoencoder up to a fifth.
    assert ((again - pixels).square().mean((1, 2, 3)) < 0.25 * pixels.var((1, 2, 3))).all()
    assert 0.5 < tiny.components.latent.to_model(latents).std() < 2


@torch.no_grad()
def test_predictions_are_those_of_diffusers(tiny: Model, pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    time = torch.tensor([999.0, 40.0])

    prediction = tiny.denoiser.predict(latents, time, Conditioning({"context": context}))
    torch.testing.assert_close(prediction, pipe.unet(latents, time, encoder_hidden_states=context).sample)


def test_its_schedule_and_prediction_are_read_from_its_scheduler(tiny: Model, pipe: Any) -> None:
    level = tiny.components.schedule.at(torch.tensor([0.25]))

    assert tiny.components.parameterization == "v"
    torch.testing.assert_close(level.alpha**2, pipe.scheduler.alphas_cumprod[250:251], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "said", ["no JSON", "[" * 50_000, "[1, 2]", json.dumps({"unet": 3}), json.dumps({"unet": {"sample_size": 1 << 20}})]
)
def test_a_damaged_description_is_a_sentence(said: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file(load_file(built_in_models()[BUILT_IN]), path, {ARCHITECTURE: said})
    with pytest.raises(ModelError, match=r"must be settings by component in JSON; .* get it again"):
        load_model(path)


@pytest.mark.parametrize(
    ("component", "setting", "value", "said"),
    [
        ("unet", "no_such", 1, "does not fit its architecture"),
        ("unet", "norm_num_groups", 0, "does not fit its architecture"),
        ("text_encoder", "num_attention_heads", "four", "does not fit its architecture"),
        ("text_encoder", "num_attention_heads", 3, "does not fit its architecture"),
        ("defaults", "no_such", 1, "a model may say defaults for resolution, "),
        ("defaults", "learning_rate", "high", "and this one says 'high' for learning_rate"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(
    component: str, setting: str, value: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    architecture = json.loads(check_safetensors(built_in_models()[BUILT_IN]).metadata[ARCHITECTURE])
    architecture[component][setting] = value
    save_file(load_file(built_in_models()[BUILT_IN]), path, {ARCHITECTURE: json.dumps(architecture)})
    with pytest.raises(ModelError, match=said):
        load_model(path)
