"""Text to pictures and clips with a loaded model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorasmith.adapters.frozen_layer import placed_for_products
from lorasmith.core.errors import OptionError
from lorasmith.core.placement import best_device
from lorasmith.families.base import Conditioning, controls_taken
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.report.pictures import Clip
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.samplers import sigmas_for


@dataclass(frozen=True)
class Experts:
    """Two denoisers of one model: `noisy` draws the first part of the way from noise, `clean` the rest."""

    noisy: Denoiser
    clean: Denoiser
    boundary: float  # diffusion time, 1 for noise, below which `clean` draws

    @property
    def base(self) -> Model:
        """The model whose encoders and autoencoder are used: the first one loaded with an autoencoder."""
        return self.clean.base if self.noisy.base.components.vae is None else self.noisy.base

    def parts(self, sigmas: Tensor) -> list[tuple[Denoiser, Tensor]]:
        """Each denoiser with the sigmas of its steps; one without steps is left out."""
        schedule = self.noisy.diffusion.schedule
        border = schedule.at(torch.tensor([schedule.quantile(self.boundary)]))
        first = int((schedule.at_sigma(sigmas[:-1]).time >= border.time - _BORDER).sum())
        parts = [(self.noisy, sigmas[: first + 1]), (self.clean, sigmas[first:])]
        return [(denoiser, some) for denoiser, some in parts if len(some) > 1]


_BORDER = 1e-4  # of the network's time: a step at the boundary itself is the first expert's, despite rounding


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled; names of `sampler` and `scheduler` are those of KSampler."""

    seed: int = 0
    steps: int = 20
    cfg: float | None = None  # guidance scale; None for the model's own
    sampler: str = "euler"
    scheduler: str = "normal"
    # in pixels, as is `height`; None for the size of the first control, or the model's resolution without
    width: int | None = None
    height: int | None = None
    # of the denoiser's weights and products; bf16 needs half the memory and changes pictures slightly
    dtype: torch.dtype = torch.float32
    frames: int = 1  # of a clip; 1 for pictures
    frame_rate: float | None = None  # frames per second for display; None for the model's own


