"""Checkpoints that are refused by name: architectures people are likely to have that no family here covers.

Only for the error's sentence; a checkpoint that a family recognises never gets here.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["looks_like"]

_PART = "one part of a diffusers model (give the folder that has its model_index.json instead)"
# What a denoiser's tensor names begin with → architecture.
_SIGNS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_stream_modulation_img.": "Flux.2",
    "distilled_guidance_layer.": "Chroma",
    "cap_embedder.": "Lumina 2 or Z-Image",
    "head.modulation": "Wan",
    "txt_norm.": "Qwen-Image",
    "down_blocks.": _PART,
    "single_transformer_blocks.": _PART,
}
# Input channels of a Stable Diffusion UNet; four are the noisy latents.
_UNET_INPUTS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}
# Width of its text conditioning.
_UNET_CONTEXTS = {1280: "the Stable Diffusion XL refiner", 2048: "Stable Diffusion XL"}


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a denoiser with these tensors (prefix cut off) is called, or None."""
    if "input_blocks.0.0.weight" in shapes:
        contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
        known = (_UNET_CONTEXTS[width] for width in contexts if width in _UNET_CONTEXTS)
        return _UNET_INPUTS.get(shapes["input_blocks.0.0.weight"][1]) or next(known, None)
    return next((title for sign, title in _SIGNS.items() if any(name.startswith(sign) for name in shapes)), None)
