"""What a LoRA layout must know of a model: its module paths, in diffusers' and in the original checkpoint's naming.

Families build these tables from the real module list of a model; layouts only look names up, so that flattened names
(`lora_unet_..._to_q`) are never parsed by guessing where an underscore was a dot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ModelNames", "OriginalName"]


@dataclass(frozen=True)
class OriginalName:
    """Where a diffusers module stands in the original checkpoint.

    Attributes:
        path: dotted module path in the original naming, without `model.diffusion_model.`.
        rows: (start, stop) output rows when the original fuses several modules into one (`qkv`), else None.
        swap_halves: the two halves of the output rows change places (shift, scale ↔ scale, shift).
    """

    path: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


@dataclass(frozen=True)
class ModelNames:
    """Names of one loaded model.

    Attributes:
        family: registered family name.
        denoiser: diffusers path of every module that can carry an adapter or a difference (Linear, convolution, norm,
            embedding) → its place in the original checkpoint.
        out_features: diffusers path → size of the weight's first dimension, for fusing and splitting rows.
        text_encoders: component (`text_encoder`, `text_encoder_2`) → module paths as every peer names them, with
            `text_model.` in front (transformers ≥ 5.6 dropped it from CLIPTextModel).
        kohya_naming: which naming this family's `lora_unet_` keys use by convention.
        peft_prefix: component prefix of PEFT keys, `unet` or `transformer`.
        portable: name of the layout that most programs apply completely for this family.
        weight_shapes: diffusers path → shape of the weight, for files that flatten convolution kernels and to tell
            whether an adapter fits. Modules that are not listed are taken as they come.
        aliases: further names that files use, without a prefix → the diffusers paths that each stands for, in the order
            of their rows. Read, never written.
        encoder_kinds: component → what ComfyUI calls that text encoder (`clip_l`, `clip_g`, `clip_h`, `t5xxl`).
    """

    family: str
    denoiser: Mapping[str, OriginalName]
    out_features: Mapping[str, int]
    text_encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kohya_naming: Literal["diffusers", "original"] = "diffusers"
    peft_prefix: Literal["unet", "transformer"] = "unet"
    portable: str = "kohya"
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    encoder_kinds: Mapping[str, str] = field(
        default_factory=lambda: {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    )
