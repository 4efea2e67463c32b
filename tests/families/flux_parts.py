"""Flux.1 in small as people have it: denoiser, two text encoders and an autoencoder, each in a file of its own."""

from __future__ import annotations

from pathlib import Path

import models
import torch
from torch import Tensor

from tests.families.original_models import TEXT_WIDTH, clip_l, save

SHAPE = models.FluxShape(256, 1, 1, context=64, pooled=TEXT_WIDTH)


def denoiser(seed: int = 0) -> dict[str, Tensor]:
    return models.checkpoint(SHAPE, seed)


def t5(width: int = SHAPE.context, seed: int = 0) -> dict[str, Tensor]:
    """A T5 of two layers with T5's whole vocabulary."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32128, d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    tensors = T5EncoderModel(config).state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}


def ae(seed: int = 0) -> dict[str, Tensor]:
    """An autoencoder of 16 channels, without the convolutions of quantization, as Flux.1's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


def comfyui_folder(base: Path) -> Path:
    """A base folder of ComfyUI's layout with the four files under their usual names."""
    for place, tensors in {
        "diffusion_models/flux1-dev.safetensors": denoiser(),
        "text_encoders/clip_l.safetensors": clip_l(),
        "text_encoders/t5xxl_fp16.safetensors": {name: tensor.half() for name, tensor in t5().items()},
        "vae/ae.safetensors": ae(),
    }.items():
        path = base / "models" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, tensors)
    return base
