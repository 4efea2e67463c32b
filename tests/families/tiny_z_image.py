"""A small random Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tiny_parts import TinyFamily, chatting, kl, kl_names, original_tensors, qwen, randomized, under
from torch import Tensor, nn

__all__ = ["Z_IMAGE"]


@cache
def _z_image() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    denoiser = ZImageTransformer2DModel(
        dim=64,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        n_refiner_layers=1,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(kl(16)),
        "text_encoder": randomized(qwen(3, rope_theta=1e6)),
        "tokenizer": chatting(),
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    (context,), _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    return {"context": context[None]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    out: Tensor = denoiser([latents[0].unsqueeze(1)], 1 - time, [given["context"][0]]).sample[0]
    return -out.squeeze(1)[None]


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return pipeline(**arguments, guidance_scale=guidance - 1).images[0]


Z_IMAGE = TinyFamily(
    _z_image,
    "ZImagePipeline",
    {
        "transformer": (
            "diffusion_models/z_image_bf16.safetensors",
            lambda one: original_tensors("z-image", one) | {"norm_final.weight": torch.ones(64)},
        ),
        "vae": ("vae/ae.safetensors", kl_names),
        "text_encoder": ("text_encoders/qwen_3_4b.safetensors", under("model.")),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
)
