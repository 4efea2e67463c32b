"""Sampling of latents from noise and prompts, in the denoiser's latent space, with classifier-free guidance.

Guidance (Ho & Salimans 2022, arXiv:2207.12598) is by several prompts on each side. Initial noise is the same as in
ComfyUI for the same seed. Noise added between steps is keyed by (seed, step) and thus the same on every device, whereas
ComfyUI draws it on the model's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.core.errors import CancelledError, LorasmithError, OptionError
from lorasmith.core.random import keyed_normal
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, NoiseSchedule
from lorasmith.families.conditionings import Conditioning, collate
from lorasmith.sampling.samplers import SAMPLERS

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents (batch, ...), time (batch,), conditioning of that batch) → prediction in the latents' shape."""


def guided(
    predict: Predict,
    *,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    cfg: float,
    batch: int,
    sigma_at: Callable[[float], float] = lambda progress: math.inf if progress <= 0 else 0.0,
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, float]]:
    """The guided prediction `negative + cfg · (positive − negative)` as a function of (latents, time, sigma).

    Several conditionings of one side are averaged, shorter batches repeated to `batch`. Those of weight 0 are not
    computed: with `cfg` 1 `negative` may be empty. Conditionings of equal tensor shapes run as one batch, others
    separately: repeating a shorter context is correct for cross-attention, but not for joint attention to text and
    image.

    The function returns the prediction, and the weight of the sides that it lacks because the spans of all of their
    conditionings (by `sigma_at`) exclude the sigma; ComfyUI takes 0 as the clean sample of such a side. Raises
    OptionError if a side with non-zero weight has no conditioning.
    """
    sides = (_side("positive", positive, cfg, batch), _side("negative", negative, 1 - cfg, batch))
    joined: dict[Hashable, list[_Forward]] = {}

    def prediction(latents: Tensor, time: Tensor, sigma: float) -> tuple[Tensor, float]:
        active = tuple(
            tuple(
                sigma_at(conditioning.span[0]) >= sigma >= sigma_at(conditioning.span[1])
                for conditioning in conditionings
            )
            for _, conditionings in sides
        )
        if active not in joined:
            joined[active] = _forwards(sides, active)
        total = torch.zeros_like(latents, dtype=torch.float32)
        for weights, conditioning in joined[active]:
            copies = len(weights)
            answer = predict(latents.repeat(copies, *(1,) * (latents.ndim - 1)), time.repeat(copies), conditioning)
            for weight, part in zip(weights, answer.float().chunk(copies), strict=True):
                total += weight * part
        return total, sum(weight for (weight, _), chosen in zip(sides, active, strict=True) if not any(chosen))

    return prediction


_Side = tuple[float, list[Conditioning]]  # weight and conditionings of a side, none if the weight is 0
_Forward = tuple[list[float], Conditioning]  # weights of the prompts in a batch, and the batch


def _side(side: str, conditionings: Sequence[Conditioning], weight: float, batch: int) -> _Side:
    if weight == 0:
        return 0.0, []
    if not conditionings:
        raise OptionError(
            f"sampling needs at least one {side} conditioning, got none; encode a prompt, which may be empty"
        )
    return weight, [_repeated(conditioning, batch) for conditioning in conditionings]


def _forwards(sides: Sequence[_Side], active: Sequence[Sequence[bool]]) -> list[_Forward]:
    """The batches of the active conditionings, which share the weight of their side."""
    groups: dict[Hashable, list[tuple[float, Conditioning]]] = {}
    for (weight, conditionings), chosen in zip(sides, active, strict=True):
        for conditioning in (
            candidate for candidate, is_active in zip(conditionings, chosen, strict=True) if is_active
        ):
            shapes = frozenset((key, tensor.shape[1:]) for key, tensor in conditioning.tensors.items())
            groups.setdefault(shapes, []).append((weight / sum(chosen), conditioning))
    return [
        ([weight for weight, _ in group], collate([conditioning for _, conditioning in group], repeatable=False))
        for group in groups.values()
    ]


def _repeated(conditioning: Conditioning, batch: int) -> Conditioning:
    """`conditioning` for exactly `batch` latents: repeated in order, or truncated."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(math.ceil(batch / len(tensor)), *(1,) * (tensor.ndim - 1))[:batch]

    tensors = {key: repeated(tensor) for key, tensor in conditioning.tensors.items()}
    mask = None if conditioning.mask is None else repeated(conditioning.mask)
    return replace(conditioning, tensors=tensors, mask=mask)


class SamplingError(LorasmithError):
    """The sampled latents are not finite."""


class SamplingCancelledError(CancelledError):
    """Sampling was cancelled."""


def prepare_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise on the CPU, from one generator for the whole batch; seed in [0, 2^64)."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed)))  # numpy's, too


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
    mask: Tensor | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """Sample latents (batch, channels, [frames,] height, width) for prompts, in fp32 on the device of `latents`.

    `latents` to start from are scaled for the denoiser, zeros for text to image; `noise` has their shape, and `seed` is
    of the noise that some samplers add between steps. Where `mask`, which broadcasts to them, is 0, they stay as they
    are. Without a step in `sigmas` (from `sigmas_for`, or some of them) they are returned unchanged. `predict` gets
    latents and conditionings in `dtype`; the latter as for `guided`. `callback` receives (step, number of steps,
    predicted clean latents); `cancelled` is called before each evaluation of the network.

    Raises OptionError, SamplingError if the result holds NaN or infinity, and SamplingCancelledError.
    """
    solve = SAMPLERS[sampler].solve
    to_clean = PARAMETERIZATIONS[parameterization].clean
    device, batch = latents.device, len(latents)
    latents = latents.float()
    total = len(sigmas) - 1
    if total < 1:
        return latents
    noise = noise.to(device, torch.float32)
    kept = None if mask is None else 1 - mask.to(device, torch.float32)
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
        if kept is not None:
            x = x * (1 - kept) + schedule.initial(noise, latents, sigma) * kept
        seen = schedule.model_input(x, level)
        prediction, lacking = guide(seen, level.time, sigma)
        clean = to_clean(prediction, seen, level)
        # The clean sample is affine in the prediction; of a side that is left out it is 0.
        clean = clean - lacking * to_clean(torch.zeros_like(seen), seen, level) if lacking else clean
        return clean if kept is None else clean * (1 - kept) + latents * kept

    def step_noise(step: int) -> Tensor:
        return keyed_normal(tuple(latents.shape), seed, "sampling", step).to(device)

    def progress(step: int, denoised: Tensor) -> None:
        if callback is not None:
            callback(step, total, denoised)

    with torch.no_grad():
        start = schedule.initial(noise, latents, sigmas[0].item())
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
