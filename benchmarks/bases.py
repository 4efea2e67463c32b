"""Models with random weights, the machine and the clock of the benchmarks."""

from __future__ import annotations

import contextlib
import copy
import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule
from lorasmith.families.base import FAMILIES
from lorasmith.families.forms import Diffusion
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.slots import Components


@dataclass(frozen=True)
class Base:
    """A model for benchmarks.

    Attributes:
        make: the model in a dtype on a device, weights of the denoiser included.
        latent: side of its square latents on a GPU.
        batches: batch sizes on a GPU.
        rehearsal: name of the model that replaces it without a GPU; None for models that `benchmarks.gpu` leaves out.
    """

    make: Callable[[torch.dtype, torch.device], Model]
    latent: int = 64
    batches: tuple[int, ...] = (1, 4)
    rehearsal: str | None = None


def _tiny(dtype: torch.dtype, device: torch.device) -> Model:
    model = load_model("lorasmith-tiny", dtype=dtype)
    model.components.denoiser.to(device)
    return model


def _random(
    family: str, diffusion: Diffusion, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Model:
    """A family's released denoiser with random weights; `config` overrides its configuration."""
    kind = FAMILIES[family]
    with _made_on(device, dtype):
        denoiser = kind.denoiser_class()(**(kind.released or {}) | config)
    denoiser.eval().requires_grad_(False)
    latent = kind.latent_format(denoiser, None)
    components = Components(
        denoiser=denoiser,
        schedule=diffusion.schedule,
        parameterization=diffusion.parameterization,
        latent=latent,
        defaults=kind.defaults(denoiser, latent, diffusion),
    )
    return Model(kind, components, title=f"random {kind.title}")


_EPSILON = Diffusion("epsilon", DiscreteSchedule.scaled_linear())
_FLOW = Diffusion("flow", FlowSchedule())
# A third as wide and with a tenth of the blocks: 155 million parameters.
_SMALLER_FLUX = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 8}
# Many blocks of which none is a large part: 90 million parameters.
_DEEP_FLUX = {"num_layers": 2, "num_single_layers": 16, "num_attention_heads": 4}
_TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64}
_TINY_SDXL = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 1),
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 64 + 6 * 256,
}

MODELS: dict[str, Base] = {
    "tiny": Base(_tiny),
    "sd15": Base(functools.partial(_random, "sd1", _EPSILON, {}), rehearsal="tiny"),
    "sdxl-tiny": Base(functools.partial(_random, "sdxl", _EPSILON, _TINY_SDXL)),
    "sdxl": Base(functools.partial(_random, "sdxl", _EPSILON, {}), latent=128, rehearsal="sdxl-tiny"),
    "flux": Base(functools.partial(_random, "flux1", _FLOW, _SMALLER_FLUX)),
    "flux-deep": Base(functools.partial(_random, "flux1", _FLOW, _DEEP_FLUX)),
    "flux-tiny": Base(functools.partial(_random, "flux1", _FLOW, _TINY_FLUX)),
    "flux-12b": Base(functools.partial(_random, "flux1", _FLOW, {}), rehearsal="flux-tiny"),
}
"""The models by name; every benchmark knows those listed here, and `benchmarks.gpu` those with a `rehearsal`."""


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy whose layers may be changed, sharing the weights of `module`.

    Only kernels of convolutions are copied: a run has them channels-last, diffusers' code contiguous.
    """
    shared = {id(one): one for one in (*module.parameters(), *module.buffers()) if one.ndim != 4}
    return copy.deepcopy(module, dict(shared))


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock for a device, in seconds.

    Processor seconds on the CPU, which other work on the machine affects less than wall time. One thread is steadiest,
    since waiting threads of a pool count as busy. Wall seconds on a GPU.
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
    """Modules are created on `device` in `dtype` inside: 12 billion fp32 numbers on a host take minutes and 48 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
