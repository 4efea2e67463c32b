"""Nodes for training data: folders of images and videos, frames of videos, encoding, buckets, and encoded data sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.folders import Folders
from lorasmith.core.printable import count_text
from lorasmith.data.clips import Video, VideoScan, open_video, read_frames, scan_videos
from lorasmith.data.controls import check_pairs
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import encoded_pixels, encoded_texts
from lorasmith.data.folder import FolderScan, scan_folder
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
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.nodes.conditioning import check_encoder, with_embeddings
from lorasmith.nodes.picture_prompts import prompt_with, sees_pictures
from lorasmith.nodes.values import (
    SEED,
    Latent,
    check_pixels,
    flat_conditionings,
    flat_images,
    flat_latents,
    image_from_pixels,
    latent_of,
    numpy_draws,
    one_for_each,
    optional_texts,
    pixels_from_image,
    shuffled,
    single,
)
from lorasmith.workflow import NodeContext, Output, node, socket

T = TypeVar("T")

_FOLDER = socket("COMBO", options=Folders.input_folders, file=Folders.find_input_folder, tooltip="In the input folder.")
_SAMPLES = (Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True))


@node(
    "LoadImageDataSetFromFolder",
    "Load Image (from Folder)",
    "image",
    outputs=[Output("IMAGE", "images", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
)
def load_image_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Tensor]]:
    """Read the images of a folder in the order of their names, upright, with transparency on white."""
    path = context.folders.find_input_folder(folder)
    scan = _scanned(context, folder)
    images = [image for image in scan.images if image.path.parent == path]
    if not images:
        raise DataError(f"{folder} must contain images itself, but all are in its subfolders; choose one of those")
    return (_read(context, [image.path for image in images], _image),)


@node(
    "LoadImageTextDataSetFromFolder",
    "Load Image-Text (from Folder)",
    "image",
    outputs=[Output("IMAGE", "images", is_list=True), Output("STRING", "texts", is_list=True)],
    search_aliases=["load folder", "load dataset", "import dataset"],
)
def load_image_text_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Tensor], list[str]]:
    """Read the images of a folder and their caption files, in the order of their names.

    Images of subfolders such as `10_sks dog` are repeated that many times. An image without a caption file has an empty
    caption, with a warning.
    """
    images, texts, _ = _with_texts(context, _scanned(context, folder))
    return images, texts


@node(
    "LoadImagePairDataSetFromFolder",
    "Load Image Pairs (from Folders)",
    "image",
    outputs=[
        Output("IMAGE", "images", is_list=True),
        Output("IMAGE", "controls", is_list=True),
        Output("STRING", "texts", is_list=True),
    ],
    search_aliases=["load folder", "load dataset", "import dataset", "edit dataset"],
)
def load_image_pairs(
    context: NodeContext,
    *,
    folder: str = _FOLDER,
    control_folder: str = socket(
        "COMBO",
        options=Folders.input_folders,
        file=Folders.find_input_folder,
        tooltip="With the pictures before the edit, named as those after it.",
    ),
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Read the images of a folder, their caption files, and the pictures of the same names in another folder."""
    before = str(context.folders.find_input_folder(control_folder))
    config = DataConfig(follow_links=context.folders.follow_links, control=(before,))
    scan = _scanned(context, folder, config)
    check_pairs(scan, config, title="this node")
    if len(scan.images[0].controls) > 1:
        raise DataError(
            f"a folder of controls must have one for each image here, got {len(scan.images[0].controls)} for "
            f"{scan.images[0].name}; put further ones into a folder of their own"
        )
    images, texts, repeats = _with_texts(context, scan)
    controls = _read(context, [image.controls[0].path for image in scan.images], _image)
    return images, _repeated(controls, repeats), texts


@node(
    "MakeTrainingDataset",
    "Make Training Dataset",
    "model/training",
    outputs=_SAMPLES,
    search_aliases=["encode dataset"],
    is_input_list=True,
)
def make_training_dataset(
    context: NodeContext,
    *,
    images: list[Tensor] = socket("IMAGE"),
    vae: list[Autoencoder] = socket("VAE"),
    clip: list[TextEncoder] = socket("CLIP"),
    texts: Sequence[str] | None = optional_texts("One caption per image, or one for all. Default: empty captions."),
) -> tuple[list[Latent], list[list[Conditioning]]]:
    """Encode images and their captions; repeated ones, and those of earlier runs, are encoded once.

    For a VAE of videos each batch in the list is one clip.
    """
    return _encoded(context, images, vae, clip, texts)


