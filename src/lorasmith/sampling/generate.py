"""Text to pictures and clips with a loaded model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorasmith.adapters.frozen_layer import sampling_dtype
from lorasmith.core.errors import OptionError
from lorasmith.core.placement import best_device
from lorasmith.families.conditionings import Conditioning, named_controls
from lorasmith.families.forms import ControlForm, Defaults
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.report.pictures import Clip
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.sampling.sketches import Sketcher


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
    steps: int = Defaults.steps
    cfg: float | None = None  # guidance scale; None for the model's own
    sampler: str = "euler"
    scheduler: str = "normal"
    # in pixels, as is `height`; None for the size of the first control, or the model's resolution without
    width: int | None = None
    height: int | None = None
    dtype: torch.dtype | None = None  # of the denoiser's weights and products; None for `sampling_dtype`
    frames: int = 1  # of a clip; 1 for pictures
    frame_rate: float | None = None  # frames per second for display; None for the model's own


def generate(
    model: Model | Denoiser,
    prompts: str | Sequence[str],
    *,
    seed: int | Sequence[int] = Sampling.seed,
    steps: int | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Generate one picture per prompt, from noise of one seed, or of a seed each.

    `arguments` are fields of `Sampling` and arguments of `generate_clips`; `steps` are by default the model's.
    """
    base = model if isinstance(model, Model) else model.base
    settings = {field.name: arguments.pop(field.name) for field in fields(Sampling) if field.name in arguments}
    seeds = seed if isinstance(seed, Sequence) else [seed] * (1 if isinstance(prompts, str) else len(prompts))
    sampling = Sampling(steps=steps or base.defaults.steps, **settings)
    return [clip.frames[0] for clip in generate_clips(model, prompts, sampling, seeds=seeds, **arguments)]


def generate_clips(
    model: Model | Denoiser | Experts,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    controls: Sequence[Image.Image] = (),
    mask: Image.Image | None = None,
    seeds: Sequence[int] = (),
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Clip]:
    """Generate one clip per prompt (`(word:1.2)` weights included); pictures are clips of one frame.

    `model` is a model, or its denoiser with LoRAs applied, as may be `text_encoder`; `controls` are the pictures that
    an edit model edits or refers to, for all prompts, and `mask` is white where a model that fills masks paints.
    `seeds` are those of each prompt, all that of `sampling` if empty. `progress` receives (steps done, total) of all
    prompts together; `cancelled` is called before each evaluation of the network. Raises OptionError for a size, number
    of frames or name that does not fit, ModelError if the model lacks a text encoder or an autoencoder, and
    SamplingCancelledError.
    """
    denoiser = model.denoiser if isinstance(model, Model) else model
    positives, away = _encoded(denoiser, prompts, negative, controls, mask, sampling, text_encoder, device)
    return clips(
        denoiser, positives, away, sampling, seeds=seeds, device=device, progress=progress, cancelled=cancelled
    )


def clips(
    denoiser: Denoiser | Experts,
    positives: Sequence[Conditioning],
    negatives: Sequence[Conditioning],
    sampling: Sampling,
    *,
    seeds: Sequence[int] = (),
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    sketcher: Sketcher | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Clip]:
    """Generate one clip per encoded prompt, with LoRAs as applied to `denoiser`; pictures are clips of one frame.

    `negatives` are those of each prompt, whose controls are theirs, too; `sketcher` sees the first of them. Other
    arguments and errors are as for `generate_clips`.
    """
    base, device = denoiser.base, device or best_device()
    first = denoiser.noisy if isinstance(denoiser, Experts) else denoiser
    negatives = [
        conditioning.with_pictures(positive.pictures)
        for conditioning, positive in zip(negatives, positives, strict=True)
    ]
    first.check_conditionings([*positives, *negatives])
    shapes = [_latent_shape(base, sampling, positive) for positive in positives]
    sigmas = sigmas_for(first.diffusion.schedule, sampling.scheduler, sampling.steps, sampler=sampling.sampler)
    parts = denoiser.parts(sigmas) if isinstance(denoiser, Experts) else [(denoiser, sigmas)]
    latents = [torch.zeros(shape, device=device) for shape in shapes]
    seeds = seeds or [sampling.seed] * len(positives)
    noise = [prepare_noise(seed, shape) for seed, shape in zip(seeds, shapes, strict=True)]
    done, total = 0, sampling.steps * len(positives)
    for one, some in parts:
        dtype = sampling.dtype or sampling_dtype(one.module, device)
        with one.placed(device, dtype):
            for index, (positive, negative) in enumerate(zip(positives, negatives, strict=True)):
                latents[index] = sample_latents(
                    one.predict,
                    schedule=one.diffusion.schedule,
                    parameterization=one.diffusion.parameterization,
                    positive=[positive],
                    negative=[negative],
                    latents=latents[index],
                    noise=noise[index],
                    sigmas=some,
                    sampler=sampling.sampler,
                    cfg=base.defaults.guidance if sampling.cfg is None else sampling.cfg,
                    seed=seeds[index],
                    dtype=dtype,
                    callback=_callback(progress, done, total, None if index else sketcher),
                    cancelled=cancelled,
                )
                done += len(some) - 1
        noise = [torch.zeros(shape) for shape in shapes]  # what the first part leaves is noisy still
    with base.autoencoder.active(device):
        drawn = [clip_of(base, latent, sampling.frame_rate) for latent in latents]
    if sketcher is not None:
        for latent, clip in zip(latents, drawn, strict=True):
            sketcher.learn(latent, clip.frames[0])
    return drawn


