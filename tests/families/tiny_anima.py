"""A small random Anima. Its pipeline in diffusers is a modular one, which is put together from blocks."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_parts import TinyFamily, qwen
from torch import Tensor, nn
from torch.nn import functional as F

from lorasmith.families.parts.encoders import t5_tokenizer

_ADAPTER = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2}


@cache
def diffusers_parts() -> dict[str, Any]:
    """The pipeline's parts, made of diffusers' classes alone. Nothing may change them."""
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    parts = dict(ANIMA.parts())
    ours = parts["transformer"].state_dict()
    settings = {**parts["transformer"].config, "in_channels": 16, "concat_padding_mask": True}
    transformer, adapter = CosmosTransformer3DModel.from_config(settings), AnimaTextConditioner(**_ADAPTER)
    inner = "text_conditioner."
    transformer.load_state_dict({name: one for name, one in ours.items() if not name.startswith(inner)})
    adapter.load_state_dict({name.removeprefix(inner): one for name, one in ours.items() if name.startswith(inner)})
    for part in (transformer, adapter):
        part.eval().requires_grad_(False)
    return {**parts, "transformer": transformer, "text_conditioner": adapter, "t5_tokenizer": t5_tokenizer()}


@contextmanager
def _resized() -> Iterator[None]:
    """diffusers scales the mask of padding with torchvision, which need not be there."""
    module = sys.modules["diffusers.models.transformers.transformer_cosmos"]

    def resize(mask: Tensor, size: list[int], interpolation: Any) -> Tensor:
        return F.interpolate(mask, size, mode="nearest")

    functional = types.SimpleNamespace(resize=resize, InterpolationMode=types.SimpleNamespace(NEAREST=None))
    fake = types.SimpleNamespace(functional=functional, InterpolationMode=functional.InterpolationMode)
    with mock.patch.object(module, "transforms", fake, create=True):
        yield


class _Modular(TinyFamily):
    def made(self) -> Any:
        from diffusers import AnimaAutoBlocks, AnimaModularPipeline, FlowMatchEulerDiscreteScheduler

        pipeline = AnimaModularPipeline(blocks=AnimaAutoBlocks())
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
        pipeline.update_components(scheduler=scheduler, **diffusers_parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_folder(self, folder: Path) -> None:
        self.made().save_pretrained(str(folder), overwrite_modular_index=True)


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    encoded = AnimaTextEncoderStep.encode_prompt(pipeline, text, prepare_unconditional_embeds=False)
    ids = encoded["t5_input_ids"]
    return {"context": encoded["qwen_prompt_embeds"], "t5xxl_ids": ids, "t5xxl_weights": torch.ones_like(ids).float()}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    padding = torch.zeros(1, 1, *(8 * side for side in latents.shape[-2:]))
    with _resized():
        found: Tensor = diffusers_parts()["transformer"](latents, time, given["context"], padding_mask=padding).sample
    return found


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    from diffusers import ClassifierFreeGuidance

    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
    with _resized():
        return pipeline(**arguments, output="images")[0]


ANIMA = _Modular(
    "anima",
    "anima-base-v1.0.safetensors",
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "text_embed_dim": 32,
        "adaln_lora_dim": 16,
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
        "text_conditioner": _ADAPTER,
    },
    {"text_encoder": lambda: qwen(2, rope_theta=1e6)},
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    left_out={"diffusers reads the file": "its class reads the transformer alone, in test_anima.py"},
    is_slow=True,
)
