"""What the benchmarks train on, and what they run on: models with random weights, the machine, the clock."""

from __future__ import annotations

import contextlib
import copy
import functools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorasmith.families.flux import Flux
from lorasmith.families.flux import components_of as flux_components
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.stable_diffusion import StableDiffusion
from lorasmith.families.stable_diffusion import components_of as unet_components


@dataclass(frozen=True)
class Base:
    """A model that benchmarks train.

    Attributes:
        make: the model in a dtype on a device, weights of the denoiser included.
        latent: side of its square latents where a GPU is measured.
        batches: the batch sizes there.
        rehearsal: name of the model that stands in for it where there is no GPU; None for models that `benchmarks.gpu`
            leaves out.
    """

    make: Callable[[torch.dtype, torch.device], Model]
    latent: int = 64
    batches: tuple[int, ...] = (1, 4)
    rehearsal: str | None = None


def _tiny(dtype: torch.dtype, device: torch.device) -> Model:
    model = load_model("lorasmith-tiny", dtype=dtype)
    model.components.denoiser.to(device)
    return model


def _sd15(dtype: torch.dtype, device: torch.device) -> Model:
    from diffusers import UNet2DConditionModel

    with _made_on(device, dtype):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    unet.eval().requires_grad_(False)
    return Model(StableDiffusion(1), unet_components(unet, None, parameterization="epsilon"), title="random SD 1.5")


def _flux(
    dtype: torch.dtype, device: torch.device, *, double: int, single: int, heads: int, context: int = 4096
) -> Model:
    from diffusers import FluxTransformer2DModel

    with _made_on(device, dtype):
        transformer = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=128,
            joint_attention_dim=context,
            pooled_projection_dim=768,
            guidance_embeds=True,
        )
    transformer.eval().requires_grad_(False)
    return Model(Flux(), flux_components(transformer), title="random Flux.1")


MODELS: dict[str, Base] = {
    "tiny": Base(_tiny),
    # 860 million parameters.
    "sd15": Base(_sd15, rehearsal="tiny"),
    # A third as wide and with a tenth of the blocks of Flux.1: 155 million parameters.
    "flux": Base(functools.partial(_flux, double=2, single=4, heads=8)),
    "flux-tiny": Base(functools.partial(_flux, double=1, single=1, heads=1, context=64)),
    # 11.9 billion parameters.
    "flux-12b": Base(functools.partial(_flux, double=19, single=38, heads=24), rehearsal="flux-tiny"),
}
"""The models by name; one line makes a new one known to every benchmark, and with a `rehearsal` to `benchmarks.gpu`."""


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy whose layers may be changed, with the very weights of `module`.

    Only kernels of convolutions are copied: a run has them channels-last, diffusers' own code as they were made.
    """
    shared = {id(one): one for one in (*module.parameters(), *module.buffers()) if one.ndim != 4}
    return copy.deepcopy(module, dict(shared))


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds as they count on a device.

    On the CPU, processor seconds: what else runs on the machine counts less than in wall time. One thread is steadiest,
    since waiting threads of a pool count as busy. On a GPU processor seconds say nothing.
    """
    return time.process_time if device.type == "cpu" else time.perf_counter


def machine(device: torch.device) -> str:
    """The graphics card, or processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules are made on `device` in `dtype` inside: 12 billion numbers in fp32 on a host take minutes and 48 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
