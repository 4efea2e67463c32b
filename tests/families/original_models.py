"""Tiny random Stable Diffusion checkpoints in the original layout, and what diffusers makes of them.

The UNets come from `tests/peers/models.py`; here are the autoencoder and the two text encoders around them, with names
and shapes as in the published files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 49408
TEXT_WIDTH = 64
TEXT_LAYERS = 2


@dataclass(frozen=True)
class TinyModel:
    """A version of Stable Diffusion, small.

    Attributes:
        version: 1 or 2.
        unet: shape of its UNet.
    """

    version: int
    unet: models.UNetShape

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """A whole checkpoint, with the tables and counters that real ones carry along."""
        return {
            **self.unet_tensors(seed),
            **autoencoder(seed),
            **(_clip(seed) if self.version == 1 else openclip(seed)),
            "alphas_cumprod": torch.linspace(1, 0, 1000),
            "model_ema.decay": torch.tensor(0.999),
        }

    def unet_tensors(self, seed: int = 0) -> dict[str, Tensor]:
        return models.checkpoint(self.unet, seed)

    def diffusers_folder(self, folder: Path) -> Path:
        """The configuration files with which diffusers converts such a checkpoint."""
        configs = {
            "model_index.json": {
                "_class_name": "StableDiffusionPipeline",
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
            "unet/config.json": {"_class_name": "UNet2DConditionModel", **models.diffusers_config(self.unet)},
            "vae/config.json": {"_class_name": "AutoencoderKL", **_VAE_CONFIG},
            "text_encoder/config.json": self._text_config(),
            "scheduler/scheduler_config.json": {
                "_class_name": "DDIMScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "steps_offset": 1,
            },
        }
        for name, config in configs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(config))
        return folder

    def _text_config(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": VOCABULARY,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "num_attention_heads": 1,
            "num_hidden_layers": TEXT_LAYERS,
            "hidden_act": "quick_gelu" if self.version == 1 else "gelu",
            "max_position_embeddings": 77,
            "projection_dim": TEXT_WIDTH,
        }


SD1 = TinyModel(1, models.SD1_TINY)
SD2 = TinyModel(2, models.UNetShape(64, (1, 2), 2, (True, False), context=1024, linear=True))
SMALLEST = TinyModel(1, models.UNetShape(32, (1,), 1, (True,)))
"""One level, for tests of what goes wrong with files."""

_VAE_CONFIG = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, dict(metadata or {}))
    return path


def autoencoder(seed: int = 0, widths: tuple[int, ...] = (32, 64, 64)) -> dict[str, Tensor]:
    """The KL autoencoder of a checkpoint, with levels of these widths."""
    return _filled("first_stage_model.", dict(autoencoder_shapes(widths)), seed)


def autoencoder_shapes(widths: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the KL autoencoder's tensors: two resnets a level (three on the way up)."""
    first, last = widths[0], widths[-1]
    yield from _conv("encoder.conv_in", 3, first, 3)
    width = first
    for level, out in enumerate(widths):
        for block in range(2):
            yield from _resnet(f"encoder.down.{level}.block.{block}", width, out)
            width = out
        if level + 1 < len(widths):
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    yield from _middle("encoder.mid", last)
    yield from _norm("encoder.norm_out", last)
    yield from _conv("encoder.conv_out", last, 8, 3)
    yield from _conv("quant_conv", 8, 8, 1)
    yield from _conv("post_quant_conv", 4, 4, 1)
    yield from _conv("decoder.conv_in", 4, last, 3)
    yield from _middle("decoder.mid", last)
    width = last
    for level, out in reversed(list(enumerate(widths))):
        for block in range(3):
            yield from _resnet(f"decoder.up.{level}.block.{block}", width, out)
            width = out
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    yield from _norm("decoder.norm_out", first)
    yield from _conv("decoder.conv_out", first, 3, 3)


def _middle(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _resnet(f"{name}.block_1", width, width)
    yield from _norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", width, width, 1)
    yield from _resnet(f"{name}.block_2", width, width)


def _resnet(name: str, width: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if width != out:
        yield from _conv(f"{name}.nin_shortcut", width, out, 1)


def _conv(name: str, width: int, out: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, width: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width)
    yield f"{name}.bias", (out,)


def _clip(seed: int) -> dict[str, Tensor]:
    """OpenAI's CLIP text encoder as Stable Diffusion 1 holds it."""
    return {f"cond_stage_model.transformer.{name}": tensor for name, tensor in clip_l(seed, layers=TEXT_LAYERS).items()}


def clip_l(seed: int = 0, *, layers: int = 12, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """OpenAI's CLIP text encoder in a file of its own, which is known by its number of layers."""
    positions = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
    return _filled("text_model.", clip_l_shapes(layers, vocabulary, TEXT_WIDTH), seed) | positions


def clip_l_shapes(layers: int, vocabulary: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of its tensors by name, without `text_model.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        shapes |= dict(_norm(f"{name}.layer_norm1", width)) | dict(_norm(f"{name}.layer_norm2", width))
        for part in ("q", "k", "v", "out"):
            shapes |= dict(_linear(f"{name}.self_attn.{part}_proj", width, width))
        shapes |= dict(_linear(f"{name}.mlp.fc1", width, 4 * width))
        shapes |= dict(_linear(f"{name}.mlp.fc2", 4 * width, width))
    return shapes | dict(_norm("final_layer_norm", width))


def openclip(
    seed: int = 0, *, layers: int = TEXT_LAYERS + 1, vocabulary: int = VOCABULARY, width: int = TEXT_WIDTH
) -> dict[str, Tensor]:
    """OpenCLIP's text encoder as Stable Diffusion 2 holds it: one layer more than is used."""
    return _filled("cond_stage_model.model.", openclip_shapes(layers, vocabulary, width), seed)


def openclip_shapes(layers: int, vocabulary: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of its tensors by name; q, k and v are one."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, width),
    }
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        shapes |= dict(_norm(f"{name}.ln_1", width)) | dict(_norm(f"{name}.ln_2", width))
        shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
        shapes |= dict(_linear(f"{name}.attn.out_proj", width, width))
        shapes |= dict(_linear(f"{name}.mlp.c_fc", width, 4 * width))
        shapes |= dict(_linear(f"{name}.mlp.c_proj", 4 * width, width))
    return shapes | dict(_norm("ln_final", width))


def _filled(prefix: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        norm = len(shape) == 1 and name.endswith(".weight")
        return models.seeded(prefix + name, shape, seed=seed, std=0.1, mean=1.0 if norm else 0.0)

    return {prefix + name: values(name, shape) for name, shape in shapes.items()}
