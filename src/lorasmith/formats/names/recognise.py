"""Names of modules in LoRA files: their prefixes by layout, and what they tell without a model, such as the family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorasmith.adapters.algorithms import algorithms
from lorasmith.core.adapter_state import DENOISER
from lorasmith.formats.names.spelling import grouped

KOHYA_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_", "oft_unet_")
"""kohya's scripts (written), LyCORIS' wrapper, OneTrainer, and the OFT of sd-scripts for UNets."""

COMFYUI_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
DIFFUSERS_EXPERTS = ("transformer_2.", "transformer.")
"""Of the experts of a model of two; without dots, the first begins with the second."""

DIFFUSERS_PREFIXES = ("unet.", *DIFFUSERS_EXPERTS)

DIFFUSERS_PARTS = ("text_conditioner.",)
"""Of parts beside the denoiser in a pipeline that are submodules of ours (`Family.denoiser_parts`)."""

PEFT_PREFIX = "base_model.model."
"""For a text encoder in a subfolder, the folder's name and a slash precede it."""

KOHYA_ENCODER, COMFYUI_ENCODER, DIFFUSERS_ENCODER = (
    r"lora_te(?P<kohya>\d*)_",
    r"text_encoders\.(?P<comfyui>\w+)\.transformer\.",
    r"text_encoder(_(?P<diffusers>\d+))?\.",
)
"""Regular expressions for the prefixes of text encoders."""


def any_of(prefixes: tuple[str, ...]) -> str:
    """A regular expression for any of some prefixes."""
    return "|".join(map(re.escape, prefixes))


_PREFIXES = (*KOHYA_PREFIXES, *COMFYUI_PREFIXES, *DIFFUSERS_PREFIXES)
FLAT = any_of(tuple(prefix.replace(".", "_") for prefix in (*_PREFIXES, PEFT_PREFIX)))
"""Regular expression for the denoiser's prefixes with underscores for dots."""

_ENCODER = re.compile("|".join((KOHYA_ENCODER, COMFYUI_ENCODER, DIFFUSERS_ENCODER)))
_ANY = re.compile(rf"{any_of(_PREFIXES)}|(\w+/)?{re.escape(PEFT_PREFIX)}|{_ENCODER.pattern}")


def component_of(base: str) -> str:
    """`denoiser`, `text_encoder`, `text_encoder_2`, ..., by the prefix of a base."""
    folder, slash, _ = base.partition("/")
    if slash:
        return folder
    if (match := _ENCODER.match(base)) is None:
        return DENOISER
    # ComfyUI names the kind of an encoder; these two are numbers two and three wherever others are beside them.
    numbers = {"clip_g": "2", "t5": "3"}
    kind = match["comfyui"] or ""
    number = match["kohya"] or match["diffusers"] or next((n for k, n in numbers.items() if kind.startswith(k)), "")
    return "text_encoder" if number in ("", "1") else f"text_encoder_{number}"


def without_prefix(base: str) -> str:
    """A base without its prefix: a module's path in a layout's spelling."""
    match = _ANY.match(base)
    return base if match is None else base[match.end() :]


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
    """Display name of the family, or None if no signature matches."""
    said = {metadata.get(key, "").partition("/")[0].casefold() for key in _ARCHITECTURE_KEYS}
    inputs = {base.replace(".", "_"): width for base, width in _input_widths(shapes).items()}
    for sign in sorted(SIGNATURES, key=lambda one: (one.order, one.width is None)):
        if sign.architecture is not None and sign.architecture not in said:
            continue
        pattern = re.compile(sign.pattern)
        if any(sign.width in (None, width) and pattern.search(base) for base, width in inputs.items()):
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
