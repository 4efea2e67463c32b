"""What Flux.1 and Flux.2 share: names of their blocks in the original layout, and the mask of joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorasmith.formats.names.model_names import OriginalName

__all__ = ["DOUBLE_ATTENTION", "GUIDANCE", "KEY_NORM", "SINGLE_NORMS", "TOP", "attention_arguments", "in_double_block"]

KEY_NORM = "double_blocks.0.img_attn.norm.key_norm"
"""A norm as wide as an attention head."""

GUIDANCE = "guidance_in.in_layer.weight"
"""Tensor of models with distilled guidance, which Flux.1 schnell and Flux.2 klein lack."""

# diffusers' path → original path.
TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
DOUBLE_ATTENTION = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}

# Position of each split module among the thirds of the fused tensor.
_FUSED = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}


def in_double_block(index: str, path: str, width: int, parts: Mapping[str, str]) -> OriginalName:
    """Place of a module of a double block.

    Args:
        index: number of the block.
        path: diffusers' path of the module in the block.
        width: of the hidden states.
        parts: original paths of the modules that are not fused, by diffusers' paths.
    """
    if path not in _FUSED:
        return OriginalName(f"double_blocks.{index}.{parts[path]}")
    fused, third = _FUSED[path]
    return OriginalName(f"double_blocks.{index}.{fused}", rows=(third * width, (third + 1) * width))


def attention_arguments(mask: Tensor | None, pixels: int) -> dict[str, Any]:
    """diffusers' `joint_attention_kwargs`, in which text comes first, then the picture, which is not masked.

    Args:
        mask: of the text, (batch, tokens); None for none.
        pixels: number of the picture's tokens.
    """
    if mask is None:
        return {}
    picture = mask.new_ones(len(mask), pixels)
    return {"attention_mask": torch.cat((mask, picture), dim=1)[:, None, None]}
