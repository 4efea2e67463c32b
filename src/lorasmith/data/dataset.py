"""Encoded samples: what training draws from, and the way from a folder to them.

Works on plain functions for image and text, so it needs no model object; families and nodes supply them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.data.buckets import bucket_size
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.image_files import crop_offsets, open_image, resize_and_crop, to_tensor
from lorasmith.families.base import Conditioning, PictureSize

__all__ = ["EncodedDataset", "Sample", "encode_folder"]


@dataclass(frozen=True)
class Sample:
    """One image, encoded.

    Attributes:
        latents: fp32 (channels, [frames,] height, width) on the CPU, as the denoiser sees them (`LatentFormat.to_model`
            applied).
        conditioning: what the denoiser is told about it, batch of 1.
        name: what messages call it, usually the file name.
        digest: of what latents and conditioning were made from, where that is known. They themselves have other last
            bits on another device.
    """

    latents: Tensor
    conditioning: Conditioning
    name: str
    digest: str = ""


@dataclass(frozen=True)
class EncodedDataset:
    """The samples of a run. A sample that repeats within an epoch stands in here as often as it repeats.

    Raises:
        DataError: there are no samples; latents that are not (channels, [frames,] height, width), of different channel
            counts, or not finite.
    """

    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise DataError("a dataset needs at least one sample, got none; give it some images")
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
    """Encode the images of a folder, one at a time; each caption is encoded once however many images carry it.

    Captions come first, so that text encoders are done with before the images begin.

    Args:
        scan: the folder, looked through.
        encode_image: pixels (1, 3, H, W) in [−1, 1] → latents (1, C, h, w) as the denoiser sees them.
        encode_text: caption → conditioning, batch of 1.
        resolution, multiple, upscale: of the buckets, see `bucket_size`.
        sized: the conditioning of one picture from its caption's and its sizes.
        progress: called after each image with the number done, the number in all and the image's name.

    Raises:
        ImageError: an image cannot be read any more.
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
    """The image at its bucket's size, (1, 3, height, width) in [−1, 1], and how it got there."""
    width, height = bucket_size(image.width, image.height, resolution=resolution, multiple=multiple, upscale=upscale)
    left, top = crop_offsets(image.width, image.height, width, height)
    size = PictureSize(original=(image.height, image.width), crop=(top, left), target=(height, width))
    return to_tensor(resize_and_crop(open_image(image.path), width, height))[None], size


def _digest(image: ImageFile, pixels: Tensor) -> str:
    """SHA-256 of an image's file, its caption and the size that it is trained at."""
    content = hashlib.sha256(json.dumps([image.caption, list(pixels.shape)]).encode())
    content.update(image.path.read_bytes())
    return content.hexdigest()


def _on_cpu(conditioning: Conditioning) -> Conditioning:
    mask = None if conditioning.mask is None else conditioning.mask.cpu()
    return Conditioning({key: tensor.cpu() for key, tensor in conditioning.tensors.items()}, conditioning.text, mask)


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
