"""A small random Ideogram 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_parts import TinyFamily, chatting, qwen
from tiny_towers import tower_of, with_tower
from torch import Tensor, nn

from lorasmith.families.files.original_weights import weights_empty

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS = 13
"""Layers of the encoder that the network reads."""


def _tokenizer() -> Any:
    tokenizer = chatting()
    tokenizer.chat_template = _CHAT
    return tokenizer


def _vae_as_theirs(vae: nn.Module) -> nn.Module:
    """The autoencoder with its statistics in the order of the pipeline's tokens: places in a patch, then channels."""
    import diffusers

    theirs = diffusers.AutoencoderKLFlux2.from_config(vae.config)  # type: ignore[attr-defined]
    state = vae.state_dict()
    for name in ("bn.running_mean", "bn.running_var"):
        state[name] = state[name].reshape(-1, 4).T.reshape(-1)
    theirs.load_state_dict(state)
    return theirs.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _pipeline(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        **parts,
        "vae": _vae_as_theirs(parts["vae"]),
        "text_encoder": _whole(parts["text_encoder"]),
        "unconditional_transformer": parts["transformer"],
    }


def _whole(language: Any) -> nn.Module:
    """The language model with its tower, as the pipeline has them."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    tower = tower_of("qwen3vl")
    config, rope = language.config.to_dict(), {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    text = {name: one for name, one in config.items() if name not in ("model_type", "rope_parameters", "rope_scaling")}
    with weights_empty():
        whole = qwen3.Qwen3VLModel(
            qwen3.Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower.config.to_dict())
        )
    state = {f"language_model.{name}": one for name, one in language.state_dict().items()}
    whole.load_state_dict({**state, **{f"visual.{name}": one for name, one in tower.state_dict().items()}}, assign=True)
    return whole.eval().requires_grad_(False)


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, _, _, indicator = pipeline.encode_prompt(text, 1, 1, 512, torch.device("cpu"))
    return {"context": context[:, indicator[0] == 3]}


def called(
    denoiser: nn.Module, latents: Tensor, context: Tensor, time: Tensor, lengths: list[int] | None = None
) -> Tensor:
    """diffusers' call: one sequence of text, filled up before it, and picture."""
    from diffusers import Ideogram4Pipeline

    batch, tokens, (height, width) = len(latents), context.shape[1], latents.shape[-2:]
    lengths = lengths or [tokens] * batch
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids(lengths, height, width, tokens, "cpu")
    states = torch.zeros(batch, tokens + height * width, context.shape[2])
    for row, length in enumerate(lengths):
        states[row, tokens - length : tokens] = context[row, :length]
    # 2×2 pixels of the autoencoder's latents are a token, whose channels come last.
    patches = (
        latents.reshape(batch, -1, 2, 2, height, width).permute(0, 4, 5, 2, 3, 1).reshape(batch, height * width, -1)
    )
    packed = torch.cat((torch.zeros(batch, tokens, patches.shape[2]), patches), dim=1)
    found = denoiser(packed, 1 - time, states, positions, segments, indicator, return_dict=False)[0][:, tokens:]
    places = found.reshape(batch, height, width, 2, 2, -1).permute(0, 5, 3, 4, 1, 2)
    return -places.reshape(latents.shape)


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    return called(denoiser, latents, given["context"], time)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """The pipeline computes its sigmas itself, which no argument changes."""
    from unittest import mock

    import diffusers.pipelines.ideogram4.pipeline_ideogram4 as module

    given = dict(arguments)
    noise, sigmas = given.pop("latents"), torch.tensor(given.pop("sigmas"))
    height, width = noise.shape[-2:]
    packed = noise.reshape(1, -1, 2, 2, height, width).permute(0, 4, 5, 2, 3, 1).reshape(1, height * width, -1)
    with mock.patch.object(module, "_logit_normal_sigmas", lambda *_, **__: sigmas):
        return pipeline(
            **given, latents=packed, guidance_scale=guidance, guidance_schedule=None, max_sequence_length=64
        ).images[0]


IDEOGRAM4 = TinyFamily(
    "ideogram4",
    "ideogram4_fp8_scaled.safetensors",
    {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "adaln_dim": 48,
        "llm_features_dim": 32 * LAYERS,
        "mrope_section": (3, 2, 2),
    },
    {"text_encoder": lambda: qwen(36, rope_theta=5e6)},
    tokenizer=_tokenizer,
    encoder_names=with_tower("qwen3vl", "model.language_model.", "model.visual."),
    network="Ideogram4Transformer2DModel",
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    dressed=_pipeline,
    unlearnt=0.5,  # 64 of 128 channels
    # Shifted by the side, 32 px have a sixteenth of the noise of 512 px.
    learnt_with={"timesteps": "uniform", "steps": 1200},
    left_out={
        "guided picture": "its pipeline guides by a second network, which sees no text",
        "diffusers reads the file": "diffusers has no converter of the original names",
    },
    is_slow=True,
)
