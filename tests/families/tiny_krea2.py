"""A small random Krea 2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from tiny_parts import TinyFamily, grid_positions, image_patches, latents_of_patches, qwen
from tiny_towers import with_tower
from torch import Tensor, nn


def _krea_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norm = re.compile(r"(qnorm|knorm|prenorm|postnorm|txtmlp\.0|last\.norm)\.weight$")
    flat = {name: one.flatten() if name.endswith(".mod.lin") else one for name, one in tensors.items()}
    return {norm.sub(r"\1.scale", name): one for name, one in flat.items()}


def _text_only(pipeline: Any) -> Any:
    """The pipeline gives positions for three axes, which text alone has one of."""
    forward = pipeline.text_encoder.forward

    def one_axis(*args: Any, position_ids: Tensor, **rest: Any) -> Any:
        return forward(*args, position_ids=position_ids[0], **rest)

    return mock.patch.object(pipeline.text_encoder, "forward", one_axis)


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    with _text_only(pipeline):
        context, mask = pipeline.encode_prompt(text)
    return {"context": context[mask][None].flatten(2)}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    layers = given["context"].unflatten(2, (12, -1))
    ids = torch.cat((torch.zeros(layers.shape[1], 3), grid_positions(3, height // 2, width // 2)))
    patches = denoiser(image_patches(latents[:, :, 0]), layers, time, ids).sample
    return latents_of_patches(patches, height, width).unsqueeze(2)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    noise = arguments["latents"][:, :, 0]
    packed = {**arguments, "latents": pipeline._pack_latents(noise, *noise.shape)}
    with _text_only(pipeline):
        return pipeline(**packed, guidance_scale=guidance - 1).images[0]


KREA2 = TinyFamily(
    "krea2",
    "krea2_raw.safetensors",
    {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "text_hidden_dim": 32,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 48,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 12, 12),
    },
    {"text_encoder": lambda: qwen(36, rope_theta=5e6)},
    encoder_names=with_tower("qwen3vl", "model.language_model.", "model.visual."),
    network="Krea2Transformer2DModel",
    named=_krea_names,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    is_slow=True,
)
