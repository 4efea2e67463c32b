"""Nodes for pictures: read, scale, batch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.data.image_files import image_suffixes, open_frames
from lorasmith.workflow import Input, NodeContext, Output, node

__all__ = ["known_input", "resized"]

_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


def resized(pictures: Tensor, width: int, height: int, *, method: str, crop: bool) -> Tensor:
    """Pictures or latents (batch, channels, height, width) at another size.

    Args:
        pictures: values in [0, 1] for `lanczos`, which goes through 8 bits as in ComfyUI; any values otherwise.
        width, height: of the result.
        method: a method of Upscale Image.
        crop: crop the edges to keep the proportions, instead of stretching.
    """
    if crop:
        pictures = _cropped(pictures, width / height)
    if method != "lanczos":
        return functional.interpolate(pictures, size=(height, width), mode=method)
    bytes_ = (pictures * 255).clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
    scaled = [Image.fromarray(one).resize((width, height), Image.Resampling.LANCZOS) for one in bytes_]
    return torch.stack([_to_tensor(one) for one in scaled]).movedim(-1, 1)


def known_input(name: str, folders: Folders) -> str:
    """Accept every existing file, as lists only show the input folder. Raises DataError for others."""
    folders.find_input(name)
    return name


@node(
    "LoadImage",
    display_name="Load Image",
    category="image",
    inputs=[
        Input(
            "image",
            "COMBO",
            options=lambda folders: folders.input_files(image_suffixes()),
            accept=known_input,
            extras={"image_upload": True},
            tooltip="A file in the input folder; cat.png [output] is one in the output folder.",
        )
    ],
    outputs=[Output("IMAGE"), Output("MASK")],
    search_aliases=["open image", "import image", "read image"],
    fingerprint=lambda folders, image: fingerprint(folders.find_input(image)),
)
def load_image(context: NodeContext, *, image: str) -> tuple[Tensor, Tensor]:
    """Read a picture, rotated as in its EXIF data, and its transparency as a mask.

    The frames of an animation make a batch. An opaque picture has an empty mask of 64×64.
    """
    frames = open_frames(context.folders.find_input(image))
    pictures = torch.stack([_to_tensor(colours) for colours, _ in frames])
    if all(alpha is None for _, alpha in frames):
        return pictures, torch.zeros(len(frames), 64, 64)
    opaque = torch.ones(pictures.shape[1:3])
    alphas = [opaque if alpha is None else _to_tensor(alpha) for _, alpha in frames]
    return pictures, 1 - torch.stack(alphas)


@node(
    "ImageScale",
    display_name="Upscale Image",
    category="image/upscaling",
    inputs=[
        Input("image", "IMAGE"),
        Input("upscale_method", "COMBO", options=_METHODS),
        Input("width", "INT", default=512, min=0, max=16384, step=1, tooltip="In pixels; 0 keeps the proportions."),
        Input("height", "INT", default=512, min=0, max=16384, step=1, tooltip="In pixels; 0 keeps the proportions."),
        Input("crop", "COMBO", options=("disabled", "center"), tooltip="Crop the edges instead of stretching."),
    ],
    outputs=[Output("IMAGE")],
    search_aliases=["resize", "scale image"],
)
def image_scale(
    context: NodeContext, *, image: Tensor, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Tensor]:
    """Scale pictures to a size."""
    if width == height == 0:
        return (image,)
    rows, columns = image.shape[1:3]
    width = width or max(1, round(columns * height / rows))
    height = height or max(1, round(rows * width / columns))
    scaled = resized(image.movedim(-1, 1), width, height, method=upscale_method, crop=crop == "center")
    return (scaled.movedim(1, -1).contiguous(),)


@node(
    "ImageBatch",
    display_name="Batch Images (DEPRECATED)",
    category="image/batch",
    inputs=[Input("image1", "IMAGE"), Input("image2", "IMAGE")],
    outputs=[Output("IMAGE")],
    deprecated=True,
)
def image_batch(context: NodeContext, *, image1: Tensor, image2: Tensor) -> tuple[Tensor]:
    """Join two batches of pictures; the second is scaled and cropped to the size of the first."""
    if image1.shape[1:] != image2.shape[1:]:
        height, width = image1.shape[1:3]
        image2 = resized(image2.movedim(-1, 1), width, height, method="bilinear", crop=True).movedim(1, -1)
    return (torch.cat((image1, image2)),)


def _cropped(pictures: Tensor, aspect: float) -> Tensor:
    """The centre crop of an aspect ratio, in whole pixels, equal on both sides."""
    height, width = pictures.shape[-2:]
    x = max(0, round((width - height * aspect) / 2))
    y = max(0, round((height - width / aspect) / 2))
    return pictures[..., y : height - y, x : width - x]


def _to_tensor(image: Image.Image) -> Tensor:
    """A picture as fp32 (height, width[, 3]) in [0, 1]."""
    return torch.from_numpy(np.array(image)).to(torch.float32) / 255
