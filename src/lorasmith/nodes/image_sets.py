"""Nodes for the images of data sets: scale, crop, change colours, shuffle, choose, show as a grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.nodes.images import resized
from lorasmith.nodes.values import check_pixels, flat_images, numpy_draws, one_for_each, shuffled, single
from lorasmith.workflow import Input, NodeContext, Output, node

_IMAGES = Input("images", "IMAGE")
_OUTPUT = Output("IMAGE", "images")
_LIST = Output("IMAGE", "images", is_list=True)
_SEED = Input("seed", "INT", default=0, min=0, max=2**64 - 1, tooltip="The same seed gives the same result.")
_LUMA = (19595, 38470, 7471)  # weights of red, green and blue in grey, in units of 2⁻¹⁶, as in Pillow


def _edge(name: str, default: int) -> Input:
    return Input(name, "INT", default=default, min=1, max=8192, tooltip="In pixels; proportions are kept.")


def _crop_size() -> list[Input]:
    return [
        Input(name, "INT", default=512, min=1, max=8192, tooltip="In pixels; smaller images stay.")
        for name in ("width", "height")
    ]


@node(
    "ResizeImagesByShorterEdge",
    display_name="Resize Images by Shorter Edge (DEPRECATED)",
    category="image/transform",
    inputs=[_IMAGES, _edge("shorter_edge", 512)],
    outputs=[_OUTPUT],
    deprecated=True,
)
def resize_by_shorter_edge(context: NodeContext, *, images: Tensor, shorter_edge: int) -> tuple[Tensor]:
    """Scale images so that their shorter edge has a length."""
    return (_with_edge(images, shorter_edge, min),)


@node(
    "ResizeImagesByLongerEdge",
    display_name="Resize Images by Longer Edge (DEPRECATED)",
    category="image/transform",
    inputs=[_IMAGES, _edge("longer_edge", 1024)],
    outputs=[_OUTPUT],
    deprecated=True,
)
def resize_by_longer_edge(context: NodeContext, *, images: Tensor, longer_edge: int) -> tuple[Tensor]:
    """Scale images so that their longer edge has a length."""
    return (_with_edge(images, longer_edge, max),)


@node(
    "CenterCropImages",
    display_name="Crop Image (Center)",
    category="image/transform",
    inputs=[_IMAGES, *_crop_size()],
    outputs=[_OUTPUT],
    search_aliases=["crop", "cut", "trim"],
)
def center_crop(context: NodeContext, *, images: Tensor, width: int, height: int) -> tuple[Tensor]:
    """Cut the middle out of images."""
    rows, columns = images.shape[1:3]
    return (_cut(images, max(0, (columns - width) // 2), max(0, (rows - height) // 2), width, height),)


@node(
    "RandomCropImages",
    display_name="Crop Image (Random)",
    category="image/transform",
    inputs=[_IMAGES, *_crop_size(), _SEED],
    outputs=[_OUTPUT],
    search_aliases=["crop", "cut", "trim"],
)
def random_crop(context: NodeContext, *, images: Tensor, width: int, height: int, seed: int) -> tuple[Tensor]:
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
    display_name="Normalize Image Colors",
    category="image/color",
    inputs=[
        _IMAGES,
        Input("mean", "FLOAT", default=0.5, min=0.0, max=1.0, tooltip="It is subtracted first."),
        Input("std", "FLOAT", default=0.5, min=0.001, max=1.0, tooltip="The difference is divided by it."),
    ],
    outputs=[_OUTPUT],
    search_aliases=["normalize", "normalize colors"],
)
def normalize_images(context: NodeContext, *, images: Tensor, mean: float, std: float) -> tuple[Tensor]:
    """Subtract a mean and divide by a standard deviation; the values may leave the range of pictures."""
    return ((images - mean) / std,)


def _factor(what: str) -> Input:
    return Input("factor", "FLOAT", default=1.0, min=0.0, max=2.0, tooltip=f"Of the {what}; 1 changes nothing.")


@node(
    "AdjustBrightness",
    display_name="Adjust Brightness",
    category="image/adjustments",
    inputs=[_IMAGES, _factor("brightness")],
    outputs=[_OUTPUT],
    search_aliases=["brightness"],
)
def adjust_brightness(context: NodeContext, *, images: Tensor, factor: float) -> tuple[Tensor]:
    """Make images brighter or darker."""
    return ((images * factor).clamp(0, 1),)


@node(
    "AdjustContrast",
    display_name="Adjust Contrast",
    category="image/adjustments",
    inputs=[_IMAGES, _factor("distance from middle grey")],
    outputs=[_OUTPUT],
    search_aliases=["contrast"],
)
def adjust_contrast(context: NodeContext, *, images: Tensor, factor: float) -> tuple[Tensor]:
    """Raise or lower the contrast of images."""
    return (((images - 0.5) * factor + 0.5).clamp(0, 1),)


@node(
    "ShuffleDataset",
    display_name="Shuffle Images List",
    category="image/batch",
    inputs=[_IMAGES, _SEED],
    outputs=[_LIST],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_images(context: NodeContext, *, images: list[Tensor], seed: list[int]) -> tuple[list[Tensor]]:
    """Put images into an order that the seed decides."""
    return (shuffled(flat_images(images), single(context, "seed", seed)),)


@node(
    "ShuffleImageTextDataset",
    display_name="Shuffle Pairs of Image-Text",
    category="image/batch",
    inputs=[_IMAGES, Input("texts", "STRING", force_input=True, multiline=False, tooltip="One per image."), _SEED],
    outputs=[_LIST, Output("STRING", "texts", is_list=True)],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_images_and_texts(
    context: NodeContext, *, images: list[Tensor], texts: list[str], seed: list[int]
) -> tuple[list[Tensor], list[str]]:
    """Put images and their texts into an order that the seed decides; pairs stay together."""
    pictures, chosen = flat_images(images), single(context, "seed", seed)
    captions = one_for_each(texts, len(pictures), name="texts", of="text")
    return shuffled(pictures, chosen), shuffled(captions, chosen)


@node(
    "ImageDeduplication",
    display_name="Deduplicate Images",
    category="image/batch",
    inputs=[
        _IMAGES,
        Input(
            "similarity_threshold",
            "FLOAT",
            default=0.95,
            min=0.0,
            max=1.0,
            tooltip="Share of equal bits from which two images count as the same; 1 keeps more images than 0.",
        ),
    ],
    outputs=[_LIST],
    search_aliases=["deduplicate", "remove duplicates", "similarity filter"],
    is_input_list=True,
)
def deduplicate_images(
    context: NodeContext, *, images: list[Tensor], similarity_threshold: list[float]
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
    display_name="Make Image Grid",
    category="image/batch",
    inputs=[
        _IMAGES,
        Input("columns", "INT", default=4, min=1, max=20, tooltip="Images beside each other."),
        Input("cell_width", "INT", default=256, min=32, max=2048, tooltip="In pixels; images are stretched to it."),
        Input("cell_height", "INT", default=256, min=32, max=2048, tooltip="In pixels; images are stretched to it."),
        Input("padding", "INT", default=4, min=0, max=50, tooltip="Black pixels between images."),
    ],
    outputs=[_OUTPUT],
    search_aliases=["grid", "collage", "combine"],
    is_input_list=True,
)
def image_grid(context: NodeContext, *, images: list[Tensor], **settings: list[int]) -> tuple[Tensor]:
    """Put images into one picture, row by row."""
    columns, width, height, padding = (single(context, name, given) for name, given in settings.items())
    pictures = flat_images(images)
    if not pictures:
        raise DataError("images must be at least one, got an empty list; check the node it is linked to")
    rows = -(-len(pictures) // columns)
    whole_width, whole_height = columns * (width + padding) - padding, rows * (height + padding) - padding
    check_pixels(1, whole_width, whole_height)
    grid = torch.zeros(1, whole_height, whole_width, 3)
    for index, picture in enumerate(pictures):
        context.raise_if_cancelled()
        top, left = index // columns * (height + padding), index % columns * (width + padding)
        grid[:, top : top + height, left : left + width] = _scaled(picture, width, height)
    return (grid,)


@node(
    "MergeImageLists",
    display_name="Merge Image Lists (DEPRECATED)",
    category="image/batch",
    inputs=[_IMAGES],
    outputs=[_LIST],
    search_aliases=["list", "merge list", "make list"],
    is_input_list=True,
    deprecated=True,
)
def merge_image_lists(context: NodeContext, *, images: list[Tensor]) -> tuple[list[Tensor]]:
    """A list of images as single ones; Create List joins several lists."""
    return (flat_images(images),)


def _with_edge(images: Tensor, edge: int, which: Callable[[int, int], int]) -> Tensor:
    """IMAGE scaled to a shorter or longer edge; the other edge is rounded down, as in ComfyUI."""
    count, rows, columns, _ = images.shape
    factor = edge / which(columns, rows)
    # The edge itself is not computed, which could round it down.
    width, height = (edge if side == which(columns, rows) else max(1, int(side * factor)) for side in (columns, rows))
    check_pixels(count, width, height)
    return _scaled(images, width, height)


def _scaled(images: Tensor, width: int, height: int) -> Tensor:
    return resized(images.movedim(-1, 1), width, height, method="lanczos", crop=False).movedim(1, -1).contiguous()


def _cut(images: Tensor, left: int, top: int, width: int, height: int) -> Tensor:
    return images[:, top : top + height, left : left + width].contiguous()


def _brighter_places(picture: Tensor) -> Tensor:
    """64 signs of an image (1, height, width, 3): 1 where the image at 8×8 px is brighter than its mean, else −1."""
    small = (_scaled(picture, 8, 8) * 255).round().long()
    # In integers as in Pillow, so that the bits are ComfyUI's.
    grey = (small @ torch.tensor(_LUMA) + 2**15) // 2**16
    return torch.where(grey.flatten() * 64 > grey.sum(), 1.0, -1.0)
