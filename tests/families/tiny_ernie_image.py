"""A small random ERNIE-Image.

Its encoder is as wide as the released one, since files of Ministral and Mistral differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from tiny_flux2 import tekken_file
from tiny_parts import TinyFamily, mistral, under
from torch import Tensor, nn

from lorasmith.families.parts.encoders import TokenizerSource, tekken_tokenizer

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
    "ernie-image",
    "ernie-image.safetensors",
    {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "text_in_dim": WIDTH,
        "rope_axes_dim": (8, 12, 12),
    },
    {"text_encoder": lambda: mistral(_CONTROL + 258, WIDTH, 3, 1e6)},
    tokenizer=_tokenizer,
    encoder_names=lambda encoder: {**under("model.")(encoder), "tekken_model": _vocabulary()},
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    unlearnt=0.5,  # 64 of 128 channels
    is_slow=True,
)
