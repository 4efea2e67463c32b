"""Encoded samples, and encoding of a folder.

Encoding takes functions for image and text instead of a model; families and nodes supply them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.files import open_regular
from lorasmith.data.buckets import bucket_size
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.image_files import crop_offsets, open_image, resize_and_crop, to_tensor
from lorasmith.families.base import Conditioning, PictureSize

__all__ = ["EncodedDataset", "Sample", "encode_folder"]


@dataclass(frozen=True)
class Sample:
    """One image, encoded.

    Attributes:
        latents: fp32 (channels, [frames,] height, width) on the CPU, scaled for the denoiser (`LatentFormat.to_model`).
        conditioning: input of the denoiser, batch of 1.
        name: for messages, usually the file name.
        digest: hash of the inputs from which latents and conditioning were made, if known; their own last bits depend
            on the device.
    """

    latents: Tensor
    conditioning: Conditioning
    name: str
    digest: str = ""


@dataclass(frozen=True)
class EncodedDataset:
    """The samples of a run, in which a sample with repeats occurs repeatedly.

    Raises:
        DataError: there are no samples, or latents are not (channels, [frames,] height, width), differ in channels, or
            are not finite.
    """

    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise DataError("a dataset needs at least one sample, got none; add some images")
        first = self.samples[0]
        for sample in self.samples:
            _check_latents(sample, like=first.latents)

    def __len__(self) -> int:
        return len(self.samples)


def encode_folder(
    scan: FolderScan,
    *,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[str], Conditioning],
    resolution: int,
    multiple: int,
    upscale: bool = True,
    sized: Callable[[Conditioning, PictureSize], Conditioning] = lambda conditioning, size: conditioning,
    progress: Callable[[int, int, str], None] | None = None,
) -> EncodedDataset:
    """Encode the images of a folder, one at a time; each distinct caption is encoded once.

    Captions come first, so that text encoders can be released before images are encoded.

    Args:
        scan: the scanned folder.
        encode_image: pixels (1, 3, H, W) in [−1, 1] → latents (1, C, h, w), scaled for the denoiser.
        encode_text: caption → conditioning, batch of 1.
        resolution, multiple, upscale: of the buckets, see `bucket_size`.
        sized: adds a picture's sizes to the conditioning of its caption.
        progress: called after each image with (images done, total, name of the image).

    Raises:
        ImageError: an image can no longer be read.
        DataError: the resolution is below `multiple`; an image's latents are not finite.
    """
    with torch.no_grad():
        captions = {text: _on_cpu(encode_text(text)) for text in dict.fromkeys(image.caption for image in scan.images)}
        samples: list[Sample] = []
        for done, image in enumerate(scan.images, start=1):
            pixels, size = _pixels(image, resolution=resolution, multiple=multiple, upscale=upscale)
            latents = encode_image(pixels)[0].to("cpu", torch.float32)
            conditioning = sized(captions[image.caption], size)
            sample = Sample(latents, conditioning, image.path.name, _digest(image, pixels))
            _check_latents(sample, like=latents)
            samples += [sample] * image.repeats
            if progress:
                progress(done, len(scan.images), sample.name)
    return EncodedDataset(tuple(samples))


def _pixels(image: ImageFile, *, resolution: int, multiple: int, upscale: bool) -> tuple[Tensor, PictureSize]:
    """The image at its bucket's size, (1, 3, height, width) in [−1, 1], with its original size and crop."""
    width, height = bucket_size(image.width, image.height, resolution=resolution, multiple=multiple, upscale=upscale)
    left, top = crop_offsets(image.width, image.height, width, height)
    size = PictureSize(original=(image.height, image.width), crop=(top, left), target=(height, width))
    return to_tensor(resize_and_crop(open_image(image.path), width, height))[None], size


def _digest(image: ImageFile, pixels: Tensor) -> str:
    """SHA-256 of an image's file, its caption and its size in training."""
    content = hashlib.sha256(json.dumps([image.caption, list(pixels.shape)]).encode())
    with open_regular(image.path) as file:
        return hashlib.file_digest(file, lambda: content).hexdigest()


def _on_cpu(conditioning: Conditioning) -> Conditioning:
    mask = None if conditioning.mask is None else conditioning.mask.cpu()
    return replace(conditioning, tensors={key: tensor.cpu() for key, tensor in conditioning.tensors.items()}, mask=mask)


def _check_latents(sample: Sample, *, like: Tensor) -> None:
    shape = tuple(sample.latents.shape)
    frames = "frames, " if like.ndim == 4 else ""
    if len(shape) not in (3, 4) or len(shape) != like.ndim or shape[0] != len(like):
        raise DataError(
            f"latents must all be ({len(like)}, {frames}height, width), got {shape} for {sample.name}; encode every "
            "image with the same autoencoder"
        )
    if not sample.latents.isfinite().all():
        raise DataError(
            f"latents must be finite, got NaN or infinity for {sample.name}; encode in fp32 or leave the image out"
        )
