"""A small random Stable Diffusion 3.5, with one block of a second attention as medium has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_parts import TinyFamily, clip, clip_names, t5
from torch import Tensor, nn

_CLIP_WIDTH = 32


def _clip_l() -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(clip(12, _CLIP_WIDTH, _CLIP_WIDTH))


def _clip_g() -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(clip(32, _CLIP_WIDTH, _CLIP_WIDTH, activation="gelu", pad=0))


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


SD3 = TinyFamily(
    "sd3",
    "sd3.5_medium.safetensors",
    {
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * _CLIP_WIDTH,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 2 * _CLIP_WIDTH,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    {"text_encoder": _clip_l, "text_encoder_2": _clip_g, "text_encoder_3": lambda: t5(2 * _CLIP_WIDTH)},
    network="SD3Transformer2DModel",
    conditioning=_conditioning,
    call=_call,
    dressed=_dressed,
    reads_weights=True,
    unreached=("transformer_blocks.1.attn.add_q_proj",),  # the last block gives nothing for the text
    is_slow=True,
)
