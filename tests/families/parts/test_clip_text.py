"""CLIP prompts against ComfyUI's numbers (golden/make_clip_text.py) and against their own rules."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.parts.clip import clip_tokenizer, encode_prompt, tokenize_prompt
from lorasmith.families.parts.encoders import parse_weights

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("clip_text.json").read_text(encoding="utf-8"))

tokenizer = cache(lambda pad: clip_tokenizer(pad_token=pad))


@cache
def encoder(projected: bool) -> Any:
    """A CLIP text encoder whose weights are the formula that the golden numbers were made with."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**GOLDEN["config"], bos_token_id=49406, projection_dim=GOLDEN["config"]["hidden_size"])
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        original = name if name.startswith("text_") else f"text_model.{name}"
        values = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.37 + len(original)).reshape(
            tensor.shape
        )
        weights[name] = (values * 0.5 + ("norm" in name and name.endswith("weight"))).float()
    model.load_state_dict(weights)
    return model


def test_tokens_and_weights_are_comfyuis() -> None:
    for case in GOLDEN["tokens"]:
        chunks = tokenize_prompt(case["prompt"], tokenizer(case["pad"]))

        expected = [[(token, weight) for token, weight, count in runs for _ in range(count)] for runs in case["chunks"]]
        assert [[token for token, _ in chunk] for chunk in chunks] == [
            [token for token, _ in chunk] for chunk in expected
        ]
        weights = [weight for _, weight in chain(*chunks)]
        assert weights == pytest.approx([weight for _, weight in chain(*expected)], rel=1e-12)


def test_encodings_are_comfyuis() -> None:
    for case in GOLDEN["encoded"]:
        context, pooled = encode_prompt(
            case["prompt"], tokenizer(case["pad"]), encoder(case["projected"]), skip_layers=case["skip_layers"]
        )

        assert list(context.shape) == case["shape"]
        torch.testing.assert_close(
            context[0, ::11, :3].flatten(), torch.tensor(case["every_11th"]), rtol=1e-4, atol=2e-5
        )
        torch.testing.assert_close(pooled.flatten(), torch.tensor(case["pooled"]), rtol=1e-4, atol=2e-5)


def test_final_norm_can_be_left_out() -> None:
    model = encoder(False)
    raw, _ = encode_prompt("a cat", tokenizer("!"), model, skip_layers=1, final_norm=False)
    normed, _ = encode_prompt("a cat", tokenizer("!"), model, skip_layers=1)

    core = getattr(model, "text_model", model)
    assert not torch.allclose(raw, normed)
    torch.testing.assert_close(core.final_layer_norm(raw), normed)


def test_a_weight_of_one_changes_nothing_and_zero_gives_the_empty_prompt() -> None:
    def context(text: str) -> torch.Tensor:
        return encode_prompt(text, tokenizer("!"), encoder(False))[0]

    assert torch.equal(context("(a cat:1.0)"), context("a cat"))
    torch.testing.assert_close(context("(a cat:0)")[:, 1:3], context("")[:, 1:3])


@given(st.text(alphabet="ab c(,)", max_size=300))
def test_chunks_are_full_length_and_hold_every_token(prompt: str) -> None:
    clip = tokenizer("!")
    chunks = tokenize_prompt(prompt, clip)

    assert all(len(chunk) == 77 and chunk[0] == (clip.bos_token_id, 1.0) for chunk in chunks)
    inner = [token for chunk in chunks for token, _ in chunk[1 : chunk.index((clip.eos_token_id, 1.0))]]
    assert inner == [
        token for text, _ in parse_weights(prompt) for token in clip(text, add_special_tokens=False)["input_ids"]
    ]


def test_the_tokenizer_is_openais() -> None:
    clip = tokenizer("<|endoftext|>")

    assert len(clip.get_vocab()) == 49408
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id, clip.model_max_length) == (49406, 49407, 49407, 77)
    assert clip("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("!").pad_token_id == 0


def test_any_vocabulary_works() -> None:
    components = load_model(BUILT_IN).components
    small, model = components.tokenizers["text_encoder"], components.text_encoders["text_encoder"]
    context, pooled = encode_prompt("a red (circle:1.3) " * 30, small, model)

    chunk = tokenize_prompt("a red circle", small)[0]
    assert (chunk[0][0], chunk[-1][0]) == (small.bos_token_id, small.pad_token_id) == (8190, 8191)
    assert context.shape[:2] == (1, 77 * len(tokenize_prompt("a red (circle:1.3) " * 30, small)))
    assert pooled.shape == (1, context.shape[2])
    assert context.isfinite().all()
