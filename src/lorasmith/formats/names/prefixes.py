"""Prefixes of module paths in the keys of LoRA files, by layout."""

from __future__ import annotations

import re

from lorasmith.core.adapter_state import DENOISER

__all__ = [
    "COMFYUI",
    "COMFYUI_ENCODER",
    "DIFFUSERS",
    "DIFFUSERS_ENCODER",
    "DIFFUSERS_EXPERTS",
    "DIFFUSERS_PARTS",
    "FLAT",
    "KOHYA",
    "KOHYA_ENCODER",
    "PEFT",
    "any_of",
    "component_of",
    "without_prefix",
]

KOHYA = ("lora_unet_", "lycoris_", "lora_transformer_", "oft_unet_")
"""kohya's scripts (written), LyCORIS' wrapper, OneTrainer, and the OFT of sd-scripts for UNets."""

COMFYUI = ("diffusion_model.", "model.diffusion_model.")
DIFFUSERS_EXPERTS = ("transformer_2.", "transformer.")
"""Of the experts of a model of two; without dots, the first begins with the second."""

DIFFUSERS = ("unet.", *DIFFUSERS_EXPERTS)

DIFFUSERS_PARTS = ("text_conditioner.",)
"""Of parts beside the denoiser in a pipeline that are submodules of ours (`Family.denoiser_parts`)."""

PEFT = "base_model.model."
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


FLAT = any_of(tuple(prefix.replace(".", "_") for prefix in (*KOHYA, *COMFYUI, *DIFFUSERS, PEFT)))
"""Regular expression for the denoiser's prefixes with underscores for dots."""

_ENCODER = re.compile("|".join((KOHYA_ENCODER, COMFYUI_ENCODER, DIFFUSERS_ENCODER)))
_ANY = re.compile(rf"{any_of((*KOHYA, *COMFYUI, *DIFFUSERS))}|(\w+/)?{re.escape(PEFT)}|{_ENCODER.pattern}")


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
