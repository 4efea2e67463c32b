"""Kinds of autoencoders: how each is recognised by its tensors and built from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import plain_weights
from lorasmith.core.registry import Registry
from lorasmith.families.base import LatentFormat
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts import vae_layout

__all__ = ["AUTOENCODERS", "FLUX_CONSTANTS", "LATENT_MEANS", "AutoencoderKind", "recognised_autoencoder"]

FLUX_CONSTANTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
"""Configuration of Flux.1's autoencoder, which Z-Image has too, beyond what shapes say."""

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

        named = vae_layout.diffusers_vae(plain_weights(source.tensors))
        config = source.config
        if config is None:
            shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = vae_layout.vae_config(shapes) | dict(source.settings)
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
