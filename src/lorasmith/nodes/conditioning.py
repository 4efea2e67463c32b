"""Nodes that encode prompts, set options of encoding, and change encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorasmith.core.errors import DataError, ModelError
from lorasmith.families.conditionings import CONTROL_METHODS, Conditioning, PictureSize
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.families.parts.embeddings import EmbeddingFiles
from lorasmith.nodes.values import CONCAT_IMAGE, CONCAT_MASK, Latent, latent_of, pixels_from_image
from lorasmith.workflow import NodeContext, Output, node, socket

_T5_KINDS = ("t5xxl", "umt5xxl")
_LUMINA_PROMPTS = {
    "superior": (
        "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
        "based on textual prompts or user prompts."
    ),
    "alignment": (
        "You are an assistant designed to generate high-quality images with the highest degree of image-text "
        "alignment based on textual prompts."
    ),
}
"""Prefixes of prompts that Lumina 2 was trained with."""


def check_encoder(clip: TextEncoder) -> None:
    """Raise ModelError if the model was loaded without text encoders."""
    clip.family.check_encoders(clip.encoders)


def _text(tooltip: str = "") -> Any:
    return socket("STRING", multiline=True, tooltip=tooltip)


def _pixels(default: int, tooltip: str) -> Any:
    return socket("INT", default=default, min=0, max=16384, tooltip=tooltip)


@node(
    "CLIPTextEncode",
    "CLIP Text Encode (Prompt)",
    "model/conditioning",
    outputs=["CONDITIONING"],
    search_aliases=["prompt", "caption", "text prompt"],
)
def clip_text_encode(
    context: NodeContext,
    *,
    text: str = _text("(word:1.2) weights a word; \\( is a literal bracket."),
    clip: TextEncoder = socket("CLIP"),
) -> tuple[list[Conditioning]]:
    """Encode a prompt or a caption."""
    return ([_encoded(context, clip, text)],)


@node("CLIPTextEncodeFlux", "CLIPTextEncodeFlux", "model/conditioning/flux", outputs=["CONDITIONING"])
def clip_text_encode_flux(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    clip_l: str = _text("Prompt of CLIP, which gives the picture's subject and style as a whole."),
    t5xxl: str = _text("Prompt of T5, in sentences."),
    guidance: float = socket("FLOAT", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt."),
) -> tuple[list[Conditioning]]:
    """Encode a prompt for each text encoder of Flux.1, with its guidance."""
    encoded = _encoded_by_kind(context, clip, {"clip_l": clip_l, "t5xxl": t5xxl}, needed=("t5xxl",))
    tensors = {**encoded.tensors, "guidance": torch.tensor([guidance])}
    return ([replace(encoded, tensors=tensors)],)


@node("CLIPTextEncodeSDXL", "CLIP Text Encode (SDXL)", "model/conditioning/stable diffusion", outputs=["CONDITIONING"])
def clip_text_encode_sdxl(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    width: int = _pixels(1024, "Of the original picture; small ones look scaled up."),
    height: int = _pixels(1024, "Of the original picture; small ones look scaled up."),
    crop_w: int = _pixels(0, "Pixels cut off on the left."),
    crop_h: int = _pixels(0, "Pixels cut off at the top."),
    target_width: int = _pixels(1024, "Of the picture to make."),
    target_height: int = _pixels(1024, "Of the picture to make."),
    text_g: str = _text("Prompt of the large CLIP."),
    text_l: str = _text("Prompt of the small CLIP."),
) -> tuple[list[Conditioning]]:
    """Encode a prompt for each text encoder of Stable Diffusion XL, with the sizes that it is conditioned on."""
    encoded = _encoded_by_kind(context, clip, {"clip_l": text_l, "clip_g": text_g}, needed=("clip_l", "clip_g"))
    size = PictureSize(original=(height, width), crop=(crop_h, crop_w), target=(target_height, target_width))
    return ([clip.family.sized(encoded, size)],)


@node(
    "CLIPTextEncodeSD3",
    "CLIP Text Encode (SD3)",
    "model/conditioning/stable diffusion",
    outputs=["CONDITIONING"],
    search_aliases=["sd3 prompt"],
)
def clip_text_encode_sd3(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    clip_l: str = _text("Prompt of the small CLIP."),
    clip_g: str = _text("Prompt of the large CLIP."),
    t5xxl: str = _text("Prompt of T5."),
    empty_padding: str = socket(
        "COMBO",
        options=("none", "empty_prompt"),
        tooltip="Of empty prompts: none leaves them out, which Stable Diffusion 3 alone can do.",
    ),
) -> tuple[list[Conditioning]]:
    """Encode a prompt for each text encoder; those that the model lacks are ignored."""
    clip = replace(clip, encoding=replace(clip.encoding, encodes_empty=empty_padding != "none"))
    return (
        [_encoded_by_kind(context, clip, {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl}, needed=("clip_l",))],
    )


@node(
    "CLIPTextEncodeLumina2",
    "CLIP Text Encode (Lumina 2)",
    "model/conditioning/lumina",
    outputs=["CONDITIONING"],
    search_aliases=["lumina prompt"],
)
def clip_text_encode_lumina2(
    context: NodeContext,
    *,
    system_prompt: str = socket("COMBO", options=tuple(_LUMINA_PROMPTS), tooltip="Sentence before the prompt."),
    user_prompt: str = _text(),
    clip: TextEncoder = socket("CLIP"),
) -> tuple[list[Conditioning]]:
    """Encode a prompt after one of the two instructions that Lumina 2 was trained with."""
    return ([_encoded(context, clip, f"{_LUMINA_PROMPTS[system_prompt]} <Prompt Start> {user_prompt}")],)


@node("CLIPSetLastLayer", "CLIP Set Last Layer", "model/conditioning", outputs=["CLIP"], search_aliases=["clip skip"])
def clip_set_last_layer(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    stop_at_clip_layer: int = socket("INT", default=-1, min=-24, max=-1, step=1, tooltip="-2 skips the last layer."),
) -> tuple[TextEncoder]:
    """Skip the last layers of the text encoder."""
    return (replace(clip, encoding=replace(clip.encoding, skip_layers=-1 - stop_at_clip_layer)),)


@node("T5TokenizerOptions", "T5 Tokenizer Options", "model/conditioning", outputs=["CLIP"], experimental=True)
def t5_tokenizer_options(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    min_padding: int = socket("INT", default=0, min=0, max=10000, step=1, tooltip="Least padding after a prompt."),
    min_length: int = socket("INT", default=0, min=0, max=10000, step=1, tooltip="Least number of tokens."),
) -> tuple[TextEncoder]:
    """Set how prompts are padded for T5."""
    padding = {**clip.encoding.min_padding, **dict.fromkeys(_T5_KINDS, min_padding)}
    tokens = {**clip.encoding.min_tokens, **dict.fromkeys(_T5_KINDS, min_length)}
    return (replace(clip, encoding=replace(clip.encoding, min_padding=padding, min_tokens=tokens)),)


def with_embeddings(context: NodeContext, clip: TextEncoder) -> TextEncoder:
    """Text encoders that read `embedding:NAME`; names without a file are left out with a warning, as in ComfyUI."""
    return replace(clip, embeddings=EmbeddingFiles(context.folders, context.warn))


def _encoded(context: NodeContext, clip: TextEncoder, text: str | Mapping[str, str]) -> Conditioning:
    check_encoder(clip)
    clip = with_embeddings(context, clip)
    with clip.active():
        return clip.encode(text)


def _encoded_by_kind(
    context: NodeContext, clip: TextEncoder, texts: Mapping[str, str], *, needed: tuple[str, ...]
) -> Conditioning:
    """Conditioning of one text per encoder kind, unknown kinds ignored. ModelError if a `needed` kind is missing."""
    kinds = {component: slot.kind for component, slot in clip.family.text_encoders.items()}
    if lacking := [kind for kind in needed if kind not in kinds.values()]:
        raise ModelError(
            f"this node is for models with the text encoder {' and '.join(lacking)}, but {clip.title} encodes for "
            f"{clip.family.title}, which has {' and '.join(kinds.values())}; use CLIP Text Encode (Prompt)"
        )
    return _encoded(context, clip, {component: texts.get(kind, "") for component, kind in kinds.items()})


_ENCODED = ("context", "pooled")  # tensors that encode the prompt; others, such as guidance, are settings


@node("ConditioningCombine", "Conditioning (Combine)", "model/conditioning/transform", outputs=["CONDITIONING"])
def conditioning_combine(
    context: NodeContext,
    *,
    conditioning_1: list[Conditioning] = socket("CONDITIONING"),
    conditioning_2: list[Conditioning] = socket("CONDITIONING"),
) -> tuple[list[Conditioning]]:
    """Combine prompts into a list: sampling averages their predictions, training uses one per image."""
    return ([*conditioning_1, *conditioning_2],)


@node(
    "ConditioningAverage",
    "Conditioning (Average)",
    "model/conditioning/transform",
    outputs=["CONDITIONING"],
    search_aliases=["blend prompts", "mix prompts"],
)
def conditioning_average(
    context: NodeContext,
    *,
    conditioning_to: list[Conditioning] = socket("CONDITIONING"),
    conditioning_from: list[Conditioning] = socket(
        "CONDITIONING", tooltip="Its first prompt is mixed into all of the others."
    ),
    conditioning_to_strength: float = socket("FLOAT", default=1.0, min=0.0, max=1.0, step=0.01),
) -> tuple[list[Conditioning]]:
    """Average encoded prompts; a shorter or longer `conditioning_from` is padded with zeros or cut."""
    if not conditioning_from:
        raise DataError("conditioning_from must be a prompt, got none; encode one")
    if len(conditioning_from) > 1:
        context.warn(f"conditioning_from takes one prompt but received {len(conditioning_from)}; the first one is used")
    return (
        [_average(conditioning, conditioning_from[0], conditioning_to_strength) for conditioning in conditioning_to],
    )


@node("ConditioningZeroOut", "Conditioning Zero Out", "model/conditioning/transform", outputs=["CONDITIONING"])
def conditioning_zero_out(
    context: NodeContext, *, conditioning: list[Conditioning] = socket("CONDITIONING")
) -> tuple[list[Conditioning]]:
    """Replace the encoded prompts by zeros, which differs from an empty prompt."""
    zeroed = (
        {key: torch.zeros_like(tensor) if key in _ENCODED else tensor for key, tensor in entry.tensors.items()}
        for entry in conditioning
    )
    return ([replace(entry, tensors=tensors, text=None) for entry, tensors in zip(conditioning, zeroed, strict=True)],)


@node(
    "ConditioningSetTimestepRange",
    "ConditioningSetTimestepRange",
    "model/conditioning/transform",
    outputs=["CONDITIONING"],
)
def conditioning_set_timestep_range(
    context: NodeContext,
    *,
    conditioning: list[Conditioning] = socket("CONDITIONING"),
    start: float = socket("FLOAT", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling; 0 is noise."),
    end: float = socket(
        "FLOAT", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling; 1 is the picture."
    ),
) -> tuple[list[Conditioning]]:
    """Use prompts for a part of sampling only; training uses them at every noise level."""
    return ([replace(entry, span=(start, end)) for entry in conditioning],)


@node("FluxGuidance", "FluxGuidance", "model/conditioning/flux", outputs=["CONDITIONING"])
def flux_guidance(
    context: NodeContext,
    *,
    conditioning: list[Conditioning] = socket("CONDITIONING"),
    guidance: float = socket("FLOAT", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt."),
) -> tuple[list[Conditioning]]:
    """Set the guidance that distilled models have as an input; others ignore it."""
    return ([_with(entry, "guidance", torch.full((_batch(entry),), guidance)) for entry in conditioning],)


@node("FluxDisableGuidance", "FluxDisableGuidance", "model/conditioning/flux", outputs=["CONDITIONING"])
def flux_disable_guidance(
    context: NodeContext, *, conditioning: list[Conditioning] = socket("CONDITIONING")
) -> tuple[list[Conditioning]]:
    """Leave out the embedding of guidance that distilled models have; others ignore it."""
    return ([_with(entry, "no_guidance", torch.zeros(_batch(entry))) for entry in conditioning],)


@node("ReferenceLatent", "Set Reference Latent", "model/conditioning", outputs=["CONDITIONING"])
def reference_latent(
    context: NodeContext,
    *,
    conditioning: list[Conditioning] = socket("CONDITIONING"),
    latent: Latent | None = socket("LATENT", optional=True, tooltip="Of the picture to edit or refer to."),
) -> tuple[list[Conditioning]]:
    """Give an edit model a picture beside the prompts; several nodes in a row give several."""
    if latent is None:
        return (conditioning,)
    return ([entry.with_controls([*entry.controls, latent["samples"]]) for entry in conditioning],)


@node(
    "InpaintModelConditioning",
    "InpaintModelConditioning",
    "model/conditioning",
    outputs=[Output("CONDITIONING", "positive"), Output("CONDITIONING", "negative"), Output("LATENT", "latent")],
)
def inpaint_model_conditioning(
    context: NodeContext,
    *,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    vae: Autoencoder = socket("VAE"),
    pixels: Tensor = socket("IMAGE"),
    mask: Tensor = socket("MASK", tooltip="White is painted."),
    noise_mask: bool = socket(
        "BOOLEAN", default=True, tooltip="Sample inside of the mask alone; the rest stays as it is in the picture."
    ),
) -> tuple[list[Conditioning], list[Conditioning], Latent]:
    """Give a model that fills masks, such as Flux.1 Fill, the picture outside of a mask; other models ignore it."""
    if len(mask) not in (1, len(pixels)):
        raise DataError(
            f"InpaintModelConditioning must have a mask for each picture or one for all, got {len(mask)} for "
            f"{len(pixels)}; add or remove some"
        )
    picture = pixels_from_image(context, pixels, vae)
    size = picture.shape[-2:]
    top, left = ((whole - cut) // 2 for whole, cut in zip(pixels.shape[1:3], size, strict=True))
    mask = functional.interpolate(mask.unsqueeze(1), size=pixels.shape[1:3], mode="bilinear")
    mask = mask[..., top : top + size[0], left : left + size[1]]
    with vae.active():
        latents, known = vae.encode(picture), vae.encode(picture * (1 - mask.round()))
    tensors = {CONCAT_IMAGE: known, CONCAT_MASK: mask}
    sides = [[replace(entry, tensors={**entry.tensors, **tensors}) for entry in side] for side in (positive, negative)]
    return sides[0], sides[1], latent_of(latents, mask=mask if noise_mask else None)


@node(
    "FluxKontextMultiReferenceLatentMethod",
    "Edit Model Reference Method",
    "model/conditioning/flux",
    outputs=["CONDITIONING"],
    experimental=True,
)
def flux_kontext_multi_reference_latent_method(
    context: NodeContext,
    *,
    conditioning: list[Conditioning] = socket("CONDITIONING"),
    reference_latents_method: str = socket(
        "COMBO",
        options=tuple(CONTROL_METHODS),
        tooltip="How several pictures lie to each other: beside or below each other, or each on its own. "
        "index_timestep_zero says besides that they are clean.",
    ),
) -> tuple[list[Conditioning]]:
    """Choose the positions of reference latents.

    Without this node Flux.1 has offset, Flux.2 and Qwen-Image-Edit index, Krea 2 and Qwen-Image-Edit 2511
    index_timestep_zero.
    """
    changed = []
    for entry in conditioning:
        kept = {key: tensor for key, tensor in entry.tensors.items() if key not in CONTROL_METHODS.values()}
        method = CONTROL_METHODS[reference_latents_method]
        changed.append(replace(entry, tensors={**kept, method: torch.zeros(_batch(entry))}))
    return (changed,)


def _with(conditioning: Conditioning, name: str, value: Tensor) -> Conditioning:
    """The conditioning with one guidance setting replaced."""
    kept = {key: tensor for key, tensor in conditioning.tensors.items() if key not in ("guidance", "no_guidance")}
    return replace(conditioning, tensors={**kept, name: value})


def _batch(conditioning: Conditioning) -> int:
    return len(conditioning.tensors["context"])


def _average(to: Conditioning, from_: Conditioning, strength: float) -> Conditioning:
    """`strength · to + (1 − strength) · from_` of the tensors that encode prompts; settings are those of `to`."""
    tensors = dict(to.tensors)
    for name in _ENCODED:
        ours, theirs = tensors.get(name), from_.tensors.get(name)
        if theirs is None:
            continue
        if ours is None:
            tensors[name] = theirs
            continue
        if name == "context":
            theirs = _of_length(theirs, ours.shape[1])
        _check_widths(name, ours, theirs)
        tensors[name] = strength * ours + (1 - strength) * theirs
    return replace(to, tensors=tensors)


def _of_length(context: Tensor, tokens: int) -> Tensor:
    """(batch, tokens, ...) cut, or padded with zeros."""
    cut = context[:, :tokens]
    padding = cut.new_zeros(len(cut), tokens - cut.shape[1], *cut.shape[2:])
    return torch.cat((cut, padding), dim=1)


def _check_widths(name: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape[1:] != theirs.shape[1:]:
        raise DataError(
            f"averaged prompts must be from the same text encoders, got a {name} of width {ours.shape[-1]} and one of "
            f"{theirs.shape[-1]}; encode both with one CLIP"
        )
