"""The model family of a LoRA, recognised by names, shapes and metadata, without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorasmith.adapters.algorithms import algorithms
from lorasmith.formats.names.prefixes import FLAT
from lorasmith.formats.names.spelling import grouped

__all__ = ["DENOISER_START", "SIGNATURES", "Signature", "block_of", "guessed_family", "kind_of"]

DENOISER_START = rf"^({FLAT})?"
"""Optional prefix of a denoiser's first module name, for signatures that match its beginning."""


@dataclass(frozen=True)
class Signature:
    """A sign by which LoRA files of a family are recognised.

    Attributes:
        title: display name of the family.
        pattern: regular expression that finds the name of one of its modules, with underscores for dots.
        width: input width of this module; None for any.
        architecture: how its metadata must call the architecture, for a family whose files have the names and widths of
            another's; None for anything.
        order: signatures of a lower order are tried first; one that other families share gets a high one.
    """

    title: str
    pattern: str
    width: int | None = None
    order: int = 0
    architecture: str | None = None


SIGNATURES: list[Signature] = []
"""Of every family that is registered (`families.base.register`) or known by name alone (`families.known`)."""


def guessed_family(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Display name of the family, or None if no signature matches.

    Args:
        shapes: shape of each tensor by key.
        metadata: of the file.
    """
    said = {metadata.get(key, "").partition("/")[0].casefold() for key in _ARCHITECTURE_KEYS}
    inputs = {base.replace(".", "_"): width for base, width in _input_widths(shapes).items()}
    for sign in sorted(SIGNATURES, key=lambda one: (one.order, one.width is None)):
        if sign.architecture is not None and sign.architecture not in said:
            continue
        if any(re.search(sign.pattern, base) and sign.width in (None, width) for base, width in inputs.items()):
            return sign.title
    return None


def block_of(base: str) -> str:
    """The outermost numbered block of a base, such as `down_blocks.1`, or an empty string."""
    match = _BLOCK.search(base)
    if match is None:
        return ""
    return ".".join(part for part in match.groups() if part)


def kind_of(base: str) -> str:
    """The layer of a base within its block, such as `attn1_to_q`; its name if it is in no block."""
    return _UP_TO_KIND.sub("", base.replace(".", "_"))


_ARCHITECTURE_KEYS = ("ss_base_model_version", "modelspec.architecture")
_UP_TO_KIND = re.compile(rf"^.*(blocks|block|layers|attentions|resnets|samplers)_\d+_(\d+_)?|^({FLAT})")
_BLOCK = re.compile(
    r"((?:down|up|input|output|double|single|joint)_blocks|(?:single_)?transformer_blocks|layers|blocks)[._](\d+)"
    r"|(mid_block|middle_block)"
)


def _input_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of each module by base, 0 if no tensor determines it."""
    axes = {role: axis for _, form in algorithms() for role, axis in form.input_axes.items()}
    widths = {}
    for base, keys in grouped(shapes).items():
        role = next((role for role in axes if role in keys), "")
        shape = shapes[keys[role]] if role else ()
        widths[base] = shape[axes[role]] if len(shape) > 1 else 0
    return widths
