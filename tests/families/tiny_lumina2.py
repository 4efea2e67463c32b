"""A small random Lumina 2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from spiece_models import spiece_model
from tiny_parts import TinyFamily, kl, kl_names, original_tensors, randomized
from torch import Tensor, nn

from lorasmith.families.parts.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = ["LUMINA2"]


@cache
def _lumina2() -> dict[str, Any]:
    from diffusers import Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    denoiser = Lumina2Transformer2DModel(
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(1536, 512, 512),
        multiple_of=128,
        cap_feat_dim=32,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            attn_implementation="eager",
        )
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(kl(16)),
        "text_encoder": randomized(encoder),
        "tokenizer": SentencePieceTokenizer(spiece_model("bpe"), adds_bos=True),
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, mask = pipeline._get_gemma_prompt_embeds(text)
    return {"context": context[mask.bool()][None]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    mask = torch.ones(given["context"].shape[:2], dtype=torch.bool)
    prediction: Tensor = -denoiser(latents, 1 - time, given["context"], mask).sample
    return prediction


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """Prompts as they are, without an instruction before the positive one; guidance without its normalization."""
    given = {key: one for key, one in arguments.items() if key != "prompt"}
    for start, text in (("", arguments["prompt"]), ("negative_", "")):
        given[f"{start}prompt_embeds"], given[f"{start}prompt_attention_mask"] = pipeline._get_gemma_prompt_embeds(text)
    return pipeline(**given, guidance_scale=guidance, cfg_normalization=False).images[0]


def _with_vocabulary(encoder: nn.Module) -> dict[str, Tensor]:
    vocabulary = torch.frombuffer(bytearray(spiece_model("bpe")), dtype=torch.uint8)
    return {f"model.{name}": one for name, one in encoder.state_dict().items()} | {"spiece_model": vocabulary}


LUMINA2 = TinyFamily(
    _lumina2,
    "Lumina2Pipeline",
    {
        "transformer": (
            "diffusion_models/lumina_2_model_bf16.safetensors",
            lambda one: original_tensors("lumina2", one) | {"norm_final.weight": torch.ones(96)},
        ),
        "vae": ("vae/ae.safetensors", kl_names),
        "text_encoder": ("text_encoders/gemma_2_2b_fp16.safetensors", _with_vocabulary),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={
        "diffusers reads the file": "diffusers' converter has the released widths written into it",
        "folder": "its pipeline has our tokenizer, which transformers does not save",
    },
    is_slow=True,
)
