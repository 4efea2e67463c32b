"""A small model of clips: Krea 2's parts, with each frame of the latents predicted on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_krea2 import KREA2
from torch import Tensor, nn

from lorasmith.families.base import Conditioning, Defaults, Diffusion, Expert, LatentFormat
from lorasmith.families.krea2 import Krea2
from lorasmith.families.model import Model

__all__ = ["clip_model"]


class Clips(Krea2):
    title = "Clips"
    experts = (Expert("high_noise", (0.8, 1.0)), Expert("low_noise", (0.0, 0.8)))

    def latent_format(self, denoiser: nn.Module, vae: Any) -> LatentFormat:
        return replace(super().latent_format(denoiser, vae), time_downscale=4)

    def defaults(self, denoiser: nn.Module, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        return replace(super().defaults(denoiser, latent, diffusion), resolution=32, frames=5, frame_rate=5.0)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        frames = [super(Clips, self).predict(denoiser, one, time, conditioning) for one in latents.split(1, dim=2)]
        return torch.cat(frames, dim=2)


def clip_model(folder: Path) -> Model:
    """The model, from files in a folder."""
    base, family = KREA2.loaded(KREA2.saved(folder)), Clips()
    parts = base.components
    latent = family.latent_format(parts.denoiser, parts.vae)
    diffusion = Diffusion(parts.parameterization, parts.schedule)
    defaults = family.defaults(parts.denoiser, latent, diffusion)
    return replace(base, family=family, components=replace(parts, latent=latent, defaults=defaults))
