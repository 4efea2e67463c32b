"""A small random Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_parts import TinyFamily, qwen
from torch import Tensor, nn


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    (context,), _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    return {"context": context[None]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    out: Tensor = denoiser([latents[0].unsqueeze(1)], 1 - time, [given["context"][0]]).sample[0]
    return -out.squeeze(1)[None]


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return pipeline(**arguments, guidance_scale=guidance - 1).images[0]


Z_IMAGE = TinyFamily(
    "z-image",
    "z_image_bf16.safetensors",
    {
        "dim": 64,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "cap_feat_dim": 32,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1536, 512, 512],
    },
    {"text_encoder": lambda: qwen(3, rope_theta=1e6)},
    named=lambda tensors: tensors | {"norm_final.weight": torch.ones(64)},
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
)
