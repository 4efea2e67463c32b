"""Nodes for pictures: read, scale, batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.data.image_files import image_suffixes, open_frames
from lorasmith.workflow import Input, NodeContext, Output, node

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
    scaled = [Image.fromarray(one).resize((width, height), Image.Resampling.LANCZOS) for one in bytes_]
    return torch.stack([_to_tensor(one) for one in scaled]).movedim(-1, 1)


def known_input(name: str, folders: Folders) -> str:
    """Accept every existing file, as lists only show the input folder. Raises DataError for others."""
    folders.find_input(name)
    return name


_IMAGE_FILE = Input(
    "image",
    "COMBO",
    options=lambda folders: folders.input_files(image_suffixes()),
    accept=known_input,
    extras={"image_upload": True},
    tooltip="A file in the input folder; cat.png [output] is one in the output folder.",
)


@node(
    "LoadImage",
    display_name="Load Image",
    category="image",
    inputs=[_IMAGE_FILE],
    outputs=[Output("IMAGE"), Output("MASK")],
    search_aliases=["open image", "import image", "read image"],
    fingerprint=lambda folders, image: fingerprint(folders.find_input(image)),
)
def load_image(context: NodeContext, *, image: str) -> tuple[Tensor, Tensor]:
    """Read a picture, rotated as in its EXIF data, and its transparency as a mask.

    The frames of an animation make a batch. An opaque picture has an empty mask of 64×64.
    """
    return _read(context, image)


@node(
    "LoadImageMask",
    display_name="Load Image (as Mask)",
    category="image",
    inputs=[_IMAGE_FILE, Input("channel", "COMBO", options=("alpha", *_CHANNELS), tooltip="alpha is transparency.")],
    outputs=[Output("MASK")],
    search_aliases=["import mask", "alpha mask", "channel mask"],
    fingerprint=lambda folders, image: fingerprint(folders.find_input(image)),
)
def load_image_mask(context: NodeContext, *, image: str, channel: str) -> tuple[Tensor]:
    """Read one channel of a picture as a mask."""
    pictures, transparency = _read(context, image)
    return (transparency if channel == "alpha" else pictures[..., _CHANNELS.index(channel)].contiguous(),)


@node(
    "GetImageSize",
    display_name="Get Image Size",
    category="image",
    inputs=[Input("image", "IMAGE")],
    outputs=[Output("INT", "width"), Output("INT", "height"), Output("INT", "batch_size")],
    search_aliases=["dimensions", "resolution", "image info"],
)
def get_image_size(context: NodeContext, *, image: Tensor) -> tuple[int, int, int]:
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
    return (_scaled(image, width, height, upscale_method, crop=crop == "center"),)


@node(
    "ImageScaleBy",
    display_name="Upscale Image By",
    category="image/upscaling",
    inputs=[
        Input("image", "IMAGE"),
        Input("upscale_method", "COMBO", options=_METHODS),
        Input("scale_by", "FLOAT", default=1.0, min=0.01, max=8.0, step=0.01, tooltip="Factor of both sides."),
    ],
    outputs=[Output("IMAGE")],
)
def image_scale_by(context: NodeContext, *, image: Tensor, upscale_method: str, scale_by: float) -> tuple[Tensor]:
    """Scale pictures by a factor."""
    rows, columns = (max(1, round(side * scale_by)) for side in image.shape[1:3])
    return (_scaled(image, columns, rows, upscale_method),)


@node(
    "ImageScaleToTotalPixels",
    display_name="Scale Image to Total Pixels",
    category="image/upscaling",
    inputs=[
        Input("image", "IMAGE"),
        Input("upscale_method", "COMBO", options=_METHODS),
        Input("megapixels", "FLOAT", default=1.0, min=0.01, max=16.0, step=0.01, tooltip="1 is 1024×1024 px."),
        Input("resolution_steps", "INT", default=1, min=1, max=256, tooltip="Sides are multiples of it."),
    ],
    outputs=[Output("IMAGE")],
)
def image_scale_to_total_pixels(
    context: NodeContext, *, image: Tensor, upscale_method: str, megapixels: float, resolution_steps: int
) -> tuple[Tensor]:
    """Scale pictures to a number of pixels, keeping their proportions."""
    rows, columns = image.shape[1:3]
    factor = math.sqrt(megapixels * 1024**2 / (rows * columns)) / resolution_steps
    rows, columns = (max(1, round(side * factor)) * resolution_steps for side in (rows, columns))
    return (_scaled(image, columns, rows, upscale_method),)


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
