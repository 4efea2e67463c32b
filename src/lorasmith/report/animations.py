"""Clips as animated WebP files, which browsers show as pictures, with text in their EXIF data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import ExifTags, Image

_USER_COMMENT = "UNICODE\0".encode("ascii")


@dataclass(frozen=True)
class Clip:
    """Pictures in time.

    Attributes:
        frames: RGB pictures of one size, at least one.
        rate: frames a second.
    """

    frames: tuple[Image.Image, ...]
    rate: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


Shot = Image.Image | Clip
"""What a model draws of a prompt."""


def animation(
    clip: Clip, entries: Mapping[int, str | bytes], *, lossless: bool = False, quality: int = 90, method: int = 4
) -> bytes:
    """A clip as a WebP file, which repeats without end.

    Args:
        clip: the clip.
        entries: EXIF data by tag; see `parameters_entry`.
        lossless: whether pixels are kept as they are.
        quality: of the compression, 0 to 100; without loss the effort.
        method: effort of the compression, 0 to 6.
    """
    exif = Image.Exif()
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, value in entries.items():
        (inner if tag == ExifTags.Base.UserComment else exif)[tag] = value
    buffer = io.BytesIO()
    clip.frames[0].save(
        buffer,
        format="webp",
        save_all=True,
        append_images=clip.frames[1:],
        duration=int(1000 / clip.rate),
        loop=0,
        exif=exif,
        lossless=lossless,
        quality=quality,
        method=method,
    )
    return buffer.getvalue()


def parameters_entry(text: str) -> tuple[int, bytes]:
    """Tag and value of the parameters of a picture, where A1111 and model browsers look for them in WebP files."""
    return int(ExifTags.Base.UserComment), _USER_COMMENT + text.encode("utf-16-be")
