"""Clips as animated WebP files, which browsers show as pictures, with text in their EXIF data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import ExifTags, Image

_USER_COMMENT = "UNICODE\0".encode("ascii")


@dataclass(frozen=True)
class Clip:
    """Frames of a video: RGB pictures of one size, at least one."""

    frames: tuple[Image.Image, ...]
    rate: float  # frames per second

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


Shot = Image.Image | Clip  # a sample of a prompt


def animation(
    clip: Clip, entries: Mapping[int, str | bytes], *, lossless: bool = False, quality: int = 90, method: int = 4
) -> bytes:
    """A clip as an endlessly repeating WebP file with EXIF data by tag (see `parameters_entry`).

    `quality` is 0 to 100, if lossless the effort; `method` is the effort of the compression, 0 to 6.
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
    """Tag and value of a picture's parameters, where A1111 and model browsers look for them in WebP files."""
    return int(ExifTags.Base.UserComment), _USER_COMMENT + text.encode("utf-16-be")
