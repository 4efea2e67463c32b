"""What families share: batches of conditionings, and the scaling of latents."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import DataError, ModelError
from lorasmith.families import z_image
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.conditionings import Conditioning, collate
from lorasmith.families.forms import Expert, LatentFormat
from lorasmith.families.loading import load_model  # noqa: F401 - families register themselves there


def conditioning(tokens: int, *, seed: int = 0, **extra: torch.Tensor) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning({"context": torch.randn(1, tokens, 4, generator=generator), **extra}, f"prompt {seed}")


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_batch_keeps_the_order_and_repeats_to_the_common_multiple(lengths: list[int]) -> None:
    parts = [conditioning(n, seed=i, pooled=torch.full((1, 2), float(i))) for i, n in enumerate(lengths)]
    batch = collate(parts, repeatable=True)
    tokens = math.lcm(*lengths)

    assert batch.tensors["context"].shape == (len(lengths), tokens, 4)
    for i, part in enumerate(parts):
        context = part.tensors["context"]
        assert torch.equal(batch.tensors["context"][i : i + 1], context.repeat(1, tokens // lengths[i], 1))
        assert batch.tensors["pooled"][i].tolist() == [i, i]


def test_repeating_leaves_cross_attention_unchanged() -> None:
    short, long = conditioning(2, seed=1), conditioning(3, seed=2)
    query = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    batch = collate([short, long], repeatable=True).tensors["context"]
    together = F.scaled_dot_product_attention(query, batch, batch)

    for i, part in enumerate((short, long)):
        context = part.tensors["context"]
        alone = F.scaled_dot_product_attention(query[i : i + 1], context, context)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_conditionings_of_different_kinds_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        collate([conditioning(2), conditioning(2, guidance=torch.ones(1))], repeatable=True)

    assert str(caught.value) == (
        "conditionings in one batch must carry the same tensors, got context and context, guidance; "
        "encode all captions with the same text encoder"
    )


def test_moving_a_conditioning_casts_floating_point_alone() -> None:
    moved = conditioning(2, ids=torch.arange(3)).to("cpu", torch.bfloat16)

    assert moved.tensors["context"].dtype == torch.bfloat16
    assert moved.tensors["ids"].dtype == torch.int64
    assert moved.text == "prompt 0"


FORMATS = {
    "one number": LatentFormat(channels=4, downscale=8, scale=0.18215),
    "shifted": LatentFormat(channels=16, downscale=8, scale=0.3611, shift=0.1159),
    "per channel": LatentFormat(channels=2, downscale=8, scale=(2.0, 4.0), shift=(1.0, -1.0)),
}


def test_latents_are_scaled_there_and_back() -> None:
    for latent in FORMATS.values():
        latents = torch.randn(3, latent.channels, 2, 5)

        torch.testing.assert_close(latent.from_model(latent.to_model(latents)), latents)


def test_each_channel_has_its_own_scale() -> None:
    scaled = FORMATS["per channel"].to_model(torch.ones(1, 2, 1, 1))

    assert scaled.flatten().tolist() == [0.0, 8.0]  # (1 − 1)·2 and (1 + 1)·4


def test_a_family_is_complete() -> None:
    for name in FAMILIES:
        family = FAMILIES[name]

        assert family.name == name
        assert family.title
        assert {"attention", "transformer", "all"} <= set(family.presets)
        assert not family.recognises({})
        assert not family.recognises({"conv_in.weight": (4, 4, 3, 3)})


def test_an_unknown_family_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"^unknown model family 'sd4' \(did you mean 'sd[123]'\?\)"):
        FAMILIES["sd4"]


def test_frames_of_clips_are_one_and_a_multiple() -> None:
    for count, whole in [(1, 1), (4, 1), (5, 5), (8, 5), (33, 33), (35, 33)]:
        clips = LatentFormat(16, 8, 1.0, frames=True, time_downscale=4)
        assert clips.whole_frames(count) == whole
        assert clips.shape(64, 32, whole) == (16, 1 + whole // 4, 8, 4)
        pictures = LatentFormat(16, 8, 1.0, frames=True)
        assert pictures.whole_frames(count) == 1
        assert pictures.shape(64, 32) == (16, 1, 8, 4)


def test_an_expert_is_known_by_its_name() -> None:
    for file, is_named in [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", True),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", True),
        ("wan2.2_t2v_low_noise_14B_fp16.safetensors", False),
        ("wan2.1_t2v_14B_bf16.safetensors", False),
    ]:
        assert Expert("high_noise", (0.875, 1.0), "transformer").is_named_in(file) is is_named


def test_the_lengths_of_captions_are_known_on_a_device() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    there = Conditioning({"context": torch.zeros(2, 3, 4)}, mask=mask).to("meta", torch.bfloat16)
    assert there.mask is not None
    assert there.mask.is_meta  # nobody could read it
    assert there.lengths == there.to("meta", torch.float32).lengths == (2, 1)
    assert replace(there, mask=torch.ones(2, 3, dtype=torch.bool)).lengths == (3, 3)


def test_tokens_behind_any_mask_are_left_out() -> None:
    for mask in [(1, 1, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0)]:
        context, kept = torch.arange(8.0).view(4, 2), torch.tensor(mask, dtype=torch.bool)
        assert torch.equal(z_image._attended(context, kept), context[kept])


def test_extensions_may_use_the_names_of_earlier_versions() -> None:
    class Former(Family):
        beside = known = lambda *_: None

    assert Former.picture_inputs is Former.known_latents is Former.beside
    given = conditioning(1).with_beside({"known": torch.zeros(1)})
    assert given.beside == given.pictures and "known" in given.tensors
    names: dict[str, object] = {}
    exec("from lorasmith.families.base import *", names)
    assert {"torch", "nn", "Family", "EncoderSlot", "FlowSchedule", "Rule", "DENOISER_START"} <= names.keys()
