"""Stable Diffusion's UNet in its two namings: diffusers' and the original (CompVis / Stability "LDM") one.

One function maps a module path from diffusers to the original; tables for loading, saving and LoRA names are built by
applying it to the real module list of a model, and inverted from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorasmith.core.errors import ModelError
from lorasmith.formats.names.model_names import ProgramLimits

__all__ = ["UNET_LIMITS", "original_unet_path", "unet_config"]

UNET_LIMITS = ProgramLimits(
    unknown_to_comfyui=("*.attn[12].to_[qkv]", "*.attn[12].to_out.0"),
    diffusers_reads=("kohya",),
    diffusers_refuses_others=True,
    diffusers_one_alpha=("*.attn[12].*",),
    sd_scripts_applies=("down_blocks.*", "mid_block.*", "up_blocks.*"),
)
"""What programs do not do with LoRA files of models with this UNet."""

_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_unet_path(path: str, *, layers_per_block: int, up_attention: tuple[bool, ...]) -> str:
    """Original path of a diffusers UNet module.

    Args:
        path: module path in diffusers, such as `down_blocks.1.attentions.0.proj_in`.
        layers_per_block: the UNet's `layers_per_block`.
        up_attention: for each up block, whether it has attention (it moves the upsampler's index).

    Raises:
        KeyError: the path is no module of such a UNet.
    """
    if path in _TOP:
        return _TOP[path]
    if match := _MID.fullmatch(path):
        kind, index, rest = match[1], int(match[2]), match[3]
        position = 1 if kind == "attentions" else 2 * index
        return f"middle_block.{position}.{_inside(kind, rest)}"
    if not (match := _BLOCK.fullmatch(path)):
        raise KeyError(path)
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    # A down block is `layers` resnets and a downsampler, counted after conv_in; an up block is one resnet more, with
    # the upsampler appended to the last of them.
    stride = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{stride * (block + 1) - 1}.{2 if up_attention[block] else 1}.conv"
    base = f"input_blocks.{1 + stride * block + index}" if side == "down" else f"output_blocks.{stride * block + index}"
    return f"{base}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def unet_config(shapes: Mapping[str, tuple[int, ...]], *, head_dim: int | None) -> dict[str, Any]:
    """Configuration of diffusers' UNet2DConditionModel for an original-layout UNet.

    Args:
        shapes: the UNet's tensor shapes by original name.
        head_dim: channels per attention head, or None for Stable Diffusion 1's fixed eight heads.

    Raises:
        ModelError: tensors that fix the configuration are missing.
    """
    channels, attention, layers = _levels(shapes)
    keys = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    proj_in = shapes[keys.partition(".transformer_blocks.")[0] + ".proj_in.weight"]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "cross_attention_dim": shapes[keys][1],
        # diffusers calls the number of heads attention_head_dim in these configs, and keeps the name for old files.
        "attention_head_dim": 8 if head_dim is None else tuple(max(1, width // head_dim) for width in channels),
        "use_linear_projection": len(proj_in) == 2,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
    }


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[bool], int]:
    """Channels of each level, whether it has attention, and resnets per level."""
    channels: list[int] = []
    attention: list[bool] = []
    counts: list[int] = []
    fresh = True
    block = 1
    while f"input_blocks.{block}.0.in_layers.0.weight" in shapes or f"input_blocks.{block}.0.op.weight" in shapes:
        if f"input_blocks.{block}.0.op.weight" in shapes:
            fresh = True
        else:
            width = shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]
            if fresh:
                channels.append(width)
                attention.append(f"input_blocks.{block}.1.proj_in.weight" in shapes)
                counts.append(0)
                fresh = False
            counts[-1] += 1
        block += 1
    if not channels:
        raise ModelError("the checkpoint lacks input_blocks.1.0.in_layers.0.weight; it is incomplete or was cut short")
    return channels, attention, counts[0]


def _inside(kind: str, rest: str) -> str:
    """Names inside a resnet differ; those inside a transformer are the same."""
    if kind == "attentions":
        return rest
    return _RESNET_PARTS[rest]
