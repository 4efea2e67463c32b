"""A small random Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from tiny_parts import TinyFamily, image_patches, latents_of_patches, qwen25
from tiny_towers import with_tower
from torch import Tensor, nn


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, mask = pipeline.encode_prompt(text, max_sequence_length=512)  # which is the default of its call
    assert mask is None, "one prompt has no padding"
    return {"context": context}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    patches = denoiser(
        image_patches(latents[:, :, 0]), given["context"], timestep=time, img_shapes=[[(1, height // 2, width // 2)]]
    ).sample
    return latents_of_patches(patches, height, width).unsqueeze(2)


class _WithoutNorms:
    """torch for the pipeline, which gives guided predictions the norm of unguided ones; no other program does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def norm(x: Tensor, **_: Any) -> Tensor:
        return x.new_ones(())


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    packed = {**arguments, "latents": image_patches(arguments["latents"][:, :, 0])}
    with mock.patch("diffusers.pipelines.qwenimage.pipeline_qwenimage.torch", _WithoutNorms()):
        return pipeline(**packed, negative_prompt="", true_cfg_scale=guidance).images[0]


QWEN_IMAGE = TinyFamily(
    "qwen-image",
    "qwen_image_bf16.safetensors",
    {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 14, 14),
    },
    {"text_encoder": lambda: qwen25(2)},
    encoder_names=with_tower("qwen25vl", "model.", "visual."),
    network="QwenImageTransformer2DModel",
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    # The last block's text is dropped.
    unreached=tuple(f"transformer_blocks.1.{one}" for one in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.*")),
    is_slow=True,
)
