"""The family contract: a model architecture is data plus a few functions and a name table.

Shared code (training, sampling, formats, nodes) never asks which family it works on; a `Family` implements what differs
between architectures. Adding a family is one module that subclasses `Family` and registers an instance; see
docs/adding-a-family.md.
"""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.extras import model_packages
from lorasmith.core.placement import sent
from lorasmith.core.printable import count_text, described, printable
from lorasmith.core.registry import Registry, instance_of
from lorasmith.diffusion.schedule import FlowSchedule, NoiseSchedule, ResolutionShift
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count, module_paths, norm_name, weight_shapes, weights_empty
from lorasmith.formats.names import EncoderNames, ModelNames, Naming, OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, SIGNATURES, Signature

__all__ = [
    "AT_ZERO", "BY_INDEX", "BY_OFFSET", "BY_UXO", "DENOISER_START", "SIGNATURES", "Any", "AutoencoderSlot", "Callable",
    "Collection", "Components", "Conditioning", "ControlForm", "DataError", "Defaults", "Diffusion", "EncoderNames",
    "EncoderSlot", "Encoding", "Expert", "Family", "FlowSchedule", "HubFolder", "LatentFormat", "Mapping", "ModelError",
    "ModelNames", "OriginalCheckpoint", "OriginalName", "PictureSize", "PipelineConfigs", "ProgramLimits", "Release",
    "ResolutionShift", "Routing", "Rule", "Sequence", "Sight", "Signature", "Tensor", "TextEncoders", "block_count",
    "check_even", "collate", "module_paths", "nn", "norm_name", "register", "replace", "torch", "weight_shapes",
]  # fmt: skip


_CONTROL = "control_"
FIRST_FRAME = "first_frame"
"""Name of the tensor of a conditioning that is the first of a clip's latents, or the first few."""

CLIP_VISION = "clip_vision"
"""Name of the tensor of a conditioning that is made by an image encoder."""

BY_OFFSET, BY_INDEX, BY_UXO, AT_ZERO = "controls_by_offset", "controls_by_index", "controls_by_uxo", "controls_at_zero"
CONTROL_METHODS = {"offset": BY_OFFSET, "index": BY_INDEX, "uxo/uno": BY_UXO, "index_timestep_zero": AT_ZERO}
"""ComfyUI's methods of placing controls → tensors of a conditioning, of any value, that choose them: beside or below
each other, each with an index of its own, beyond each other's corners, and by index with time 0."""

_BESIDE = re.compile(rf"{_CONTROL}\d+|known|{FIRST_FRAME}|{CLIP_VISION}")

IMAGE_ENCODER = "image_encoder"
"""Component name of an encoder of pictures that the denoiser attends to."""


def encoder_title(component: str) -> str:
    """What an encoder is called in messages."""
    return "image encoder" if component == IMAGE_ENCODER else "text encoder"


