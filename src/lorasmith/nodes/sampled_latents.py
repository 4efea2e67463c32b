"""Sampling for all sampling nodes: latents fitted to the model, checked conditionings, and progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.adapters.frozen_layer import placed_for_products
from lorasmith.core.errors import CancelledError
from lorasmith.core.placement import best_device, sampling_dtype
from lorasmith.families.base import Conditioning, LatentFormat
from lorasmith.families.model import Denoiser
from lorasmith.nodes.values import Latent, check_latents, with_frames
from lorasmith.sampling.sample import SamplingCancelledError, prepare_noise, sample_latents
from lorasmith.workflow import NodeContext


@dataclass(frozen=True)
class Guider:
    """A model with the prompts that guide it (ComfyUI's GUIDER)."""

    model: Denoiser
    positive: Sequence[Conditioning]
    negative: Sequence[Conditioning] = ()  # unused if `cfg` is 1
    cfg: float = 1.0  # guidance scale

    def check(self) -> None:
        """Raise DataError for prompts of another model's text encoders."""
        self.model.check_conditionings([*self.positive, *(self.negative if self.cfg != 1 else ())])


@dataclass(frozen=True)
class Noise:
    """Initial noise (ComfyUI's NOISE); `seed` is also that of the noise which samplers add between steps."""

    seed: int
    is_empty: bool = False  # zeros

    def of_shape(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape)) if self.is_empty else prepare_noise(self.seed, shape)


def sampled(
    context: NodeContext, guider: Guider, latent: Latent, noise: Noise, *, sampler: str, sigmas: Tensor
) -> tuple[Latent, Latent]:
    """Sample latents; returns them, and the clean ones that the last step predicted, both unscaled.

    Empty latents get the channels and size of the model's. With fewer than two `sigmas` the latents are returned as
    they are. DataError if latents or prompts are from another model; CancelledError if the run was cancelled.
    """
    model = guider.model
    form = model.base.components.latent
    guider.check()
    start = _fitted(context, latent, form)
    if len(sigmas) < 2:
        return {"samples": start}, {"samples": start}
    device = best_device()
    dtype = sampling_dtype(model.module, device)
    clean = start

    def keep(step: int, total: int, predicted: Tensor) -> None:
        nonlocal clean
        clean = predicted
        context.progress(step + 1, total)

    try:
        # Placed first and patched second: adapters are created on their layers' device.
        with placed_for_products(model.module, device=device, dtype=dtype), model.active():
            result = sample_latents(
                model.predict,
                schedule=model.diffusion.schedule,
                parameterization=model.diffusion.parameterization,
                positive=guider.positive,
                negative=guider.negative,
                latents=(form.to_model(start) if start.count_nonzero() else start).to(device),
                noise=noise.of_shape(start.shape),
                sigmas=sigmas,
                sampler=sampler,
                cfg=guider.cfg,
                seed=noise.seed,
                dtype=dtype,
                callback=keep,
                cancelled=context.cancelled,
            )
    except SamplingCancelledError as error:
        raise CancelledError(str(error)) from error
    return {"samples": form.from_model(result.cpu())}, {"samples": form.from_model(clean.cpu())}


def _fitted(context: NodeContext, latent: Latent, form: LatentFormat) -> Tensor:
    """Latents in fp32 in the shape of the model's; raises DataError for those of another model."""
    samples = latent["samples"].float()
    if samples.count_nonzero():
        samples = with_frames(samples, form)
        check_latents(samples, form)
        return samples
    times = samples.shape[2] if samples.ndim == 5 else 1
    if times > 1 and not form.time_downscale:
        context.warn(
            f"the empty latents have {times} frames, but this model makes pictures, so that one is sampled; set length "
            "to 1"
        )
        times = 1
    scale = latent.get("downscale_ratio_spacial", form.downscale) / form.downscale
    height, width = (round(side * scale) * form.downscale for side in samples.shape[-2:])
    return torch.zeros(len(samples), *form.shape(height, width, 1 + (times - 1) * form.time_downscale))
