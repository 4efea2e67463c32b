"""Loaded models as people pass them around: immutable handles on shared modules.

A handle never changes what it points to; a LoRA applied to it gives a new handle with one more patch, and patches touch
the shared module only while something runs inside `active()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasmith.adapters.patch import Patch, applied
from lorasmith.core.placement import best_device, held
from lorasmith.families.base import Components, Conditioning, Defaults, Family
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["Autoencoder", "Denoiser", "Model", "TextEncoder"]


@dataclass(frozen=True)
class Model:
    """A base model as loaded.

    Attributes:
        family: its architecture.
        components: its parts.
        title: what it is called in reports (the file's or folder's name).
        path: the file or folder it came from, None for models made in memory.
    """

    family: Family
    components: Components
    title: str
    path: Path | None = None

    @property
    def defaults(self) -> Defaults:
        """Settings that suit it."""
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
        """Apply the patches while inside."""
        return applied(self.module, self.patches)

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction; see `Family.predict`. Patches count inside `active()` only."""
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
        """Apply the patches and stay on `device` (the best one if None) while inside, for many prompts in a row."""
        with contextlib.ExitStack() as stack:
            for name, module in self.base.components.text_encoders.items():
                stack.enter_context(held(module, device=device or best_device(), dtype=torch.float32))
                stack.enter_context(applied(module, [patch for target, patch in self.patches if target == name]))
            yield

    @torch.no_grad()
    def encode(self, text: str) -> Conditioning:
        """Conditioning of one prompt, in fp32 on the CPU. Patches count inside `active()` only."""
        conditioning = self.base.family.encode_text(self.base.components, text, skip_layers=self.skip_layers)
        return conditioning.to("cpu", torch.float32)


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder (ComfyUI's VAE). Latents here are the VAE's own, not yet scaled for the denoiser."""

    base: Model

    def active(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """Stay on `device` (the best one if None) while inside, for many pictures in a row."""
        module = self.base.components.vae
        if module is None:
            return contextlib.nullcontext()
        return held(module, device=device or best_device(), dtype=torch.float32)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """VAE latents (batch, channels, h, w) of pixels (batch, 3, height, width) in [−1, 1], in fp32 on the CPU."""
        return self.base.family.encode_image(self.base.components, self._placed(pixels)).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [−1, 1] of VAE latents, in fp32 on the CPU."""
        return self.base.family.decode_latents(self.base.components, self._placed(latents)).float().cpu()

    def _placed(self, tensor: Tensor) -> Tensor:
        module = self.base.components.vae
        return tensor if module is None else tensor.to(next(module.parameters()).device, torch.float32)
