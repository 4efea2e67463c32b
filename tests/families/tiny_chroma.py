"""A small random Chroma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from tiny_parts import TinyFamily, grid_positions, image_patches, latents_of_patches, t5
from torch import Tensor, nn


def _names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released file says `scale` for the weights of all norms."""
    norms = (".query_norm.weight", ".key_norm.weight")
    return {
        f"{name.removesuffix('weight')}scale" if name.endswith(norms) or ".norms." in name else name: one
        for name, one in tensors.items()
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, _, mask, *_ = pipeline.encode_prompt(text)
    return {"context": context[:, mask[0].bool()]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    patches = denoiser(
        image_patches(latents),
        given["context"],
        time,
        grid_positions(3, height // 2, width // 2),
        torch.zeros(given["context"].shape[1], 3),
    ).sample
    return latents_of_patches(patches, height, width)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """The pipeline's picture with its mask as booleans, which hides padding, instead of numbers, which are added."""
    noise = arguments["latents"]
    packed = {**arguments, "latents": pipeline._pack_latents(noise, *noise.shape)}
    prepare = pipeline._prepare_attention_mask

    def as_booleans(**given: Any) -> Tensor | None:
        mask = prepare(**given)
        return None if mask is None else mask.bool()

    with mock.patch.object(pipeline, "_prepare_attention_mask", as_booleans):
        return pipeline(**packed, negative_prompt="", guidance_scale=guidance).images[0]


CHROMA = TinyFamily(
    "chroma",
    "Chroma1-HD.safetensors",
    {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 14, 14),
        "approximator_hidden_dim": 64,
        "approximator_layers": 2,
    },
    {"text_encoder": t5},
    network="ChromaTransformer2DModel",
    named=_names,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
    is_slow=True,
)
