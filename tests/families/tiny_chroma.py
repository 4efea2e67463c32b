"""A small random Chroma."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any
from unittest import mock

import torch
from tiny_parts import (
    TinyFamily,
    grid_positions,
    image_patches,
    kl,
    kl_names,
    latents_of_patches,
    original_tensors,
    randomized,
    t5_names,
)
from torch import Tensor, nn

from lorasmith.families.parts.tokenizers import t5_tokenizer

__all__ = ["CHROMA", "chroma_denoiser", "chroma_names"]


def chroma_denoiser(*, heads: int, head: int, axes: tuple[int, int, int]) -> nn.Module:
    """One block of either kind.

    Args:
        heads, head: number of attention heads and their width.
        axes: of rotary positions, which add up to `head`.
    """
    from diffusers import ChromaTransformer2DModel

    denoiser = ChromaTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=axes,
        approximator_hidden_dim=64,
        approximator_layers=2,
    )
    return randomized(denoiser)


@cache
def _chroma() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=32128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    return {
        "transformer": chroma_denoiser(heads=2, head=32, axes=(4, 14, 14)),
        "vae": randomized(kl(16)),
        "text_encoder": randomized(T5EncoderModel(t5)),
        "tokenizer": t5_tokenizer(),
    }


def chroma_names(denoiser: nn.Module) -> dict[str, Tensor]:
    """The released file says `scale` for the weights of all norms."""
    norms = (".query_norm.weight", ".key_norm.weight")
    tensors = original_tensors("chroma", denoiser)
    return {
        f"{name.removesuffix('weight')}scale" if name.endswith(norms) or ".norms." in name else name: one
        for name, one in tensors.items()
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, _, mask, *_ = pipeline.encode_prompt(text)
    return {"context": context[:, mask[0].bool()]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    patches = denoiser(
        image_patches(latents),
        given["context"],
        time,
        grid_positions(3, height // 2, width // 2),
        torch.zeros(given["context"].shape[1], 3),
    ).sample
    return latents_of_patches(patches, height, width)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """The pipeline's picture with its mask as booleans, which hides padding, instead of numbers, which are added."""
    noise = arguments["latents"]
    packed = {**arguments, "latents": pipeline._pack_latents(noise, *noise.shape)}
    prepare = pipeline._prepare_attention_mask

    def as_booleans(**given: Any) -> Tensor | None:
        mask = prepare(**given)
        return None if mask is None else mask.bool()

    with mock.patch.object(pipeline, "_prepare_attention_mask", as_booleans):
        return pipeline(**packed, negative_prompt="", guidance_scale=guidance).images[0]


CHROMA = TinyFamily(
    _chroma,
    "ChromaPipeline",
    {
        "transformer": ("diffusion_models/Chroma1-HD.safetensors", chroma_names),
        "vae": ("vae/ae.safetensors", kl_names),
        "text_encoder": ("text_encoders/t5xxl_fp16.safetensors", t5_names),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
    is_slow=True,
)
