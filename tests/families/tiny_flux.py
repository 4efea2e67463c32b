"""A small random Flux.1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from original_models import clip_l_shapes
from tiny_parts import (
    VOCABULARY,
    TinyFamily,
    clip_names,
    grid_positions,
    image_patches,
    kl,
    kl_names,
    latents_of_patches,
    original_tensors,
    randomized,
    scaled,
    t5_names,
)
from torch import Tensor, nn

from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.parts.tokenizers import t5_tokenizer

__all__ = ["FLUX1"]


@cache
def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    denoiser = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    clip = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=1,
        num_hidden_layers=12,
        hidden_act="quick_gelu",
        projection_dim=64,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    t5 = T5Config(
        vocab_size=32128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    assert {name.removeprefix("text_model.") for name in CLIPTextModel(clip).state_dict()} == set(
        clip_l_shapes(12, VOCABULARY, 64)
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(kl(16)),
        "text_encoder": randomized(CLIPTextModel(clip)),
        "text_encoder_2": randomized(T5EncoderModel(t5)),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, pooled, _ = pipeline.encode_prompt(text, None)
    return {"context": context, "pooled": pooled}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    patches = denoiser(
        image_patches(latents),
        given["context"],
        given["pooled"],
        time,
        grid_positions(3, height // 2, width // 2),
        torch.zeros(given["context"].shape[1], 3),
        torch.tensor([3.5]),
    ).sample
    return latents_of_patches(patches, height, width)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    noise = arguments["latents"]
    packed = {**arguments, "latents": pipeline._pack_latents(noise, *noise.shape)}
    negative = {"negative_prompt": "", "true_cfg_scale": guidance} if guidance != 1 else {}
    return pipeline(**packed, **negative).images[0]


FLUX1 = TinyFamily(
    _flux,
    "FluxPipeline",
    {
        "transformer": (
            "diffusion_models/flux1-dev.safetensors",
            lambda one: scaled(original_tensors("flux1", one)),
        ),
        "vae": ("vae/ae.safetensors", kl_names),
        "text_encoder": ("text_encoders/clip_l.safetensors", clip_names),
        "text_encoder_2": ("text_encoders/t5xxl_fp16.safetensors", t5_names),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
)