@node(
    "MakeTrainingPairs",
    "Make Training Pairs",
    "model/training",
    outputs=_SAMPLES,
    search_aliases=["edit dataset", "kontext dataset", "reference dataset"],
    is_input_list=True,
)
def make_training_pairs(
    context: NodeContext,
    *,
    images: list[Tensor] = socket("IMAGE", tooltip="The pictures after the edit, on which is trained."),
    controls: list[Tensor] = socket("IMAGE", tooltip="The pictures before it, one per image or one for all."),
    vae: list[Autoencoder] = socket("VAE"),
    clip: list[TextEncoder] = socket("CLIP"),
    controls_2: list[Tensor] | None = socket("IMAGE", optional=True, tooltip="Second pictures to edit or refer to."),
    controls_3: list[Tensor] | None = socket("IMAGE", optional=True, tooltip="Third pictures to edit or refer to."),
    texts: Sequence[str] | None = optional_texts(
        "What to change: one text per image, or one for all. Default: empty texts."
    ),
) -> tuple[list[Latent], list[list[Conditioning]]]:
    """Encode pairs of pictures for an edit model, in the order of the lists, with the texts that ask for the edits.

    Text encoders that see pictures see the controls as in TextEncodeQwenImageEditPlus.
    """
    beside = [images for images in (controls, controls_2, controls_3) if images is not None]
    return _encoded(context, images, vae, clip, texts, beside)


def _encoded(
    context: NodeContext,
    images: Sequence[Tensor],
    vae: Sequence[Autoencoder],
    clip: Sequence[TextEncoder],
    texts: Sequence[str] | None,
    controls: Sequence[Sequence[Tensor]] = (),
) -> tuple[list[Latent], list[list[Conditioning]]]:
    """Latents of the images, and conditionings of their texts with the controls of each, through the user's cache."""
    encoder, autoencoder = with_embeddings(context, single(context, "clip", clip)), single(context, "vae", vae)
    pictures = list(images) if autoencoder.latent.time_downscale else flat_images(images)
    count = len(pictures)
    captions = one_for_each(texts or [""], count, name="texts", of="caption")
    names = [f"controls{f'_{number}' if number > 1 else ''}" for number in range(1, len(controls) + 1)]
    beside = [
        one_for_each(flat_images(some), count, name=name, of="picture")
        for name, some in zip(names, controls, strict=True)
    ]
    check_encoder(encoder)
    pixels = [pixels_from_image(context, picture, autoencoder) for picture in itertools.chain(pictures, *beside)]

    def shown(what: str) -> Callable[[int, int], None]:
        return lambda done, total: context.advance(done, total, f"{what} {done} of {total}")

    hashing = shown("hashing encoders, tensor")
    if beside and sees_pictures(encoder):
        conditionings = []
        for index, caption in enumerate(captions):
            context.advance(index, count, f"caption {index} of {count}")
            conditionings.append(prompt_with(context, encoder, caption, [some[index] for some in beside]))
    else:
        conditionings = encoded_texts(encoder, captions, progress=shown("caption"), hash_progress=hashing)
    latents = encoded_pixels(autoencoder, pixels, progress=shown("picture"), hash_progress=hashing)
    pairs = [
        conditioning.with_controls(latents[index + count :: count]) for index, conditioning in enumerate(conditionings)
    ]
    return [{"samples": latent} for latent in latents[:count]], [[pair] for pair in pairs]


