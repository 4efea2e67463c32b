"""A small random Stable Diffusion 3.5, with one block of a second attention as medium has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tiny_parts import VOCABULARY, TinyFamily, clip_names, kl, kl_names, original_tensors, randomized, t5_names
from torch import Tensor, nn

from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.parts.tokenizers import t5_tokenizer

__all__ = ["SD3"]

_CLIP_WIDTH = 32


def _clip(layers: int, activation: str, pad: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=_CLIP_WIDTH,
        intermediate_size=_CLIP_WIDTH,
        num_attention_heads=1,
        num_hidden_layers=layers,
        hidden_act=activation,
        projection_dim=_CLIP_WIDTH,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=pad,
    )


@cache
def _sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    denoiser = SD3Transformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=2 * _CLIP_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    t5 = T5Config(
        vocab_size=32128,
        d_model=2 * _CLIP_WIDTH,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(kl(16, scale=1.5305, shift=0.0609)),
        "text_encoder": randomized(CLIPTextModel(_clip(12, "quick_gelu", VOCABULARY - 1))),
        "text_encoder_2": randomized(CLIPTextModelWithProjection(_clip(32, "gelu", 0))),
        "text_encoder_3": randomized(T5EncoderModel(t5)),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "tokenizer_3": t5_tokenizer(),
    }


def _dressed(parts: dict[str, Any]) -> dict[str, Any]:
    """The first encoder with a projection that changes nothing, as published folders have it."""
    from transformers import CLIPTextModelWithProjection

    plain = parts["text_encoder"]
    projected = CLIPTextModelWithProjection(plain.config)
    projected.load_state_dict({**clip_names(plain), "text_projection.weight": torch.eye(_CLIP_WIDTH)})
    return {**parts, "text_encoder": projected.eval()}


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    prediction: Tensor = denoiser(latents, given["context"], given["pooled"], time).sample
    return prediction


def _projected_names(encoder: nn.Module) -> dict[str, Tensor]:
    return dict(encoder.state_dict())


SD3 = TinyFamily(
    _sd3,
    "StableDiffusion3Pipeline",
    {
        "transformer": (
            "diffusion_models/sd3.5_medium.safetensors",
            lambda one: original_tensors("sd3", one),
        ),
        "vae": ("vae/sd3_vae.safetensors", kl_names),
        "text_encoder": ("text_encoders/clip_l.safetensors", clip_names),
        "text_encoder_2": ("text_encoders/clip_g.safetensors", _projected_names),
        "text_encoder_3": ("text_encoders/t5xxl_fp16.safetensors", t5_names),
    },
    conditioning=_conditioning,
    call=_call,
    dressed=_dressed,
    reads_weights=True,
    unreached=("transformer_blocks.1.attn.add_q_proj",),  # the last block gives nothing for the text
    is_slow=True,
)
