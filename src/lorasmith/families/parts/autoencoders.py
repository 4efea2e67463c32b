"""Kinds of autoencoders: the contract, that of latent diffusion with its two namings, and Flux.2's.

Flux.2's is that of latent diffusion with 32 channels, then 2×2 latents as 128 normalised channels. The normalisation's
statistics are tensors of the file (`bn.running_mean`, `bn.running_var`), so latents that leave the autoencoder are the
denoiser's already.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import plain_weights
from lorasmith.core.registry import Registry
from lorasmith.families.base import AutoencoderSlot, LatentFormat
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.families.files.original_weights import PartSource, block_count, build

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
_UP = re.compile(r"^decoder\.up\.(\d{1,3})\.(block|upsample)\.(?:(\d+)\.)?")


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration of diffusers' AutoencoderKL for tensors under its names, as far as shapes determine it."""
    levels = block_count(shapes, "encoder.down_blocks.") or 1
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)
        ),
        "layers_per_block": block_count(shapes, "encoder.down_blocks.0.resnets."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def decoder_widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels of the decoder's levels, the finest first; autoencoders may have a smaller decoder."""
    levels = block_count(shapes, "decoder.up_blocks.") or 1
    return tuple(shapes[f"decoder.up_blocks.{level}.resnets.0.conv2.weight"][0] for level in reversed(range(levels)))


def diffusers_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under diffusers' names; attention's 1×1 convolutions become matrices.

    Tensors under these names already are kept. Tensors of its training (losses, counters of averages) are left out.
    """
    levels = block_count(tensors, "decoder.up.")
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


def _up_block(match: re.Match[str], levels: int) -> str:
    # The original counts up blocks from the finest level, diffusers in the order they run.
    block = levels - 1 - int(match[1])
    inside = "upsamplers.0" if match[2] == "upsample" else f"resnets.{match[3]}"
    return f"decoder.up_blocks.{block}.{inside}."


FLUX_AUTOENCODER = AutoencoderSlot(
    "kl",
    channels=16,
    usual_file="ae.safetensors",
    prefixes=("vae.", "first_stage_model."),
    settings={"scaling_factor": 0.3611, "shift_factor": 0.1159},
)
"""Flux.1's autoencoder, which Chroma, Lumina 2 and Z-Image have too."""

LATENT_MEANS = "bn.running_mean"
"""Tensor of autoencoders that normalise their latents by statistics of their own, as Flux.2's does."""


class AutoencoderKind(ABC):
    """A kind of autoencoder.

    Attributes:
        name: registered name.
    """

    name: str

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are the tensors of such an autoencoder, in the original naming or in diffusers'."""

    @abstractmethod
    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Channels of its latents."""

    @abstractmethod
    def build(self, source: PartSource) -> nn.Module:
        """The autoencoder.

        Args:
            source: its tensors, in the original naming or diffusers'.

        Raises:
            ModelError: tensors are missing or of the wrong shape.
        """

    @abstractmethod
    def latent_format(self, vae: Any) -> LatentFormat:
        """Channels, pixels and frames per latent of its latents; scale 1 and shift 0."""

    @abstractmethod
    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents (the distribution's mean) of pixels (batch, 3, height, width) in [−1, 1].

        Kinds whose latents have a time axis take pixels (batch, 3, frames, height, width) as well, of a number of
        frames that makes whole latents (`LatentFormat.whole_frames`).
        """

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), about in [−1, 1], of latents.

        Those of latents with a time axis are (batch, 3, frames, height, width).
        """


class KlAutoencoder(AutoencoderKind):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), which Flux.1 has too."""

    name = "kl"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return len(shapes.get("decoder.conv_in.weight", ())) == 4 and LATENT_MEANS not in shapes

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["decoder.conv_in.weight"][1]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKL

        named = diffusers_vae(plain_weights(source.tensors))
        config = source.config
        if config is None:
            shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = vae_config(shapes) | dict(source.settings)
        return build(lambda: AutoencoderKL.from_config(config), lambda _: named, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        config = vae.config
        return LatentFormat(config.latent_channels, 2 ** (len(config.block_out_channels) - 1), scale=1.0)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels).latent_dist.mean
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents).sample
        return pixels


AUTOENCODERS: Registry[AutoencoderKind] = Registry("autoencoder", ModelError)
AUTOENCODERS.register(KlAutoencoder.name)(KlAutoencoder())


def recognised_autoencoder(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderKind | None:
    """The kind of autoencoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in AUTOENCODERS.items() if kind.recognises(shapes)), None)


_PATCH = 2


class Flux2Autoencoder(AutoencoderKind):
    """Flux.2's, also the variant with a small decoder."""

    name = "flux2"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return LATENT_MEANS in shapes and len(shapes.get("decoder.conv_in.weight", ())) == 4

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes[LATENT_MEANS][0]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLFlux2

        plain = plain_weights(source.tensors)
        statistics = {name: tensor for name, tensor in plain.items() if name.startswith("bn.")}
        named = diffusers_vae({name: one for name, one in plain.items() if name not in statistics})
        config = source.config
        if config is None:
            shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = {**vae_config(shapes), **source.settings}
            decoder = decoder_widths(shapes)
            if decoder != config["block_out_channels"]:
                config["decoder_block_out_channels"] = decoder
        return build(
            lambda: AutoencoderKLFlux2.from_config(config), lambda _: {**named, **statistics}, where=source.where
        )

    def latent_format(self, vae: Any) -> LatentFormat:
        downscale = _PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        return LatentFormat(vae.config.latent_channels * _PATCH**2, downscale, scale=1.0)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        latents: Tensor = vae.encode(pixels).latent_dist.mean
        return (F.pixel_unshuffle(latents, _PATCH) - mean) / deviation

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        pixels: Tensor = vae.decode(F.pixel_shuffle(latents * deviation + mean, _PATCH)).sample
        return pixels


AUTOENCODERS.register(Flux2Autoencoder.name)(Flux2Autoencoder())


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, channels, 1, 1)."""
    mean, variance = (one.reshape(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
