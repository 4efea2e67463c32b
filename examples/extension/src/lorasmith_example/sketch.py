"""A family: a small flow network on pixels that reads the bytes of its prompt. Run it to write a random model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.forms import Defaults, Diffusion, LatentFormat
from lorasmith.families.parts.autoencoders import AutoencoderKind
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, TextEncoders
from lorasmith.formats.spelling import DENOISER_START, Signature

_PATCH = 4  # pixels per latent
_CHANNELS = 3 * _PATCH**2


class Network(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=_CHANNELS, text_width=256)
        self.enter = nn.Conv2d(_CHANNELS, width, 1)
        self.time, self.text = nn.Linear(1, width), nn.Linear(256, width)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.leave = nn.Conv2d(width, _CHANNELS, 1)

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.enter(latents) + (self.time(time[:, None]) + self.text(text))[:, :, None, None]
        for block in self.blocks:
            x = x + block(F.silu(x))
        return self.leave(F.silu(x))


class Sketch(Family):
    name = "sketch"  # that of the entry point
    title = "Sketch"
    pipeline = "SketchPipeline"
    network = f"{__name__}.Network"
    signs = ("enter.weight", "text.weight", "blocks.0.weight")
    modelspec_implementation = "https://example.org/sketch"
    kohya_name = modelspec_name = "sketch"
    own_diffusion = Diffusion("flow", FlowSchedule())
    own_defaults = Defaults(guidance=1.0, resolution=64, targets="transformer")
    targets = dict.fromkeys(("attention", "transformer"), Rule(("blocks.*",)))  # names that every family has
    text_encoders: Mapping[str, EncoderSlot] = {}
    autoencoder = AutoencoderSlot("pixels", channels=_CHANNELS, usual_file="sketch.safetensors", downscale=_PATCH)
    text_width = "text_width"
    lora_signatures = (Signature(title, DENOISER_START + r"blocks_[01]$"),)
    released: Mapping[str, Any] = {}

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"width": shapes["enter.weight"][0]}

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Any) -> Conditioning:
        letters = F.one_hot(torch.tensor([*texts["text"].encode()] or [0]), 256)
        return Conditioning({"context": letters.float()[None]}, texts["text"])

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        letters = conditioning.tensors["context"]  # filled up with zeros in a batch, which the mean leaves out
        mean = letters.sum(1) / letters.new_tensor(conditioning.lengths)[:, None]
        return denoiser(latents, time.to(latents.dtype), mean)


class Pixels(AutoencoderKind):
    name = "pixels"  # squares of pixels as channels; a file holds one number, by which it is recognised

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return shapes.keys() == {"gain"}

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return _CHANNELS

    def build(self, source: PartSource) -> nn.Module:
        return build(lambda: nn.ParameterDict({"gain": torch.ones(1)}), lambda _: source.tensors, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        return LatentFormat(_CHANNELS, _PATCH, scale=1.0)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, _PATCH)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, _PATCH)


if __name__ == "__main__":
    torch.manual_seed(0)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in Network().state_dict().items()}
    save_file({**tensors, "vae.gain": torch.ones(1)}, sys.argv[1])
