"""Loaded models as immutable handles on shared modules.

A handle never changes its module; a LoRA applied to it gives a new handle with one more patch, and patches modify the
shared module only inside `active()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasmith.adapters.patch import Patch, patches_applied
from lorasmith.core.placement import best_device, placed
from lorasmith.families.base import Components, Conditioning, Defaults, Family
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["Autoencoder", "Denoiser", "Model", "TextEncoder"]


@dataclass(frozen=True)
class Model:
    """A base model as loaded.

    Attributes:
        family: its architecture.
        components: its parts.
        title: name in reports (the file's or folder's).
        path: the file or folder its denoiser came from, None for models made in memory.
        files: the file or folder of each part, by component name; empty for models made in memory.
    """

    family: Family
    components: Components
    title: str
    path: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def defaults(self) -> Defaults:
        """Default settings for it."""
        return self.components.defaults

    @cached_property
    def names(self) -> ModelNames:
        """Its two-way name table."""
        return self.family.names(self.components.denoiser, self.components.text_encoders)

    @property
    def denoiser(self) -> Denoiser:
        """The handle that training and sampling work on."""
        return Denoiser(self)

    @property
    def text_encoder(self) -> TextEncoder:
        """The handle that encodes prompts."""
        return TextEncoder(self)

    @property
    def autoencoder(self) -> Autoencoder:
        """The handle that encodes and decodes pictures."""
        return Autoencoder(self)


@dataclass(frozen=True)
class Denoiser:
    """A denoiser with an ordered list of LoRAs (ComfyUI's MODEL)."""

    base: Model
    patches: tuple[Patch, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The shared network."""
        return self.base.components.denoiser

    def patched(self, patch: Patch) -> Denoiser:
        """A handle with one more LoRA."""
        return replace(self, patches=(*self.patches, patch))

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The module has the patches inside."""
        return patches_applied(self.module, self.patches)

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction; see `Family.predict`. Patches apply inside `active()` only."""
        return self.base.family.predict(self.module, latents, time, conditioning)


@dataclass(frozen=True)
class TextEncoder:
    """The text encoders with their LoRAs (ComfyUI's CLIP).

    Attributes:
        skip_layers: last layers to leave out.
        patches: by component name.
    """

    base: Model
    skip_layers: int = 0
    patches: tuple[tuple[str, Patch], ...] = ()

    def patched(self, component: str, patch: Patch) -> TextEncoder:
        """A handle with one more LoRA on `component`."""
        return replace(self, patches=(*self.patches, (component, patch)))

    @contextlib.contextmanager
    def active(self, device: torch.device | None = None) -> Iterator[None]:
        """The encoders are on `device` (the best one if None) with their patches inside, for many prompts in a row."""
        with contextlib.ExitStack() as stack:
            for name, module in self.base.components.text_encoders.items():
                stack.enter_context(placed(module, device=device or best_device(), dtype=self._dtype(name)))
                stack.enter_context(
                    patches_applied(module, [patch for target, patch in self.patches if target == name])
                )
            yield

    @torch.no_grad()
    def encode(self, text: str) -> Conditioning:
        """Conditioning of one prompt, in fp32 on the CPU. Patches apply inside `active()` only."""
        base = self.base
        with contextlib.ExitStack() as stack:  # does nothing inside `active()`
            for name, module in base.components.text_encoders.items():
                stack.enter_context(placed(module, device=_device_of(module), dtype=self._dtype(name)))
            return base.family.encode_text(base.components, text, skip_layers=self.skip_layers).to("cpu", torch.float32)

    def _dtype(self, component: str) -> torch.dtype:
        return ENCODERS[self.base.family.text_encoders[component].kind].dtype


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder (ComfyUI's VAE). Latents here are the VAE's own, not yet scaled for the denoiser."""

    base: Model

    def active(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """The autoencoder is on `device` (the best one if None) inside, for many pictures in a row."""
        module = self.base.components.vae
        if module is None:
            return contextlib.nullcontext()
        return placed(module, device=device or best_device(), dtype=torch.float32)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """VAE latents (batch, channels, [frames,] h, w) of pixels (batch, 3, height, width) in [−1, 1], fp32, CPU."""
        with self._placed(pixels) as placed:
            return self.base.family.encode_image(self.base.components, placed).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [−1, 1] of VAE latents, in fp32 on the CPU."""
        with self._placed(latents) as placed:
            return self.base.family.decode_latents(self.base.components, placed).float().cpu()

    @contextlib.contextmanager
    def _placed(self, tensor: Tensor) -> Iterator[Tensor]:
        """The autoencoder is in fp32 on its device inside; yields `tensor` on that device. No effect in `active()`."""
        module = self.base.components.vae
        if module is None:
            yield tensor
            return
        device = _device_of(module)
        with placed(module, device=device, dtype=torch.float32):
            yield tensor.to(device, torch.float32)


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
