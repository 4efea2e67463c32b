"""A small random Flux.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from original_models import clip_l_shapes
from tiny_parts import VOCABULARY, TinyFamily, clip, grid_positions, image_patches, latents_of_patches, scaled, t5
from torch import Tensor, nn


def _clip_l() -> nn.Module:
    from transformers import CLIPTextModel

    encoder: nn.Module = CLIPTextModel(clip(12, 64, 256))
    names = {name.removeprefix("text_model.") for name in encoder.state_dict()}
    assert names == set(clip_l_shapes(12, VOCABULARY, 64))
    return encoder


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
    "flux1",
    "flux1-dev.safetensors",
    {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 14, 14),
    },
    {"text_encoder": _clip_l, "text_encoder_2": t5},
    named=scaled,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
)
