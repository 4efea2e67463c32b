"""A model's names for LoRA layouts: module paths in diffusers' and in the original checkpoint's naming.

Families build these tables from the real module list of a model; layouts only look names up, so that flattened names
(`lora_unet_..._to_q`) are never parsed by guessing which underscore was a dot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from lorasmith.core.adapter_state import DENOISER

Naming: TypeAlias = Literal["diffusers", "original"]
"""Whose names modules have."""


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns matches a whole module path; `*` crosses dots."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


@dataclass(frozen=True)
class OriginalName:
    """A diffusers module's place in the original checkpoint.

    Attributes:
        path: dotted module path in the original naming, without `model.diffusion_model.`.
        rows: (start, stop) output rows when the original fuses several modules into one (`qkv`), else None.
        swap_halves: whether the two halves of the output rows are exchanged (shift, scale ↔ scale, shift).
        parameters: names below `path` of the module's own parameters that are called otherwise there; their numbers
            may be in another shape.
    """

    path: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, leaf: str) -> str:
        """Name there of one of the module's own parameters, such as `weight`."""
        return ".".join(filter(None, (self.path, self.parameters.get(leaf, leaf))))


@dataclass(frozen=True)
class EncoderNames:
    """One text encoder in LoRA files.

    Attributes:
        paths: module paths in files; a CLIP's begin with `text_model.`.
        kohya: prefixes of its keys in kohya's layout; the first is written, all are read.
        comfyui: ComfyUI's names of it (`clip_l`, `t5xxl`); the first is written, all are read.
        drops_text_model: whether its class in transformers has no `text_model.` in its paths since version 5.6.
    """

    paths: tuple[str, ...]
    kohya: tuple[str, ...]
    comfyui: tuple[str, ...]
    drops_text_model: bool = False


@dataclass(frozen=True)
class ProgramLimits:
    """What programs do not apply of a family's LoRA files, as measured in `docs/load-matrix.md`.

    Patterns are those of `fnmatch`, on diffusers' paths of the denoiser.

    Attributes:
        unknown_to_comfyui: modules that ComfyUI does not find by diffusers' names.
        diffusers_applies: layouts besides its own that diffusers reads → modules that it finds in them.
        diffusers_also_loads: layouts of these in which diffusers loads more than LoRA → names of these algorithms.
        diffusers_refuses_others: whether diffusers refuses a whole file because a module has more than LoRA's factors.
        diffusers_refuses_unknown: whether diffusers refuses a whole file for a module that it does not find in it.
        diffusers_whole_blocks: lists of blocks, by the start of their paths. diffusers refuses a file unless it has
            every linear layer of the first n blocks, n being the number of blocks in the file.
        diffusers_one_alpha: modules for which diffusers reads one alpha in kohya's layout, the most frequent one. If
            there are any, it does so for all modules of a text encoder too.
        sd_scripts_applies: modules that sd-scripts' own network loads; None if sd-scripts has no such models.
    """

    unknown_to_comfyui: tuple[str, ...] = ()
    diffusers_applies: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"kohya": ("*",), "comfy": ("*",), "ai-toolkit": ("*",)}
    )
    diffusers_also_loads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    diffusers_refuses_others: bool = False
    diffusers_refuses_unknown: bool = False
    diffusers_whole_blocks: tuple[str, ...] = ()
    diffusers_one_alpha: tuple[str, ...] = ()
    sd_scripts_applies: tuple[str, ...] | None = ("*",)


@dataclass(frozen=True)
class ModelNames:
    """Names of one loaded model.

    Attributes:
        family: registered family name.
        denoiser: diffusers path of every module that can carry an adapter or a difference (Linear, convolution, norm,
            embedding) → its place in the original checkpoint.
        peft_prefix: the denoiser's name in diffusers' pipelines and so in its keys, `unet` or `transformer`.
        denoiser_parts: submodules of the denoiser that are parts of diffusers' pipelines themselves, of the same name.
        text_encoders: by component (`text_encoder`, `text_encoder_2`).
        kohya_naming: naming of this family's `lora_unet_` keys by convention.
        ai_toolkit_naming: naming of this family's `diffusion_model.` keys in ai-toolkit's files.
        portable: name of the layout that most programs apply completely for this family. A LoRA that does not fit it is
            written in kohya's, which holds all.
        weight_shapes: diffusers path → shape of the weight, for files that flatten convolution kernels and to check
            whether an adapter fits. Modules that are not listed are not checked.
        aliases: further names in files, without a prefix → the diffusers paths of each, in the order of their rows.
            Read, never written.
        limits: what programs do not apply of this family's files.
    """

    family: str
    denoiser: Mapping[str, OriginalName]
    peft_prefix: str
    denoiser_parts: tuple[str, ...] = ()
    text_encoders: Mapping[str, EncoderNames] = field(default_factory=dict)
    kohya_naming: Naming = "diffusers"
    ai_toolkit_naming: Naming = "original"
    portable: str = "kohya"
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: ProgramLimits = field(default_factory=ProgramLimits)

    def pipeline_place(self, path: str) -> tuple[str, str]:
        """The part of diffusers' pipeline with a module of the denoiser, and the module's path there."""
        part, _, inner = path.partition(".")
        return (part, inner) if part in self.denoiser_parts else (self.peft_prefix, path)

    def paths(self, component: str) -> Collection[str]:
        """Module paths of a component; none of a text encoder that the model lacks."""
        if component == DENOISER:
            return self.denoiser
        return self.text_encoders[component].paths if component in self.text_encoders else ()
