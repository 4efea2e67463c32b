"""Kinds of autoencoders: how each is recognised by its tensors and built from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed
from lorasmith.core.registry import Registry
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts import vae_layout

__all__ = ["AUTOENCODERS", "AutoencoderKind", "recognised_autoencoder"]


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


class KlAutoencoder(AutoencoderKind):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), which Flux.1 has too."""

    name = "kl"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        # Flux.2's, which is built alike, normalises its latents by statistics of its own.
        return len(shapes.get("decoder.conv_in.weight", ())) == 4 and "bn.running_mean" not in shapes

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["decoder.conv_in.weight"][1]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKL

        plain = {name: one.weight() if isinstance(one, Packed) else one for name, one in source.tensors.items()}
        named = vae_layout.diffusers_vae(plain)
        config = source.config
        if config is None:
            shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = vae_layout.vae_config(shapes) | dict(source.settings)
        return build(lambda: AutoencoderKL.from_config(config), lambda _: named, where=source.where)


AUTOENCODERS: Registry[AutoencoderKind] = Registry("autoencoder", ModelError)
AUTOENCODERS.register(KlAutoencoder.name)(KlAutoencoder())


def recognised_autoencoder(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderKind | None:
    """The kind of autoencoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in AUTOENCODERS.items() if kind.recognises(shapes)), None)
