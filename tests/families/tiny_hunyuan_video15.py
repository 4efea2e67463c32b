"""A small random HunyuanVideo 1.5. Widths that its class or ComfyUI has written into it are the released ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_parts import TinyFamily, qwen25, renamed
from torch import Tensor, nn

BYT5_WIDTH = 1472


def _byt5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=1510,
            d_model=BYT5_WIDTH,
            d_ff=32,
            d_kv=8,
            num_heads=2,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    )


def authors_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by ComfyUI's names under those of the files that it publishes."""
    renames = (
        (r"(time_in|txt_in\.t_embedder)\.in_layer", r"\1.mlp.0"),
        (r"(time_in|txt_in\.t_embedder)\.out_layer", r"\1.mlp.2"),
        (r"c_embedder\.in_layer", "c_embedder.linear_1"),
        (r"c_embedder\.out_layer", "c_embedder.linear_2"),
        (r"_attn\.norm\.query_norm", "_attn_q_norm"),
        (r"_attn\.norm\.key_norm", "_attn_k_norm"),
        (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
        (r"_mod\.lin\.", "_mod.linear."),
        (r"(blocks\.\d\.(?:img_|txt_)?mlp)\.0\.", r"\1.fc1."),
        (r"(blocks\.\d\.(?:img_|txt_)?mlp)\.2\.", r"\1.fc2."),
    )
    return renamed(tensors, renames)


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, mask, glyphs, glyph_mask = pipeline.encode_prompt(text)
    found = {"context": context[mask.bool()][None]}
    return found | ({"glyphs": glyphs[glyph_mask.bool()][None]} if glyph_mask.any() else {})


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    glyphs = given.get("glyphs", torch.zeros(1, 1, BYT5_WIDTH))
    unknown = torch.zeros(1, latents.shape[1] + 1, *latents.shape[2:])
    return denoiser(  # type: ignore[no-any-return]
        torch.cat((latents, given.get("known", unknown)), dim=1),
        time,
        given["context"],
        torch.ones(given["context"].shape[:2]),
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=torch.full(glyphs.shape[:2], float("glyphs" in given)),
        image_embeds=given.get("clip_vision", torch.zeros(1, 2, 1152)),
    ).sample


def frames_of(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> list[Any]:
    """The pictures of a clip of `num_frames`, drawn by the pipeline."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
    return pipeline(**arguments, output_type="pil").frames[0]  # type: ignore[no-any-return]


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return frames_of(pipeline, {**arguments, "num_frames": 1}, guidance)[0]


def _dressed(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers.guiders import ClassifierFreeGuidance

    return {**parts, "guider": ClassifierFreeGuidance()}


HUNYUAN_VIDEO15 = TinyFamily(
    "hunyuan-video15",
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
    {"num_attention_heads": 1, "num_layers": 2, "text_embed_dim": 32},
    {"text_encoder": lambda: qwen25(4), "text_encoder_2": _byt5},
    network="HunyuanVideo15Transformer3DModel",
    named=authors_names,
    dressed=_dressed,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    # The last block's text is dropped.
    unreached=(
        *(f"transformer_blocks.1.{one}" for one in ("attn.add_q_proj", "attn.to_add_out", "ff_context.*")),
        *("context_embedder_2.*", "image_embedder.*"),
    ),
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers has no reader of its files"},
    is_slow=True,
)
