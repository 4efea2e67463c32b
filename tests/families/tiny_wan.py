"""Small random Wan 2.1 and Wan 2.2 5B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from original_models import save
from sentencepiece import SentencePieceProcessor
from spiece_models import spiece_model
from tiny_parts import TinyFamily, randomized, renamed, t5_names, wan_names
from torch import Tensor, nn

from lorasmith.families.parts.autoencoders import LATENT_MEAN_22, LATENT_STD_22
from lorasmith.families.slots import AutoencoderSlot


def _sizes(channels: int) -> dict[str, Any]:
    return {
        "num_attention_heads": max(1, channels // 24),  # of 128 each; together more than a patch has numbers
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 32,
        "ffn_dim": 96,
        "num_layers": 2,
    }


@cache
def _umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
        )
    )


@cache
def _tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = SentencePieceProcessor(model_proto=spiece_model("unigram"))
    vocabulary = [(pieces.id_to_piece(id_), pieces.get_score(id_)) for id_ in range(pieces.get_piece_size())]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def _wan21(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=16)


def _wan22(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=48,
        latents_mean=LATENT_MEAN_22,
        latents_std=LATENT_STD_22,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def _umt5_names(encoder: nn.Module) -> dict[str, Tensor]:
    vocabulary = torch.frombuffer(bytearray(spiece_model("unigram")), dtype=torch.uint8)
    return {**t5_names(encoder), "spiece_model": vocabulary}


def _wan22_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKLWan's tensors by Wan 2.2's names: what changes the size is the last layer of its block."""
    renames = (
        (r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1samples.\2.\1samples.\3"),
        (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2"),
        (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3"),
    )
    blocks = renamed(vae.state_dict(), renames)
    return wan_names(SimpleNamespace(state_dict=lambda: blocks))  # type: ignore[arg-type]


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"context": context}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    return denoiser(latents, time, given["context"]).sample  # type: ignore[no-any-return]


def frames_of(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> list[Any]:
    """The pictures of a clip of `num_frames`, drawn by the pipeline, which takes no `sigmas`."""
    rest = {name: value for name, value in arguments.items() if name != "sigmas"}
    set_timesteps = pipeline.scheduler.set_timesteps

    def at(_steps: int, device: Any) -> None:
        set_timesteps(sigmas=arguments["sigmas"], device=device)

    with mock.patch.object(pipeline.scheduler, "set_timesteps", at):
        return pipeline(**rest, guidance_scale=guidance, output_type="pil").frames[0]  # type: ignore[no-any-return]


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return frames_of(pipeline, {**arguments, "num_frames": 1}, guidance)[0]


WAN = TinyFamily(
    "wan",
    "wan2.1_t2v_1.3B_fp16.safetensors",
    _sizes(16),
    {"text_encoder": _umt5},
    tokenizer=_tokenizer,
    encoder_names=_umt5_names,
    vae=_wan21,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
)


def _with_nothing_known(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    unknown = latents.new_zeros(len(latents), 20, *latents.shape[2:])
    return _call(denoiser, torch.cat((latents, unknown), dim=1), given, time)


def _conditioning_i2v(pipeline: Any, text: str) -> dict[str, Tensor]:
    """That module of diffusers uses ftfy even where it is not installed."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    with mock.patch.object(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), create=True):
        return _conditioning(pipeline, text)


_DRAWS_CLIPS = "it draws clips from a picture, which tests of its own do"

WAN_I2V = replace(
    WAN,
    name="wan-i2v",
    file="wan2.2_i2v_high_noise_14B_fp16.safetensors",
    sizes={**_sizes(16), "in_channels": 36},
    conditioning=_conditioning_i2v,
    call=_with_nothing_known,
    left_out={"pictures": _DRAWS_CLIPS},
)

WAN21_I2V = replace(
    WAN_I2V,
    file="wan2.1_i2v_480p_14B_fp16.safetensors",
    sizes={**WAN_I2V.sizes, "image_dim": 80, "added_kv_proj_dim": 128},
)

WAN21_FLF2V = replace(
    WAN21_I2V,
    file="wan2.1_flf2v_720p_14B_fp16.safetensors",
    sizes={**WAN21_I2V.sizes, "pos_embed_seq_len": 514},
)


@cache
def clip_vision() -> nn.Module:
    """An image encoder of three layers, in whose patches and positions ViT-H's sizes are."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return randomized(CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION_SIZES)))


CLIP_VISION_SIZES = {
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 16,
}


def save_clip_vision(folder: Path) -> Path:
    """The image encoder as released files have it."""
    path = folder / "models" / "clip_vision" / "clip_vision_h.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"vision_model.{name}": one.contiguous() for name, one in clip_vision().state_dict().items()}
    return save(path, {**tensors, "visual_projection.weight": torch.zeros(16, 80)})


WAN_5B = TinyFamily(
    "wan22-5b",
    "wan2.2_ti2v_5B_fp16.safetensors",
    _sizes(48),
    {"text_encoder": _umt5},
    tokenizer=_tokenizer,
    encoder_names=_umt5_names,
    vae=_wan22,
    vae_names=_wan22_names,
    further={"expand_timesteps": True},
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    unlearnt=1.0,  # all of the noise: four tokens a picture are too few for 192 numbers a patch
    is_slow=True,
)
