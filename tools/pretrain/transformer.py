"""A small transformer of the same drawings, on which methods are measured that a UNet cannot have (token routing).

It has the blocks of PixArt (Chen et al. 2023, arXiv:2310.00426), the text encoder and autoencoder of the built-in
model, and a family of its own, outside of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.slots import Encoding, TextEncoders
from lorasmith.families.stable_diffusion import StableDiffusion
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.names import EncoderNames
from tools.pretrain.loop import Run, autocast, step_random
from tools.pretrain.optimizer import optimizers_for
from tools.pretrain.text_encoder import SHORT, encode
from tools.pretrain.unet import BATCH, Latents, captions_of

_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_layers": 8,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "patch_size": 2,
    "cross_attention_dim": 128,
    "caption_channels": None,
    "use_additional_conditions": False,
}
_BUILT_IN = StableDiffusion(1)  # whose other parts it has
DRAWING_TRANSFORMER = "drawing-transformer"
_PREFIX = "model.diffusion_model."


class DrawingTransformer(Family):
    """Eight blocks of width 256 on 64 tokens, 8.4 million parameters, trained by flow matching."""

    name = kohya_name = modelspec_name = DRAWING_TRANSFORMER
    title = "Drawing transformer"
    pipeline = "DrawingTransformerPipeline"  # in no package
    network = "PixArtTransformer2DModel"
    modelspec_implementation = "diffusers"
    signs = ("adaln_single.linear.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn2.to_q.weight")
    own_diffusion = Diffusion("flow", FlowSchedule(time_scale=1000.0))
    own_defaults = Defaults(resolution=64, pixel_multiple=8, guidance=3.0, learning_rate=7e-4, targets="transformer")
    targets: Mapping[str, Rule] = {
        "attention": Rule(("transformer_blocks.*.attn?.to_*",)),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    text_encoders = _BUILT_IN.text_encoders
    autoencoder = replace(_BUILT_IN.autoencoder, downscale=4)
    routing = Routing(blocks={"transformer_blocks": {"hidden_states": "bp."}})
    repeatable_context = True

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _CONFIG

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        return _BUILT_IN.encoder_names(text_encoders)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        return _BUILT_IN.encode_text(encoders, texts, encoding)

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        return _BUILT_IN.conditioning_shapes(denoiser)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = denoiser(latents, conditioning.tensors["context"], timestep=time, return_dict=False)[0]
        return prediction


def build() -> Any:
    """The network with random weights."""
    torch.manual_seed(0)
    network = DrawingTransformer().denoiser_class()(**_CONFIG)
    nn.init.zeros_(network.proj_out.weight)  # the first prediction is nothing
    return network


def train_transformer(
    work: Path,
    text_encoder: CLIPTextModel,
    steps: int,
    device: torch.device,
    *,
    show: Callable[[nn.Module, int], None],
) -> None:
    """Train until `steps` updates; `show` is called with the averaged model and the step after each save."""
    data = Latents.load(work)
    text_encoder = text_encoder.to(device).eval().requires_grad_(False)
    model = build().train().to(device)
    optimizers = optimizers_for(model, lr=2e-3, weight_decay=1e-2)
    run = Run(model, optimizers, state=work / "transformer" / "state.pt", ema=0.998)

    def loss_at(step: int) -> Tensor:
        random = np.random.default_rng(step_random("transformer", step))
        captions, clean = captions_of(data, random)
        clean = clean.to(device)
        noise = torch.from_numpy(random.standard_normal(clean.shape, np.float32)).to(device)
        # A logistic of normal numbers, stratified: Esser et al. 2024, arXiv:2403.03206.
        quantiles = torch.from_numpy((np.arange(BATCH) + random.random(BATCH)) / BATCH).float()
        time = torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)).sigmoid().to(device)
        share = time[:, None, None, None]
        with autocast(device):
            context = text_encoder(encode(captions, SHORT).to(device)).last_hidden_state
            prediction = model((1 - share) * clean + share * noise, context, timestep=1000 * time).sample
        return (prediction.float() - (noise - clean)).square().mean()

    run.until(steps, loss_at, every=lambda: show(run.average, run.step))


def save(network: nn.Module, built_in: Path, target: Path) -> None:
    """A checkpoint of the network with the other parts of the built-in model."""
    parts, metadata = read_safetensors(built_in)
    others = {name: tensor for name, tensor in parts.items() if not name.startswith(_PREFIX)}
    tensors = {f"{_PREFIX}{name}": tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    write_safetensors(target, {**others, **tensors}, metadata)