def generate(
    model: Model | Denoiser,
    prompts: str | Sequence[str],
    *,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    controls: Sequence[Image.Image] = (),
    seed: int = Sampling.seed,
    steps: int | None = None,
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
    """Generate one picture per prompt (`(word:1.2)` weights included), all from noise of the same seed.

    `model` is a model, or its denoiser with LoRAs applied, as may be `text_encoder`; `controls` are the pictures that
    an edit model edits or refers to, for all prompts; other settings are those of `Sampling`. `progress` receives
    (steps done, total) of all prompts together; `cancelled` is called before each evaluation of the network. Raises
    OptionError for a size or name that does not fit, ModelError if the model lacks a text encoder or an autoencoder,
    and SamplingCancelledError.
    """
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    positives, away = _encoded(denoiser, prompts, negative, controls, text_encoder, device)
    sampling = Sampling(
        seed=seed,
        steps=steps or denoiser.base.defaults.steps,
        cfg=cfg,
        sampler=sampler,
        scheduler=scheduler,
        width=width,
        height=height,
        dtype=dtype,
    )
    drawn = clips(denoiser, positives, away, sampling, device=device, progress=progress, cancelled=cancelled)
    return [clip.frames[0] for clip in drawn]


def generate_clips(
    model: Model | Denoiser | Experts,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    controls: Sequence[Image.Image] = (),
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Clip]:
    """Generate one clip per prompt with a video model, all from noise of the same seed.

    Arguments and errors are as for `generate`; OptionError also for a number of frames that does not fit.
    """
    denoiser = model.denoiser if isinstance(model, Model) else model
    positives, away = _encoded(denoiser, prompts, negative, controls, text_encoder, None)
    return clips(denoiser, positives, away, sampling, progress=progress, cancelled=cancelled)


def clips(
    denoiser: Denoiser | Experts,
    positives: Sequence[Conditioning],
    negative: Conditioning,
    sampling: Sampling,
    *,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Clip]:
    """Generate one clip per encoded prompt, with LoRAs as applied to `denoiser`; pictures are clips of one frame.

    A prompt's controls are the negative prompt's, too. Arguments and errors are as for `generate_clips`.
    """
    base, device = denoiser.base, device or best_device()
    first = denoiser.noisy if isinstance(denoiser, Experts) else denoiser
    first.check_conditionings([*positives, negative])
    components, shapes = base.components, [_latent_shape(base, sampling, one) for one in positives]
    sigmas = sigmas_for(first.diffusion.schedule, sampling.scheduler, sampling.steps, sampler=sampling.sampler)
    parts = denoiser.parts(sigmas) if isinstance(denoiser, Experts) else [(denoiser, sigmas)]
    latents = [torch.zeros(shape, device=device) for shape in shapes]
    noise = [prepare_noise(sampling.seed, shape) for shape in shapes]
    done, total = 0, sampling.steps * len(positives)
    for one, some in parts:
        # Placed first and patched second: adapters are created on their layers' device.
        with placed_for_products(one.module, device=device, dtype=sampling.dtype), one.active():
            for index, positive in enumerate(positives):
                latents[index] = sample_latents(
                    one.predict,
                    schedule=one.diffusion.schedule,
                    parameterization=one.diffusion.parameterization,
                    positive=[positive],
                    negative=[negative.with_controls(positive.controls)],
                    latents=latents[index],
                    noise=noise[index],
                    sigmas=some,
                    sampler=sampling.sampler,
                    cfg=base.defaults.guidance if sampling.cfg is None else sampling.cfg,
                    seed=sampling.seed,
                    dtype=sampling.dtype,
                    callback=progress and _counter(progress, done, total),
                    cancelled=cancelled,
                )
                done += len(some) - 1
        noise = [torch.zeros(shape) for shape in shapes]  # what the first part leaves is noisy still
    with base.autoencoder.active(device):
        decoded = [base.autoencoder.decode_frames(components.latent.from_model(latent)) for latent in latents]
    rate = sampling.frame_rate or base.defaults.frame_rate
    return [Clip(tuple(to_images(pixels[0].movedim(1, 0))), rate) for pixels in decoded]


def _encoded(
    denoiser: Denoiser | Experts,
    prompts: str | Sequence[str],
    negative: str,
    controls: Sequence[Image.Image],
    text_encoder: TextEncoder | None,
    device: torch.device | None,
) -> tuple[list[Conditioning], Conditioning]:
    encoder = text_encoder or denoiser.base.text_encoder
    beside = encoded_controls(denoiser.base, controls, device)
    with encoder.active(device):
        positives = [encoder.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return [one.with_controls(beside) for one in positives], encoder.encode(negative)


def encoded_controls(model: Model, pictures: Sequence[Image.Image], device: torch.device | None = None) -> list[Tensor]:
    """Latents (1, channels, height, width) of RGB pictures to edit or refer to, each in a size that the model knows.

    What does not fit its aspect ratio is cut off around the centre. OptionError if the model takes no or fewer
    pictures, or needs one.
    """
    form, title = model.control_form, f"{model.title} ({model.family.title})"
    if len(pictures) > (most := 0 if form is None else form.most):
        remedy = "leave some out" if most else "leave them out, or choose an edit model"
        raise OptionError(f"{title} {controls_taken(most)}, got {len(pictures)}; {remedy}")
    if form is None:
        return []
    if form.is_required and not pictures:
        raise OptionError(
            f"{title} edits pictures and needs one, got none; give it as a control, or choose edit none to draw without"
        )
    to_model = model.components.latent.to_model
    with model.autoencoder.active(device) if pictures else contextlib.nullcontext():
        fitted = (ImageOps.fit(one, form.size(*one.size), Image.Resampling.LANCZOS) for one in pictures)
        return [to_model(model.autoencoder.encode(_pixels(one))) for one in fitted]


def _pixels(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) in [−1, 1]; the inverse of `to_images`."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures from pixels (batch, 3, height, width) in [−1, 1]."""
    scaled = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in scaled]


def _latent_shape(model: Model, sampling: Sampling, prompt: Conditioning) -> tuple[int, ...]:
    defaults, latent, frames = model.defaults, model.components.latent, sampling.frames
    model.check_clips("frames", frames)
    if frames < 1 or frames != latent.whole_frames(frames):
        raise OptionError(
            f"frames must be one more than a multiple of {latent.time_downscale} for {model.title}, got {frames}; "
            f"try {latent.whole_frames(max(1, frames))}"
        )
    height, width = defaults.resolution, defaults.resolution
    for control in prompt.controls[:1]:
        height, width = (side * latent.downscale for side in control.shape[-2:])
    sides = {"width": sampling.width or width, "height": sampling.height or height}
    for name, side in sides.items():
        if side % defaults.pixel_multiple:
            raise OptionError(
                f"{name} must be a multiple of {defaults.pixel_multiple} for {model.title}, got {side}; "
                f"try {max(1, round(side / defaults.pixel_multiple)) * defaults.pixel_multiple}"
            )
    return (1, *latent.shape(sides["height"], sides["width"], frames))


def _counter(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int, Tensor], None]:
    return lambda step, _, __: progress(before + step + 1, total)
