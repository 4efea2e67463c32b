"""What the benchmarks train on, and what they run on: models with random weights, the machine, the clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lorasmith.families.flux import Flux
from lorasmith.families.flux import components_of as flux_components
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.stable_diffusion import StableDiffusion
from lorasmith.families.stable_diffusion import components_of as unet_components

# On the CPU, processor seconds: what else runs on the machine counts less than in wall time. One thread is steadiest,
# since waiting threads of a pool count as busy.
clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.process_time


def tiny(dtype: torch.dtype, device: torch.device) -> Model:
    """The model that comes with the package."""
    model = load_model("lorasmith-tiny", dtype=dtype)
    model.components.denoiser.to(device)
    return model


def sd15(dtype: torch.dtype, device: torch.device) -> Model:
    """Stable Diffusion 1.5's UNet at full size, 860 million parameters."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    unet.to(device, dtype).eval().requires_grad_(False)
    return Model(StableDiffusion(1), unet_components(unet, None, parameterization="epsilon"), title="random SD 1.5")


def flux(dtype: torch.dtype, device: torch.device) -> Model:
    """Flux.1's transformer, a third as wide and with a tenth of the blocks: 155 million parameters."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=8,
        attention_head_dim=128,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    transformer.to(device, dtype).eval().requires_grad_(False)
    return Model(Flux(), flux_components(transformer), title="random Flux.1")


MODELS: dict[str, Callable[[torch.dtype, torch.device], Model]] = {"tiny": tiny, "sd15": sd15, "flux": flux}


def machine() -> str:
    """Processor and threads, or the graphics card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
