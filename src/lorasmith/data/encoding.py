"""Encoding a folder of images with a model, for `train`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from lorasmith.core.placement import chosen_device
from lorasmith.data.dataset import EncodedDataset, encode_folder
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.families.model import Model

__all__ = ["encode_scan", "load_dataset"]


def load_dataset(
    folder: str | os.PathLike[str],
    model: Model,
    *,
    trigger: str = "",
    resolution: int | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> EncodedDataset:
    """Read and encode a folder of images with captions in same-name `.txt` files.

    Args:
        folder: the folder.
        model: its autoencoder and text encoders are used.
        trigger: put in front of captions that lack it; replaces missing captions.
        resolution: side in pixels of the square whose area pictures are scaled to; the model's own if None.
        device: where to encode; the first GPU, or the CPU, if None.
        progress: called after each image with (images done, total, name of the image).

    Raises:
        DataError: the folder or its images cannot be used.
        OptionError: there is no such device.
    """
    place, scan = chosen_device(device), scan_folder(Path(folder), trigger=trigger)
    return encode_scan(scan, model, resolution=resolution, device=place, progress=progress)


def encode_scan(
    scan: FolderScan,
    model: Model,
    *,
    resolution: int | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> EncodedDataset:
    """Encode a scanned folder.

    Args:
        scan: from `scan_folder`.
        model, resolution, device, progress: as for `load_dataset`.
    """
    latent, encoder, autoencoder = model.components.latent, model.text_encoder, model.autoencoder
    with encoder.active(device):  # left before the images, as the encoders of large models fill the memory
        captions = {
            caption: encoder.encode(caption) for caption in dict.fromkeys(image.caption for image in scan.images)
        }
    with autoencoder.active(device):
        return encode_folder(
            scan,
            encode_image=lambda pixels: latent.to_model(autoencoder.encode(pixels)),
            encode_text=captions.__getitem__,
            sized=model.family.sized,
            resolution=resolution or model.defaults.resolution,
            multiple=model.defaults.pixel_multiple,
            progress=progress,
        )
