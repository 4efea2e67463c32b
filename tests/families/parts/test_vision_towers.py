"""Prompts with pictures: states of language models with their vision towers are transformers', from ready patches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tiny_parts import randomized
from tiny_towers import tower_of
from torch import Tensor

from lorasmith.core.errors import DataError, ModelError
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.parts.encoders import ENCODERS, qwen_tokenizer
from lorasmith.families.parts.language_models import hidden_states, sight_of
from lorasmith.families.parts.vision_towers import PICTURE, token_positions

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}


@cache
def whole(kind: str) -> Any:
    """The vision-language model as transformers has it, with the small tower."""
    vision = tower_of(kind).config.to_dict()
    if kind == "qwen25vl":
        text = {**TEXT, "hidden_size": 128, "num_attention_heads": 1, "num_hidden_layers": 2}
        rope = {**ROPE, "mrope_section": [16, 24, 24]}
        settings = {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {**vision, "out_hidden_size": 128},
        }
        return randomized(transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**settings)))
    text = {**TEXT, "num_attention_heads": 2, "head_dim": 128, "num_hidden_layers": 5}
    rope = {**ROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    settings = {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision}
    return randomized(transformers.Qwen3VLModel(transformers.Qwen3VLConfig(**settings)))


def ours_of(kind: str, model: Any) -> Any:
    """Our encoder of the tensors in a diffusers folder's names."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    return ENCODERS[kind].build(PartSource("a folder", tensors, config=config))


def pictures_of(kind: str) -> list[Tensor]:
    multiple = 28 if kind == "qwen25vl" else 32
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3), (5, 2)]
    return [
        torch.rand(1, 3, rows * multiple, columns * multiple, generator=generator) * 2 - 1 for rows, columns in sizes
    ]


def patches(picture: Tensor, kind: str) -> Tensor:
    """Patches as transformers' processor cuts a picture that has the right size."""
    side, mean, std = (14, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    if kind == "qwen3vl":
        side, mean, std = 16, [0.5] * 3, [0.5] * 3
    scaled = (picture[0] / 2 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    rows, columns = (length // side for length in picture.shape[-2:])
    found = []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                patch = scaled[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
                found.append(torch.stack((patch, patch), dim=1).flatten())
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen25vl", "qwen3vl"])
@pytest.mark.parametrize("count", [1, 2])
def test_states_of_prompts_with_pictures_are_those_of_transformers(kind: str, count: int) -> None:
    model, pictures = whole(kind), pictures_of(kind)[:count]
    sight = sight_of(pixels=384**2, multiple=28)
    ids = qwen_tokenizer()(sight.prompt("make it blue", range(1, count + 1))).input_ids
    assert ids.count(PICTURE) == count
    ours = hidden_states(ours_of(kind, model), ids, [-1], pictures=pictures)[:, :, 0]

    side = 14 if kind == "qwen25vl" else 16
    grids = torch.tensor([(1, one.shape[-2] // side, one.shape[-1] // side) for one in pictures])
    sizes = iter((grids.prod(1) // 4).tolist())
    tokens = torch.tensor([[token for one in ids for token in [one] * (next(sizes) if one == PICTURE else 1)]])
    theirs = model(
        input_ids=tokens,
        pixel_values=torch.cat([patches(one, kind) for one in pictures]),
        image_grid_thw=grids,
        mm_token_type_ids=(tokens == PICTURE).int(),
    ).last_hidden_state
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() <= 5e-7


def test_positions_of_a_picture_count_from_the_words_before_it_and_words_after_from_its_longest_side() -> None:
    found = token_positions([1, 2, PICTURE, 3, PICTURE, 4], [(2, 3), (1, 2)])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8],
    ]


@torch.no_grad()
def test_the_encoder_is_as_before_once_pictures_were_seen() -> None:
    encoder = ours_of("qwen3vl", whole("qwen3vl"))
    before = hidden_states(encoder, [1, 2, 3], [1, -1])
    hidden_states(encoder, [1, PICTURE, 3], [1, -1], pictures=pictures_of("qwen3vl")[:1])
    assert torch.equal(hidden_states(encoder, [1, 2, 3], [1, -1]), before)


def test_a_prompt_needs_a_place_for_each_picture() -> None:
    encoder = ours_of("qwen25vl", whole("qwen25vl"))
    for ids, got in (([1, 2], 0), ([PICTURE, 1, PICTURE], 2)):
        with pytest.raises(DataError, match=rf"^a prompt with 1 picture must have as many <\|image_pad\|>, got {got};"):
            hidden_states(encoder, ids, [-1], pictures=pictures_of("qwen25vl")[:1])


def test_pictures_are_seen_in_an_area_and_whole_tokens() -> None:
    for sight, size, expected, tokens in [
        (sight_of(pixels=1024**2, multiple=28), (1024, 1024), (1036, 1036), 1369),  # as in ComfyUI
        (sight_of(pixels=384**2, multiple=28), (1024, 1024), (392, 392), 196),
        (sight_of(pixels=384**2, multiple=28), (100, 150), (308, 476), 187),  # smaller ones are enlarged
        (sight_of(pixels=384**2, multiple=32), (10, 4000), (32, 7680), 240),
    ]:
        assert sight.size(*size) == expected
        assert sight.tokens(*size) == tokens


def test_the_prompt_of_an_edit_numbers_its_pictures_or_does_not() -> None:
    plus, plain = sight_of(pixels=1, multiple=28), sight_of(pixels=1, multiple=28, is_numbered=False)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    text = plus.prompt("a {b}", (1, 3))
    assert f"user\nPicture 1: {mark}Picture 3: {mark}a {{b}}<|im_end|>\n<|im_start|>assistant\n" in text
    assert f"user\n{mark}a<|im_end|>" in plain.prompt("a", (1,))
    ids = qwen_tokenizer()(text.partition("Picture 1")[0]).input_ids
    assert len(ids) == 64, "tokens that the denoiser does not see"


def test_a_damaged_tower_matters_only_where_pictures_are_seen() -> None:
    tensors = {f"model.{name}": tensor for name, tensor in whole("qwen25vl").state_dict().items()}
    for lost in ("model.visual.blocks.3.norm1.weight", "model.visual.blocks.0.mlp.gate_proj.weight"):
        rest = {name: tensor for name, tensor in tensors.items() if name != lost}
        encoder = ENCODERS["qwen25vl"].build(PartSource("a file", rest))
        assert hidden_states(encoder, [1, 2], [-1]).shape == (1, 2, 1, 128)
        with pytest.raises(ModelError, match=r"^a file (lacks|does not fit its architecture: ).*"):
            hidden_states(encoder, [PICTURE], [-1], pictures=pictures_of("qwen25vl")[:1])
