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
    """Sampling gave numbers of which no picture can be made."""


class SamplingCancelledError(CancelledError):
    """Sampling was cancelled."""


def prepare_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise on the CPU, from one generator for the whole batch.

    Args:
        seed: any integer in [0, 2^64).
        shape: (batch, channels, [frames,] height, width).
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
    """Sample latents for prompts.

    Args:
        predict: the network; called with latents and conditionings in `dtype` on the latents' device.
        schedule, parameterization: of the network, as in `Components`.
        positive: positive conditionings; several are averaged, short batches repeated.
        negative: negative conditionings; not used if `cfg` is 1.
        latents: (batch, channels, [frames,] height, width) to start from, scaled for the denoiser; zeros for text to
            image.
        noise: initial noise of the same shape, from `prepare_noise`.
        sigmas: sigmas of the steps, from `sigmas_for`, or some of them; without a step the latents are returned
            unchanged.
        sampler: registered name.
        cfg: guidance scale; 1 is none.
        seed: of the noise that some samplers add between steps.
        dtype: of the network.
        callback: called once per step with (step, number of steps, predicted clean latents).
        cancelled: called before each evaluation of the network; True ends sampling.

    Returns:
        (batch, channels, [frames,] height, width) in fp32 on the latents' device.

    Raises:
        OptionError: an unknown sampler or parameterization, or a missing conditioning.
        SamplingError: the result holds NaN or infinity.
        SamplingCancelledError: `cancelled` returned True.
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
