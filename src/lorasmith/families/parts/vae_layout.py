"""The KL autoencoder of latent diffusion in the original naming, converted to diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["decoder_widths", "diffusers_vae", "vae_config"]

_RENAMES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.q\.", ".mid_block.attentions.0.to_q."),
    (r"\.mid\.attn_1\.k\.", ".mid_block.attentions.0.to_k."),
    (r"\.mid\.attn_1\.v\.", ".mid_block.attentions.0.to_v."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
)
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.(?:(\d+)\.)?")


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration of diffusers' AutoencoderKL for tensors under its names, as far as shapes determine it."""
    levels = _counted(r"encoder\.down_blocks\.(\d+)\.", shapes)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)
        ),
        "layers_per_block": _counted(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", shapes),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def decoder_widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels of the decoder's levels, the finest first; autoencoders may have a smaller decoder."""
    levels = _counted(r"decoder\.up_blocks\.(\d+)\.", shapes)
    return tuple(shapes[f"decoder.up_blocks.{level}.resnets.0.conv2.weight"][0] for level in reversed(range(levels)))


def diffusers_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under diffusers' names; attention's 1×1 convolutions become matrices.

    Tensors under these names already are kept. Tensors of its training (losses, counters of averages) are left out.
    """
    levels = _counted(r"decoder\.up\.(\d+)\.", tensors)
    converted = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PARTS):
            continue
        new = _UP.sub(lambda match: _up_block(match, levels), name)
        for pattern, replacement in _RENAMES:
            new = re.sub(pattern, replacement, new)
        if ".attentions." in new and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        converted[new] = tensor
    return converted


def _counted(pattern: str, names: Iterable[str]) -> int:
    """One more than the highest number that `pattern` finds at the start of a name; 1 when it finds none."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=0)


def _up_block(match: re.Match[str], levels: int) -> str:
    # The original counts up blocks from the finest level, diffusers in the order they run.
    block = levels - 1 - int(match[1])
    inside = "upsamplers.0" if match[2] == "upsample" else f"resnets.{match[3]}"
    return f"decoder.up_blocks.{block}.{inside}."
