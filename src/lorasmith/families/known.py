"""The list of families: modules of those that can be loaded, and signs of others.

Adding a family is a line here, and the removal of its signs. The others are for messages alone: they are searched only
for checkpoints and LoRAs that no family recognises.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorasmith.families import (  # noqa: F401  (register themselves)
    anima,
    chroma,
    ernie_image,
    flux,
    flux2,
    hunyuan_video15,
    ideogram4,
    krea2,
    lumina2,
    qwen_image,
    qwen_image21,
    sd3,
    sdxl,
    stable_diffusion,
    wan,
    z_image,
)
from lorasmith.families.parts import clip, clip_vision, language_models  # noqa: F401  (register themselves)
from lorasmith.families.parts.unet_layout import context_widths
from lorasmith.formats.spelling import DENOISER_START, SIGNATURES, Signature

_PART = "one part of a diffusers model (give the folder that has its model_index.json instead)"
# What a denoiser's tensor names begin with → architecture.
_SIGNS = {
    "nerf_blocks.": "Chroma Radiance",
    "cap_embedder.": "Lumina",
    "head.modulation": "a variant of Wan",
    "txt_in.individual_token_refiner.": "HunyuanVideo 1.0 or HunyuanImage 2.1",
    "clean_x_embedder.": "FramePack",
    "audio_patchify_proj.": "LTX-2",
    "patchify_proj.": "LTX-Video",
    "t_embedding_norm.": "Cosmos-Predict2",
    "down_blocks.": _PART,
    "time_embed.t_embedder.": _PART,
    "single_transformer_blocks.": _PART,
}
# Input channels of a Stable Diffusion UNet; four are the noisy latents.
_UNET_INPUTS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}
# Width of its text conditioning.
_UNET_CONTEXTS = {1280: "the Stable Diffusion XL refiner"}
_NEXT_DIT = DENOISER_START + r"layers_\d+_(attention|attn|feed_forward)_"

_SIGNATURES = (Signature("Lumina", _NEXT_DIT, order=5),)
SIGNATURES.append(lambda: _SIGNATURES)


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Name of an unsupported architecture with these denoiser tensors (prefix cut off), or None."""
    if "input_blocks.0.0.weight" in shapes:
        known = (_UNET_CONTEXTS[width] for width in context_widths(shapes) if width in _UNET_CONTEXTS)
        return _UNET_INPUTS.get(shapes["input_blocks.0.0.weight"][1]) or next(known, None)
    return next((title for sign, title in _SIGNS.items() if any(name.startswith(sign) for name in shapes)), None)
