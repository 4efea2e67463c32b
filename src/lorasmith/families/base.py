"""The family contract: a model architecture is data plus a few functions and a name table.

Shared code (training, sampling, formats, nodes) never asks which family it works on; whatever differs between
architectures is answered here. Adding a family is one module that subclasses `Family` and registers an instance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.registry import Registry

if TYPE_CHECKING:
    from lorasmith.diffusion.schedule import NoiseSchedule
    from lorasmith.families.files.checkpoint import OriginalCheckpoint
    from lorasmith.formats.names.model_names import ModelNames

__all__ = ["FAMILIES", "Components", "Conditioning", "Defaults", "Family", "LatentFormat", "TargetPreset", "collate"]


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about a picture besides the noisy latents.

    Attributes:
        tensors: every tensor's first dimension is the batch, 1 for a single prompt. `context` (1, tokens, width) is
            there in each family; `pooled` (1, width), `guidance` (1,) and others where the family has them.
        text: the prompt it came from, for reports and metadata; None when unknown.
    """

    tensors: Mapping[str, Tensor]
    text: str | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """A copy on `device` with floating-point tensors in `dtype`."""
        moved = {
            key: t.to(device, dtype if t.is_floating_point() else t.dtype, non_blocking=True)
            for key, t in self.tensors.items()
        }
        return Conditioning(moved, self.text)


