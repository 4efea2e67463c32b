"""Sampling: from noise and prompts to latents, in the denoiser's own latent space.

Initial noise is the one that ComfyUI draws for a seed, so that the same seed starts from the same noise there and here.
Noise added between the steps is keyed by (seed, step) instead: it is the same on every device, whereas ComfyUI draws it
where the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.core.errors import LorasmithError
from lorasmith.core.random import keyed_normal
from lorasmith.diffusion.parameterization import PARAMETERIZATIONS
from lorasmith.diffusion.schedule import NoiseSchedule
from lorasmith.families.base import Conditioning
from lorasmith.sampling.guidance import Predict, guided
from lorasmith.sampling.samplers import SAMPLERS

__all__ = ["SamplingCancelledError", "prepare_noise", "sample_latents"]


class SamplingCancelledError(LorasmithError):
    """Somebody asked for sampling to stop."""


def prepare_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise of `shape` on the CPU: one generator, seeded once, for the whole batch.

    Args:
        seed: any integer in [0, 2^64).
        shape: (batch, channels, height, width).
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def sample_latents(
    predict: Predict,
    *,
    schedule: NoiseSchedule,
    parameterization: str,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    sampler: str,
    cfg: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
    callback: Callable[[int, int, Tensor], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """Latents that fit the prompts.

    Args:
        predict: the network; called with `dtype` latents and conditionings on the latents' device.
        schedule, parameterization: what the network was trained with, as in `Components`.
        positive: conditionings to move towards; several are averaged, short batches repeated.
        negative: conditionings to move away from; not used when `cfg` is 1.
        latents: (batch, channels, height, width) start, as the denoiser sees latents; zeros for a picture from nothing.
        noise: initial noise of the same shape, from `prepare_noise`.
        sigmas: levels to stop at, from `sigmas_for`; the latents come back as they are when there is no step to take.
        sampler: registered name.
        cfg: guidance scale; 1 is none.
        seed: for the noise that some samplers add between steps.
        dtype: the network's.
        callback: told (step, number of steps, clean latents as expected at that step) once a step.
        cancelled: asked before each evaluation of the network.

    Returns:
        (batch, channels, height, width) in fp32 on the latents' device.

    Raises:
        OptionError: an unknown sampler or parameterization, or a missing conditioning.
        SamplingCancelledError: `cancelled` said so.
    """
    solve = SAMPLERS[sampler].solve
    to_clean = PARAMETERIZATIONS[parameterization].clean
    device, batch = latents.device, len(latents)
    latents = latents.float()
    total = len(sigmas) - 1
    if total < 1:
        return latents
    guide = guided(
        lambda x, time, conditioning: predict(x.to(dtype), time, conditioning),
        positive=[conditioning.to(device, dtype) for conditioning in positive],
        negative=[conditioning.to(device, dtype) for conditioning in negative],
        cfg=cfg,
        batch=batch,
    )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if cancelled is not None and cancelled():
            raise SamplingCancelledError(
                f"sampling was cancelled before its {total} steps were done; queue it again to finish"
            )
        level = schedule.at_sigma(torch.full((batch,), sigma)).to(device)
        seen = schedule.model_input(x, level)
        return to_clean(guide(seen, level.time), seen, level)

    def step_noise(step: int) -> Tensor:
        return keyed_normal(tuple(latents.shape), seed, "sampling", step).to(device)

    def progress(step: int, denoised: Tensor) -> None:
        if callback is not None:
            callback(step, total, denoised)

    with torch.no_grad():
        start = schedule.initial(noise.to(device, torch.float32), latents, sigmas[0].item())
        return solve(denoise, start, sigmas, schedule=schedule, noise=step_noise, callback=progress)