def clip_of(model: Model, latents: Tensor, frame_rate: float | None = None) -> Clip:
    """The clip of a model's latents (1, channels, [frames,] height, width), a picture as one frame."""
    pixels = model.autoencoder.decode_frames(model.components.latent.from_model(latents))
    return Clip(tuple(to_images(pixels[0].movedim(1, 0))), frame_rate or model.defaults.frame_rate)


def _encoded(
    denoiser: Denoiser | Experts,
    prompts: str | Sequence[str],
    negative: str,
    controls: Sequence[Image.Image],
    mask: Image.Image | None,
    sampling: Sampling,
    text_encoder: TextEncoder | None,
    device: torch.device | None,
) -> tuple[list[Conditioning], list[Conditioning]]:
    encoder = text_encoder or denoiser.base.text_encoder
    controls_given, sight = encoded_controls(denoiser.base, controls, sampling, device, mask=mask), denoiser.base.sight
    seen = [] if sight is None else [_fitted(control, sight.size(*control.size)) for control in controls]
    with encoder.active(device, sees=bool(seen)):
        texts = [prompts] if isinstance(prompts, str) else prompts
        known = {text: encoder.encode(text, seen, sight=sight) for text in dict.fromkeys((*texts, negative))}
        return [known[text].with_pictures(controls_given) for text in texts], [known[negative]] * len(texts)


def encoded_controls(
    model: Model,
    pictures: Sequence[Image.Image],
    sampling: Sampling,
    device: torch.device | None = None,
    *,
    mask: Image.Image | None = None,
) -> Mapping[str, Tensor]:
    """Tensors of a conditioning made of RGB pictures to edit or refer to, each in a size that the model knows, or in
    the size of `sampling` of the first and last frame of a clip, or of a picture and the mask of what is
    painted.

    What does not fit its aspect ratio is cut off around the centre. OptionError if the model takes no or fewer
    pictures, or needs one, or a mask.
    """
    form, title = model.control_form, f"{model.title} ({model.family.title})"
    if mask is not None and not form.is_fill:
        raise OptionError(f"{title} takes no mask, got one; leave it out, or choose a model that fills masks")
    if len(pictures) > form.most:
        remedy = "leave some out" if form.most else "leave them out, or choose an edit model"
        raise OptionError(f"{title} {form.count_text}, got {len(pictures)}; {remedy}")
    if pictures and form.sight is not None:
        model.text_encoder.check_sight()
    if form.is_fill and (mask is None or not pictures):
        lacking = "mask" if pictures else "control"
        raise OptionError(
            f"{title} paints what a mask covers in a picture, got no {lacking}; give the picture as control, and a mask"
        )
    if form.is_required and not pictures:
        if not form.are_files:
            raise OptionError(f"{title} draws from a picture and needs one, got none; give it as a control")
        raise OptionError(
            f"{title} edits pictures and needs one, got none; give it as a control, or choose edit none to draw without"
        )
    if not form.are_files:
        return _picture_conditioning(model, form, pictures, mask, sampling, device) if pictures else {}
    to_model = model.components.latent.to_model
    with model.autoencoder.active(device) if pictures else contextlib.nullcontext():
        fitted = (_fitted(picture, form.size(*picture.size)) for picture in pictures)
        return named_controls([to_model(model.autoencoder.encode(picture)) for picture in fitted])


