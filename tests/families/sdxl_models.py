"""Tiny random Stable Diffusion XL checkpoints in the original layout, and what diffusers makes of them.

The encoders are narrow, but as deep as the released ones: by their depth files that hold them alone are recognised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
from original_models import autoencoder, clip_l, openclip, save
from torch import Tensor

from lorasmith.families.parts.clip import clip_tokenizer

PREFIX = "model.diffusion_model."
VOCABULARY = 2000
_VAE_WIDTHS = (32, 32, 32, 32)
_WIDTHS = {"text_encoder": 64, "text_encoder_2": 128}
_LAYERS = {"text_encoder": 12, "text_encoder_2": 32}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A whole checkpoint."""
    small = clip_l(seed, vocabulary=VOCABULARY)
    large = openclip(seed, layers=_LAYERS["text_encoder_2"], vocabulary=VOCABULARY, width=_WIDTHS["text_encoder_2"])
    return {
        **models.checkpoint(models.SDXL_TINY, seed),
        **autoencoder(seed, _VAE_WIDTHS),
        **{f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in small.items()},
        **{name.replace("cond_stage_model.", "conditioner.embedders.1."): tensor for name, tensor in large.items()},
    }


def saved_checkpoint(path: Path, extra: Mapping[str, Tensor] | None = None) -> Path:
    """A checkpoint on disk, with `extra` tensors in it."""
    return save(path, tensors() | dict(extra or {}))


def diffusers_pipeline(checkpoint: Path, folder: Path, **scheduler: Any) -> Any:
    """diffusers' own loading of a checkpoint.

    Args:
        checkpoint: the file.
        folder: an empty folder, for the configuration that diffusers needs beside it.
        scheduler: settings of its scheduler that differ from the base model's.
    """
    from diffusers import StableDiffusionXLPipeline

    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionXLPipeline",
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **models.diffusers_config(models.SDXL_TINY)},
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": _VAE_WIDTHS,
            "down_block_types": ["DownEncoderBlock2D"] * len(_VAE_WIDTHS),
            "up_block_types": ["UpDecoderBlock2D"] * len(_VAE_WIDTHS),
            "layers_per_block": 2,
            "scaling_factor": 0.13025,
            "force_upcast": True,
        },
        "text_encoder/config.json": _text_config("text_encoder", "CLIPTextModel", "quick_gelu"),
        "text_encoder_2/config.json": _text_config("text_encoder_2", "CLIPTextModelWithProjection", "gelu"),
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "timestep_spacing": "leading",
            **scheduler,
        },
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    clip_tokenizer(size=VOCABULARY).save_pretrained(folder / "tokenizer")
    clip_tokenizer(size=VOCABULARY, pad_token="!").save_pretrained(folder / "tokenizer_2")
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_config(component: str, kind: str, activation: str) -> dict[str, Any]:
    width = _WIDTHS[component]
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": _LAYERS[component],
        "hidden_act": activation,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": 0 if component == "text_encoder_2" else VOCABULARY - 1,
    }
