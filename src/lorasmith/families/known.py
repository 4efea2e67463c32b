"""The list of families: modules of those that can be loaded, and signs of others.

Adding a family is a line here, and the removal of its signs. The others are for messages alone: they are searched only
for checkpoints and LoRAs that no family recognises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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
_IN_COMFYUI = {
    "nerf_blocks.": "Chroma Radiance",
    "clip_txt_mapper.": "stage C of Stable Cascade",
    "clip_mapper.": "stage B of Stable Cascade",
    "double_layers.0.attn.w1q.": "AuraFlow",
    "mlp_t5.": "HunyuanDiT",
    "txt_in.individual_token_refiner.": "HunyuanVideo 1.0 or HunyuanImage 2.1",
    "t5_yproj.": "Mochi",
    "t_block.1.": "PixArt",
    "blocks.block0.": "Cosmos 1",
    "t_embedding_norm.": "Cosmos-Predict2",
    "core.pixel_embedder.": "PixelDiT",
    "patch_embed.text_proj.": "CogVideoX",
    "caption_projection.0.linear.": "HiDream-I1",
    "t_embedder1.": "HiDream-O1",
    "double_stream_layers.": "Boogu-Image",
    "time_caption_embed.timestep_embedder.": "OmniGen2",
    "transformer_blocks.0.img_mlp.w1.": "Lens",
    "visual_transformer_blocks.": "Kandinsky 5",
    "double_blocks.0.attn.img_attn_qkv.": "JoyImage",
    "encoder.lyric_encoder.": "ACE-Step 1.5",
    "patchify_proj.": "LTX-Video",
    "head.modulation": "a variant of Wan",
}
"""What a denoiser's tensor names begin with → architecture that comfyui-lorasmith trains."""

_SIGNS = {
    "audio_patchify_proj.": "LTX-2",
    **_IN_COMFYUI,
    "cap_embedder.": "Lumina",
    "clean_x_embedder.": "FramePack",
    "down_blocks.": _PART,
    "time_embed.t_embedder.": _PART,
    "single_transformer_blocks.": _PART,
}
# Input channels of a Stable Diffusion UNet; four are the noisy latents.
_UNET_INPUTS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}
# Width of its text conditioning.
_UNET_CONTEXTS = {1280: "the Stable Diffusion XL refiner"}
_TRAINED_IN_COMFYUI = {*_IN_COMFYUI.values(), *_UNET_INPUTS.values(), *_UNET_CONTEXTS.values()}
_NEXT_DIT = DENOISER_START + r"layers_\d+_(attention|attn|feed_forward)_"

_SIGNATURES = (Signature("Lumina", _NEXT_DIT, order=5),)
SIGNATURES.append(lambda: _SIGNATURES)


class Unsupported(NamedTuple):
    """An architecture that no family here has."""

    title: str
    remedy: str  # if comfyui-lorasmith trains it, otherwise empty


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> Unsupported | None:
    """The unsupported architecture with these denoiser tensors (prefix cut off), or None."""
    if (title := _title(shapes)) is None:
        return None
    remedy = "train it in ComfyUI with Train LoRA (Lorasmith) of comfyui-lorasmith"
    return Unsupported(title, remedy if title in _TRAINED_IN_COMFYUI else "")


def _title(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if "input_blocks.0.0.weight" in shapes:
        known = (_UNET_CONTEXTS[width] for width in context_widths(shapes) if width in _UNET_CONTEXTS)
        return _UNET_INPUTS.get(shapes["input_blocks.0.0.weight"][1]) or next(known, None)
    return next((title for sign, title in _SIGNS.items() if any(name.startswith(sign) for name in shapes)), None)