def _picture_conditioning(
    model: Model,
    form: ControlForm,
    pictures: Sequence[Image.Image],
    mask: Image.Image | None,
    sampling: Sampling,
    device: torch.device | None,
) -> Mapping[str, Tensor]:
    """What the model is given of a picture and its mask, or of a clip with these pictures as first and last frame."""
    if len(pictures) < len(form.frames):
        raise OptionError(f"{model.title} draws from the first and the last frame, got one picture; give both")
    if sampling.frames == 1 and mask is None:
        raise OptionError(
            f"frames must be at least {1 + model.components.latent.time_downscale} for a clip that {model.title} draws "
            f"from a picture, got 1; try {model.defaults.frames}"
        )
    width, height = form.size(*pictures[0].size)
    size = (sampling.width or width, sampling.height or height)
    _latent_shape(model, replace(sampling, width=size[0], height=size[1]))
    if mask is not None:
        pixels = _fitted(pictures[0], size)
        with model.encodes_pictures(device):
            return model.picture_inputs(pixels, _inside(mask, pictures[0].size, size))
    pixels = torch.zeros(1, 3, sampling.frames, size[1], size[0])
    for place, picture in zip((0, -1), pictures, strict=False):
        pixels[:, :, place] = _fitted(picture, size)
    with model.encodes_pictures(device):
        return model.picture_inputs(pixels, form=form.with_frames(len(pictures)))


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Pixels of the picture in a size; what does not fit its aspect ratio is cut off around the centre."""
    return _pixels(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def _inside(mask: Image.Image, of: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(height, width) in [0, 1], 1 inside of a picture's mask at this size. OptionError for one that cannot be used."""
    (width, height), (columns, rows) = of, mask.size
    if abs(columns * height - rows * width) > width + height:  # more than a pixel of the mask
        raise OptionError(
            f"a mask must have the aspect ratio of its picture, {width}×{height}, got {columns}×{rows}; crop or scale "
            "it"
        )
    inside = torch.from_numpy(np.array(ImageOps.fit(mask.convert("L"), size, Image.Resampling.BOX))).float() / 255
    if (share := inside.round().mean()) in (0, 1):
        covered = "all" if share else "nothing"
        raise OptionError(f"a mask must cover a part of its picture, got one of {covered}; make white what is painted")
    return inside


def _pixels(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) in [−1, 1]; the inverse of `to_images`."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures from pixels (batch, 3, height, width) in [−1, 1]."""
    scaled = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in scaled]


def _latent_shape(model: Model, sampling: Sampling, prompt: Conditioning | None = None) -> tuple[int, ...]:
    """Shape of the latents of a picture or clip, which has the size of what its prompt is given."""
    defaults, latent, frames = model.defaults, model.components.latent, sampling.frames
    model.check_clips("frames", frames)
    if frames < 1 or frames != latent.whole_frames(frames):
        raise OptionError(
            f"frames must be one more than a multiple of {latent.time_downscale} for {model.title}, got {frames}; "
            f"try {latent.whole_frames(max(1, frames))}"
        )
    height, width = defaults.resolution, defaults.resolution
    pictures = [] if prompt is None else [picture for picture in prompt.pictures.values() if picture.ndim > 3]
    for one in pictures[:1]:
        height, width = (side * latent.downscale for side in one.shape[-2:])
    sides = {"width": sampling.width or width, "height": sampling.height or height}
    for name, side in sides.items():
        if side % defaults.pixel_multiple:
            raise OptionError(
                f"{name} must be a multiple of {defaults.pixel_multiple} for {model.title}, got {side}; "
                f"try {max(1, round(side / defaults.pixel_multiple)) * defaults.pixel_multiple}"
            )
    shape = (1, *latent.shape(sides["height"], sides["width"], frames))
    known = None if prompt is None else prompt.tensors.get("known")
    return shape if known is None else (*shape[:2], *known.shape[2:])


def _callback(
    progress: Callable[[int, int], None] | None, before: int, total: int, sketcher: Sketcher | None
) -> Callable[[int, int, Tensor], None] | None:
    if progress is None and sketcher is None:
        return None

    def heard(step: int, _: int, denoised: Tensor) -> None:
        if progress is not None:
            progress(before + step + 1, total)
        if sketcher is not None:
            sketcher.see(denoised)

    return heard
