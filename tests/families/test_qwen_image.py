"""Qwen-Image: its chat, its encoder in files and folders of the whole vision-language model, odd sides, variants."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from original_models import save
from transformer_models import TINY

from lorasmith.core.errors import DataError
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import PipelineConfigs
from lorasmith.families.files.gguf import names_of
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.loading import load_model
from lorasmith.families.part_loading import load_text_encoder
from lorasmith.families.parts.encoders import ENCODERS, qwen_tokenizer, recognised_encoder
from lorasmith.families.parts.language_models import SYSTEM, SYSTEM_TOKENS, chat_of, seen_from

QWEN = TINY["qwen-image"]


def test_the_denoiser_sees_what_follows_the_opening_of_the_users_turn() -> None:
    for text in ["a fox", "", "two <|im_start|>user\n turns"]:
        tokenizer = qwen_tokenizer()
        ids = tokenizer(chat_of(text)).input_ids
        assert len(tokenizer(SYSTEM).input_ids) == SYSTEM_TOKENS == seen_from(tokenizer, ids)
        assert tokenizer.decode(ids[SYSTEM_TOKENS:]) == f"{text}<|im_end|>\n<|im_start|>assistant\n"


# What ComfyUI's QwenImageTEModel and Krea2TEModel cut off.
CHATS = {
    "two turns": ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na fox", "a fox"),
    "the user's alone": ("<|im_start|>user\na fox", "a fox"),
    "an answer second": ("<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n"),
    "nothing said": ("<|im_start|>user\n", "<|im_start|>user\n"),
}


def test_a_prompt_that_is_a_chat_is_taken_as_it_is() -> None:
    for text, seen in CHATS.values():
        tokenizer = qwen_tokenizer()
        ids = tokenizer(chat_of(text)).input_ids
        assert chat_of(text) == text
        assert tokenizer.decode(ids[seen_from(tokenizer, ids) :]) == seen


@pytest.mark.slow
@torch.no_grad()
def test_the_encoder_is_the_text_of_the_whole_vision_language_model(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 151936, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-6}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": 128}
    config = Qwen2_5_VLConfig(text_config={**text, **heads, "rope_parameters": rope}, vision_config=vision)
    whole = Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = qwen_tokenizer()(chat_of("a fox")).input_ids
    expected = whole(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][:, SYSTEM_TOKENS:]

    whole.save_pretrained(tmp_path / "text_encoder")
    qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    # ComfyUI's file, which has the names of transformers before version 4.52.
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    tensors = {
        next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name): one.clone()
        for name, one in whole.state_dict().items()
    }
    assert {"model.layers.0.self_attn.k_proj.bias", "lm_head.weight", "visual.merger.ln_q.weight"} <= tensors.keys()
    file = save(tmp_path / "qwen_2.5_vl_7b.safetensors", tensors)
    for path in (file, tmp_path / "text_encoder"):
        encoder = load_text_encoder([path], "qwen_image")
        assert encoder.family.name == "qwen-image"
        torch.testing.assert_close(encoder.encode("a fox").tensors["context"], expected, rtol=1e-4, atol=1e-5)


def test_an_older_configuration_of_the_encoder_is_read() -> None:
    """The released folder has the language part's settings beside those of the vision part."""
    encoder = QWEN.parts()["text_encoder"]
    config = {
        **{name: getattr(encoder.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "model_type": "qwen2_5_vl",
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32},
    }
    built = ENCODERS["qwen25vl"].build(PartSource("a folder", dict(encoder.state_dict()), config=config))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(built(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_llama_cpps_names_of_the_encoder_are_those_of_qwen2() -> None:
    parts = ("attn_q.weight", "attn_k.bias", "attn_norm.weight", "ffn_norm.weight", "ffn_gate.weight")
    names = names_of("qwen2vl", ["token_embd.weight", *(f"blk.0.{one}" for one in parts)])
    kind = recognised_encoder(dict.fromkeys(names.original, (1,)))
    assert kind is ENCODERS["qwen25vl"]
    assert names.permuted == {}


@torch.no_grad()
@pytest.mark.parametrize("sides", [(6, 10), (10, 4)])
def test_an_odd_number_of_tokens_is_counted_as_in_the_class_of_the_authors(sides: tuple[int, int]) -> None:
    denoiser, family = QWEN.parts()["transformer"], FAMILIES["qwen-image"]
    latents, time = models.seeded("latents", (1, 16, 1, *sides), seed=0), torch.tensor([0.6])
    given = {"context": models.seeded("context", (1, 7, 32), seed=0)}
    ours = family.predict(denoiser, latents, time, Conditioning(given))
    torch.testing.assert_close(ours, QWEN.call(denoiser, latents, given, time), rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="sides must be even, got 6×9"):
        family.predict(denoiser, latents.new_zeros(1, 16, 1, 6, 9), time, Conditioning(given))


def test_a_prompt_without_positions_is_refused() -> None:
    latents, text = torch.zeros(1, 16, 1, 16, 8), Conditioning({"context": torch.zeros(1, 4093, 32)})
    with pytest.raises(DataError, match="takes prompts of at most 4092 tokens for this size of picture, got 4093"):
        FAMILIES["qwen-image"].predict(QWEN.parts()["transformer"], latents, torch.tensor([0.5]), text)


def test_names_say_which_edit_variant_a_model_is() -> None:
    for name, edit in {
        "qwen_image_2512_bf16": None,
        "qwen_image_edit_fp8_e4m3fn": "edit",
        "Qwen-Image-Edit-2509": "edit-2509",
        "qwen_image_edit_2509_bf16": "edit-2509",
        "FireRed-Image-Edit-1.1": "edit-2509",
        "Qwen-Image-Edit-Plus": "edit-2509",
        "qwen_image_edit_2511_fp8mixed": "edit-2511",
        "QwenImageEditPipeline": "edit",
        "QwenImageEditPlusPipeline": "edit-2509",
    }.items():
        form = FAMILIES["qwen-image"].controls_of(QWEN.parts()["transformer"], [name])
        assert (None if form is None else form.name) == edit


def test_the_empty_tensor_of_2511_or_its_configuration_says_that_it_is_2511(tmp_path: Path) -> None:
    told = {**QWEN.denoiser_tensors(), "__index_timestep_zero__": torch.zeros(0)}
    model = load_model(save(tmp_path / "repacked.safetensors", told))
    folder = QWEN.denoiser(zero_cond_t=True)
    for form in (model.control_form, FAMILIES["qwen-image"].controls_of(folder, ["a folder"])):
        assert form is not None and (form.name, form.at_zero, form.is_required) == ("edit-2511", True, True)
    assert model.as_edit("none").control_form.need == "none"
    assert model.as_edit("edit-2509").control_form != model.control_form


def test_pipelines_of_edits_are_of_the_family() -> None:
    for name in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        assert FAMILIES["qwen-image"].recognises_pipeline(PipelineConfigs("a folder", (name,), lambda part: {}))
