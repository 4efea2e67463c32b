"""Nodes for training data: folders of images, encoding, buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.folders import fingerprint
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import encoded_pixels, encoded_texts
from lorasmith.data.folder import FolderScan, ImageFile, scan_folder
from lorasmith.data.image_files import open_image, to_tensor
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.nodes.text_encoding import check_encoder
from lorasmith.nodes.values import (
    Latent,
    flat_conditionings,
    flat_images,
    flat_latents,
    image_from_pixels,
    one_for_each,
    pixels_from_image,
    single,
)
from lorasmith.workflow import Input, NodeContext, Output, node

T = TypeVar("T")

_FOLDER = Input("folder", "COMBO", options=lambda folders: folders.input_folders(), tooltip="In the input folder.")


@node(
    "LoadImageDataSetFromFolder",
    display_name="Load Image (from Folder)",
    category="image",
    inputs=[_FOLDER],
    outputs=[Output("IMAGE", "images", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
    fingerprint=lambda folders, folder: fingerprint(folders.find_input_folder(folder)),
)
def load_image_folder(context: NodeContext, *, folder: str) -> tuple[list[Tensor]]:
    """Read the images of a folder in the order of their names, upright, with transparency on white."""
    path = context.folders.find_input_folder(folder)
    scan = _scanned(context, folder)
    images = [image for image in scan.images if image.path.parent == path]
    if not images:
        raise DataError(f"{folder} must contain images itself, but all are in its subfolders; choose one of those")
    return (_read(context, images),)


@node(
    "LoadImageTextDataSetFromFolder",
    display_name="Load Image-Text (from Folder)",
    category="image",
    inputs=[_FOLDER],
    outputs=[Output("IMAGE", "images", is_list=True), Output("STRING", "texts", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
    fingerprint=lambda folders, folder: fingerprint(folders.find_input_folder(folder)),
)
def load_image_text_folder(context: NodeContext, *, folder: str) -> tuple[list[Tensor], list[str]]:
    """Read the images of a folder and their caption files, in the order of their names.

    Images of subfolders such as `10_sks dog` are repeated that many times. An image without a caption file has an empty
    caption, with a warning.
    """
    scan = _scanned(context, folder)
    if scan.missing_captions:
        names = ", ".join(path.name for path in scan.missing_captions[:3])
        context.warn(
            f"{len(scan.missing_captions)} of {len(scan.images)} images have no caption (such as {names}) and get an "
            "empty one; add a text file of the same name for each"
        )
    for note in scan.notes:
        context.warn(note)
    captions = [image.caption if image.caption_source in ("file", "metadata") else "" for image in scan.images]
    images = _read(context, scan.images)
    repeats = [image.repeats for image in scan.images]
    return _repeated(images, repeats), _repeated(captions, repeats)


@node(
    "MakeTrainingDataset",
    display_name="Make Training Dataset",
    category="model/training",
    inputs=[
        Input("images", "IMAGE"),
        Input("vae", "VAE"),
        Input("clip", "CLIP"),
        Input(
            "texts",
            "STRING",
            optional=True,
            force_input=True,
            multiline=False,
            tooltip="One caption per image, or one for all. Default: empty captions.",
        ),
    ],
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["encode dataset"],
    is_input_list=True,
)
def make_training_dataset(
    context: NodeContext,
    *,
    images: list[Tensor],
    vae: list[Autoencoder],
    clip: list[TextEncoder],
    texts: Sequence[str] = (),
) -> tuple[list[Latent], list[list[Conditioning]]]:
    """Encode images and their captions; repeated ones, and those of earlier runs, are encoded once.

    For a VAE of videos each batch in the list is one clip.
    """
    encoder, autoencoder = single(context, "clip", clip), single(context, "vae", vae)
    pictures = list(images) if autoencoder.latent.time_downscale else flat_images(images)
    captions = one_for_each(texts or [""], len(pictures), name="texts", of="caption")
    check_encoder(encoder)
    pixels = [pixels_from_image(context, one, autoencoder) for one in pictures]

    def shown(what: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            context.raise_if_cancelled()
            context.progress(done, total, text=f"{what} {done} of {total}")

        return progress

    hashing = shown("hashing encoders, tensor")
    conditionings = encoded_texts(encoder, captions, progress=shown("caption"), hash_progress=hashing)
    latents = encoded_pixels(autoencoder, pixels, progress=shown("picture"), hash_progress=hashing)
    return [{"samples": one} for one in latents], [[one] for one in conditionings]


@node(
    "ResolutionBucket",
    display_name="Resolution Bucket",
    category="model/training",
    inputs=[Input("latents", "LATENT"), Input("conditioning", "CONDITIONING")],
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["bucket by resolution", "group by resolution"],
    is_input_list=True,
)
def resolution_bucket(
    context: NodeContext, *, latents: list[Latent], conditioning: list[list[Conditioning]]
) -> tuple[list[Latent], list[list[Conditioning]]]:
    """Batch latents of equal size, each with its conditioning, in the order of the first of each size."""
    samples = flat_latents(latents)
    prompts = one_for_each(flat_conditionings(conditioning), len(samples), name="conditioning", of="conditioning")
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(samples):
        buckets.setdefault(tuple(one.shape), []).append(index)
    return (
        [{"samples": torch.cat([samples[index] for index in bucket])} for bucket in buckets.values()],
        [[prompts[index] for index in bucket] for bucket in buckets.values()],
    )


def _scanned(context: NodeContext, folder: str) -> FolderScan:
    config = DataConfig(follow_links=context.folders.follow_links)
    scan = scan_folder(context.folders.find_input_folder(folder), config)
    for path, reason in scan.skipped:
        context.warn(f"skipped: {path.name} {reason}")
    return scan


def _read(context: NodeContext, images: Sequence[ImageFile]) -> list[Tensor]:
    """Each file as a separate IMAGE."""
    read = []
    for done, image in enumerate(images, start=1):
        context.raise_if_cancelled()
        read.append(image_from_pixels(to_tensor(open_image(image.path))[None]))
        context.progress(done, len(images), text=image.path.name)
    return read


def _repeated(items: Sequence[T], repeats: Sequence[int]) -> list[T]:
    return [item for item, count in zip(items, repeats, strict=True) for _ in range(count)]