@node(
    "ResolutionBucket",
    "Resolution Bucket",
    "model/training",
    outputs=_SAMPLES,
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
    for index, sample in enumerate(samples):
        buckets.setdefault(tuple(sample.shape), []).append(index)
    return (
        [{"samples": torch.cat([samples[index] for index in bucket])} for bucket in buckets.values()],
        [[prompts[index] for index in bucket] for bucket in buckets.values()],
    )


def _scanned(context: NodeContext, folder: str, config: DataConfig | None = None) -> FolderScan:
    config = config or DataConfig(follow_links=context.folders.follow_links)
    scan = scan_folder(context.folders.find_input_folder(folder), config)
    for path, reason in scan.skipped:
        context.warn(f"skipped: {path.name} {reason}")
    return scan


def _with_texts(context: NodeContext, scan: FolderScan) -> tuple[list[Tensor], list[str], list[int]]:
    """The images and their captions, repeated, and how often each is."""
    _warn_of_missing(context, scan.missing_captions, f"{len(scan.images)} images")
    for note in scan.notes:
        context.warn(note)
    captions = [image.caption if image.caption_source in ("file", "metadata") else "" for image in scan.images]
    images = _read(context, [image.path for image in scan.images], _image)
    repeats = [image.repeats for image in scan.images]
    return _repeated(images, repeats), _repeated(captions, repeats), repeats


def _warn_of_missing(context: NodeContext, missing: Sequence[Path], all_of_them: str) -> None:
    """Warn of files without a caption."""
    if missing:
        names = ", ".join(path.name for path in missing[:3])
        context.warn(
            f"{len(missing)} of {all_of_them} have no caption (such as {names}) and get an empty one; add a text file "
            "of the same name for each"
        )


def _image(path: Path) -> Tensor:
    return image_from_pixels(to_tensor(open_image(path))[None])


def _read(context: NodeContext, paths: Sequence[Path], read_one: Callable[[Path], T]) -> list[T]:
    """Each file, read separately."""
    read = []
    for done, path in enumerate(paths, start=1):
        context.raise_if_cancelled()
        read.append(read_one(path))
        context.progress(done, len(paths), text=path.name)
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
    batches = [LatentBatch(latent["samples"].cpu(), latent.get("downscale_ratio_spacial")) for latent in latents]
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
    outputs=_SAMPLES,
    search_aliases=["import dataset", "training data"],
)
def load_training_dataset(
    context: NodeContext,
    *,
    folder_name: str = socket(
        "COMBO",
        options=Folders.datasets,
        file=Folders.find_dataset,
        tooltip="Saved here or by ComfyUI, in the datasets folder.",
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
    latents = [latent_of(batch.samples, batch.downscale) for batch in samples.latents]
    return latents, [list(combined) for combined in samples.conditioning]


_VIDEO = socket("VIDEO")
_LENGTH = socket("INT", default=16, min=1, max=99999, tooltip="Frames to keep.")
_LIST = Output("VIDEO", "videos", is_list=True)
_TEXTS = Output("STRING", "texts", is_list=True)
_SEARCHED = ("load folder", "load dataset", "load videos", "import dataset")


@node("LoadVideoDataSetFromFolder", "Load Video (from Folder)", "video", outputs=[_LIST], search_aliases=_SEARCHED)
def load_video_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Video]]:
    """Find the videos of a folder, in the order of their names."""
    scan = _scanned_videos(context, folder, subfolders=False)
    return (_read(context, [video.path for video in scan.videos], open_video),)


@node(
    "LoadVideoTextDataSetFromFolder",
    "Load Video-Text (from Folder)",
    "video",
    outputs=[_LIST, _TEXTS],
    search_aliases=_SEARCHED,
)
def load_video_text_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Video], list[str]]:
    """Find the videos of a folder and their caption files, in the order of their names.

    Videos of subfolders such as `10_sks dog` are repeated that many times. A video without a caption file has an empty
    caption, with a warning.
    """
    scan = _scanned_videos(context, folder, subfolders=True)
    _warn_of_missing(
        context, [video.path for video in scan.videos if video.caption is None], f"{len(scan.videos)} videos"
    )
    videos = _read(context, [video.path for video in scan.videos], open_video)
    repeats = [video.repeats for video in scan.videos]
    return _repeated(videos, repeats), _repeated([video.caption or "" for video in scan.videos], repeats)


