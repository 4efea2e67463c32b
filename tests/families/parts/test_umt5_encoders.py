"""UMT5 against transformers' own class: masked padding, weights, and where its vocabulary is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from spiece_models import spiece_model
from tiny_wan import WAN
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.families.part_loading import load_text_encoder
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.families.parts.language_models import encode_umt5
from lorasmith.families.slots import Encoding


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return WAN.parts()


@torch.no_grad()
def padded(parts: dict[str, Any], text: str, length: int) -> Tensor:
    """States of a prompt that is filled with masked padding, which is then set to zero."""
    rows = parts["tokenizer"]([text], padding="max_length", max_length=length, return_tensors="pt")
    states = parts["text_encoder"](rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    return states * rows.attention_mask[..., None]  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", ["a photo of a cat", ""])
def test_padding_is_masked_and_zero(parts: dict[str, Any], text: str) -> None:
    ours = encode_umt5(text, parts["tokenizer"], parts["text_encoder"], min_tokens=24)
    torch.testing.assert_close(ours, padded(parts, text, 24), rtol=1e-4, atol=1e-5)


def test_a_weight_moves_states_away_from_those_of_the_empty_prompt(parts: dict[str, Any]) -> None:
    plain, weighted = (
        encode_umt5(text, parts["tokenizer"], parts["text_encoder"], min_tokens=16) for text in ("cat", "(cat:1.5)")
    )
    empty, count = padded(parts, "", 16), len(parts["tokenizer"]("cat").input_ids)
    moved = empty + 1.5 * (plain - empty)
    torch.testing.assert_close(weighted[:, : count - 1], moved[:, : count - 1], rtol=1e-5, atol=1e-6)
    assert torch.equal(weighted[:, count - 1 :], plain[:, count - 1 :]), "its end has no weight"


def test_lengths(parts: dict[str, Any]) -> None:
    def length(**options: int) -> int:
        return encode_umt5("a cat on the mat", parts["tokenizer"], parts["text_encoder"], **options).shape[1]

    whole = length()
    assert (length(min_tokens=64), length(max_tokens=4), length(min_padding=3)) == (64, 4, whole + 3)


def test_the_vocabulary_is_inside_the_file_or_beside_it(tmp_path: Path) -> None:
    file = WAN.saved(tmp_path)["text_encoder"]
    inside = load_text_encoder([file], "wan").encode("a fox").tensors["context"]
    bare = save(tmp_path / "bare.safetensors", {n: t for n, t in load_file(file).items() if n != "spiece_model"})
    with pytest.raises(ModelError, match=r"needs a vocabulary, which it does not hold; put spiece\.model beside it"):
        load_text_encoder([bare], "wan")
    (tmp_path / "spiece.model").write_bytes(spiece_model("unigram"))
    assert torch.equal(load_text_encoder([bare], "wan").encode("a fox").tensors["context"], inside)


def test_options_of_the_tokenizer_hold_for_it(tmp_path: Path) -> None:
    encoder = load_text_encoder([WAN.saved(tmp_path)["text_encoder"]], "wan")
    options = Encoding(min_tokens={"umt5xxl": 20}, min_padding={"umt5xxl": 40})
    assert encoder.encode("").tensors["context"].shape[1] == 512
    assert replace(encoder, encoding=options).encode("").tensors["context"].shape[1] == 41


def test_prompts_are_cleaned_as_the_pipeline_does_where_it_is_followed(tmp_path: Path) -> None:
    encoder = load_text_encoder([WAN.saved(tmp_path)["text_encoder"]], "wan")
    follows = replace(encoder, encoding=Encoding(lengths="diffusers"))
    one, other = (follows.encode(text).tensors["context"] for text in ("a &amp;amp; \n\n cat ", "a & cat"))
    assert torch.equal(one, other)
    plain = encoder.encode("a &amp;amp; \n\n cat ").tensors["context"]
    assert not torch.equal(plain, other), "ComfyUI takes a prompt as it is"


def test_it_is_told_from_t5_by_the_biases_of_the_second_block() -> None:
    shapes = {f"encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64) for n in (0, 1)}
    assert [name for name, kind in ENCODERS.items() if kind.recognises(shapes)] == ["umt5xxl"]
    del shapes["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert [name for name, kind in ENCODERS.items() if kind.recognises(shapes)] == ["t5xxl"]
