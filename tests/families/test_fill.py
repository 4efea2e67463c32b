"""Flux.1 Fill: its files, the call of diffusers' pipeline, what is known of a picture, and which LoRAs fit."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from original_models import save
from tiny_flux import FLUX1
from tiny_parts import grid_positions, image_patches, latents_of_patches
from torch import Tensor

from lorasmith.families.base import Conditioning
from lorasmith.families.model import Model

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
    found = fill.family.known(fill.components.denoiser, picture, mask)
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


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(fill: Model) -> None:
    latents, time = models.seeded("latents", (2, 16, *SIZES[0]), seed=0), torch.tensor([0.2, 0.9])
    both = prompt(2, known(fill, *masked(2, SIZES[0])))
    alone = [Conditioning({name: one[i : i + 1] for name, one in both.tensors.items()}) for i in range(2)]
    together = fill.denoiser.predict(latents, time, fill.family.join(alone))
    singles = [fill.denoiser.predict(latents[i : i + 1], time[i : i + 1], alone[i]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(singles), rtol=1e-5, atol=1e-6)


def test_its_files_are_told_by_their_shapes(fill: Model, network: Any) -> None:
    config = fill.components.denoiser.config
    assert (config.in_channels, config.out_channels) == (384, 64)
    assert fill.components.latent.channels == 16
    state = fill.components.denoiser.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in network.state_dict().items())
