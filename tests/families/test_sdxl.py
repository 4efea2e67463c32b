"""Stable Diffusion XL, held against what diffusers makes of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_models import PREFIX, diffusers_pipeline, saved_checkpoint
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule, plan_adapters
from lorasmith.core.errors import ModelError
from lorasmith.data.encoding import load_dataset
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning, PictureSize
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.slots import Encoding
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import prepare_noise
from tests.covering import slow_except

GOLDEN = Path(__file__).parents[1] / "golden"
SDXL = FAMILIES["sdxl"]
PARTS: dict[str, Callable[[Model], Any]] = {
    "unet": lambda model: model.components.denoiser,
    "vae": lambda model: model.components.vae,
    "text_encoder": lambda model: model.components.text_encoders["text_encoder"],
    "text_encoder_2": lambda model: model.components.text_encoders["text_encoder_2"],
}
V_PREDICTION = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


@dataclass(frozen=True)
class Loaded:
    """One checkpoint, as we load it and as diffusers does."""

    ours: Model
    theirs: Any


@pytest.fixture(scope="module")
def loaded(sdxl_file: Path, sdxl: Model, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(sdxl, diffusers_pipeline(sdxl_file, tmp_path_factory.mktemp("sdxl-config")))


def conditioning(batch: int = 2, *, tokens: int = 77, **extra: Tensor) -> Conditioning:
    context = models.seeded(f"context {tokens}", (batch, tokens, models.SDXL_TINY.context), seed=0)
    pooled = models.seeded("pooled", (batch, models.SDXL_TINY.pooled), seed=0)
    return Conditioning({"context": context, "pooled": pooled, **extra})


def test_every_tensor_is_the_one_that_diffusers_loads(loaded: Loaded) -> None:
    for part, get in PARTS.items():
        ours, theirs = get(loaded.ours).state_dict(), getattr(loaded.theirs, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def test_the_original_layout_is_had_back_from_the_model(sdxl: Model) -> None:
    state, table = sdxl.components.denoiser.state_dict(), SDXL.table(sdxl.components.denoiser)
    back = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        back[f"{PREFIX}{table[path].path}.{leaf}"] = tensor
    expected = models.checkpoint(models.SDXL_TINY, 0)

    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("file", ["sdxl", "folder"])
def test_what_it_is_called_and_what_suits_it(
    loaded: Loaded, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = loaded.ours
    if file == "folder":
        loaded.theirs.save_pretrained(tmp_path)
        model = load_model(tmp_path)
        for get in PARTS.values():
            ours, again = get(loaded.ours).state_dict(), get(model).state_dict()
            assert ours.keys() == again.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in again.items())
        same = [one.text_encoder.encode("a (red:1.3) fox").tensors for one in (loaded.ours, model)]
        assert all(torch.equal(same[0][name], same[1][name]) for name in ("context", "pooled"))
    components = model.components

    assert model.family is SDXL
    assert components.parameterization == "epsilon"
    assert (components.latent.channels, components.latent.downscale, components.latent.scale) == (4, 8, 0.13025)
    assert (model.defaults.resolution, model.defaults.pixel_multiple) == (1024, 32)
    assert SDXL.kohya_version("v") == "sdxl_base_v1-0"
    assert SDXL.modelspec_architecture("epsilon") == "stable-diffusion-xl-v1-base"


@torch.no_grad()
@pytest.mark.parametrize("sizes", [None, torch.tensor([[700, 1300, 0, 31, 64, 128], [64, 128, 5, 0, 64, 128]])])
def test_predictions_are_those_of_diffusers(loaded: Loaded, sizes: Tensor | None) -> None:
    latents, time = models.seeded("x", (2, 4, 8, 16), seed=0), torch.tensor([951.0, 123.0])
    given = conditioning() if sizes is None else conditioning(time_ids=sizes)
    # Without sizes the picture is taken for one that was made as large as it is.
    expected = torch.tensor([[64, 128, 0, 0, 64, 128]] * 2) if sizes is None else sizes

    prediction = loaded.ours.denoiser.predict(latents, time, given)
    reference = loaded.theirs.unet(
        latents,
        time,
        encoder_hidden_states=given.tensors["context"],
        added_cond_kwargs={"text_embeds": given.tensors["pooled"], "time_ids": expected.float()},
    ).sample
    torch.testing.assert_close(prediction, reference, rtol=0, atol=1e-5)
    assert reference.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("text", ["a red fox", ""])
def test_prompts_are_encoded_as_in_diffusers(loaded: Loaded, text: str) -> None:
    context, _, pooled, _ = loaded.theirs.encode_prompt(text, negative_prompt="")
    found = loaded.ours.text_encoder.encode(text)

    torch.testing.assert_close(found.tensors["context"], context)
    torch.testing.assert_close(found.tensors["pooled"], pooled)
    assert {name: (1, *tensor.shape[1:]) for name, tensor in found.tensors.items()} == SDXL.conditioning_shapes(
        loaded.ours.components.denoiser
    )


@torch.no_grad()
def test_a_skip_of_one_layer_is_what_it_does_anyway(sdxl: Model) -> None:
    contexts = [
        replace(sdxl.text_encoder, encoding=Encoding(skip_layers=skipped)).encode("a fox").tensors["context"]
        for skipped in range(3)
    ]

    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[1], contexts[2])


@pytest.mark.parametrize("prediction", slow_except(["epsilon", "v"], "v"))
def test_pictures_are_those_of_diffusers(loaded: Loaded, tmp_path: Path, prediction: str) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    is_v = prediction == "v"
    ours = load_model(saved_checkpoint(tmp_path / "v.safetensors", V_PREDICTION)) if is_v else loaded.ours
    pipe = StableDiffusionXLPipeline(**loaded.theirs.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        loaded.theirs.scheduler.config,
        timestep_spacing="linspace",
        prediction_type="v_prediction" if is_v else "epsilon",
        rescale_betas_zero_snr=is_v,
    )
    pipe.scheduler.set_timesteps(10)  # whole timesteps, which both take for the same noise
    top = float(pipe.scheduler.init_noise_sigma)
    # diffusers scales the first state by sigma, ComfyUI and `generate` by sqrt(1 + sigma²).
    noise = prepare_noise(3, (1, 4, 4, 8)) * float(np.sqrt(1 + top**2) / top)
    drawn = pipe(
        "a red fox", negative_prompt="blue", latents=noise, height=32, width=64, guidance_scale=5.0,
        num_inference_steps=10, output_type="np",
    ).images[0]  # fmt: skip
    pictures = generate(ours, "a red fox", negative="blue", seed=3, steps=10, width=64, height=32)

    assert drawn.std() > 0.05
    assert np.abs(drawn - np.asarray(pictures[0], np.float32) / 255).max() < 1 / 255


def test_v_prediction_with_a_schedule_that_ends_in_noise(tmp_path: Path) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    components = load_model(saved_checkpoint(tmp_path / "v.safetensors", V_PREDICTION)).components
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    found = components.schedule.at((torch.arange(1000) + 0.5) / 1000).alpha ** 2

    assert components.parameterization == "v"
    assert found[-1] == 0
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_v_prediction_alone_keeps_the_schedule(tmp_path: Path) -> None:
    components = load_model(saved_checkpoint(tmp_path / "v.safetensors", {"v_pred": torch.zeros(0)})).components

    assert components.parameterization == "v"
    assert components.schedule.at(torch.tensor([0.9999])).alpha > 0


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_models_with_continuous_noise_levels_are_refused(tmp_path: Path, mark: str) -> None:
    file = saved_checkpoint(tmp_path / "edm.safetensors", {mark: torch.zeros(4)})
    with pytest.raises(ModelError, match=f"must have the noise schedule of Stable Diffusion XL, but its tensor {mark}"):
        load_model(file)


def test_sizes_are_those_of_the_real_picture(sdxl: Model, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"wide": (200, 90), "square": (64, 64)}.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
            folder / f"{name}.png"
        )
    data = load_dataset(folder, sdxl, trigger="a fox", resolution=64)
    sizes = {sample.name: sample.conditioning.tensors["time_ids"].tolist() for sample in data.samples}
    latents = {sample.name: tuple(8 * side for side in sample.latents.shape[1:]) for sample in data.samples}

    assert latents == {"wide.png": (32, 96), "square.png": (64, 64)}
    assert sizes["square.png"] == [[64, 64, 0, 0, 64, 64]]
    # 200×90 pixels become 96×43, of which 11 are cut off, 6 of them above.
    assert sizes["wide.png"] == [[90, 200, 6, 0, 32, 96]]


def test_sizes_keep_every_digit_in_any_dtype() -> None:
    size = PictureSize(original=(1025, 4099), crop=(0, 517), target=(1024, 1024))
    sized = SDXL.sized(conditioning(1), size).to("cpu", torch.bfloat16)

    assert sized.tensors["time_ids"].tolist() == [[1025, 4099, 0, 517, 1024, 1024]]
    assert sized.tensors["context"].dtype == torch.bfloat16


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(sdxl: Model) -> None:
    """Captions of one and of two chunks, pictures of several sizes, different noise levels."""
    captions = ("a fox", "a penguin on a pink background, " * 20, "")
    sizes = (
        PictureSize((64, 64), (0, 0), (64, 64)),
        PictureSize((900, 700), (12, 0), (64, 64)),
        PictureSize((50, 300), (0, 80), (64, 64)),
    )
    parts = [SDXL.sized(sdxl.text_encoder.encode(text), size) for text, size in zip(captions, sizes, strict=True)]
    latents, time = models.seeded("x", (3, 4, 8, 8), seed=0), torch.tensor([951.0, 123.0, 500.0])
    together = sdxl.denoiser.predict(latents, time, SDXL.join(parts))

    assert parts[1].tensors["context"].shape[1] > 77
    for index, part in enumerate(parts):
        row = slice(index, index + 1)
        alone = sdxl.denoiser.predict(latents[row], time[row], part)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def released() -> nn.Module:
    with torch.device("meta"):
        return SDXL.denoiser_class()(**SDXL.released)


def test_the_released_configuration_is_that_of_the_released_shapes(released: Any) -> None:
    shapes = dict(models.SDXL_FULL.tensors())
    config = SDXL.denoiser_config(shapes)
    originals = {path: place.path for path, place in SDXL.table(released).items()}

    assert SDXL.recognises(shapes)
    assert {name: tuple(v) if isinstance(v := released.config[name], list) else v for name in config} == config
    assert SDXL.conditioning_shapes(released) == {"context": (1, 77, 2048), "pooled": (1, 1280)}
    assert shapes == {
        f"{originals[path]}.{leaf}": tuple(parameter.shape)
        for (path, _, leaf), parameter in ((name.rpartition("."), one) for name, one in released.named_parameters())
    }


def test_names_and_default_targets_are_those_of_sd_scripts(released: nn.Module) -> None:
    record = json.loads((GOLDEN / "kohya_sdxl_modules.json").read_text())
    names = SDXL.names(released, {})

    def targeted(preset: str) -> set[str]:
        chosen = SDXL.presets[preset]
        plan = plan_adapters(released, [Rule(chosen.include, chosen.exclude, chosen.linear_only)], rank=4)
        return {f"lora_unet_{names.denoiser[one.path].path.replace('.', '_')}" for one in plan.adapters}

    assert sorted(targeted("transformer")) == record["unet"]
    assert set(record["unet"]) | set(record["unet_conv"]) <= targeted("all")
    for number, component in enumerate(("text_encoder", "text_encoder_2"), start=1):
        # OneTrainer trains the projection as well.
        paths = [path for path in names.paths(component) if path != "text_projection"]
        assert sorted(f"lora_te{number}_{path.replace('.', '_')}" for path in paths) == record[component]