def collate(conditionings: Sequence[Conditioning]) -> Conditioning:
    """One batch of several prompts' conditionings, in order.

    Contexts of different length are repeated to their least common multiple, which leaves unmasked cross-attention
    unchanged: softmax over k copies of the keys gives each copy 1/k of the weight.

    Raises:
        DataError: the conditionings carry different tensors.
    """
    keys = set(conditionings[0].tensors)
    if any(set(one.tensors) != keys for one in conditionings):
        raise DataError(
            "conditionings in one batch must carry the same tensors, got "
            + " and ".join(sorted({", ".join(sorted(one.tensors)) for one in conditionings}))
            + "; encode all captions with the same text encoder"
        )
    batch = {}
    for key in keys:
        parts = [one.tensors[key] for one in conditionings]
        if key == "context":
            tokens = math.lcm(*(part.shape[1] for part in parts))
            parts = [part.repeat(1, tokens // part.shape[1], 1) for part in parts]
        batch[key] = torch.cat(parts)
    return Conditioning(batch)


@dataclass(frozen=True)
class LatentFormat:
    """How VAE latents relate to what the denoiser sees: `model = (vae − shift) · scale`.

    Attributes:
        channels: latent channels.
        downscale: pixels per latent in each direction.
        scale, shift: numbers, or one number per channel.
    """

    channels: int
    downscale: int
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0

    def to_model(self, latents: Tensor) -> Tensor:
        """VAE latents (batch, channels, height, width) as the denoiser sees them."""
        return (latents - self._per_channel(self.shift, latents)) * self._per_channel(self.scale, latents)

    def from_model(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model`."""
        return latents / self._per_channel(self.scale, latents) + self._per_channel(self.shift, latents)

    def _per_channel(self, value: float | tuple[float, ...], latents: Tensor) -> Tensor | float:
        if isinstance(value, float):
            return value
        return latents.new_tensor(value).reshape(1, -1, *(1,) * (latents.ndim - 2))


@dataclass(frozen=True)
class TargetPreset:
    """A named choice of modules.

    Attributes:
        include, exclude: patterns matched against the whole module path (`fnmatch`, so `*` crosses dots).
        linear_only: leave convolutions out.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    linear_only: bool = False


@dataclass(frozen=True)
class Defaults:
    """Settings that suit a base model when nothing is said.

    Attributes:
        resolution: side of a square picture in pixels.
        pixel_multiple: widths and heights must divide by it.
        learning_rate: for LoRA with AdamW and alpha = rank.
        targets: name of a target preset.
        guidance: classifier-free guidance scale for pictures.
        timestep_distribution: registered distribution that training draws from.
    """

    resolution: int
    pixel_multiple: int
    learning_rate: float
    targets: str
    guidance: float
    timestep_distribution: str


@dataclass(frozen=True)
class Components:
    """The parts of a loaded base model; absent parts are None or empty (a bare denoiser file, say).

    Attributes:
        denoiser: the network that is trained, in eval mode, without gradients.
        schedule, parameterization: the noise schedule and the kind of prediction the checkpoint was trained with.
        latent: latent format, from the autoencoder's config where it says so.
        defaults: settings that suit it.
        text_encoders: by component name (`text_encoder`, `text_encoder_2`).
        tokenizers: by name (`tokenizer`, `tokenizer_2`), in the same order.
        vae: the autoencoder, a diffusers AutoencoderKL.
    """

    denoiser: nn.Module
    schedule: NoiseSchedule
    parameterization: str
    latent: LatentFormat
    defaults: Defaults
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    vae: Any = None


class Family(ABC):
    """One model architecture.

    Attributes:
        name: registered name, such as `sd1`.
        title: what people call it.
        modelspec_implementation: `modelspec.implementation`.
        targets: target presets by name.
        repeatable_context: whether text enters by unmasked cross-attention alone, so that a context repeated k times
            says the same; joint attention would weigh the text k times as much.
    """

    name: str
    title: str
    modelspec_implementation: str
    targets: Mapping[str, TargetPreset]
    repeatable_context: bool

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether an original-layout checkpoint with these denoiser tensors (prefix cut off) is of this family."""

    @abstractmethod
    def recognises_folder(self, folder: Path) -> bool:
        """Whether a diffusers folder (with `model_index.json`) is of this family."""

    @abstractmethod
    def from_original(self, checkpoint: OriginalCheckpoint, dtype: torch.dtype) -> Components:
        """Components from a single file in the original layout."""

    @abstractmethod
    def from_folder(self, folder: Path, dtype: torch.dtype) -> Components:
        """Components from a diffusers folder."""

    @abstractmethod
    def kohya_version(self, parameterization: str) -> str:
        """`ss_base_model_version` of sd-scripts' metadata."""

    @abstractmethod
    def modelspec_architecture(self, parameterization: str) -> str:
        """`modelspec.architecture` without `/lora`."""

    @abstractmethod
    def names(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> ModelNames:
        """The two-way name table of a loaded model."""

    @abstractmethod
    def encode_text(self, components: Components, text: str, *, skip_layers: int = 0) -> Conditioning:
        """Conditioning of one prompt, `(word:1.2)` weights and long prompts included.

        Args:
            components: text encoders and tokenizers, wherever they are; the result stays on their device.
            text: the prompt.
            skip_layers: how many of the encoder's last layers to leave out ("clip skip" minus one).
        """

    @abstractmethod
    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a prompt of usual length gives, batch of 1: all that `predict` needs."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents.

        Args:
            denoiser: the network, possibly with adapters attached.
            latents: (batch, channels, height, width) in the denoiser's dtype.
            time: (batch,) as `NoiseLevel.time`.
            conditioning: a batch of the same size.

        Returns:
            (batch, channels, height, width), in the parameterization that `Components` names.
        """

    def encode_image(self, components: Components, pixels: Tensor) -> Tensor:
        """VAE latents (the distribution's mean, unscaled) of pixels (batch, 3, height, width) in [−1, 1]."""
        if components.vae is None:
            raise ModelError(f"this {self.title} file has no autoencoder; load a full checkpoint to encode images")
        latents: Tensor = components.vae.encode(pixels).latent_dist.mean
        return latents

    def decode_latents(self, components: Components, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [−1, 1] of unscaled VAE latents."""
        if components.vae is None:
            raise ModelError(f"this {self.title} file has no autoencoder; load a full checkpoint to decode latents")
        pixels: Tensor = components.vae.decode(latents).sample
        return pixels.clamp(-1, 1)


FAMILIES: Registry[Family] = Registry("model family", ModelError)