@dataclass(frozen=True)
class Conditioning:
    """A denoiser's inputs besides noisy latents and time.

    Attributes:
        tensors: by name, each with the batch as its first dimension, 1 for a single prompt. `context` (batch, tokens,
            width) is there in each family; `pooled` (batch, width), `guidance` (batch,) and others where the family
            has them. With `no_guidance`, of any value, a network with an embedding of guidance leaves it out.
            `control_0`, `control_1`, ... (batch, channels, height, width) are pictures to edit or refer to, scaled like
            the latents; sizes of their own are never padded. Made of the picture or clip itself (`Family.beside`):
            `known` (batch, channels, [frames,] height, width) are channels beside the noisy latents, `first_frame`
            (batch, channels, 1, height, width) is a clip's first frame, which gets no noise, `clip_vision` (batch,
            tokens, width) are states of an image encoder.
        text: the prompt it came from, for reports and metadata; None when unknown.
        mask: bool (batch, tokens), True for tokens of the context that are attended to; None for all of them.
        span: the part of sampling that it applies to, from 0 at the start to 1 at the end; training ignores it.
        texts: the prompts of a batch, which a network with text encoders in training encodes again; else empty.
    """

    tensors: Mapping[str, Tensor]
    text: str | None = None
    mask: Tensor | None = None
    span: tuple[float, float] = (0.0, 1.0)
    texts: tuple[str, ...] = ()
    _moved: tuple[Tensor, Tensor] | None = field(default=None, compare=False)  # a mask, and where it was copied from

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping):
            raise DataError(
                f"tensors of a conditioning must be a mapping by name, got {described(self.tensors)}; give "
                '{"context": tensor}'
            )

    def __repr__(self) -> str:
        facts = [f"{name} {'×'.join(map(str, tensor.shape))}" for name, tensor in self.tensors.items()]
        caption = [] if self.text is None else [repr(printable(self.text, limit=60))]
        return f"Conditioning({', '.join([*caption, *facts, *(['masked'] if self.mask is not None else [])])})"

    @property
    def controls(self) -> tuple[Tensor, ...]:
        """The controls, in order."""
        found = list[Tensor]()
        while (one := self.tensors.get(f"{_CONTROL}{len(found)}")) is not None:
            found.append(one)
        return tuple(found)

    def with_controls(self, controls: Sequence[Tensor]) -> Conditioning:
        """The conditioning with these controls in place of its own."""
        others = {name: one for name, one in self.beside.items() if not name.startswith(_CONTROL)}
        return self.with_beside({**others, **named_controls(controls)})

    @property
    def beside(self) -> Mapping[str, Tensor]:
        """The tensors that are made of pictures."""
        return {name: one for name, one in self.tensors.items() if _BESIDE.fullmatch(name)}

    def with_beside(self, beside: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning with these tensors in place of those that are made of pictures."""
        if not beside and not self.beside:
            return self
        others = {name: one for name, one in self.tensors.items() if not _BESIDE.fullmatch(name)}
        return replace(self, tensors={**others, **beside})

    def with_text(self, other: Conditioning) -> Conditioning:
        """The conditioning with another text's encoding, whose other inputs (sizes, controls, ...) are kept."""
        return replace(other, tensors={**self.tensors, **other.tensors}, span=self.span)

    def rows(self) -> list[Conditioning]:
        """The conditioning of each of `texts`, with the padding of the batch."""
        return [
            Conditioning(
                {name: tensor[row : row + 1] for name, tensor in self.tensors.items()},
                text,
                None if self.mask is None else self.mask[row : row + 1],
            )
            for row, text in enumerate(self.texts)
        ]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of attended tokens of the context, for each of the batch."""
        context, mask = self.tensors["context"], self.mask_on_cpu
        return (context.shape[1],) * len(context) if mask is None else tuple(mask.sum(1).tolist())

    @property
    def mask_on_cpu(self) -> Tensor | None:
        """The mask on the CPU, for which nobody waits if `to` has copied it to the device."""
        if self._moved is not None and self._moved[0] is self.mask:
            return self._moved[1]
        return None if self.mask is None else self.mask.cpu()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """A copy on `device` with floating-point tensors in `dtype`."""
        device = torch.device(device)
        moved = {
            key: sent(tensor, device, dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in self.tensors.items()
        }
        if self.mask is None:
            return replace(self, tensors=moved)
        mask = sent(self.mask, device, self.mask.dtype)
        known = (mask, self.mask) if self.mask.device.type == "cpu" else self._moved
        return replace(self, tensors=moved, mask=mask, _moved=known)


def named_controls(controls: Sequence[Tensor]) -> dict[str, Tensor]:
    """Controls by the names that they have in a conditioning."""
    return {f"{_CONTROL}{index}": one for index, one in enumerate(controls)}


class PictureSize(NamedTuple):
    """How a training picture got its size; (height, width) or (top, left) in pixels."""

    original: tuple[int, int]  # of the image file, upright
    crop: tuple[int, int]  # what was cut off above and to the left after scaling
    target: tuple[int, int]  # of what is trained on


def collate(conditionings: Sequence[Conditioning], *, repeatable: bool) -> Conditioning:
    """One batch of several prompts' conditionings, in order. Raises DataError if they carry different tensors.

    `repeatable` says how contexts of different length share the batch. True repeats each to their least common
    multiple, which leaves unmasked cross-attention unchanged: softmax over k copies of the keys gives each copy 1/k of
    the weight. False pads with zeros and masks them.
    """
    keys = set(conditionings[0].tensors)
    if any(set(conditioning.tensors) != keys for conditioning in conditionings):
        raise DataError(
            "conditionings in one batch must carry the same tensors, got "
            + " and ".join(sorted({", ".join(sorted(conditioning.tensors)) for conditioning in conditionings}))
            + "; encode all captions with the same text encoder"
        )
    batch = {key: [conditioning.tensors[key] for conditioning in conditionings] for key in keys}
    masks = [conditioning.mask for conditioning in conditionings]
    contexts = batch.get("context", [])
    lengths = [context.shape[1] for context in contexts]
    if len(set(lengths)) > 1 and repeatable:
        tokens = math.lcm(*lengths)
        batch["context"] = [_times(context, tokens // context.shape[1]) for context in contexts]
        masks = [mask if mask is None else _times(mask, tokens // mask.shape[1]) for mask in masks]
    elif len(set(lengths)) > 1:
        batch["context"] = [_filled(context, max(lengths)) for context in contexts]
        masks = [_filled(_known(mask, context), max(lengths)) for mask, context in zip(masks, contexts, strict=True)]
    mask = None
    if any(mask is not None for mask in masks):
        mask = torch.cat([_known(*pair) for pair in zip(masks, batch["context"], strict=True)])
    return Conditioning({key: torch.cat(parts) for key, parts in batch.items()}, mask=mask)


def check_even(latents: Tensor, title: str, *, pixels: int = 16) -> None:
    """Raise DataError for latents (..., height, width) that cannot be cut into patches of 2×2, `pixels` wide each."""
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise DataError(
            f"{title} packs latents 2×2, so their sides must be even, got {height}×{width}; "
            f"use picture sizes that are multiples of {pixels}"
        )


def _times(tensor: Tensor, count: int) -> Tensor:
    """(batch, tokens, ...) with all tokens `count` times."""
    return tensor.repeat(1, count, *(1,) * (tensor.ndim - 2))


def _filled(tensor: Tensor, tokens: int) -> Tensor:
    """(batch, tokens, ...) padded with zeros."""
    rest = tensor.new_zeros(len(tensor), tokens - tensor.shape[1], *tensor.shape[2:])
    return torch.cat((tensor, rest), dim=1)


def _known(mask: Tensor | None, context: Tensor) -> Tensor:
    return context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask


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


@dataclass(frozen=True)
class AutoencoderSlot:
    """The autoencoder of a family."""

    kind: str  # registered name in `families.parts.autoencoders`
    channels: int  # of its latents; autoencoders of another number are refused
    usual_file: str  # common name of its file, for messages
    # of its tensors' names in a full checkpoint; the first one found is used
    prefixes: tuple[str, ...] = ("first_stage_model.", "vae.")
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its configuration that shapes leave open
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


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a text encoder sees controls: as pictures in the prompt."""

    pixels: int  # to which a picture is scaled
    multiple: int  # of both sides in pixels
    chat: str  # the prompt, with `{pictures}` and `{text}`
    mark: str  # of each picture, with its `{number}` from 1

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what is seen of a picture of width × height px."""
        return _scaled((width, height), self.pixels, self.multiple)

    def prompt(self, text: str, numbers: Iterable[int]) -> str:
        """The prompt of a text with pictures of these numbers."""
        marks = "".join(self.mark.format(number=number) for number in numbers)
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


def controls_taken(most: int) -> str:
    """How many controls a model takes, for messages."""
    return f"takes at most {count_text(most, 'control')}" if most else "takes no controls"


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
            before them and of its own length in each row (`packed`), or after them (`last`).
        patch: latents of a token, in frames, height and width.
        states: place of the states among what a block returns, where that is a pair.
    """

    blocks: Mapping[str, Mapping[str, Layout]]
    text: Literal["first", "packed", "last"] = "last"
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


COMMON_PRESETS = {"all-linear": Rule(("*",), linear_only=True), "all": Rule(("*",))}
"""Target presets of every model."""


class Family(ABC):
    """One model architecture.

    Attributes:
        name: registered name, such as `sd1`.
        before: names of families that it precedes where files are recognised; of use to those of extensions.
        title: display name.
        pipeline: class of the diffusers pipeline whose folders hold it.
        network: class of the denoiser, in diffusers or by its full name.
        text_width: setting of the denoiser's configuration with the width of its text, if every encoder has this width.
        usual_tokens: of a prompt.
        draws_clips: whether that pipeline's results are clips, not pictures.
        denoiser_folder: subfolder of the denoiser there, and the prefix of its LoRA keys in PEFT's naming.
        denoiser_parts: further parts of that pipeline which our denoiser holds, as submodules of the same name.
        modelspec_implementation: `modelspec.implementation`.
        kohya_name: `ss_base_model_version` of sd-scripts' metadata; see `kohya_version`.
        modelspec_name: `modelspec.architecture` without `/lora`; see `modelspec_architecture`.
        kohya_naming, ai_toolkit_naming, portable, limits: as in `ModelNames`.
        signs: tensors of its original checkpoints, which no other family has all of; see `recognises`.
        own_diffusion: how its denoisers are trained, where that is one way.
        own_defaults: default settings, where they are the same for all its models.
        civitai_name: Civitai's name of its base model; None where the family is of several there.
        a1111_version: A1111's and Forge's name of it in a LoRA's user metadata.
        targets: its own target presets by name; see `presets`.
        text_encoders: its text encoders by component name, in the order of the pipeline's.
        needs_each_encoder: whether it cannot do without one of them.
        autoencoder: its autoencoder.
        image_encoder: its encoder of pictures that the denoiser attends to; see `encoder_slots`.
        routing: where tokens are in the denoiser, so that some may skip blocks in training; None for no such routing.
        clip_types: ComfyUI's names of it in nodes that load text encoders apart from the denoiser.
        predicts_by_length: whether `predict` runs the denoiser once for each length of context in a batch.
        repeatable_context: whether text enters by unmasked cross-attention alone, so that a context repeated k times
            gives the same result. Contexts of other families are padded and masked; see `collate`.
        unused_tensors: patterns of tensors in its original checkpoints that the network does not use.
        diffusers_start: start of some names in diffusers' own files of the denoiser, for single files that have them.
        distilled: parts of file names of variants that are distilled to few steps without guidance, which training
            undoes, and these steps; they have the same tensors as the variant to train on.
        training_adapters: the usual LoRA to train such a variant with, `owner/repository/file` on the hub, by the part
            of its name; ostris', which have learnt the variant's own pictures, so that training undoes them first.
        experts: the denoisers of models that have several, the noisiest part first; each has a file and a LoRA.
        controls: the controls that its models take, those of edit variants before those of all models.
        control_methods: of `CONTROL_METHODS`, those that `predict` knows.
        lora_signatures: how its LoRA files are recognised without a model.
        released: configuration of the released denoiser for its diffusers class, to name its modules without a file.
        releases: the released models to begin with, those to train on.
    """

    name: str
    before: tuple[str, ...] = ()
    title: str
    pipeline: str
    network: str
    text_width: str = ""
    usual_tokens: int = 64
    draws_clips: bool = False
    denoiser_folder: str = "transformer"
    denoiser_parts: tuple[str, ...] = ()
    modelspec_implementation: str
    kohya_name: str = ""
    modelspec_name: str = ""
    kohya_naming: Naming = "original"
    ai_toolkit_naming: Naming = "original"
    portable: str = "kohya"
    limits: ProgramLimits = ProgramLimits()
    signs: tuple[str, ...] = ()
    own_diffusion: Diffusion | None = None
    own_defaults: Defaults | None = None
    civitai_name: str | None = None
    a1111_version: str = "Unknown"
    targets: Mapping[str, Rule]
    text_encoders: Mapping[str, EncoderSlot]
    needs_each_encoder: bool = True
    predicts_by_length: bool = False
    autoencoder: AutoencoderSlot
    image_encoder: EncoderSlot | None = None
    routing: Routing | None = None
    clip_types: tuple[str, ...] = ()
    repeatable_context: bool = False
    unused_tensors: tuple[str, ...] = ()
    diffusers_start: str = "transformer_blocks."
    distilled: Mapping[str, int] = {}
    training_adapters: Mapping[str, str] = {}
    experts: tuple[Expert, ...] = ()
    controls: tuple[ControlForm, ...] = ()
    control_methods: tuple[str, ...] = ()
    lora_signatures: tuple[Signature, ...] = ()
    released: Mapping[str, Any] | None = None
    releases: tuple[Release, ...] = ()

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether an original-layout checkpoint with these denoiser tensors (prefix cut off) is of this family."""
        return bool(self.signs) and shapes.keys() >= set(self.signs)

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        """Whether a diffusers pipeline, in a folder or in memory, is of this family."""
        known = {self.pipeline, *(form.pipeline for form in self.controls if form.pipeline)}
        return not known.isdisjoint(configs.classes)

    def controls_of(self, denoiser: nn.Module, names: Sequence[str], edit: str | None = None) -> ControlForm | None:
        """The controls of a model whose file or folder has one of these names, one of which may be that of its
        pipeline's class; or of the variant `edit`.

        A family whose files tell variants apart by their tensors chooses by the denoiser's configuration.
        """
        if edit is not None:
            return next((form for form in self.controls if form.name == edit), None)
        given = [letters(name) for name in names]
        for form in self.controls:
            if form.pipeline in names or any(letters(form.name) in name for name in given):
                return form
        return None

    @property
    def presets(self) -> Mapping[str, Rule]:
        """Target presets by name: the family's own, `all-linear` and `all`."""
        return {**self.targets, **COMMON_PRESETS}

    @property
    def slots(self) -> Mapping[str, EncoderSlot | AutoencoderSlot]:
        """Its parts besides the denoiser, by component name."""
        image_encoder = {} if self.image_encoder is None else {IMAGE_ENCODER: self.image_encoder}
        return {**self.text_encoders, "vae": self.autoencoder, **image_encoder}

    def encoder_slots(self, denoiser: nn.Module, form: ControlForm | None) -> Mapping[str, EncoderSlot]:
        """The encoders that a model with this denoiser and these controls has by component name, that of pictures
        included.
        """
        if self.image_encoder is None or CLIP_VISION not in self.conditioning_shapes(denoiser):
            return self.text_encoders
        return {**self.text_encoders, IMAGE_ENCODER: self.image_encoder}

    def denoiser_class(self) -> type[nn.Module]:
        """The class of the denoiser, imported when this is called. Raises ModelError if it is not installed."""
        module, _, name = self.network.rpartition(".")
        module = module or "diffusers"
        with model_packages(self.title):
            found: type[nn.Module] | None = getattr(import_module(module), name, None)
        if found is None:
            package = module.partition(".")[0]
            raise ModelError(f"{self.title} needs a newer {package}, with {name}; run: pip install -U {package}")
        return found

    @abstractmethod
    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Configuration of the denoiser's class for original-layout shapes (prefix cut off).

        Raises:
            ModelError: tensors that determine the configuration are missing, or the variant is not supported.
        """

    def released_denoiser(self, **changes: Any) -> nn.Module:
        """The released denoiser without weights, with some settings of its configuration changed."""
        with weights_empty():
            return self.denoiser_class()(**{**(self.released or {}), **changes})

    def original(self, path: str, denoiser: Any) -> OriginalName:
        """Place of a module of the denoiser in the original checkpoint: that of the same name, if not overridden.

        Parameters at the root of the model are those of the module "".
        """
        return OriginalName(path)

    def table(self, denoiser: nn.Module) -> Mapping[str, OriginalName]:
        """Path of each module of the denoiser that has parameters → its place in the original checkpoint."""
        return {path: self.original(path, denoiser) for path in module_paths(denoiser)}

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        """How the denoiser of a checkpoint was trained, from its tensors and metadata."""
        assert self.own_diffusion is not None
        return self.own_diffusion

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        """How the denoiser of a diffusers pipeline was trained. Raises ModelError for unsupported schedules."""
        assert self.own_diffusion is not None
        return self.own_diffusion

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        """Latent format, from the autoencoder's configuration where it has one; `vae` may be None."""
        return self.autoencoder.latents(denoiser.config.in_channels)

    def defaults(self, denoiser: nn.Module, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        """Default settings for the model."""
        assert self.own_defaults is not None
        return self.own_defaults

    def kohya_version(self, parameterization: str) -> str:
        """`ss_base_model_version` of sd-scripts' metadata."""
        return self.kohya_name

    def modelspec_architecture(self, parameterization: str) -> str:
        """`modelspec.architecture` without `/lora`."""
        return self.modelspec_name

    def names(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> ModelNames:
        """The two-way name table of a loaded model."""
        return ModelNames(
            family=self.name,
            denoiser=self.table(denoiser),
            denoiser_parts=self.denoiser_parts,
            weight_shapes=weight_shapes(denoiser),
            text_encoders=self.encoder_names(text_encoders),
            kohya_naming=self.kohya_naming,
            ai_toolkit_naming=self.ai_toolkit_naming,
            peft_prefix=self.denoiser_folder,
            portable=self.portable,
            limits=self.limits,
        )

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        """Names of the text encoders in LoRA files, whether these are loaded or not, by component name.

        None by default: nobody trains language models with a LoRA for pictures.
        """
        return {}

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        """Text encoders that LoRAs may be trained on, by component name, with the paths of the layers that learn.

        Layers that never receive a gradient are left out. None by default.
        """
        return {}

    def takes_guidance(self, denoiser: nn.Module) -> bool:
        """Whether guidance is an input of the denoiser, which its distillation has added."""
        return bool(getattr(getattr(denoiser, "config", None), "guidance_embeds", False))

    def encoder_width(self, denoiser: nn.Module, component: str) -> int | None:
        """Width of the states that a text encoder must have for the denoiser; None if every width fits."""
        return int(getattr(denoiser.config, self.text_width)) if self.text_width else None

    def most_tokens(self, denoiser: nn.Module) -> int | None:
        """Tokens of a prompt that the denoiser is given, the rest being cut; None if it is given all."""
        return None

    @abstractmethod
    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        """Conditioning of one prompt.

        Args:
            encoders: on any device; the result stays on it.
            texts: the prompt by component name, the same for each component unless a user gives several; as `text` for
                a family without text encoders.
            encoding: options; those that the family has no use for are ignored.

        Raises:
            ModelError: a text encoder is missing; see `text_encoder`.
        """

    def encode_seen(
        self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding, pictures: Sequence[Tensor]
    ) -> Conditioning:
        """As `encode_text`, of a prompt with pictures, for families whose controls have a `Sight`.

        pictures: pixels (1, 3, height, width) in [−1, 1] each, in the sight's size.
        """
        raise ModelError(f"{self.title} has no pictures in prompts; give the prompt alone")

    def encode_again(
        self,
        conditioning: Conditioning,
        encoders: TextEncoders,
        texts: Mapping[str, str],
        encoding: Encoding,
        components: Collection[str],
    ) -> Conditioning:
        """A prompt's conditioning (batch of 1) with what the encoders of `components` make of it, differentiable.

        By default all of the text is encoded; a family may keep what its other encoders made.
        """
        return conditioning.with_text(self.encode_text(encoders, texts, encoding))

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """One batch of conditionings of any length; see `collate`."""
        return collate(conditionings, repeatable=self.repeatable_context)

    def sized(self, conditioning: Conditioning, size: PictureSize) -> Conditioning:
        """The conditioning with a picture's size, if the denoiser is conditioned on it; else unchanged."""
        return conditioning

    def beside(
        self,
        form: ControlForm,
        components: Components,
        encode: Callable[[Tensor], Tensor],
        pixels: Tensor,
        mask: Tensor | None,
    ) -> Mapping[str, Tensor]:
        """What the denoiser is given of a picture or clip, by names of `Conditioning.tensors`; by default nothing.

        Called for a form whose source is not files, where samples are encoded and where pictures are drawn.

        Args:
            form: the model's.
            components: the model's parts.
            encode: pixels (1, 3, [frames,] height, width) in [−1, 1] → latents, scaled for the denoiser.
            pixels: those of the picture or clip; where a clip is drawn, only the frames that `form.source` names are
                known, and the others are 0.
            mask: (height, width) in pixels, 1 inside; None without one.
        """
        return {}

    def known(self, denoiser: nn.Module, latents: Tensor, mask: Tensor) -> Tensor | None:
        """`Conditioning.tensors["known"]` of a graph, from `concat_latent_image` and `concat_mask` of its conditioning.

        None, by default, for denoisers that are given nothing of a picture: as in ComfyUI they ignore it.

        Args:
            denoiser: the network.
            latents: (batch, channels, [frames,] height, width) of the picture without what is to be painted, scaled.
            mask: (batch or 1, 1, height, width) in pixels, 1 where it is to be painted; for clips (batch or 1, 4 or 1,
                frames, height, width) of the latents.
        """
        return None

    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the conditioning tensors that `predict` needs, for a batch of 1 and a prompt of usual length."""
        return {"context": (1, self.usual_tokens, int(getattr(denoiser.config, self.text_width)))}

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents.

        Implementations convert times of the opposite direction and outputs of the opposite sign.

        Args:
            denoiser: the network, possibly with adapters attached.
            latents: (batch, channels, [frames,] height, width) in the denoiser's dtype.
            time: (batch,) as `NoiseLevel.time`.
            conditioning: a batch of the same size. Its mask, if any, must be applied.

        Returns:
            The shape of `latents`, in the parameterization that `Components` names.
        """

    def unread_left_out(self, denoiser: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context in which a denoiser in training computes nothing that its prediction does not read.

        By default it is as it is.
        """
        return contextlib.nullcontext()

    def text_encoder(self, encoders: TextEncoders, component: str) -> nn.Module:
        """A text encoder of the model. Raises ModelError, which names the file to get, if it is missing."""
        if component in encoders.modules:
            return encoders.modules[component]
        slot = self.text_encoders[component]
        raise ModelError(
            f"{self.title} needs the text encoder {slot.kind}, which this model came without; load a full checkpoint, "
            f"or give the encoder as well (its file is usually called {slot.usual_file})"
        )

    def check_encoders(self, encoders: TextEncoders) -> None:
        """Raise ModelError, which names the file to get, if a text encoder is missing that the family needs."""
        if encoders.modules and not self.needs_each_encoder:
            return
        for component in self.text_encoders:
            self.text_encoder(encoders, component)

    @property
    def encoders_text(self) -> str:
        """Its text encoders in words, with the type under which nodes load them."""
        kinds = " and ".join(slot.kind for slot in self.text_encoders.values())
        return f"{kinds}, loaded with type {self.clip_types[0]}" if self.clip_types else kinds

    def check_parts(
        self, components: Components, *, text: bool = False, images: bool = False, form: ControlForm | None = None
    ) -> None:
        """Raises ModelError, which names the file to get, if a part for text, for images, or for what `beside` makes of
        these for a form, is missing.
        """
        if text:
            self.check_encoders(components.encoders)
        if images and components.vae is None:
            raise ModelError(
                f"{self.title} needs an autoencoder for pictures, which this model came without; load a full "
                f"checkpoint, or give it as well (its file is usually called {self.autoencoder.usual_file})"
            )
        slot = None if form is None else self.encoder_slots(components.denoiser, form).get(IMAGE_ENCODER)
        if slot is not None and components.image_encoder is None:
            raise ModelError(
                f"{self.title} needs the image encoder {slot.kind}, which this model came without; give it like a text "
                f"encoder (its file is usually called {slot.usual_file})"
            )


FAMILIES: Registry[Family] = Registry(
    "model family", ModelError, group="families", home="lorasmith.families.known", checked=instance_of(Family)
)


def register(family: Family, *aliases: str) -> None:
    """Register a built-in family under its name and aliases."""
    FAMILIES.register(family.name, *aliases)(family)


def _signatures() -> Iterator[Signature]:
    """How LoRA files of all families are recognised; those of a family go before those of families that it precedes."""
    least = {name: min((sign.order for sign in one.lora_signatures), default=0) for name, one in FAMILIES.items()}
    for name, family in FAMILIES.items():
        first = min((least.get(other, 0) - 1 for other in FAMILIES.preceded(name)), default=None)
        for sign in family.lora_signatures:
            yield sign if first is None else replace(sign, order=min(first, sign.order))


SIGNATURES.append(_signatures)
