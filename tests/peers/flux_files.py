"""A tiny Flux.1 in files of its own, as people have it: denoiser, CLIP-L, T5, autoencoder."""

from __future__ import annotations

from pathlib import Path

import models
import original_models
import torch
from safetensors.torch import save_file
from torch import Tensor

CONTEXT = 32
_POOLED = 64  # width of the tiny CLIP-L
_VAE_WIDTHS = (32, 32, 32, 32)
SHAPE = models.FluxShape(128, 1, 1, context=CONTEXT, pooled=_POOLED)


def save_flux_files(base: Path) -> dict[str, Path]:
    """Write the files into the folders of a ComfyUI installation; returns them by part."""
    files = {
        "denoiser": ("diffusion_models/flux1-dev.safetensors", models.checkpoint(SHAPE, 0)),
        "clip_l": ("text_encoders/clip_l.safetensors", original_models.clip_l()),
        "t5xxl": ("text_encoders/t5xxl_fp16.safetensors", t5()),
        "vae": ("vae/ae.safetensors", _autoencoder()),
    }
    paths = {part: base / "models" / name for part, (name, _) in files.items()}
    for part, (_, tensors) in files.items():
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, paths[part])
    return paths


def t5() -> dict[str, Tensor]:
    """A T5 v1.1 encoder of two layers with the published vocabulary."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": CONTEXT, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tensors.pop("encoder.embed_tokens.weight", None)  # the same as `shared`
    return tensors


def _autoencoder() -> dict[str, Tensor]:
    """One of 16 channels, without convolutions around the latents."""
    shapes = {
        name: shape
        for name, shape in original_models.autoencoder_shapes(_VAE_WIDTHS)
        if not name.startswith(("quant_conv", "post_quant_conv"))
    }
    last = _VAE_WIDTHS[-1]
    shapes |= {"encoder.conv_out.weight": (32, last, 3, 3), "encoder.conv_out.bias": (32,)}
    shapes["decoder.conv_in.weight"] = (last, 16, 3, 3)
    return {name: models.weight(name, shape, seed=0) for name, shape in shapes.items()}
