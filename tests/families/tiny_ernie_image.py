"""A small random ERNIE-Image.

Its encoder is as wide as the released one, since files of Ministral and Mistral differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from tiny_flux2 import tekken_file
from tiny_parts import TinyFamily, kl_names, original_tensors, randomized, under
from torch import Tensor, nn

from lorasmith.families.parts.tokenizers import TokenizerSource, tekken_tokenizer

__all__ = ["ERNIE_IMAGE", "WIDTH"]

WIDTH = 3072
_CONTROL = 32  # tokens


def _vocabulary() -> Tensor:
    return torch.frombuffer(bytearray(tekken_file(_CONTROL)), dtype=torch.uint8)


def _tokenizer() -> Any:
    """As the release's: it begins every text with `<s>`."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tekken_tokenizer(TokenizerSource(embedded={"tekken_model": _vocabulary()}))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def _ernie() -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, ErnieImageTransformer2DModel
    from transformers import MistralConfig, MistralModel

    denoiser = ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=96,
        text_in_dim=WIDTH,
        rope_axes_dim=(8, 12, 12),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    ministral = MistralConfig(
        vocab_size=_CONTROL + 258,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(vae),
        "text_encoder": randomized(MistralModel(ministral)),
        "tokenizer": _tokenizer(),
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    return {"context": pipeline.encode_prompt(text, "cpu")[0][None]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    context = given["context"]
    return denoiser(latents, time, context, torch.tensor([context.shape[1]])).sample  # type: ignore[no-any-return]


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """The pipeline spaces its steps itself, which no argument changes.

    It adds 1e-5 to the variance of latents, where the autoencoder's configuration and ComfyUI have 1e-4.
    """
    given = dict(arguments)
    spaced = partial(pipeline.scheduler.set_timesteps, sigmas=given.pop("sigmas"))
    statistics = pipeline.vae.bn
    with (
        mock.patch.object(pipeline.scheduler, "set_timesteps", lambda sigmas, device: spaced(device=device)),
        mock.patch.dict(statistics._buffers, running_var=statistics.running_var + (1e-4 - 1e-5)),
    ):
        return pipeline(**given, guidance_scale=guidance).images[0]


ERNIE_IMAGE = TinyFamily(
    _ernie,
    "ErnieImagePipeline",
    {
        "transformer": (
            "diffusion_models/ernie-image.safetensors",
            lambda one: original_tensors("ernie-image", one),
        ),
        "vae": ("vae/flux2-vae.safetensors", kl_names),
        "text_encoder": (
            "text_encoders/ministral-3-3b.safetensors",
            lambda one: {**under("model.")(one), "tekken_model": _vocabulary()},
        ),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    unlearnt=0.5,  # 64 of 128 channels
    is_slow=True,
)
