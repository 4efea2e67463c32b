"""Reading image files as upright RGB pictures, and pictures as tensors. Pillow's errors become `ImageError`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageSequence, UnidentifiedImageError
from torch import Tensor

from lorasmith.core.cancellation import check_wanted
from lorasmith.core.errors import DataError
from lorasmith.core.files import open_regular
from lorasmith.formats.metadata import sha256_file

S = TypeVar("S")
T = TypeVar("T")


class ImageError(DataError):
    """One image file cannot be used; `reason` is the message without the file name, for lists."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class ImageHeader:
    """A picture's format and mode, from the file's header."""

    format: str  # Pillow's name
    suffixes: tuple[str, ...]  # the preferred one first; empty for a format that training does not read
    mode: str  # Pillow's name of the pixel format
    is_upright: bool  # stored as it is shown
    is_animated: bool = False  # first of several in the file


def image_suffixes() -> frozenset[str]:
    """File suffixes that `open_image` reads, in lower case with their dot."""
    return frozenset(suffix for name in _readable_formats() for suffix in _FORMATS[name])


def open_image(path: Path) -> Image.Image:
    """The picture in a file: rotated as in its EXIF data, transparency on white, 8-bit RGB.

    Of an animation, the first frame. 16-bit, 32-bit and floating-point greys are scaled to 8 bits. The format is
    recognised by the content, not by the file's name. ImageError if the file is missing, empty, damaged, not an image,
    a single pixel, or too large.
    """
    return open_layers(path)[0]


def open_layers(
    path: Path, content: bytes | None = None, *, scale: float = 1.0
) -> tuple[Image.Image, Image.Image | None]:
    """The picture in a file as by `open_image`, and its opacity in mode L, None where it is opaque.

    `content` are the file's bytes, if already read. `scale` is that at which the picture is needed: a JPEG file is
    decoded at a half, a quarter or an eighth of its size where that is at least three times as large as needed, which
    takes less time and is not visible. Raises ImageError.
    """
    with _opened(path, content) as image:
        if image.format == "JPEG" and scale < 1:
            image.draft(None, (math.ceil(_GAP * scale * image.width), math.ceil(_GAP * scale * image.height)))
        image.load()
        picture = _eight_bits(_upright(image))
        if not picture.has_transparency_data:
            return picture.convert("RGB"), None
        return _on_white(picture), picture.convert("RGBA").getchannel("A")


def open_mask(path: Path) -> Image.Image:
    """The mask in a file in mode L, white inside; what is transparent is outside. Raises ImageError."""
    grey, opacity = open_layers(path)
    mask = grey.convert("L")
    return mask if opacity is None else ImageChops.multiply(mask, opacity)


