"""What Flux.1 and the families after it share: names of blocks, positions, masks, latents as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorasmith.families.conditionings import BY_INDEX, BY_OFFSET, BY_UXO, Conditioning
from lorasmith.families.files.original_weights import block_count, norm_name
from lorasmith.formats.names import OriginalName

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
DOUBLE_FEED_FORWARD = {
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}

# Patterns of Flux.1's and Chroma's layers by diffusers' paths.
ATTENTION = ("*transformer_blocks.*.attn.to_*", "*transformer_blocks.*.attn.add_*_proj")
FEED_FORWARD = (
    *("*transformer_blocks.*.ff.net.*", "*transformer_blocks.*.ff_context.net.*"),
    *("*.proj_mlp", "*blocks.*.proj_out"),
)
IN_BLOCKS = ("transformer_blocks.*", "single_transformer_blocks.*")

# Position of each split module among the thirds of the fused tensor.
_FUSED = {
    **{f"attn.to_{part}": ("img_attn.qkv", third) for third, part in enumerate("qkv")},
    **{f"attn.add_{part}_proj": ("txt_attn.qkv", third) for third, part in enumerate("qkv")},
}


def block_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Settings of diffusers' classes that the original layout's shapes determine in the same way."""
    head = shapes[norm_name(KEY_NORM, shapes)][0]
    width, in_channels = shapes["img_in.weight"]
    return {
        "in_channels": in_channels,
        "num_layers": block_count(shapes, "double_blocks."),
        "num_single_layers": block_count(shapes, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": rope_axes(head),
    }


def in_double_block(index: str, path: str, width: int, parts: Mapping[str, str]) -> OriginalName:
    """Place of a module of a double block."""
    if path not in _FUSED:
        return OriginalName(f"double_blocks.{index}.{parts[path]}")
    fused, third = _FUSED[path]
    return OriginalName(f"double_blocks.{index}.{fused}", rows=(third * width, (third + 1) * width))


# Position of each split module of Flux.1's single blocks among the rows of the fused tensor.
_SINGLE_FUSED = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}
_SINGLE = {**SINGLE_NORMS, "proj_out": "linear2"}


def in_single_block(index: str, path: str, width: int, rows: int) -> OriginalName:
    """Place of a module of a single block of Flux.1, but for its modulation."""
    if path in _SINGLE_FUSED:
        start = _SINGLE_FUSED[path] * width
        return OriginalName(f"single_blocks.{index}.linear1", rows=(start, start + rows))
    return OriginalName(f"single_blocks.{index}.{_SINGLE[path]}")


def rope_axes(head: int) -> tuple[int, int, int]:
    """Axes of the rotary embedding: 16, 56, 56 for the released head width of 128, in proportion for others."""
    return (head // 8, 7 * head // 16, 7 * head // 16)


Corner = tuple[int, int, int]
"""Rotary position (index, y, x) of a picture's first token."""


def image_positions(rows: int, columns: int, device: torch.device, corner: Corner = (0, 0, 0)) -> Tensor:
    """(rows · columns, 3) rotary positions (index, y, x) of the tokens of a picture."""
    index, top, left = corner
    y, x = torch.meshgrid(
        torch.arange(top, top + rows, device=device), torch.arange(left, left + columns, device=device), indexing="ij"
    )
    return torch.stack((torch.full_like(y, index), y, x), dim=-1).reshape(-1, 3).float()


def control_corners(
    conditioning: Conditioning, size: tuple[int, int], *, by_index: bool, spacing: int = 1, patch: int = 1
) -> list[Corner]:
    """Where each control begins, by ComfyUI's method `index`, `offset` or `uxo`.

    With `index` each has an index of its own, `spacing` apart. With `offset` all have index 1 and lie below or beside
    those before, whichever keeps the whole nearer to a square. With `uxo` all have index 0, each beyond the corner of
    the one before, the first beyond that of the picture, whose latents are `size` (height, width). A method in the
    conditioning replaces the family's own. `patch` is the latents of a token in each direction.
    """
    if BY_INDEX in conditioning.tensors or (by_index and not {BY_OFFSET, BY_UXO} & conditioning.tensors.keys()):
        return [(spacing * number, 0, 0) for number, _ in enumerate(conditioning.controls, start=1)]
    is_uxo = BY_UXO in conditioning.tensors
    corners, height, width = list[Corner](), *(size if is_uxo else (0, 0))
    for control in conditioning.controls:
        rows, columns = control.shape[-2:]
        if is_uxo:
            top, left = height, width
        else:
            top, left = (0, width) if height + rows > width + columns else (height, 0)
        corners.append((0 if is_uxo else 1, (top + patch // 2) // patch, (left + patch // 2) // patch))
        height, width = max(height, top + rows), max(width, left + columns)
    return corners


def attention_arguments(mask: Tensor | None, tokens: int) -> dict[str, Any]:
    """diffusers' `joint_attention_kwargs`, in which text comes first, then pictures, which are not masked.

    mask: of the text, (batch, tokens of text); None for none. tokens: of all pictures.
    """
    if mask is None:
        return {}
    pictures = mask.new_ones(len(mask), tokens)
    return {"attention_mask": torch.cat((mask, pictures), dim=1)[:, None, None]}


def packed_latents(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) → (batch, height/2 · width/2, 4 · channels)."""
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpacked_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed_latents`. tokens: (batch, height/2 · width/2, 4 · channels)."""
    batch, _, features = tokens.shape
    latents = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, features // 4, height, width)
