"""Which model family a LoRA was made for, as far as its names and shapes give it away without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.formats.names.spelling import grouped

__all__ = ["DENOISER_START", "SIGNATURES", "Signature", "block_of", "component_of", "guessed_family", "kind_of"]

DENOISER_START = r"^(lora_unet_|lora_transformer_|lycoris_|oft_unet_|diffusion_model_|transformer_|base_model_model_)?"
"""What may stand before the first module name of a denoiser, for signatures that need to know where it begins."""


@dataclass(frozen=True)
class Signature:
    """A sign by which LoRA files of a family are recognised.

    Attributes:
        title: of the family, as people call it.
        pattern: regular expression that finds the name of one of its modules, with underscores for dots.
        width: input width that this module has; None for any.
        order: signs of a lower order are looked for first; one that other families share with this one comes late.
    """

    title: str
    pattern: str
    width: int | None = None
    order: int = 0


SIGNATURES: list[Signature] = []
"""Of every family that is registered (`families.base.register`) or known by name alone (`families.unsupported`)."""


def guessed_family(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What people call the family, or None when nothing gives it away.

    Args:
        shapes: shape of each tensor by key.
    """
    inputs = {base.replace(".", "_"): width for base, width in _input_widths(shapes).items()}
    for sign in sorted(SIGNATURES, key=lambda one: (one.order, one.width is None)):
        if any(re.search(sign.pattern, base) and sign.width in (None, width) for base, width in inputs.items()):
            return sign.title
    return None


def component_of(base: str) -> str:
    """`denoiser`, `text_encoder`, `text_encoder_2` or `text_encoder_3`, by the way a base is spelled."""
    for pattern, component in _COMPONENTS:
        if re.match(pattern, base):
            return component
    return "denoiser"


def block_of(base: str) -> str:
    """The outermost numbered block that a base lies in, such as `down_blocks.1`, or an empty string."""
    match = _BLOCK.search(base)
    if match is None:
        return ""
    return ".".join(part for part in match.groups() if part)


def kind_of(base: str) -> str:
    """Which layer of its block a base is, such as `attn1_to_q`, or its name where it lies in none."""
    return _UP_TO_KIND.sub("", base.replace(".", "_"))


_COMPONENTS = (
    (r"lora_te3_|text_encoder_3\.|text_encoders\.t5", "text_encoder_3"),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g", "text_encoder_2"),
    (r"lora_te1?_|text_encoder\.|text_encoders\.", "text_encoder"),
)

_UP_TO_KIND = re.compile(
    r"^.*(blocks|block|layers|attentions|resnets|samplers)_\d+_(\d+_)?|^(lora_unet|oft_unet|unet|transformer|diffusion_model)_"
)
_BLOCK = re.compile(
    r"((?:down|up|input|output|double|single|joint)_blocks|(?:single_)?transformer_blocks|layers|blocks)[._](\d+)"
    r"|(mid_block|middle_block)"
)


def _input_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of each module by base, 0 where no tensor shows it."""
    widths = {}
    for base, keys in grouped(shapes).items():
        key = next((keys[role] for role in ("down", "hada_w1_b") if role in keys), None)
        widths[base] = shapes[key][1] if key is not None and len(shapes[key]) > 1 else 0
    return widths
