"""Ideogram 4: captions of different length, the order of its channels, its schedule and time."""

from __future__ import annotations

import models
import pytest
import torch
from tiny_ideogram4 import called
from transformer_models import Case

from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.parts.ideogram4_network import _picture, _tokens

FAMILY = FAMILIES["ideogram4"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of("ideogram4", tmp_path_factory.mktemp("ideogram4"))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4)])
def test_predictions_of_captions_of_two_lengths_are_those_of_diffusers_own_call(
    case: Case, lengths: tuple[int, int]
) -> None:
    width = case.tiny.sizes["llm_features_dim"]
    captions = [Conditioning({"context": models.seeded("c", (1, tokens, width), seed=tokens)}) for tokens in lengths]
    joined = FAMILY.join(captions)
    latents, time = models.seeded("latents", (2, 128, 4, 6), seed=0), torch.tensor([0.6, 0.3])
    ours = case.ours.denoiser.predict(latents, time, joined)
    theirs = called(case.tiny.parts()["transformer"], latents, joined.tensors["context"], time, list(lengths))
    assert (ours - theirs).norm() / theirs.norm() <= 1e-6


@torch.no_grad()
def test_a_picture_without_text_is_predicted_as_by_the_second_network_s_call(case: Case) -> None:
    latents, time = models.seeded("latents", (1, 128, 4, 4), seed=0), torch.tensor([0.4])
    none = torch.zeros(1, 0, case.tiny.sizes["llm_features_dim"])
    ours = case.ours.denoiser.predict(latents, time, Conditioning({"context": none}))
    theirs = called(case.tiny.parts()["transformer"], latents, none, time)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_channels_of_a_token_are_its_places_first_and_come_back() -> None:
    latents = torch.arange(2 * 3).reshape(1, 1, 2, 3) + 100 * torch.arange(8).reshape(1, 8, 1, 1)
    tokens = _tokens(latents)
    # Two channels of the autoencoder, whose four places are 0–3 and 4–7.
    assert tokens[0, 0].tolist() == [0, 400, 100, 500, 200, 600, 300, 700]
    assert tokens[0, :, 0].tolist() == list(range(6))
    assert torch.equal(_picture(tokens, 2, 3), latents)


@pytest.mark.parametrize(("side", "shift"), [(512, 1.0), (1024, 2.0), (2048, 4.0)])
def test_noise_is_shifted_by_the_side_of_the_picture(case: Case, side: int, shift: float) -> None:
    found = case.ours.components.schedule.resolution_shift(side // 16, side // 16)
    assert found == pytest.approx(shift, rel=1e-9)
    assert case.ours.defaults.timestep_distribution == "shifted"


def test_times_keep_their_precision_beside_latents_in_bf16() -> None:
    seen = []

    def denoiser(latents: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        seen.append(given["timestep"])
        return latents

    time = torch.tensor([0.6001])
    latents = torch.zeros(1, 128, 2, 2, dtype=torch.bfloat16)
    FAMILY.predict(denoiser, latents, time, Conditioning({"context": torch.zeros(1, 1, 416)}))  # type: ignore[arg-type]
    assert seen[0].dtype == torch.float32
    assert seen[0].item() == pytest.approx(1 - 0.6001, rel=1e-6)
