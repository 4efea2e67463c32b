"""Clips: files of several pictures in time, videos and animations, and which of their frames are trained.

Animated WebP and GIF files are read with Pillow, videos with PyAV (`video_files.py`). A clip is sampled from its start
at the frames a second of the model, so motion has the speed that the model knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lorasmith.core.errors import DataError
from lorasmith.data.folder_listing import VIDEO_SUFFIXES
from lorasmith.data.image_files import ImageError, image_size, open_animation, open_reduced
from lorasmith.data.video_files import decoded_frames, frame_rate
from lorasmith.families.base import LatentFormat

COUNTED_FRAMES = 1000
"""Frames that are read of a file to count them; no run trains on more of one."""

_ANIMATED = (".webp", ".gif")


class OpenedFile(NamedTuple):
    """An image file or a clip, read once.

    Attributes:
        width, height: of the upright picture in pixels.
        frames: of the file, at most `COUNTED_FRAMES`; 0 for a picture.
        rate: frames a second; 0 for a picture.
    """

    width: int
    height: int
    frames: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class ClipForm:
    """How a model takes clips.

    Attributes:
        most: frames at most.
        rate: frames a second.
        latent: form of its latents.
    """

    most: int
    rate: float
    latent: LatentFormat

    def numbers(self, frames: int, rate: float) -> tuple[int, ...]:
        """The frames of a file that are trained, by their number from 0: those shown at even times from its start.

        Args:
            frames: of the file.
            rate: its frames a second.
        """
        count = self.latent.whole_frames(min(self.most, self.available(frames, rate)))
        return tuple(min(frames - 1, int(number * rate / self.rate + _ROUNDING)) for number in range(count))

    def available(self, frames: int, rate: float) -> int:
        """Frames that the whole of a file has at the model's rate."""
        return max(1, int(frames * self.rate / rate + _ROUNDING))


_ROUNDING = 1e-6  # 16 of 10 frames a second are 1.6 of each, despite rounding


def is_video(path: Path) -> bool:
    """Whether a file has the name of a video, which Pillow does not read."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def open_file(path: Path, *, clips: bool, any_format: bool = False) -> OpenedFile:
    """Size and frames of an image file or a clip, after reading it.

    Args:
        path: the file.
        clips: whether animations are clips; else they are their first picture.
        any_format: as for `open_original`.

    Raises:
        ImageError: the file cannot be used.
    """
    if is_video(path):
        count, size = 0, (0, 0)
        for picture in _video_frames(path, None, range(COUNTED_FRAMES)):
            count, size = count + 1, picture.size
        if not count:
            raise ImageError(path, "must be a video of at least one frame; repair or remove it")
        return OpenedFile(*size, count, _rate(path))
    if clips and path.suffix.lower() in _ANIMATED:
        count, milliseconds = 0, 0.0
        for picture, shown in open_animation(path):
            count, milliseconds, size = count + 1, milliseconds + shown, picture.size
            if count == COUNTED_FRAMES:
                break
        if count > 1:
            return OpenedFile(*size, count, 1000 * count / milliseconds)
    return OpenedFile(*image_size(path, any_format=any_format))


def clip_frames(path: Path, content: bytes, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Frames of a clip as upright RGB pictures, one after the other.

    Args:
        path: the file.
        content: its bytes.
        numbers: ascending; one may occur several times.

    Raises:
        ImageError: the file cannot be read, or ends before.
    """
    wanted = set(numbers)
    found = (
        _video_frames(path, content, wanted)
        if is_video(path)
        else (one for number, (one, _) in enumerate(open_animation(path, content)) if number in wanted)
    )
    for number, picture in zip(sorted(wanted), found, strict=False):
        for _ in range(numbers.count(number)):
            yield picture
        if number == numbers[-1]:
            return
    raise ImageError(path, f"ends before its frame {numbers[-1] + 1:,}, which it had when it was checked; repair it")


def open_still(path: Path, longest: int, *, grey: bool = False) -> Image.Image:
    """The picture of a file, of a clip its first one, reduced to be looked at or measured.

    Args:
        path: the file.
        longest, grey: as for `open_reduced`.

    Raises:
        ImageError: the file cannot be read.
    """
    if not is_video(path):
        return open_reduced(path, longest, grey=grey)
    picture = next(iter(_video_frames(path, None, (0,))), None)
    if picture is None:
        raise ImageError(path, "must be a video of at least one frame; repair or remove it")
    picture.thumbnail((longest, longest), Image.Resampling.HAMMING)
    return picture.convert("L") if grey else picture


def _video_frames(path: Path, content: bytes | None, wanted: Sequence[int] | set[int]) -> Iterator[Image.Image]:
    """Some frames of a video in their order, upright; those after its end are missing."""
    try:
        for frame in decoded_frames(path, wanted, content=content):
            yield Image.fromarray(frame)
    except DataError as error:
        raise ImageError(path, str(error).removeprefix(f"{path} ")) from error


def _rate(path: Path) -> float:
    try:
        return frame_rate(path)
    except DataError as error:
        raise ImageError(path, str(error).removeprefix(f"{path} ")) from error
