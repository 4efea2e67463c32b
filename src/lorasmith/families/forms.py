"""What a family declares of its models as data: latents, defaults, how they were trained, controls, routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lorasmith.core.printable import count_text
from lorasmith.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class LatentFormat:
    """How VAE latents relate to the denoiser's input: `model = (vae − shift) · scale`."""

    channels: int
    downscale: int  # pixels per latent in each direction
    scale: float | tuple[float, ...]  # a number, or one for each channel; likewise the shift
    shift: float | tuple[float, ...] = 0.0
    # whether latents have a time axis, (batch, channels, frames, height, width); pictures are one frame
    frames: bool = False
    # frames per latent in time, after the first frame, which is a latent of its own; 0 where latents are of pictures
    # only
    time_downscale: int = 0

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of the latents of one picture of height × width pixels, or of a clip, without the batch."""
        times = (1 + (frames - 1) // (self.time_downscale or 1),) if self.frames else ()
        return (self.channels, *times, height // self.downscale, width // self.downscale)

    def whole_frames(self, count: int) -> int:
        """The most frames of `count` that make whole latents: 4k+1 with a time_downscale of 4; 1 for pictures."""
        return 1 + (count - 1) // self.time_downscale * self.time_downscale if self.time_downscale else 1

    def to_model(self, latents: Tensor) -> Tensor:
        """The denoiser's latents for VAE latents (batch, channels, [frames,] height, width)."""
        return (latents - self._per_channel(self.shift, latents)) * self._per_channel(self.scale, latents)

    def from_model(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model`."""
        return latents / self._per_channel(self.scale, latents) + self._per_channel(self.shift, latents)

    def _per_channel(self, value: float | tuple[float, ...], latents: Tensor) -> Tensor | float:
        if isinstance(value, float):
            return value
        return latents.new_tensor(value).reshape(1, -1, *(1,) * (latents.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default settings for a base model."""

    resolution: int = 1024  # side of a square picture in pixels
    pixel_multiple: int = 16  # widths and heights must be multiples of it
    learning_rate: float = 1e-4  # for LoRA with AdamW and alpha = rank
    targets: str = "attention+ff"  # name of a target preset
    guidance: float  # classifier-free guidance scale for pictures
    steps: int = 20  # of sampling a picture
    timestep_distribution: str = "logit_normal"  # registered distribution that training draws from
    frames: int = 1  # most frames of a clip in training, and frames of a preview; 1 for models of pictures
    frame_rate: float = 16.0  # frames a second of clips


@dataclass(frozen=True)
class Diffusion:
    """How a denoiser was trained."""

    parameterization: str  # registered kind of prediction, `epsilon`, `v` or `flow`
    schedule: NoiseSchedule


@dataclass(frozen=True)
class Expert:
    """A denoiser for a part of the noise levels, where a model has several of the same tensors."""

    name: str  # part of the names of its files, and end of the name of a LoRA for it: `high_noise`
    noise_range: tuple[float, float]  # its part of diffusion time: 0 is clean, 1 is noise
    folder: str  # its subfolder in diffusers' folders

    def is_named_in(self, file: str) -> bool:
        """Whether a file's name says that it is this expert's, such as `wan2.2_t2v_high_noise_14B` or `HighNoise`."""
        return letters(self.name) in letters(file)


ControlSource = Literal["files", "first frame", "first and last frame", "mask"]
"""Where controls come from: further files, frames of the clip itself, or the picture outside of its mask.

With a mask, `known` has the latents of that picture first, then the pixels of the mask at each latent.
"""


Encode = Callable[[Tensor], Tensor]
"""Pixels (1, 3, [frames,] height, width) in [−1, 1] → latents, scaled for the denoiser."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a text encoder sees controls: as pictures in the prompt."""

    pixels: int  # to which a picture is scaled
    multiple: int  # of both sides in pixels
    chat: str  # the prompt, with `{pictures}` and `{text}`
    mark: str  # of each picture, with its `{number}` from 1
    between: str = ""  # marks

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what is seen of a picture of width × height px."""
        return _scaled((width, height), self.pixels, self.multiple)

    def prompt(self, text: str, numbers: Iterable[int]) -> str:
        """The prompt of a text with pictures of these numbers."""
        marks = self.between.join(self.mark.format(number=number) for number in numbers)
        return self.chat.format(pictures=marks, text=text)

    def tokens(self, width: int, height: int) -> int:
        """Number of tokens that the encoder makes of a picture of width × height px."""
        columns, rows = (side // self.multiple for side in self.size(width, height))
        return columns * rows


@dataclass(frozen=True, kw_only=True)
class ControlForm:
    """The pictures that a model edits or refers to, its controls."""

    source: ControlSource = "files"
    # of an edit variant with the tensors of its family's other models: part of the names of its files; empty where all
    # models of the family take controls
    name: str = ""
    pipeline: str = ""  # class of the diffusers pipeline that takes them, if it is another than the family's
    modelspec_name: str = ""  # `modelspec.architecture` of LoRAs for it, without `/lora`; empty for the family's
    is_required: bool = False  # whether it edits a picture, and draws none without
    # whether a control has the size of the picture that is trained, and its part, where both have one aspect ratio
    is_aligned: bool = False
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) that the model knows; none for sizes up to `most_pixels`
    most: int = 10  # programs have no limit; more are a mistake
    most_pixels: int = 1024**2
    multiple: int = 16  # of both sides in pixels
    is_enlarged: bool = False  # whether smaller ones are enlarged to `most_pixels`
    at_zero: bool = False  # whether they have the time of clean pictures, unless a conditioning has a method
    sight: Sight | None = None  # how the text encoder sees them; None where it does not

    @property
    def are_files(self) -> bool:
        """Whether they are files of their own, not parts of the picture or clip that is trained on."""
        return self.source == "files"

    @property
    def is_fill(self) -> bool:
        """Whether the model paints what a mask covers in a picture."""
        return self.source == "mask"

    @property
    def frames(self) -> tuple[int, ...]:
        """Which frames of a clip the model is given, by index; none where it is given no clip's."""
        return {"first frame": (0,), "first and last frame": (0, -1)}.get(self.source, ())

    @property
    def need(self) -> Literal["none", "optional", "required"]:
        """Whether a control is given where pictures are drawn."""
        return "required" if self.is_required else "optional" if self.most else "none"

    @property
    def about(self) -> str:
        """What the model does with its controls, for lists of models."""
        if self.are_files:
            return "takes pictures to edit or refer to"
        return "paints what a mask covers" if self.is_fill else f"draws from the {self.source}"

    @property
    def count_text(self) -> str:
        """How many controls the model takes, for messages."""
        return f"takes at most {count_text(self.most, 'control')}" if self.most else "takes no controls"

    def with_frames(self, count: int) -> ControlForm:
        """The form of a clip whose first frame is given, or of two, whose first and last frames are."""
        return replace(self, source="first and last frame") if count > 1 else self

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a control of width × height px: the known size of the nearest aspect ratio, `most_pixels`
        in its own, or its own size, shrunk to `most_pixels` and rounded down.
        """
        if self.sizes:
            return min(self.sizes, key=lambda size: abs(size[0] / size[1] - width / height))
        if self.is_enlarged:
            return _scaled((width, height), self.most_pixels, self.multiple)
        factor = min(1.0, math.sqrt(self.most_pixels / (width * height)))
        sides = [
            max(self.multiple, int(side * factor + 1e-6) // self.multiple * self.multiple) for side in (width, height)
        ]
        return sides[0], sides[1]


def _scaled(size: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """A size scaled to a number of pixels, each side to its nearest multiple."""
    factor = math.sqrt(pixels / math.prod(size))
    width, height = (max(multiple, round(round(side * factor) / multiple) * multiple) for side in size)
    return width, height


NO_CONTROLS = ControlForm(most=0, is_aligned=True)
"""The form of a model without controls."""


Layout = str | tuple[str, ...]
"""A letter for each dimension of a tensor: `b` the batch, `p` tokens of pictures (of the one that is predicted, then of
controls), `t` those with tokens of text, `.` any other; or the layout of each of several tensors."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens are in the arguments of a denoiser's blocks; see `token_routing`.

    Attributes:
        blocks: path of each list of blocks, in the order of their computation → the layouts of a block's arguments by
            name, the states first. A tensor with another number of dimensions has no tokens.
        text: where text is among tokens of both kinds: before those of pictures and as long in each row (`first`),
            before them and of its own length in each row (`packed`), or after them (`last`); with `all others`, tokens
            of the picture are the last ones, those of text and controls before them.
        patch: latents of a token, in frames, height and width.
        states: place of the states among what a block returns, where that is a pair.
    """

    blocks: Mapping[str, Mapping[str, Layout]]
    text: Literal["first", "packed", "last", "all others"] = "last"
    patch: tuple[int, int, int] = (1, 2, 2)
    states: int = 1

    def listed(self, denoiser: nn.Module) -> list[tuple[nn.Module, Mapping[str, Layout]]]:
        """All blocks with the layouts of their arguments, in order."""
        return [
            (block, layouts)
            for path, layouts in self.blocks.items()
            for block in denoiser.get_submodule(path).children()
        ]

    def grid(self, latents: torch.Size) -> tuple[int, int, int]:
        """Number of tokens in frames, height and width for latents (channels, [frames,] height, width)."""
        frames, height, width = (1, *latents[1:])[-3:]
        return frames // self.patch[0], height // self.patch[1], width // self.patch[2]


NO_EDIT = "none"
"""The choice of an edit variant that is none of them."""


def letters(text: str) -> str:
    """The letters and digits of a name, in lower case, by which spellings of it are compared."""
    return "".join(filter(str.isalnum, text.casefold()))
