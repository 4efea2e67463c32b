"""Chroma: padding that nothing attends to, prompts of T5 alone, and files of models that are built alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from transformer_models import TINY, Case

from lorasmith.core.errors import ModelError
from lorasmith.families.base import FAMILIES
from lorasmith.families.chroma import _KeysHidden
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.slots import Encoding

CHROMA = TINY["chroma"]
FAMILY = FAMILIES["chroma"]


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of("chroma", tmp_path_factory.mktemp("chroma"))


def given(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    latents, context = (models.seeded(name, shape, seed=0) for name, shape in (("x", (1, 16, 8, 8)), ("c", (1, 9, 32))))
    return latents, torch.tensor([0.6]), context[:, :tokens]


@torch.no_grad()
def test_what_a_mask_hides_changes_nothing(chroma: Case) -> None:
    latents, time, context = given(5)
    denoiser = chroma.ours.components.denoiser
    expected = FAMILY.predict(denoiser, latents, time, Conditioning({"context": context}))
    filled = torch.cat((context, torch.full((1, 4, 32), 50.0)), dim=1)
    mask = torch.arange(9)[None] < 5
    found = FAMILY.predict(denoiser, latents, time, Conditioning({"context": filled}, mask=mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_of_numbers_hides_nothing() -> None:
    """Why the pipeline of diffusers sees its padding: attention adds such a mask."""
    latents, time, context = given(9)
    denoiser = CHROMA.parts()["transformer"]
    mask = torch.cat((torch.arange(9) < 5, torch.ones(16, dtype=torch.bool)))[None]
    inputs = {
        "hidden_states": latents.reshape(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64),
        "encoder_hidden_states": context,
        "timestep": time,
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(9, 3),
    }
    hidden = denoiser(**inputs, attention_mask=mask).sample
    added = denoiser(**inputs, attention_mask=mask.float()).sample
    cut = denoiser(**{**inputs, "encoder_hidden_states": context[:, :5], "txt_ids": torch.zeros(5, 3)}).sample
    torch.testing.assert_close(hidden, cut, rtol=1e-4, atol=1e-5)
    assert (added - cut).norm() > 1e-3 * cut.norm()


def test_padding_itself_attends_to_the_text() -> None:
    """A token that may attend to nothing is NaN in some kernels, which later layers would spread."""
    seen = {}

    def processor(attn: nn.Module, states: Tensor, text: Tensor | None, mask: Tensor, rotary: Any) -> None:
        seen["mask"] = mask

    keys = torch.tensor([[True, True, False, True]])
    of_pairs = keys[:, None, None, :] * keys[:, None, :, None]
    _KeysHidden(processor)(nn.Identity(), torch.zeros(1, 4, 2), attention_mask=of_pairs)
    assert torch.equal(seen["mask"], keys[:, None, None])


def tokens(case: Case, text: str, **options: Any) -> int:
    return replace(case.ours.text_encoder, encoding=Encoding(**options)).encode(text).tensors["context"].shape[1]


def test_prompts_are_as_long_as_their_programs_make_them(chroma: Case) -> None:
    fox = len(CHROMA.parts()["tokenizer"]("a fox").input_ids)
    assert tokens(chroma, "a fox") == fox, "its tokens and the end"
    assert tokens(chroma, "a fox", lengths="diffusers") == fox + 1, "and a token of padding"
    assert tokens(chroma, "fox " * 600, lengths="diffusers") == 512
    assert tokens(chroma, "fox " * 600) > 600
    assert tokens(chroma, "a fox", min_tokens={"t5xxl": 77}) == 77
    assert tokens(chroma, "a fox", min_padding={"t5xxl": 1}) == fox + 1


def test_models_that_are_built_alike_are_told_apart(chroma: Case, tmp_path: Path) -> None:
    flux = TINY["flux1"].saved(tmp_path)
    with pytest.raises(ModelError, match=r"is the text encoder clip_l, but Chroma has t5xxl"):
        load_model(chroma.files["transformer"], text_encoders=[flux["text_encoder"]])
    model = load_model(chroma.files["transformer"], text_encoders=[flux["text_encoder_2"]], vae=flux["vae"])
    assert set(model.components.modules()) == {"denoiser", "text_encoder", "vae"}
