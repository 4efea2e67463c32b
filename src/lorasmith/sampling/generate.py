"""Text to image with a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.core.placement import best_device, placed
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.sigmas import sigmas_for

__all__ = ["Sampling", "generate", "pictures", "to_images"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled.

    Attributes:
        seed: of the noise.
        steps: sampling steps.
        cfg: guidance scale; the model's own if None.
        sampler, scheduler: names as in KSampler.
        width, height: in pixels; the model's resolution if None.
        dtype: of the denoiser's weights and products; bf16 needs half of the memory and changes pictures slightly.
    """

    seed: int = 0
    steps: int = 20
    cfg: float | None = None
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int | None = None
    height: int | None = None
    dtype: torch.dtype = torch.float32


def generate(
    model: Model | Denoiser,
    prompts: str | Sequence[str],
    *,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    seed: int = Sampling.seed,
    steps: int = Sampling.steps,
    cfg: float | None = Sampling.cfg,
    sampler: str = Sampling.sampler,
    scheduler: str = Sampling.scheduler,
    width: int | None = Sampling.width,
    height: int | None = Sampling.height,
    dtype: torch.dtype = Sampling.dtype,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Generate one picture per prompt, all from noise of the same seed.

    Args:
        model: the model, or its denoiser with LoRAs applied.
        prompts: one or more prompts, `(word:1.2)` weights included.
        text_encoder: text encoders with LoRAs applied; the model's if None.
        negative: negative prompt.
        seed, steps, cfg, sampler, scheduler, width, height, dtype: as in `Sampling`.
        device: where to sample; the first GPU, or the CPU, if None.
        progress: called with (steps done, total) of all prompts together.
        cancelled: called between evaluations of the network; True ends sampling.

    Raises:
        OptionError: a size does not fit the model, or a name is unknown.
        ModelError: the model lacks a text encoder or an autoencoder.
        SamplingCancelledError: `cancelled` returned True.
    """
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encoder = text_encoder or denoiser.base.text_encoder
    with encoder.active(device):
        positives = [encoder.encode(prompt) for prompt in prompts]
        away = encoder.encode(negative)
    sampling = Sampling(
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler=sampler,
        scheduler=scheduler,
        width=width,
        height=height,
        dtype=dtype,
    )
    return pictures(denoiser, positives, away, sampling, device=device, progress=progress, cancelled=cancelled)


def pictures(
    denoiser: Denoiser,
    positives: Sequence[Conditioning],
    negative: Conditioning,
    sampling: Sampling,
    *,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Generate one picture per encoded prompt.

    Args:
        denoiser: the model, with or without LoRAs applied.
        positives: the encoded prompts.
        negative: the encoded negative prompt.
        sampling: seed, steps and the like.
        device: where to sample; the first GPU, or the CPU, if None.
        progress, cancelled: as for `generate`.

    Raises:
        OptionError: a size does not fit the model, or a name is unknown.
        SamplingCancelledError: `cancelled` returned True.
    """
    base, device, steps = denoiser.base, device or best_device(), sampling.steps
    denoiser.check_conditionings([*positives, negative])
    components, shape = base.components, _latent_shape(base, sampling.width, sampling.height)
    latents = []
    # Placed first and patched second: adapters are created on their layers' device.
    with placed(denoiser.module, device=device, dtype=sampling.dtype), denoiser.active():
        for index, positive in enumerate(positives):
            latents.append(
                sample_latents(
                    denoiser.predict,
                    schedule=denoiser.diffusion.schedule,
                    parameterization=denoiser.diffusion.parameterization,
                    positive=[positive],
                    negative=[negative],
                    latents=torch.zeros(shape, device=device),
                    noise=prepare_noise(sampling.seed, shape),
                    sigmas=sigmas_for(denoiser.diffusion.schedule, sampling.scheduler, steps, sampler=sampling.sampler),
                    sampler=sampling.sampler,
                    cfg=base.defaults.guidance if sampling.cfg is None else sampling.cfg,
                    seed=sampling.seed,
                    dtype=sampling.dtype,
                    callback=progress and _counter(progress, index * steps, steps * len(positives)),
                    cancelled=cancelled,
                )
            )
    with base.autoencoder.active(device):
        decoded = [base.autoencoder.decode(components.latent.from_model(one)) for one in latents]
    return [image for pixels in decoded for image in to_images(pixels)]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures from pixels (batch, 3, height, width) in [−1, 1]."""
    scaled = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in scaled]


def _latent_shape(model: Model, width: int | None, height: int | None) -> tuple[int, ...]:
    defaults, latent = model.defaults, model.components.latent
    sides = {"width": width or defaults.resolution, "height": height or defaults.resolution}
    for name, side in sides.items():
        if side % defaults.pixel_multiple:
            raise OptionError(
                f"{name} must be a multiple of {defaults.pixel_multiple} for {model.title}, got {side}; "
                f"try {max(1, round(side / defaults.pixel_multiple)) * defaults.pixel_multiple}"
            )
    return (1, *latent.shape(sides["height"], sides["width"]))


def _counter(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int, Tensor], None]:
    return lambda step, _, __: progress(before + step + 1, total)
