"""Sampling of latents from noise and prompts, in the denoiser's latent space.

Initial noise is the same as in ComfyUI for the same seed. Noise added between steps is keyed by (seed, step) and thus
the same on every device, whereas ComfyUI draws it on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.core.errors import CancelledError, LorasmithError
from lorasmith.core.random import keyed_normal
from lorasmith.diffusion.parameterization import PARAMETERIZATIONS
from lorasmith.diffusion.schedule import NoiseSchedule
from lorasmith.families.base import Conditioning
from lorasmith.sampling.guidance import Predict, guided
from lorasmith.sampling.samplers import SAMPLERS


class SamplingError(LorasmithError):
    """The sampled latents are not finite."""


class SamplingCancelledError(CancelledError):
    """Sampling was cancelled."""


def prepare_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise on the CPU, from one generator for the whole batch; seed in [0, 2^64)."""
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
    """Sample latents (batch, channels, [frames,] height, width) for prompts, in fp32 on the device of `latents`.

    `latents` to start from are scaled for the denoiser, zeros for text to image; `noise` has their shape, and `seed` is
    of the noise that some samplers add between steps. Without a step in `sigmas` (from `sigmas_for`, or some of them)
    they are returned unchanged. `predict` gets latents and conditionings in `dtype`; the latter as for `guided`.
    `callback` receives (step, number of steps, predicted clean latents); `cancelled` is called before each evaluation
    of the network.

    Raises OptionError, SamplingError if the result holds NaN or infinity, and SamplingCancelledError.
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
        sigma_at=schedule.sigma_at,
    )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if cancelled is not None and cancelled():
            raise SamplingCancelledError(
                f"sampling was cancelled before its {total} steps were done; queue it again to restart"
            )
        level = schedule.at_sigma(torch.full((batch,), sigma)).to(device)
        seen = schedule.model_input(x, level)
        prediction, lacking = guide(seen, level.time, sigma)
        clean = to_clean(prediction, seen, level)
        # The clean sample is affine in the prediction; of a side that is left out it is 0.
        return clean - lacking * to_clean(torch.zeros_like(seen), seen, level) if lacking else clean

    def step_noise(step: int) -> Tensor:
        return keyed_normal(tuple(latents.shape), seed, "sampling", step).to(device)

    def progress(step: int, denoised: Tensor) -> None:
        if callback is not None:
            callback(step, total, denoised)

    with torch.no_grad():
        start = schedule.initial(noise.to(device, torch.float32), latents, sigmas[0].item())
        state = solve(denoise, start, sigmas, schedule=schedule, noise=step_noise, callback=progress)
        # Of a run that ends early the noisy state is returned so that another run can continue from it without noise.
        signal = schedule.signal(sigmas[-1].item())
        result = state / signal if signal > 0 else state
    if not result.isfinite().all():
        raise SamplingError(
            f"sampling must give finite latents, but {int((~result.isfinite()).sum()):,} of {result.numel():,} values "
            "are NaN or infinite; lower the strength of LoRAs and the guidance scale, sample in fp32, or check the "
            "model's file"
        )
    return result
