"""The autoencoder of Flux.2: that of latent diffusion with 32 channels, then 2×2 latents as 128 normalised channels.

The normalisation's statistics are tensors of the file (`bn.running_mean`, `bn.running_var`), so latents that leave the
autoencoder are the denoiser's already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.quantization import plain_weights
from lorasmith.families.base import LatentFormat
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts import vae_layout
from lorasmith.families.parts.autoencoders import AUTOENCODERS, LATENT_MEANS, AutoencoderKind

__all__ = ["Flux2Autoencoder"]

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
        named = vae_layout.diffusers_vae({name: one for name, one in plain.items() if name not in statistics})
        config = source.config
        if config is None:
            shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = {**vae_layout.vae_config(shapes), **source.settings}
            decoder = vae_layout.decoder_widths(shapes)
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
