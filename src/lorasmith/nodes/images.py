"""Nodes for pictures, and for the images of data sets: read, scale, crop, change colours, batch, shuffle, choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.image_files import image_suffixes, open_frames
from lorasmith.families.base import FAMILIES
from lorasmith.nodes.values import SEED, check_pixels, flat_images, numpy_draws, one_for_each, shuffled, single
from lorasmith.workflow import NodeContext, Output, node, socket

_CHANNELS = ("red", "green", "blue")
_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


def resized(pictures: Tensor, width: int, height: int, *, method: str, crop: bool) -> Tensor:
    """Pictures or latents (batch, channels, height, width) at another size, by a method of Upscale Image.

    `lanczos` needs values in [0, 1], as it uses 8 bits as in ComfyUI. `crop` keeps proportions instead of stretching.
    """
    if crop:
        pictures = _cropped(pictures, width / height)
    if method != "lanczos":
        return functional.interpolate(pictures, size=(height, width), mode=method)
    bytes_ = (pictures * 255).clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
    scaled = [Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS) for pixels in bytes_]
    return torch.stack([_to_tensor(picture) for picture in scaled]).movedim(-1, 1)


def known_input(name: str, folders: Folders) -> str:
    """Accept every existing file, as lists do not show other folders. Raises DataError for others."""
    folders.find_input(name)
    return name


_IMAGE_FILE = socket(
    "COMBO",
    options=lambda folders: folders.input_files(image_suffixes()),
    accept=known_input,
    file=Folders.find_input,
    extras={"image_upload": True},
    tooltip="A file in the input folder; cat.png [output] is one in the output folder.",
)


@node(
    "LoadImage",
    "Load Image",
    "image",
    outputs=["IMAGE", "MASK"],
    search_aliases=["open image", "import image", "read image"],
)
def load_image(context: NodeContext, *, image: str = _IMAGE_FILE) -> tuple[Tensor, Tensor]:
    """Read a picture, rotated as in its EXIF data, and its transparency as a mask.

    The frames of an animation make a batch. An opaque picture has an empty mask of 64×64.
    """
    return _read(context, image)


@node(
    "LoadImageMask",
    "Load Image (as Mask)",
    "image",
    outputs=["MASK"],
    search_aliases=["import mask", "alpha mask", "channel mask"],
)
def load_image_mask(
    context: NodeContext,
    *,
    image: str = _IMAGE_FILE,
    channel: str = socket("COMBO", options=("alpha", *_CHANNELS), tooltip="alpha is transparency."),
) -> tuple[Tensor]:
    """Read one channel of a picture as a mask."""
    pictures, transparency = _read(context, image)
    return (transparency if channel == "alpha" else pictures[..., _CHANNELS.index(channel)].contiguous(),)


@node(
    "ImageToMask",
    "Convert Image to Mask",
    "image/mask",
    outputs=["MASK"],
    search_aliases=["extract channel", "channel to mask"],
)
def image_to_mask(
    context: NodeContext,
    *,
    image: Tensor = socket("IMAGE"),
    channel: str = socket("COMBO", options=(*_CHANNELS, "alpha"), tooltip="Pictures have no alpha here."),
) -> tuple[Tensor]:
    """Take one channel of pictures as masks."""
    if channel == "alpha":
        raise OptionError(
            f"channel must be {' or '.join(_CHANNELS)} for a picture, which has no alpha here, got alpha; use Load "
            "Image (as Mask)"
        )
    return (image[..., _CHANNELS.index(channel)].contiguous(),)


@node(
    "GetImageSize",
    "Get Image Size",
    "image",
    outputs=[Output("INT", "width"), Output("INT", "height"), Output("INT", "batch_size")],
    search_aliases=["dimensions", "resolution", "image info"],
)
def get_image_size(context: NodeContext, *, image: Tensor = socket("IMAGE")) -> tuple[int, int, int]:
    """Width and height of pictures in pixels, and their number."""
    return image.shape[2], image.shape[1], image.shape[0]


def _read(context: NodeContext, image: str) -> tuple[Tensor, Tensor]:
    """The frames of a picture as IMAGE, and their transparency as MASK."""
    frames = open_frames(context.folders.find_input(image))
    pictures = torch.stack([_to_tensor(colours) for colours, _ in frames])
    if all(alpha is None for _, alpha in frames):
        return pictures, torch.zeros(len(frames), 64, 64)
    opaque = torch.ones(pictures.shape[1:3])
    alphas = [opaque if alpha is None else _to_tensor(alpha) for _, alpha in frames]
    return pictures, 1 - torch.stack(alphas)


@node("ImageScale", "Upscale Image", "image/upscaling", outputs=["IMAGE"], search_aliases=["resize", "scale image"])
def image_scale(
    context: NodeContext,
    *,
    image: Tensor = socket("IMAGE"),
    upscale_method: str = socket("COMBO", options=_METHODS),
    width: int = socket("INT", default=512, min=0, max=16384, step=1, tooltip="In pixels; 0 keeps the proportions."),
    height: int = socket("INT", default=512, min=0, max=16384, step=1, tooltip="In pixels; 0 keeps the proportions."),
    crop: str = socket("COMBO", options=("disabled", "center"), tooltip="Crop the edges instead of stretching."),
) -> tuple[Tensor]:
    """Scale pictures to a size."""
    if width == height == 0:
        return (image,)
    rows, columns = image.shape[1:3]
    width = width or max(1, round(columns * height / rows))
    height = height or max(1, round(rows * width / columns))
    return (_scaled(image, width, height, upscale_method, crop=crop == "center"),)


@node("ImageScaleBy", "Upscale Image By", "image/upscaling", outputs=["IMAGE"])
def image_scale_by(
    context: NodeContext,
    *,
    image: Tensor = socket("IMAGE"),
    upscale_method: str = socket("COMBO", options=_METHODS),
    scale_by: float = socket("FLOAT", default=1.0, min=0.01, max=8.0, step=0.01, tooltip="Factor of both sides."),
) -> tuple[Tensor]:
    """Scale pictures by a factor."""
    rows, columns = (max(1, round(side * scale_by)) for side in image.shape[1:3])
    return (_scaled(image, columns, rows, upscale_method),)


@node("ImageScaleToTotalPixels", "Scale Image to Total Pixels", "image/upscaling", outputs=["IMAGE"])
def image_scale_to_total_pixels(
    context: NodeContext,
    *,
    image: Tensor = socket("IMAGE"),
    upscale_method: str = socket("COMBO", options=_METHODS),
    megapixels: float = socket("FLOAT", default=1.0, min=0.01, max=16.0, step=0.01, tooltip="1 is 1024×1024 px."),
    resolution_steps: int = socket("INT", default=1, min=1, max=256, tooltip="Sides are multiples of it."),
) -> tuple[Tensor]:
    """Scale pictures to a number of pixels, keeping their proportions."""
    rows, columns = image.shape[1:3]
    factor = math.sqrt(megapixels * 1024**2 / (rows * columns)) / resolution_steps
    rows, columns = (max(1, round(side * factor)) * resolution_steps for side in (rows, columns))
    return (_scaled(image, columns, rows, upscale_method),)


@node("FluxKontextImageScale", "FluxKontextImageScale", "model/conditioning/flux", outputs=["IMAGE"])
def flux_kontext_image_scale(context: NodeContext, *, image: Tensor = socket("IMAGE")) -> tuple[Tensor]:
    """Scale pictures to the size of the nearest proportions that Flux.1 Kontext knows, and crop their edges."""
    (form,) = FAMILIES["flux1"].controls
    rows, columns = image.shape[1:3]
    return (_scaled(image, *form.size(columns, rows), "lanczos", crop=True),)


@node("ImageBatch", "Batch Images (DEPRECATED)", "image/batch", outputs=["IMAGE"], deprecated=True)
def image_batch(
    context: NodeContext, *, image1: Tensor = socket("IMAGE"), image2: Tensor = socket("IMAGE")
) -> tuple[Tensor]:
    """Join two batches of pictures; the second is scaled and cropped to the size of the first."""
    if image1.shape[1:] != image2.shape[1:]:
        height, width = image1.shape[1:3]
        image2 = resized(image2.movedim(-1, 1), width, height, method="bilinear", crop=True).movedim(1, -1)
    return (torch.cat((image1, image2)),)


def _scaled(image: Tensor, width: int, height: int, method: str, *, crop: bool = False) -> Tensor:
    return resized(image.movedim(-1, 1), width, height, method=method, crop=crop).movedim(1, -1).contiguous()


def _cropped(pictures: Tensor, aspect: float) -> Tensor:
    """The centre crop of an aspect ratio, in whole pixels, equal on both sides."""
    height, width = pictures.shape[-2:]
    x = max(0, round((width - height * aspect) / 2))
    y = max(0, round((height - width / aspect) / 2))
    return pictures[..., y : height - y, x : width - x]


def _to_tensor(image: Image.Image) -> Tensor:
    """A picture as fp32 (height, width[, 3]) in [0, 1]."""
    return torch.from_numpy(np.array(image)).to(torch.float32) / 255


_IMAGES = socket("IMAGE")
_OUTPUT = Output("IMAGE", "images")
_LIST = Output("IMAGE", "images", is_list=True)
_CROPPED_SIDE = socket("INT", default=512, min=1, max=8192, tooltip="In pixels; smaller images stay.")
_CELL_SIDE = socket("INT", default=256, min=32, max=2048, tooltip="In pixels; images are stretched to it.")
_LUMA = (19595, 38470, 7471)  # weights of red, green and blue in grey, in units of 2⁻¹⁶, as in Pillow


def _edge(default: int) -> Any:
    return socket("INT", default=default, min=1, max=8192, tooltip="In pixels; proportions are kept.")


@node(
    "ResizeImagesByShorterEdge",
    "Resize Images by Shorter Edge (DEPRECATED)",
    "image/transform",
    outputs=[_OUTPUT],
    deprecated=True,
)
def resize_by_shorter_edge(
    context: NodeContext, *, images: Tensor = _IMAGES, shorter_edge: int = _edge(512)
) -> tuple[Tensor]:
    """Scale images so that their shorter edge has a length."""
    return (_with_edge(images, shorter_edge, min),)


@node(
    "ResizeImagesByLongerEdge",
    "Resize Images by Longer Edge (DEPRECATED)",
    "image/transform",
    outputs=[_OUTPUT],
    deprecated=True,
)
def resize_by_longer_edge(
    context: NodeContext, *, images: Tensor = _IMAGES, longer_edge: int = _edge(1024)
) -> tuple[Tensor]:
    """Scale images so that their longer edge has a length."""
    return (_with_edge(images, longer_edge, max),)


@node(
    "CenterCropImages",
    "Crop Image (Center)",
    "image/transform",
    outputs=[_OUTPUT],
    search_aliases=["crop", "cut", "trim"],
)
def center_crop(
    context: NodeContext, *, images: Tensor = _IMAGES, width: int = _CROPPED_SIDE, height: int = _CROPPED_SIDE
) -> tuple[Tensor]:
    """Cut the middle out of images."""
    rows, columns = images.shape[1:3]
    return (_cut(images, max(0, (columns - width) // 2), max(0, (rows - height) // 2), width, height),)


@node(
    "RandomCropImages",
    "Crop Image (Random)",
    "image/transform",
    outputs=[_OUTPUT],
    search_aliases=["crop", "cut", "trim"],
)
def random_crop(
    context: NodeContext,
    *,
    images: Tensor = _IMAGES,
    width: int = _CROPPED_SIDE,
    height: int = _CROPPED_SIDE,
    seed: int = SEED,
) -> tuple[Tensor]:
    """Cut a part out of images, in a place that the seed decides: for one size of images the same place in each."""
    rows, columns = images.shape[1:3]
    draws = numpy_draws(seed)
    left, top = (
        int(draws.randint(0, room + 1)) if room > 0 else 0  # ComfyUI draws nothing where there is no choice
        for room in (columns - width, rows - height)
    )
    return (_cut(images, left, top, width, height),)


@node(
    "NormalizeImages",
    "Normalize Image Colors",
    "image/color",
    outputs=[_OUTPUT],
    search_aliases=["normalize", "normalize colors"],
)
def normalize_images(
    context: NodeContext,
    *,
    images: Tensor = _IMAGES,
    mean: float = socket("FLOAT", default=0.5, min=0.0, max=1.0, tooltip="It is subtracted first."),
    std: float = socket("FLOAT", default=0.5, min=0.001, max=1.0, tooltip="The difference is divided by it."),
) -> tuple[Tensor]:
    """Subtract a mean and divide by a standard deviation; the values may leave the range of pictures."""
    return ((images - mean) / std,)


def _factor(what: str) -> Any:
    return socket("FLOAT", default=1.0, min=0.0, max=2.0, tooltip=f"Of the {what}; 1 changes nothing.")


@node("AdjustBrightness", "Adjust Brightness", "image/adjustments", outputs=[_OUTPUT], search_aliases=["brightness"])
def adjust_brightness(
    context: NodeContext, *, images: Tensor = _IMAGES, factor: float = _factor("brightness")
) -> tuple[Tensor]:
    """Make images brighter or darker."""
    return ((images * factor).clamp(0, 1),)


@node("AdjustContrast", "Adjust Contrast", "image/adjustments", outputs=[_OUTPUT], search_aliases=["contrast"])
def adjust_contrast(
    context: NodeContext, *, images: Tensor = _IMAGES, factor: float = _factor("distance from middle grey")
) -> tuple[Tensor]:
    """Raise or lower the contrast of images."""
    return (((images - 0.5) * factor + 0.5).clamp(0, 1),)


@node(
    "ShuffleDataset",
    "Shuffle Images List",
    "image/batch",
    outputs=[_LIST],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_images(
    context: NodeContext, *, images: list[Tensor] = _IMAGES, seed: list[int] = SEED
) -> tuple[list[Tensor]]:
    """Put images into an order that the seed decides."""
    return (shuffled(flat_images(images), single(context, "seed", seed)),)


@node(
    "ShuffleImageTextDataset",
    "Shuffle Pairs of Image-Text",
    "image/batch",
    outputs=[_LIST, Output("STRING", "texts", is_list=True)],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_images_and_texts(
    context: NodeContext,
    *,
    images: list[Tensor] = _IMAGES,
    texts: list[str] = socket("STRING", force_input=True, multiline=False, tooltip="One per image."),
    seed: list[int] = SEED,
) -> tuple[list[Tensor], list[str]]:
    """Put images and their texts into an order that the seed decides; pairs stay together."""
    pictures, chosen = flat_images(images), single(context, "seed", seed)
    captions = one_for_each(texts, len(pictures), name="texts", of="text")
    return shuffled(pictures, chosen), shuffled(captions, chosen)


@node(
    "ImageDeduplication",
    "Deduplicate Images",
    "image/batch",
    outputs=[_LIST],
    search_aliases=["deduplicate", "remove duplicates", "similarity filter"],
    is_input_list=True,
)
def deduplicate_images(
    context: NodeContext,
    *,
    images: list[Tensor] = _IMAGES,
    similarity_threshold: list[float] = socket(
        "FLOAT",
        default=0.95,
        min=0.0,
        max=1.0,
        tooltip="Share of equal bits from which two images count as the same; 1 keeps more images than 0.",
    ),
) -> tuple[list[Tensor]]:
    """Keep the first of images that look alike: at 8×8 pixels, the same ones are brighter than the average."""
    threshold = single(context, "similarity_threshold", similarity_threshold)
    pictures = flat_images(images)
    seen = torch.empty(len(pictures), 64)
    kept: list[Tensor] = []
    for done, picture in enumerate(pictures, start=1):
        context.raise_if_cancelled()
        signs = _brighter_places(picture)
        different = (64 - seen[: len(kept)] @ signs) / 2
        if not (1 - different / 64 >= threshold).any():
            seen[len(kept)] = signs
            kept.append(picture)
        context.progress(done, len(pictures))
    context.log(f"{len(kept)} of {len(pictures)} images are kept.")
    return (kept,)


@node(
    "ImageGrid",
    "Make Image Grid",
    "image/batch",
    outputs=[_OUTPUT],
    search_aliases=["grid", "collage", "combine"],
    is_input_list=True,
)
def image_grid(
    context: NodeContext,
    *,
    images: list[Tensor] = _IMAGES,
    columns: list[int] = socket("INT", default=4, min=1, max=20, tooltip="Images beside each other."),
    cell_width: list[int] = _CELL_SIDE,
    cell_height: list[int] = _CELL_SIDE,
    padding: list[int] = socket("INT", default=4, min=0, max=50, tooltip="Black pixels between images."),
) -> tuple[Tensor]:
    """Put images into one picture, row by row."""
    across = single(context, "columns", columns)
    width, height = single(context, "cell_width", cell_width), single(context, "cell_height", cell_height)
    gap = single(context, "padding", padding)
    pictures = flat_images(images)
    if not pictures:
        raise DataError("images must be at least one, got an empty list; check the node it is linked to")
    rows = -(-len(pictures) // across)
    whole_width, whole_height = across * (width + gap) - gap, rows * (height + gap) - gap
    check_pixels(1, whole_width, whole_height)
    grid = torch.zeros(1, whole_height, whole_width, 3)
    for index, picture in enumerate(pictures):
        context.raise_if_cancelled()
        top, left = index // across * (height + gap), index % across * (width + gap)
        grid[:, top : top + height, left : left + width] = _scaled(picture, width, height, "lanczos")
    return (grid,)


@node(
    "MergeImageLists",
    "Merge Image Lists (DEPRECATED)",
    "image/batch",
    outputs=[_LIST],
    search_aliases=["list", "merge list", "make list"],
    is_input_list=True,
    deprecated=True,
)
def merge_image_lists(context: NodeContext, *, images: list[Tensor] = _IMAGES) -> tuple[list[Tensor]]:
    """A list of images as single ones; Create List joins several lists."""
    return (flat_images(images),)


def _with_edge(images: Tensor, edge: int, which: Callable[[int, int], int]) -> Tensor:
    """IMAGE scaled to a shorter or longer edge; the other edge is rounded down, as in ComfyUI."""
    count, rows, columns, _ = images.shape
    factor = edge / which(columns, rows)
    # The edge itself is not computed, which could round it down.
    width, height = (edge if side == which(columns, rows) else max(1, int(side * factor)) for side in (columns, rows))
    check_pixels(count, width, height)
    return _scaled(images, width, height, "lanczos")


def _cut(images: Tensor, left: int, top: int, width: int, height: int) -> Tensor:
    return images[:, top : top + height, left : left + width].contiguous()


def _brighter_places(picture: Tensor) -> Tensor:
    """64 signs of an image (1, height, width, 3): 1 where the image at 8×8 px is brighter than its mean, else −1."""
    small = (_scaled(picture, 8, 8, "lanczos") * 255).round().long()
    # In integers as in Pillow, so that the bits are ComfyUI's.
    grey = (small @ torch.tensor(_LUMA) + 2**15) // 2**16
    return torch.where(grey.flatten() * 64 > grey.sum(), 1.0, -1.0)
