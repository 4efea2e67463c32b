"""The parts of a model besides its denoiser, the slots for them, and where the hub has their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lorasmith.diffusion.schedule import NoiseSchedule
from lorasmith.families.forms import Defaults, LatentFormat

IMAGE_ENCODER = "image_encoder"
"""Component name of an encoder of pictures that the denoiser attends to."""


def encoder_title(component: str) -> str:
    """What an encoder is called in messages."""
    return "image encoder" if component == IMAGE_ENCODER else "text encoder"


@dataclass(frozen=True)
class HubFolder:
    """Where the hub has a file."""

    path: str  # `owner/repository`, with the folder in it if it is in one
    gigabytes: float  # about, of the file; exactly the hub says

    def file(self, name: str) -> tuple[str, str]:
        """The repository, and the path in it of the file of this name."""
        owner, repository, *folders = self.path.split("/")
        return f"{owner}/{repository}", "/".join((*folders, name))


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released model to begin with, which pages offer to download."""

    name: str  # of `lorasmith models --get`
    title: str
    about: str  # what it is good for, in a sentence
    file: str  # of its denoiser, or of the whole checkpoint
    hub: HubFolder  # where that file is
    licence: str
    card: str  # `owner/repository` whose page on the hub has the licence
    distilled: str = ""  # `owner/repository` of its variant distilled to few steps, which draws with LoRAs of this one
    is_gated: bool = False  # whether the licence is to be accepted on that page first
    holds: tuple[str, ...] = ()  # component names of the parts besides the denoiser that the file holds
    config: Mapping[str, Any] = field(default_factory=dict)  # of the denoiser where it differs from `Family.released`
    encoders: Mapping[str, EncoderSlot] = field(default_factory=dict)  # where sizes of the family have different ones


@dataclass(frozen=True)
class EncoderSlot:
    """A text encoder of a family."""

    kind: str  # registered name in `families.parts.encoders`, such as `clip_l`
    usual_file: str  # common name of its file, for messages
    prefixes: tuple[str, ...] = ()  # of its tensors' names in a full checkpoint; the first one found is used
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its architecture that differ from the kind's own
    # of its states in the released sizes, where sizes of one kind belong to different families. A file of such a width
    # is for these families, whatever type a node asks for
    widths: tuple[int, ...] = ()
    hub: HubFolder | None = None  # where that file is


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a model, by component name, and the tokenizers of each."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoding:
    """Options of encoding text."""

    skip_layers: int = 0  # number of a CLIP encoder's last layers to leave out ("clip skip" minus one)
    # whose padding is followed where programs differ: `comfyui` or `diffusers`
    lengths: Literal["comfyui", "diffusers"] = "comfyui"
    # whether an empty prompt is encoded like any other. If not, families that can do without an encoder leave it out
    # (`empty_padding` of ComfyUI's CLIPTextEncodeSD3)
    encodes_empty: bool = True
    # least number of tokens, by the kind of encoder (`t5xxl`), instead of the family's
    min_tokens: Mapping[str, int] = field(default_factory=dict)
    # least number of padding tokens after a prompt, by the kind of encoder
    min_padding: Mapping[str, int] = field(default_factory=dict)

    @property
    def follows_diffusers(self) -> bool:
        return self.lengths == "diffusers"

    def tokens_of(self, kind: str, least: int, most: int | None = None) -> dict[str, Any]:
        """Numbers of tokens of a kind of T5, as arguments of `t5_tokens`; `most` is diffusers'."""
        return {
            "min_tokens": self.min_tokens.get(kind, least),
            "max_tokens": most if self.follows_diffusers else None,
            "min_padding": self.min_padding.get(kind, 0),
        }


@dataclass(frozen=True)
class AutoencoderSlot:
    """The autoencoder of a family."""

    kind: str  # registered name in `families.parts.autoencoders`
    channels: int  # of its latents; autoencoders of another number are refused
    usual_file: str  # common name of its file, for messages
    # of its tensors' names in a full checkpoint; the first one found is used
    prefixes: tuple[str, ...] = ("first_stage_model.", "vae.")
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its configuration that shapes leave open
    # settings for its kind of what a diffusers pipeline of the family holds otherwise than files of the autoencoder
    in_pipelines: Mapping[str, Any] = field(default_factory=dict)
    hub: HubFolder | None = None  # where that file is

    downscale: int = 8  # pixels per latent
    latent: LatentFormat | None = None  # in which denoisers take its latents, if not by the constants in `settings`

    def latents(self, channels: int) -> LatentFormat:
        """The format of a denoiser that takes latents of these channels."""
        if self.latent is not None:
            return self.latent
        scale, shift = self.settings.get("scaling_factor", 1.0), self.settings.get("shift_factor", 0.0)
        return LatentFormat(channels, self.downscale, scale, shift)


@dataclass(frozen=True)
class Components:
    """The parts of a loaded base model; absent parts are None or empty (a bare denoiser file, say)."""

    denoiser: nn.Module  # the network that is trained, in eval mode, without gradients
    schedule: NoiseSchedule  # that the checkpoint was trained with
    parameterization: str  # likewise, the kind of prediction
    latent: LatentFormat
    defaults: Defaults
    # by component name (`text_encoder`, `text_encoder_2`)
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)  # by the component name of their encoder
    vae: Any = None  # diffusers' autoencoder
    image_encoder: nn.Module | None = None

    @property
    def encoders(self) -> TextEncoders:
        """The text encoders with their tokenizers."""
        return TextEncoders(self.text_encoders, self.tokenizers)

    def modules(self) -> dict[str, nn.Module]:
        """Every present part, by component name."""
        others = {"vae": self.vae, IMAGE_ENCODER: self.image_encoder}
        there = {name: part for name, part in others.items() if part is not None}
        return {"denoiser": self.denoiser, **self.text_encoders, **there}
