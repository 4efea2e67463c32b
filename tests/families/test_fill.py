"""Flux.1 Fill: its files, the call of diffusers' pipeline, what is known of a picture, and which LoRAs fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from original_models import save
from PIL import Image, ImageOps
from tiny_flux import FLUX1
from tiny_parts import grid_positions, image_patches, latents_of_patches
from torch import Tensor

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.slots import Encoding
from lorasmith.runs.library import train
from lorasmith.runs.memory_estimate import estimate_of
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import prepare_noise
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.training.config import TrainConfig

SIZES = [(8, 12), (6, 4)]  # latents


@pytest.fixture(scope="module")
def network() -> Any:
    return FLUX1.denoiser(in_channels=384, out_channels=64)


@pytest.fixture(scope="module")
def fill(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    files = FLUX1.saved(tmp_path_factory.mktemp("fill"))
    path = files["transformer"].with_name("flux1-fill-dev.safetensors")
    return FLUX1.loaded(files | {"transformer": save(path, FLUX1.original(network))})


def prompt(batch: int, known: Tensor | None = None) -> Conditioning:
    given = {"context": (batch, 8, 32), "pooled": (batch, 64)}
    tensors = {name: models.seeded(name, shape, seed=0) for name, shape in given.items()}
    return Conditioning(tensors | ({} if known is None else {"known": known}))


def known(fill: Model, picture: Tensor, mask: Tensor) -> Tensor:
    found = fill.family.known_latents(fill.components.denoiser, picture, mask)
    assert found is not None
    return found


def masked(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Latents of a picture, and a mask (batch, 1, height, width) in pixels without symmetry."""
    height, width = (8 * side for side in size)
    mask = (models.seeded("mask", (batch, 1, height, width), seed=0) > 0.3).float()
    return models.seeded("given", (batch, 16, *size), seed=0), mask


