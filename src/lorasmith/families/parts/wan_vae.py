"""The autoencoder of Wan 2.1, which Qwen-Image, Krea 2 and Anima use too: its layout, recognition and latents.

It is made for videos: pictures are one frame, and latents have a time axis. Both packages' names are read, the
original's and diffusers' (AutoencoderKLQwenImage and AutoencoderKLWan, which have the same tensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorasmith.core.quantization import plain_weights
from lorasmith.families.base import LatentFormat
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts.autoencoders import AUTOENCODERS, AutoencoderKind

__all__ = ["LATENT_MEAN", "LATENT_STD", "WanAutoencoder"]

# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

_ORIGINAL, _DIFFUSERS = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
_DEEPER = "decoder.upsamples.0.upsamples.0.residual.0.gamma"  # Wan 2.2's
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


class WanAutoencoder(AutoencoderKind):
    """Wan 2.1's: 16 channels, 8 pixels per latent."""

    name = "wan21"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (_ORIGINAL in shapes and _DEEPER not in shapes) or (
            _DIFFUSERS in shapes and "decoder.up_blocks.0.upsamplers.0.time_conv.weight" in shapes
        )

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["conv2.weight" if "conv2.weight" in shapes else "post_quant_conv.weight"][0]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        named = {_diffusers_name(name): tensor for name, tensor in plain_weights(source.tensors).items()}
        config = source.config or {
            "base_dim": named["encoder.conv_in.weight"].shape[0],
            "z_dim": named["post_quant_conv.weight"].shape[0],
            **source.settings,
        }
        known = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
        wanted = {name: value for name, value in config.items() if name in known}
        return build(lambda: AutoencoderKLQwenImage(**wanted), lambda _: named, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        return LatentFormat(vae.config.z_dim, vae.spatial_compression_ratio, scale=1.0, frames=True)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels.unsqueeze(2)).latent_dist.mean
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents).sample
        return pixels[:, :, 0]


AUTOENCODERS.register(WanAutoencoder.name)(WanAutoencoder())


def _diffusers_name(name: str) -> str:
    """diffusers' name of an original tensor; its own names are unchanged."""
    side, _, rest = name.partition(".")
    if side in ("conv1", "conv2"):
        return f"{'quant_conv' if side == 'conv1' else 'post_quant_conv'}.{rest}"
    kind, _, rest = rest.partition(".")
    if kind == "conv1":
        return f"{side}.conv_in.{rest}"
    if kind == "head":
        number, _, leaf = rest.partition(".")
        return f"{side}.{'norm_out' if number == '0' else 'conv_out'}.{leaf}"
    index, _, rest = rest.partition(".")
    if kind == "middle":
        return f"{side}.mid_block.{_MIDDLE[int(index)]}.{_resnet(rest)}"
    if kind == "downsamples":
        return f"{side}.down_blocks.{index}.{_resnet(rest)}"
    if kind == "upsamples":
        block, place = divmod(int(index), 4)
        return f"{side}.up_blocks.{block}.{'upsamplers.0' if place == 3 else f'resnets.{place}'}.{_resnet(rest)}"
    return name


def _resnet(rest: str) -> str:
    """A name within a block, in which the original numbers the layers of the residual path."""
    if (match := re.match(r"residual\.(\d)\.", rest)) is not None:
        return f"{_RESIDUAL[match[1]]}.{rest[match.end() :]}"
    return re.sub(r"^shortcut\.", "conv_shortcut.", rest)