@node(
    "VideoFrameSample",
    "Sample Video Frame",
    "video",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["sample frames", "extract frames"],
)
def video_frame_sample(
    context: NodeContext,
    *,
    video: Video = _VIDEO,
    num_frames: int = socket("INT", default=16, min=1, max=9999, tooltip="Frames to keep."),
    strategy: str = socket(
        "COMBO",
        default="uniform",
        options=("uniform", "head", "tail", "random"),
        tooltip="Evenly spread, the first, the last, or any in their order.",
    ),
    seed: int = socket("INT", default=0, min=0, max=2**64 - 1, tooltip="Of the strategy random."),
) -> tuple[Video]:
    """Keep a number of frames of a video, all of them if it has fewer."""
    total = len(video.frames)
    count = min(num_frames, total)
    if strategy == "head":
        return (video.part(0, count),)
    if strategy == "tail":
        return (video.part(total - count, count),)
    if strategy == "random":
        return (video.only(sorted(numpy_draws(seed).choice(total, size=count, replace=False).tolist())),)
    if count == 1:
        return (video.only([total // 2]),)
    return (video.only([round(index * (total - 1) / (count - 1)) for index in range(count)]),)


@node(
    "VideoTemporalCrop",
    "Crop Video (Temporal)",
    "video/transform",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["crop", "crop video", "truncate video"],
)
def video_temporal_crop(
    context: NodeContext,
    *,
    video: Video = _VIDEO,
    start_frame: int = socket("INT", default=0, min=0, max=99999, tooltip="First frame, counted from 0."),
    length: int = _LENGTH,
) -> tuple[Video]:
    """Keep frames in a row; at the end of the video there may be fewer."""
    return (video.part(min(start_frame, len(video.frames) - 1), length),)


@node(
    "VideoRandomTemporalCrop",
    "Crop Video (Temporal Random)",
    "video/transform",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["crop", "crop video", "truncate video", "random crop"],
)
def video_random_temporal_crop(
    context: NodeContext, *, video: Video = _VIDEO, length: int = _LENGTH, seed: int = SEED
) -> tuple[Video]:
    """Keep frames in a row, from where the seed decides."""
    room = len(video.frames) - length
    return (video.part(int(numpy_draws(seed).randint(0, room + 1)) if room > 0 else 0, length),)


@node(
    "ShuffleVideoDataset",
    "Shuffle Videos List",
    "video/batch",
    outputs=[_LIST],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_videos(context: NodeContext, *, videos: list[Video] = _VIDEO, seed: list[int] = SEED) -> tuple[list[Video]]:
    """Put videos into an order that the seed decides."""
    return (shuffled(videos, single(context, "seed", seed)),)


@node(
    "ShuffleVideoTextDataset",
    "Shuffle Pairs of Video-Text",
    "dataset/video",
    outputs=[_LIST, _TEXTS],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_videos_and_texts(
    context: NodeContext,
    *,
    videos: list[Video] = _VIDEO,
    texts: list[str] = socket("STRING", multiline=False, tooltip="One per video."),
    seed: list[int] = SEED,
) -> tuple[list[Video], list[str]]:
    """Put videos and their texts into an order that the seed decides; pairs stay together."""
    chosen = single(context, "seed", seed)
    captions = one_for_each(texts, len(videos), name="texts", of="text")
    return shuffled(videos, chosen), shuffled(captions, chosen)


@node(
    "GetVideoComponents",
    "Get Video Components",
    "video",
    outputs=[
        Output("IMAGE", "images"),
        Output("AUDIO", "audio", tooltip="Always nothing: sound is not read here."),
        Output("FLOAT", "fps"),
        Output("INT", "bit_depth"),
        Output("COMBO", "color_space"),
    ],
    search_aliases=["extract frames", "split video", "video to images"],
)
def get_video_components(context: NodeContext, *, video: Video = _VIDEO) -> tuple[Tensor, None, float, int, str]:
    """Read the frames of a video as a batch of pictures."""
    check_pixels(len(video.frames), video.width, video.height)
    return read_frames(video, context.advance), None, float(video.rate), video.bit_depth, video.colour_space


def _scanned_videos(context: NodeContext, folder: str, *, subfolders: bool) -> VideoScan:
    path = context.folders.find_input_folder(folder)
    scan = scan_videos(path, subfolders=subfolders, follow_links=context.folders.follow_links)
    for note in scan.notes:
        context.warn(note)
    return scan
