"""One image file or clip as the pixels and masks of its framings.

The file is read once, so digest, pixels and transparency are of the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from lorasmith.data.clips import clip_frames
from lorasmith.data.crops import Framing
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import ImageFile
from lorasmith.data.image_files import ImageError, open_layers, read_image, to_tensor


@dataclass(frozen=True)
class FramedPicture:
    """A framing of an image file as tensors."""

    pixels: Tensor  # fp32 (3, [frames,] height, width) in [−1, 1]
    inside: Tensor | None  # fp32 (height, width) of the latents: share of each inside the mask


def framed(
    image: ImageFile,
    digest: str,
    framings: Sequence[Framing],
    config: DataConfig,
    *,
    downscale: int,
    numbers: Sequence[int] = (),
) -> list[FramedPicture]:
    """The framings of an image file; `downscale` is pixels per latent, `numbers` are the frames of a clip.

    ImageError if the file or its mask can no longer be read, or the file's SHA-256 is not `digest`.
    """
    content = read_image(image.path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ImageError(image.path, "has changed since it was checked; start again when it stays as it is")
    size = (image.width, image.height)
    if numbers:
        opacity = None
        frames: list[list[Tensor]] = [[] for _ in framings]
        for picture in clip_frames(image.path, content, numbers):  # framed at once, as those of a film take gigabytes
            for of_framing, one in zip(frames, framings, strict=True):
                of_framing.append(to_tensor(one.applied(picture, size)))
        pixels = [torch.stack(one, dim=1) for one in frames]
    else:
        picture, opacity = open_layers(image.path, content, scale=max(one.scale for one in framings))
        pixels = [to_tensor(one.applied(picture, size)) for one in framings]
    mask = opacity if config.masks == "alpha" else mask_of(image, config)
    found = []
    for one, shown in zip(framings, pixels, strict=True):
        inside = None
        if mask is not None:
            there = one.mask_applied(mask, size, (one.width // downscale, one.height // downscale))
            inside = torch.from_numpy(np.array(there)).to(torch.float32) / 255
        found.append(FramedPicture(shown, inside))
    return found


def mask_of(image: ImageFile, config: DataConfig) -> Image.Image | None:
    """The mask in mode L, white inside; None without one, and for a clip's transparency. Raises ImageError."""
    if config.masks == "alpha":
        return None if image.frames else open_layers(image.path)[1]
    if image.mask is None:
        return None
    grey, opacity = open_layers(image.mask)
    mask = grey.convert("L")
    if opacity is not None:  # what is transparent is outside
        mask = ImageChops.multiply(mask, opacity)
    return mask


def place_weights(inside: Tensor | None, config: DataConfig) -> Tensor | None:
    """Weights of the loss by place, fp32 (height, width); None for 1 everywhere, or if all of them would be 0.

    `inside` is the share of each place inside the mask.
    """
    if inside is None:
        return None
    weights = config.mask_outside + (config.mask_inside - config.mask_outside) * inside
    mean = weights.mean()
    if mean <= 0:
        return None
    return weights / mean if config.mask_normalize else weights
