"""Values that nodes pass to each other, and flattening of lists of them.

IMAGE         fp32 tensor (batch, height, width, 3) in [0, 1]
MASK          fp32 tensor (batch, height, width) in [0, 1], 1 where the picture is transparent
LATENT        dict with `samples`, fp32 (batch, channels, [frames,] height, width) from the autoencoder, unscaled, and
              `noise_mask`, fp32 (batch, 1, [frames,] height, width) of any size, 1 where they are sampled
CONDITIONING  list of `Conditioning`, one per prompt; its controls are unscaled like a LATENT, and so is
              `concat_latent_image`, the known part of a picture, with `concat_mask` (batch, 1, height, width) in
              pixels, or of a clip, with a mask (1, 4, frames, height, width) of latents
CLIP_VISION, CLIP_VISION_OUTPUT    an image encoder; its states (batch, tokens, width) of pictures
MODEL, CLIP, VAE    `Denoiser`, `TextEncoder`, `Autoencoder`
LORA_MODEL    `Lora`
LOSS_MAP      dict with `loss`, a list of numbers
NOISE, GUIDER `Noise`, `Guider` (`sampling`)
SAMPLER       registered name of a sampler
SIGMAS        fp32 tensor (steps + 1,), descending
VIDEO         `Video` (`data/clips.py`), whose frames are read when they are used
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
from torch import Tensor

from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.printable import count_text
from lorasmith.families.conditionings import FIRST_FRAME, Conditioning
from lorasmith.families.forms import LatentFormat
from lorasmith.families.model import Autoencoder, Model
from lorasmith.workflow import NodeContext, socket

T = TypeVar("T")

SEED = socket("INT", default=0, min=0, max=2**64 - 1, tooltip="The same seed gives the same result.")

_MOST_PIXELS = 2**27  # of all pictures of one output: 1.6 GB as fp32


def optional_texts(tooltip: str) -> Any:
    """An input of texts, one per image or one for all."""
    return socket("STRING", optional=True, force_input=True, multiline=False, tooltip=tooltip)


class Latent(TypedDict):
    """A batch of latents; `downscale_ratio_spacial` (ComfyUI's key) is the pixels per latent of empty ones."""

    samples: Tensor
    noise_mask: NotRequired[Tensor]
    downscale_ratio_spacial: NotRequired[int]


class LossMap(TypedDict):
    """The loss of each training step."""

    loss: list[float]


def pixels_from_image(context: NodeContext, image: Tensor, autoencoder: Autoencoder) -> Tensor:
    """IMAGE as input of the autoencoder: (batch, 3, height, width) in [−1, 1], cropped to whole latents.

    A batch of several is one clip for an autoencoder of clips, (1, 3, frames, height, width), as in ComfyUI. Frames
    after the last whole latent are dropped, with a warning. DataError if the picture is smaller than one latent.
    """
    multiple = autoencoder.latent.downscale
    height, width = image.shape[1:3]
    rows, columns = height // multiple * multiple, width // multiple * multiple
    if not rows or not columns:
        raise DataError(
            f"a picture must have at least {multiple}×{multiple} px here, got {width}×{height}; scale it up"
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    pixels = image[:, top : top + rows, left : left + columns, :3].movedim(-1, 1) * 2 - 1
    if not autoencoder.latent.time_downscale or len(pixels) == 1:
        return pixels
    frames = autoencoder.latent.whole_frames(len(pixels))
    if frames < len(pixels):
        context.warn(
            f"a batch of {len(pixels)} pictures is one clip for this VAE, of which {frames} are encoded: their number "
            f"must be one more than a multiple of {autoencoder.latent.time_downscale}; use a list for separate pictures"
        )
    return pixels[:frames].movedim(0, 1).unsqueeze(0)


def image_from_pixels(pixels: Tensor) -> Tensor:
    """IMAGE of pixels (batch, 3, [frames,] height, width) in [−1, 1]; frames of clips become a batch."""
    return (pixels.movedim(1, -1).reshape(-1, *pixels.shape[-2:], 3) / 2 + 0.5).clamp(0, 1).contiguous()


def latent_of(samples: Tensor, downscale: int | None = None, mask: Tensor | None = None) -> Latent:
    """LATENT of `downscale` pixels per latent, if known, with its `noise_mask`, if any."""
    found: Latent = {"samples": samples}
    if downscale is not None:
        found["downscale_ratio_spacial"] = downscale
    if mask is not None:
        found["noise_mask"] = mask
    return found


def check_latents(samples: Tensor, form: LatentFormat) -> None:
    """Raise DataError for latents (batch, channels, [frames,] height, width) of another model."""
    if samples.ndim != 4 + form.frames or samples.shape[1] != form.channels:
        frames = "frames, " if form.frames else ""
        raise DataError(
            f"latents must be (batch, {form.channels}, {frames}height, width) for this model, got "
            f"{tuple(samples.shape)}; encode the pictures with its own VAE"
        )
    if form.frames and not form.time_downscale and samples.shape[2] > 1:
        raise DataError(
            f"latents of this model are of pictures, one frame each, got {samples.shape[2]} frames; encode pictures "
            "as a list, as a batch is one clip for this VAE"
        )


CONCAT_IMAGE, CONCAT_MASK = "concat_latent_image", "concat_mask"
"""ComfyUI's names of what is known of a picture."""


def for_model(conditioning: Conditioning, model: Model, samples: Tensor, first: Tensor | None = None) -> Conditioning:
    """An entry of CONDITIONING as a model takes it beside these latents: with scaled controls, and what it is given of
    a picture, or of a clip's first latents. DataError for those of another model or size.
    """
    form, tensors = model.components.latent, dict(conditioning.tensors)
    image, mask = tensors.pop(CONCAT_IMAGE, None), tensors.pop(CONCAT_MASK, None)
    known = None
    for control in conditioning.controls:
        check_latents(control, form)
    # Other models ignore it. A file's name need not say that the model is the variant that takes it.
    takes = any(
        not control.are_files and control.is_required for control in (model.control_form, *model.family.controls)
    )
    if image is not None and mask is not None and takes:
        check_latents(image, form)
        if image.shape[-2:] != samples.shape[-2:]:
            shown, drawn = ("×".join(map(str, latents.shape[:-3:-1])) for latents in (image, samples))
            raise DataError(
                f"the known part of a picture must have the size of the latents, {drawn}, got {shown}; use the latents "
                "of InpaintModelConditioning"
            )
        known = model.family.known_latents(model.components.denoiser, form.to_model(image.float()), mask)
    tensors |= {} if known is None else {"known": known}
    tensors |= {} if first is None else {FIRST_FRAME: form.to_model(first.float())}
    converted = replace(conditioning, tensors=tensors)
    return converted.with_controls([form.to_model(control.float()) for control in conditioning.controls])


def first_frames(latent: Latent, model: Model) -> Tensor | None:
    """The first latents of clips that their noise mask keeps, and it alone, for a model that is given them apart."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    takes = any(form.frames and not form.is_required for form in model.family.controls)
    if not takes or mask is None or mask.ndim != 5 or samples.ndim != 5:
        return None
    kept = [bool((frame == 0).all()) for frame in mask.unbind(2)]
    count = kept.index(False) if False in kept else 0
    return samples[:, :, :count] if count and bool((mask[:, :, count:] == 1).all()) else None


def check_pixels(count: int, width: int, height: int) -> None:
    """Raise OptionError for `count` pictures of a size in pixels that would take too much memory."""
    if count * width * height > _MOST_PIXELS:
        raise OptionError(
            f"the pictures of one output must have at most {_MOST_PIXELS:,} pixels together, got {count:,} of "
            f"{width:,}×{height:,}; choose a smaller size or use fewer pictures"
        )


def with_frames(samples: Tensor, form: LatentFormat) -> Tensor:
    """Latents with a time axis of one frame added if the model's have one and they lack it."""
    return samples.unsqueeze(2) if form.frames and samples.ndim == 4 else samples


def flat_images(images: Sequence[Tensor]) -> list[Tensor]:
    """The single pictures of a list of batches, (1, height, width, 3) each."""
    return [image for batch in images for image in _singles(batch)]


def flat_latents(latents: Sequence[Latent]) -> list[Tensor]:
    """The single latents of a list of batches, (1, channels, [frames,] height, width) each."""
    return [samples for latent in latents for samples in _singles(latent["samples"])]


def flat_conditionings(conditionings: Sequence[Sequence[Conditioning]]) -> list[Conditioning]:
    """The single prompts of a list of CONDITIONING."""
    return [conditioning for combined in conditionings for conditioning in combined]


def one_for_each(items: Sequence[T], count: int, *, name: str, of: str) -> list[T]:
    """`count` items: those passed, or a single one repeated. DataError, naming input and `of`, for other counts."""
    if len(items) not in (1, count):
        raise DataError(
            f"{name} must have one {of} per image or one for all, "
            f"got {len(items)} for {count_text(count, 'image')}; add or remove some"
        )
    return list(items) * count if len(items) == 1 else list(items)


def numpy_draws(seed: int) -> np.random.RandomState:
    """The random numbers that ComfyUI's nodes for data sets draw for a seed of 64 bits."""
    return np.random.RandomState(seed % (2**32 - 1))


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """`items` in ComfyUI's order for the seed."""
    return [items[index] for index in numpy_draws(seed).permutation(len(items))]


def single(context: NodeContext, name: str, values: Sequence[T]) -> T:
    """The value of a scalar input in a node that receives lists; warns of further ones. DataError for an empty list."""
    if not values:
        raise DataError(f"{name} must receive a value, got an empty list; check the node it is linked to")
    if len(values) > 1:
        context.warn(f"{name} takes one value but received {len(values)}; the first one is used")
    return values[0]


def _singles(batch: Tensor) -> list[Tensor]:
    return [batch[index : index + 1] for index in range(len(batch))]
