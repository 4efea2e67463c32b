"""Which model family a LoRA was made for, as far as its names and shapes give it away without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.adapters.algorithms import algorithms
from lorasmith.formats.names.prefixes import FLAT
from lorasmith.formats.names.spelling import grouped

__all__ = ["DENOISER_START", "SIGNATURES", "Signature", "block_of", "guessed_family", "kind_of"]

DENOISER_START = rf"^({FLAT})?"
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


def block_of(base: str) -> str:
    """The outermost numbered block that a base lies in, such as `down_blocks.1`, or an empty string."""
    match = _BLOCK.search(base)
    if match is None:
        return ""
    return ".".join(part for part in match.groups() if part)


def kind_of(base: str) -> str:
    """Which layer of its block a base is, such as `attn1_to_q`, or its name where it lies in none."""
    return _UP_TO_KIND.sub("", base.replace(".", "_"))


_UP_TO_KIND = re.compile(rf"^.*(blocks|block|layers|attentions|resnets|samplers)_\d+_(\d+_)?|^({FLAT})")
_BLOCK = re.compile(
    r"((?:down|up|input|output|double|single|joint)_blocks|(?:single_)?transformer_blocks|layers|blocks)[._](\d+)"
    r"|(mid_block|middle_block)"
)


def _input_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of each module by base, 0 where no tensor shows it."""
    axes = {role: axis for _, form in algorithms() for role, axis in form.input_axes.items()}
    widths = {}
    for base, keys in grouped(shapes).items():
        role = next((role for role in axes if role in keys), "")
        shape = shapes[keys[role]] if role else ()
        widths[base] = shape[axes[role]] if len(shape) > 1 else 0
    return widths