def theirs(network: Any, latents: Tensor, given: Conditioning, time: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """The call of FluxFillPipeline, whose mask is folded as the pipeline does it."""
    batch, _, height, width = latents.shape
    folded = mask[:, 0].view(batch, height, 8, width, 8).permute(0, 2, 4, 1, 3).reshape(batch, 64, height, width)
    packed = [torch.cat([image_patches(one) for one in part.split(1)]) for part in (latents, picture, folded)]
    text = torch.zeros(given.tensors["context"].shape[1], 3)
    ids, guidance = grid_positions(3, height // 2, width // 2), torch.full((batch,), 30.0)
    tokens = network(
        torch.cat(packed, 2), given.tensors["context"], given.tensors["pooled"], time, ids, text, guidance
    ).sample
    return torch.cat([latents_of_patches(one, height, width) for one in tokens.split(1)])


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_predictions_are_those_of_diffusers_own_call(fill: Model, network: Any, size: tuple[int, int]) -> None:
    latents, time = models.seeded("latents", (2, 16, *size), seed=0), torch.tensor([0.6, 0.3])
    picture, mask = masked(2, size)
    given = prompt(2, known(fill, picture, mask))
    ours = fill.denoiser.predict(latents, time, given)
    expected = theirs(network, latents, given, time, picture, mask)
    assert ours.shape == latents.shape
    assert (ours - expected).norm() / expected.norm() <= 5e-7
    other = fill.denoiser.predict(latents, time, prompt(2, known(fill, picture, 1 - mask)))
    assert (ours - other).norm() / other.norm() > 1e-3, "the mask counts"


@torch.no_grad()
def test_without_a_picture_all_is_to_be_painted(fill: Model, network: Any) -> None:
    latents, time = models.seeded("latents", (1, 16, *SIZES[0]), seed=0), torch.tensor([0.6])
    nothing = fill.components.latent.to_model(torch.zeros_like(latents))
    expected = theirs(network, latents, prompt(1), time, nothing, torch.ones(1, 1, 64, 96))
    ours = fill.denoiser.predict(latents, time, prompt(1))
    assert (ours - expected).norm() / expected.norm() <= 5e-7


def test_a_plan_counts_no_further_tokens(fill: Model, tmp_path: Path) -> None:
    assert fill.path is not None
    settings = TrainConfig(rank=4, targets="attention")
    files = (FLUX1.saved(tmp_path)["transformer"], fill.path)
    found = [estimate_of(load_model(one), settings, card_bytes=2**33, resolution=64) for one in files]
    assert [one.controls for one in found] == [(), ()]
    needed = [one.plans[0].needed_bytes for one in found]
    assert needed[0] <= needed[1] < 1.2 * needed[0]


def test_it_takes_no_other_controls(fill: Model) -> None:
    with pytest.raises(OptionError, match=r"^edit must be left out for flux1-fill-dev \(Flux.1\), got 'kontext'$"):
        fill.as_edit("kontext")
    given = prompt(1).with_controls([torch.zeros(1, 16, 8, 8)])
    with pytest.raises(DataError, match=r"flux1-fill-dev \(Flux.1\) takes no controls, got 1; leave them out"):
        fill.denoiser.check_conditionings([given])


def pipeline(network: Any) -> Any:
    """diffusers' pipeline of the parts, which encodes pictures as we do: not at random."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
    made = diffusers.FluxFillPipeline(scheduler=scheduler, **FLUX1.parts() | {"transformer": network})
    made.set_progress_bar_config(disable=True)
    return made


def drawn_on(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[8 : height - 20, width // 3 :] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


def test_pictures_are_those_of_diffusers(fill: Model, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    (picture, mask), steps = drawn_on(96, 64), 3
    encoder = replace(fill.text_encoder, encoding=Encoding(lengths="diffusers"))
    settings: dict[str, Any] = {"steps": steps, "scheduler": "simple", "seed": 3, "text_encoder": encoder}
    (ours,) = generate(fill, "a fox", controls=[picture], mask=mask, **settings)
    sigmas = sigmas_for(fill.components.schedule, "simple", steps)
    noise = prepare_noise(3, (1, 16, 8, 12))
    theirs = pipeline(network)(
        "a fox",
        image=picture,
        mask_image=mask,
        latents=image_patches(noise),
        sigmas=sigmas[:-1].tolist(),
        num_inference_steps=steps,
        width=96,
        height=64,
    ).images[0]
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    (other,) = generate(fill, "a fox", controls=[picture], mask=ImageOps.invert(mask), **settings)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(other, dtype=int)).mean() > 1


def test_a_folder_of_its_pipeline_is_read(fill: Model, network: Any, tmp_path: Path) -> None:
    pipeline(network).save_pretrained(tmp_path / "FLUX.1-Fill-dev")
    for one in (load_model(tmp_path / "FLUX.1-Fill-dev"), load_model(pipeline(network))):
        assert one.control_form.source == "mask" and one.components.latent == fill.components.latent
        state = one.components.denoiser.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_masks_that_do_not_fit_are_said(fill: Model, tmp_path: Path) -> None:
    (picture, mask), dev = drawn_on(96, 64), FLUX1.loaded(FLUX1.saved(tmp_path))
    for model, controls, given, message in (
        (
            fill,
            [],
            mask,
            r"paints what a mask covers in a picture, got no control; give the picture as",
        ),
        (fill, [picture], None, r"got no mask; give the picture as control, and a mask$"),
        (
            fill,
            [picture],
            mask.resize((64, 64)),
            r"aspect ratio of its picture, 96×64, got 64×64; crop or scale it$",
        ),
        (
            fill,
            [picture],
            Image.new("L", (96, 64)),
            r"a part of its picture, got one of nothing; make white",
        ),
        (
            fill,
            [picture],
            Image.new("L", (96, 64), 255),
            r"a part of its picture, got one of all; make white",
        ),
        (fill, [picture] * 2, mask, r"takes at most 1 control, got 2; leave some out$"),
        (dev, [], mask, r"^flux1-dev \(Flux.1\) takes no mask, got one; leave it out, or choose a model that fills"),
    ):
        with pytest.raises(OptionError, match=message):
            generate(model, "a fox", controls=controls, mask=given, steps=1)


@pytest.mark.slow
def test_a_tiny_model_learns_to_fill_with_what_is_around_the_mask(fill: Model) -> None:
    """Pictures of one colour each, whose captions are the same: only what is known tells which colour is missing."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    outside = (mask[:, :, ::8, ::8] == 0).float()
    colours = [models.seeded(f"colour {index}", (1, 16, 1, 1), seed=0).expand(1, 16, 4, 4) for index in range(4)]
    prompts = [prompt(1, known(fill, colour * outside, mask)) for colour in colours]
    places = 2 - 2 * outside[0, 0]
    samples = [
        Sample(colour[0].contiguous(), given, f"{index}.png", places=places)
        for index, (colour, given) in enumerate(zip(colours, prompts, strict=True))
    ]
    settings: dict[str, Any] = {"algorithm": "Full", "targets": "all-linear", "learning_rate": 3e-3, "seed": 1}
    result = train(fill, EncodedDataset(tuple(samples)), steps=600, batch_size=4, training_dtype="fp32", **settings)
    denoiser = result.lora.applied_to(fill.denoiser)
    noise, time = models.seeded("noise", (1, 16, 4, 4), seed=0), torch.ones(1)
    with denoiser.active(), torch.no_grad():
        drawn = [noise - denoiser.predict(noise, time, given) for given in prompts]
    for index, one in enumerate(drawn):
        distances = [((one - colour) * (1 - outside)).norm() / (colour * (1 - outside)).norm() for colour in colours]
        assert int(torch.stack(distances).argmin()) == index, "noise alone does not say which colour it is"
        assert distances[index] < 0.5, distances
