"""Nodes for training data: folders of images, encoding, buckets, saving and loading of encoded data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.printable import count_text
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import encoded_pixels, encoded_texts
from lorasmith.data.folder import FolderScan, ImageFile, scan_folder
from lorasmith.data.image_files import open_image, to_tensor
from lorasmith.data.saved_samples import (
    INDEX,
    LatentBatch,
    SavedSamples,
    is_comfyui_dataset,
    read_comfyui_dataset,
    read_samples,
    write_samples,
)
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.nodes.conditioning import check_encoder
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
from lorasmith.workflow import NodeContext, Output, node, socket

T = TypeVar("T")

_FOLDER = socket("COMBO", options=lambda folders: folders.input_folders(), tooltip="In the input folder.")


@node(
    "LoadImageDataSetFromFolder",
    "Load Image (from Folder)",
    "image",
    outputs=[Output("IMAGE", "images", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
    fingerprint=lambda folders, folder: fingerprint(folders.find_input_folder(folder)),
)
def load_image_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Tensor]]:
    """Read the images of a folder in the order of their names, upright, with transparency on white."""
    path = context.folders.find_input_folder(folder)
    scan = _scanned(context, folder)
    images = [image for image in scan.images if image.path.parent == path]
    if not images:
        raise DataError(f"{folder} must contain images itself, but all are in its subfolders; choose one of those")
    return (_read(context, images),)


@node(
    "LoadImageTextDataSetFromFolder",
    "Load Image-Text (from Folder)",
    "image",
    outputs=[Output("IMAGE", "images", is_list=True), Output("STRING", "texts", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
    fingerprint=lambda folders, folder: fingerprint(folders.find_input_folder(folder)),
)
def load_image_text_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Tensor], list[str]]:
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
    "Make Training Dataset",
    "model/training",
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["encode dataset"],
    is_input_list=True,
)
def make_training_dataset(
    context: NodeContext,
    *,
    images: list[Tensor] = socket("IMAGE"),
    vae: list[Autoencoder] = socket("VAE"),
    clip: list[TextEncoder] = socket("CLIP"),
    texts: Sequence[str] | None = socket(
        "STRING",
        optional=True,
        force_input=True,
        multiline=False,
        tooltip="One caption per image, or one for all. Default: empty captions.",
    ),
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
    "Resolution Bucket",
    "model/training",
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["bucket by resolution", "group by resolution"],
    is_input_list=True,
)
def resolution_bucket(
    context: NodeContext,
    *,
    latents: list[Latent] = socket("LATENT"),
    conditioning: list[list[Conditioning]] = socket("CONDITIONING"),
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


def _checked_name(name: str, folders: Folders) -> str:
    """The name of a new data set, checked before any node runs. Raises OutputError."""
    folders.new_dataset(name)
    return name


@node(
    "SaveTrainingDataset",
    "Save Training Dataset",
    "model/training",
    search_aliases=["export dataset", "save dataset"],
    is_input_list=True,
    output_node=True,
)
def save_training_dataset(
    context: NodeContext,
    *,
    latents: list[Latent] = socket("LATENT", tooltip="From Make Training Dataset or Resolution Bucket."),
    conditioning: list[list[Conditioning]] = socket("CONDITIONING", tooltip="One per latent, or one for all."),
    folder_name: list[str] = socket(
        "STRING",
        default="training_dataset",
        accept=_checked_name,
        multiline=False,
        tooltip="In the datasets folder; may have folders. A data set of this name is replaced.",
    ),
    shard_size: list[int] = socket("INT", default=1000, min=1, max=100000, tooltip="Samples in a file, at most."),
) -> tuple[()]:
    """Save encoded images and captions, to train on them again without encoding."""
    folder = context.folders.new_dataset(single(context, "folder_name", folder_name))
    batches = [LatentBatch(one["samples"].cpu(), one.get("downscale_ratio_spacial")) for one in latents]
    count = sum(len(batch.samples) for batch in batches)
    shards = write_samples(
        folder, SavedSamples(batches, conditioning), shard_size=single(context, "shard_size", shard_size)
    )
    context.log(f"{count} samples are in {folder}, in {count_text(shards, 'file')}.")
    return ()


@node(
    "LoadTrainingDataset",
    "Load Training Dataset",
    "model/training",
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["import dataset", "training data"],
    fingerprint=lambda folders, folder_name: fingerprint(folders.find_dataset(folder_name)),
)
def load_training_dataset(
    context: NodeContext,
    *,
    folder_name: str = socket(
        "COMBO", options=lambda folders: folders.datasets(), tooltip="Saved here or by ComfyUI, in the datasets folder."
    ),
) -> tuple[list[Latent], Sequence[Sequence[Conditioning]]]:
    """Load encoded images and captions that Save Training Dataset saved."""
    folder = context.folders.find_dataset(folder_name)
    if (folder / INDEX).exists():
        samples = read_samples(folder)
    elif is_comfyui_dataset(folder):
        samples, ignored = read_comfyui_dataset(folder)
        if ignored:
            shown = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
            context.warn(f"{shown} in {folder_name} has no meaning here and is left out")
    else:
        raise DataError(f"{folder} must be a saved training data set, but has no {INDEX}; save it again")
    return [_latent(batch) for batch in samples.latents], [list(one) for one in samples.conditioning]


def _latent(batch: LatentBatch) -> Latent:
    if batch.downscale is None:
        return {"samples": batch.samples}
    return {"samples": batch.samples, "downscale_ratio_spacial": batch.downscale}