def open_reduced(path: Path, longest: int, *, grey: bool = False) -> Image.Image:
    """The picture of `open_image`, reduced to at most `longest` px; in mode L if `grey`. Raises ImageError.

    JPEG files are decoded at a fraction of their size where that suffices, which is several times faster.
    """
    with _opened(path) as image, one_at_a_time(image.size):
        if image.format == "JPEG":
            factor = min(1.0, longest / max(image.size))
            image.draft("L" if grey else "RGB", (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        image.load()
        picture = _eight_bits(image)
        colours = "L" if grey else "RGB"
        picture = picture.convert("RGBA" if picture.has_transparency_data else colours)
        picture.thumbnail((longest, longest), Image.Resampling.HAMMING, reducing_gap=2.0)
        picture = _turned(picture, _orientation(image))
        return _on_white(picture).convert(colours) if picture.mode == "RGBA" else picture


def open_frames(path: Path) -> list[tuple[Image.Image, Image.Image | None]]:
    """The frames of a file (one, unless it is animated), upright, as RGB and alpha (mode L, None where opaque).

    Colours are those under the transparency, for separate use of both. Frames of another size than the first are
    skipped. Raises ImageError.
    """
    frames: list[tuple[Image.Image, Image.Image | None]] = []
    with _opened(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            picture = _eight_bits(_upright(frame))
            alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
            if not frames or picture.size == frames[0][0].size:
                frames.append((picture.convert("RGB"), alpha))
    return frames


def open_animation(path: Path, content: bytes | None = None) -> Iterator[tuple[Image.Image, float]]:
    """Frames of a file one after the other, as by `open_image`, with the milliseconds each is shown."""
    with _opened(path, content) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            picture = _eight_bits(_upright(frame))
            shown = float(frame.info.get("duration") or _SHOWN)
            yield _on_white(picture) if picture.has_transparency_data else picture.convert("RGB"), shown


def read_image(path: Path) -> bytes:
    """The content of an image file. Raises ImageError if it cannot be read."""
    with _file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError(path, f"cannot be read ({error.strerror}); replace or remove it") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises ImageError if it cannot be read, or has more than 1 GiB."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ImageError(path, "has more than 1 GiB; scale it down first")
        return sha256_file(path)
    except FileNotFoundError:
        raise ImageError(path, "does not exist; check the name") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror}); replace or remove it") from None


MAX_ASPECT = 8  # longer to shorter edge of what is trained on; beyond that a crop or bucket keeps too little


def image_size(path: Path, *, any_format: bool = False) -> tuple[int, int]:
    """Width and height of the upright picture, after reading the whole file. Raises ImageError.

    JPEG files are decoded at an eighth of their size, which still reads every byte and is much faster. What is longer
    than `MAX_ASPECT`, and so refused, is not decoded: a small file may announce sides of millions of pixels.
    """
    with _opened(path, any_format=any_format) as image:
        width, height = image.size
        if image.format == "JPEG":
            image.draft("RGB", (1, 1))
        if max(width, height) > MAX_ASPECT * min(width, height):
            return width, height
        with one_at_a_time(image.size):
            image.load()
        # Read after loading: for TIFF, Pillow has then rotated size and pixels itself, and removed the entry.
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def header_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture, from the file's header. Raises ImageError."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def image_header(path: Path, *, any_format: bool = False) -> ImageHeader:
    """The picture's header, without decoding the picture. Raises ImageError."""
    with _opened(path, any_format=any_format) as image:
        known = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG file with a second picture, of phones
        is_animated = known != "JPEG" and getattr(image, "n_frames", 1) > 1
        return ImageHeader(known, _FORMATS.get(known, ()), image.mode, _orientation(image) == 1, is_animated)


def open_original(path: Path, *, any_format: bool = False) -> tuple[Image.Image, bytes | None]:
    """The picture to be saved again, upright, RGB (RGBA if transparent), and its colour profile. Raises ImageError.

    `any_format` also reads formats that training does not, such as TGA or JPEG 2000.
    """
    with _opened(path, any_format=any_format) as image:
        image.load()
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        return upright_original(image), profile


def upright_original(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright, as 8-bit RGB, or RGBA if it is transparent."""
    picture = _eight_bits(_upright(image))
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def in_threads(function: Callable[[S], T], items: Sequence[S], *, most: int) -> Iterator[T]:
    """`function` of each item in order, in at most `most` threads: Pillow decodes without the GIL.

    Few items are submitted ahead, so that an interrupted call ends soon. Raises CancelledError, as `check_wanted`.
    """
    image_suffixes()  # Pillow's readers are registered before several threads ask for them
    threads = max(1, min(most, os.cpu_count() or 1))
    # Each file is opened with warnings off, which is not safe in threads: so they are off around all of them.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(threads, "read images") as pool:
        for start in range(0, len(items), 64 * threads):
            for result in pool.map(function, items[start : start + 64 * threads]):
                check_wanted()
                yield result


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as fp32 (3, height, width), black at −1 and white at 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32) / 127.5 - 1


_LARGE_PIXELS = 2**24
_LARGE = threading.Lock()
"""Held while a large picture is read, so that threads do not keep several in memory."""


def one_at_a_time(size: tuple[int, int]) -> contextlib.AbstractContextManager[object]:
    """A lock for reading a large picture; no lock for a small `size`."""
    return _LARGE if math.prod(size) > _LARGE_PIXELS else contextlib.nullcontext()


_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    # Supported by newer versions of Pillow, or with a registered plug-in.
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}

_CONVERTED = ("JPEG2000", "TGA", "PSD", "PPM", "PCX", "QOI", "DDS", "SGI", "ICO")
"""Formats read for conversion only; none of their readers starts another program."""

_MOST_BYTES = 2**30

_SHOWN = 100  # milliseconds that browsers show a frame without a duration

_GAP = 3  # a JPEG file is decoded at least at this multiple of the size needed

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# Exceptions of Pillow's readers for damaged files or unsupported modes: their own, those of decoders, and of parsers.
_DAMAGE = (OSError, SyntaxError, RuntimeError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def _readable_formats() -> list[str]:
    Image.init()
    _register_heif()
    return [name for name in _FORMATS if name in Image.OPEN]


_LIBHEIF = (1, 23, 2)  # earlier ones have CVE-2026-84383


@functools.cache
def _register_heif() -> None:
    """Register a plug-in of Pillow for HEIC and HEIF, without which everything else works.

    That is pillow-heif, or pi-heif, which decodes only and so brings no library under GPL.
    """
    for name in ("pillow_heif", "pi_heif"):
        with contextlib.suppress(ImportError):
            plug_in = importlib.import_module(name)
            if tuple(map(int, re.findall(r"\d+", plug_in.libheif_version())[:3])) >= _LIBHEIF:
                plug_in.register_heif_opener(thumbnails=False)
                return


@contextlib.contextmanager
def _opened(path: Path, content: bytes | None = None, *, any_format: bool = False) -> Iterator[Image.Image]:
    """The file as a lazy Pillow image; errors of Pillow inside the block become ImageError."""
    try:
        # Pillow warns of unusual metadata, which training does not read, and of sizes well below its limit.
        with (
            warnings.catch_warnings(action="ignore"),
            _file(path) if content is None else io.BytesIO(content) as file,
            Image.open(file, formats=[*_readable_formats(), *(_CONVERTED if any_format else ())]) as image,
        ):
            if image.size == (1, 1):
                raise ImageError(path, "is a single pixel; replace it by a picture or remove it")
            yield image
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(path, f"has more than {limit} million pixels; scale it down first") from None
    except UnidentifiedImageError:
        raise ImageError(path, _no_image(path, content)) from None
    except _DAMAGE as error:
        raise ImageError(path, f"is damaged or cut short ({error}); get a good copy or remove it") from error


def _file(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise ImageError(path, "does not exist; check the name") from None
    except PermissionError:
        raise ImageError(path, "cannot be read; check the file's permissions") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror}); replace or remove it") from None


def _no_image(path: Path, content: bytes | None) -> str:
    if (path.stat().st_size if content is None else len(content)) == 0:
        return "is empty; get a good copy or remove it"
    known = ", ".join(_readable_formats())
    return f"is not an image in spite of its name: its content is none of {known}; replace or remove it"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        # A damaged EXIF block does not affect the pixels.
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return _turned(image, _orientation(image))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture, scaled to mode L if it is grey with more than 8 bits per pixel."""
    if image.mode.startswith("I;16"):
        return _scaled_grey(image, white_levels=(0xFFFF,))
    if image.mode == "I":
        return _scaled_grey(image, white_levels=(0xFFFF, 0x7FFFFFFF))
    if image.mode == "F":
        return _scaled_grey(image, white_levels=(1, 0xFF, 0xFFFF))
    return image


def _scaled_grey(image: Image.Image, *, white_levels: tuple[int, ...]) -> Image.Image:
    """Greys of more than 8 bits as mode L. Files do not record white: it is the first level that no pixel exceeds."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0).clip(min=0)
    brightest = values.max()
    white = next((level for level in white_levels if brightest <= level), brightest)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(canvas, picture).convert("RGB")
