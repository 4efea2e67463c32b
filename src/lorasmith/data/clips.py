"""Clips: files of several pictures in time, videos and animations, and which of their frames are trained.

Animated WebP and GIF files are read with Pillow, videos with PyAV (`video_files.py`). A clip is sampled from its start
at the model's frame rate, so motion has the speed that the model was trained on.
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

COUNTED_FRAMES = 1000  # frames read to count those of a file; no run trains on more of one

_ANIMATED = (".webp", ".gif")


class OpenedFile(NamedTuple):
    """Size (upright, in pixels) and frames of an image file or a clip."""

    width: int
    height: int
    frames: int = 0  # at most `COUNTED_FRAMES`; 0 for a picture
    rate: float = 0.0  # frames per second; 0 for a picture


@dataclass(frozen=True)
class ClipForm:
    """The clips that a model accepts."""

    most: int  # frames at most
    rate: float  # frames per second
    latent: LatentFormat

    def numbers(self, frames: int, rate: float) -> tuple[int, ...]:
        """The trained frames of a file of `frames` at `rate` per second: evenly spaced in time from its start."""
        count = self.latent.whole_frames(min(self.most, self.available(frames, rate)))
        return tuple(min(frames - 1, int(number * rate / self.rate + _ROUNDING)) for number in range(count))

    def available(self, frames: int, rate: float) -> int:
        """Frames of the whole file at the model's rate."""
        return max(1, int(frames * self.rate / rate + _ROUNDING))


_ROUNDING = 1e-6  # 16 of 10 frames a second are 1.6 of each, despite rounding


def is_video(path: Path) -> bool:
    """Whether a file has a video suffix, which Pillow does not read."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def open_file(path: Path, *, clips: bool, any_format: bool = False) -> OpenedFile:
    """Size and frames of an image file or a clip, read whole; without `clips`, animations are their first picture."""
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
    """Frames (ascending `numbers`, which may repeat) of a clip as upright RGB pictures. Raises ImageError."""
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
    """The picture of a file (the first one of a clip), reduced as by `open_reduced`. Raises ImageError."""
    if not is_video(path):
        return open_reduced(path, longest, grey=grey)
    picture = next(iter(_video_frames(path, None, (0,))), None)
    if picture is None:
        raise ImageError(path, "must be a video of at least one frame; repair or remove it")
    picture.thumbnail((longest, longest), Image.Resampling.HAMMING)
    return picture.convert("L") if grey else picture


def _video_frames(path: Path, content: bytes | None, wanted: Sequence[int] | set[int]) -> Iterator[Image.Image]:
    """The wanted frames in order, upright; those after the end are omitted."""
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
