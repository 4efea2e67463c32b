"""Reading video files with PyAV (an optional package): frames, and some of them as pictures.

A `Video` is a selection of a file's frames; nothing is decoded until the pictures are needed. Files are untrusted: only
containers of videos are opened, not the formats in which a file references others.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.files import is_folder, open_regular
from lorasmith.data.captions import read_caption_file
from lorasmith.data.folder_listing import LINK, VIDEO_SUFFIXES, Reason, Skipped, list_folders, stem_of

_FORMATS = "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's names
_MOST_FRAMES = 10_000_000  # of a file: four days at 30 frames a second
_MOST_PIXELS = 2**26  # of a frame: twice those of 8K video; a small file may announce frames that fill the memory
_COLOUR_SPACES = {18: "HDR", 16: "HDR PQ"}
"""ComfyUI's names by transfer function (ITU-T H.273); sRGB for all others."""


@dataclass(frozen=True)
class Video:
    """Frames of a file."""

    path: Path
    frames: Sequence[int]  # indices in the file, in order of presentation
    rate: Fraction  # frames per second of the file
    width: int  # of a frame as stored, before rotation
    height: int
    bit_depth: int  # in the file; pictures have 8
    colour_space: str  # `sRGB`, `HDR` or `HDR PQ`

    def only(self, places: Sequence[int]) -> Video:
        """The frames at these positions."""
        return replace(self, frames=[self.frames[place] for place in places])

    def part(self, start: int, length: int) -> Video:
        return replace(self, frames=self.frames[start : start + length])


class VideoFile(NamedTuple):
    """A video in a folder, its occurrences in an epoch, and its caption, None without a caption file."""

    path: Path
    repeats: int
    caption: str | None


@dataclass(frozen=True)
class VideoScan:
    """The videos of a folder in natural order, and notes for the user."""

    videos: tuple[VideoFile, ...]
    notes: tuple[str, ...] = field(default=())


def scan_videos(folder: Path, *, subfolders: bool, follow_links: bool) -> VideoScan:
    """Videos, with captions, of a folder and (`subfolders`) those named `<repeats>_<name>`. Raises DataError."""
    found: list[VideoFile] = []
    notes: list[str] = []
    skipped: Skipped = []
    listed = list_folders(
        str(folder),
        recursive=False,
        masks=False,
        mask_folder=None,
        skipped=skipped,
        follow_links=follow_links,
        clips=True,
    )
    for place in listed if subfolders else itertools.islice(listed, 1):
        for name in place.images:
            if Path(name).suffix.lower() not in VIDEO_SUFFIXES:
                continue
            captions = place.captions.get(stem_of(name), [])[:1]
            if any(map(place.refuses, (name, *captions))):
                skipped.append((place.file(name), Reason(f"or its caption {LINK}; copy it here", "link")))
                continue
            caption = read_caption_file(place.file(captions[0])) if captions else None
            if caption is not None and caption.is_latin_1:
                notes.append(
                    f"{caption.path.name} is not UTF-8 and was read as latin-1; check its accents or save it as UTF-8"
                )
            found.append(VideoFile(place.file(name), place.repeats, None if caption is None else caption.text))
    notes += [f"skipped: {path.name} {reason}" for path, reason in skipped if subfolders or not is_folder(path)]
    if not found:
        known = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        raise DataError(
            f"{folder} holds no videos{f' that are used: {notes[0]}' if notes else ''}; put some in it ({known})"
        )
    return VideoScan(tuple(found), tuple(notes))


def open_video(path: Path) -> Video:
    """All frames of a file, decoded only if the file does not state their number. DataError if it is not a video."""
    with _opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        decoded = itertools.islice(container.decode(stream), _MOST_FRAMES + 1)
        count = stream.frames if stream.frames > 0 else sum(1 for _ in decoded)
        # A header may announce any number, but a frame takes a byte of the file.
        if not 0 < count <= min(_MOST_FRAMES, path.stat().st_size) or stream.format is None:
            raise DataError(
                f"{path} must have 1 to {_MOST_FRAMES:,} frames, got {count:,}; cut it into pieces or repair it"
            )
        return Video(
            path,
            range(count),
            _rate(stream),
            width,
            height,
            max((one.bits for one in stream.format.components), default=8),
            _COLOUR_SPACES.get(int(getattr(stream.codec_context, "color_trc", 0) or 0), "sRGB"),
        )


def read_frames(video: Video, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
    """The frames of a video (at least one) as pictures (frames, height, width, 3) in [0, 1], upright.

    `progress` receives (frames read, all frames). DataError if PyAV is not installed, the file is damaged, or a frame
    is missing or of another size.
    """
    wanted, read = set(video.frames), dict[int, Tensor]()
    for number, frame in zip(sorted(wanted), decoded_frames(video.path, wanted), strict=False):
        read[number] = torch.from_numpy(frame)
        progress(len(read), len(wanted))
    if missing := wanted - read.keys():
        raise DataError(
            f"{video.path} must have the {len(video.frames):,} frames that were chosen, but {min(missing):,} cannot be "
            "read; repair it, or choose earlier ones"
        )
    if len({picture.shape for picture in read.values()}) > 1:
        raise DataError(f"{video.path} must have frames of one size, and changes it; convert it first")
    return torch.stack([read[number] for number in video.frames]).float() / 255


def decoded_frames(path: Path, wanted: Collection[int], *, content: bytes | None = None) -> Iterator[np.ndarray]:
    """The wanted frames of a file, by index, upright, uint8 (height, width, 3), in order; omits those after its end.

    Raises DataError as `open_video`, and for a damaged file.
    """
    left = len(wanted)
    with _opened(path, content) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)).copy()
                left -= 1
            if not left:
                return


def frame_rate(path: Path) -> float:
    """Frames per second of a file. Raises DataError as `open_video`."""
    with _opened(path) as (_, stream):
        return float(_rate(stream))


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or 1)


@contextlib.contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file; PyAV's errors inside the block become DataError."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f'{path} is a video, which needs the package av; install it with: pip install "lorasmith[video]"'
        ) from error
    # Without protocols a file that is a playlist, whatever its name, cannot open what it lists.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
    try:
        with (
            open_regular(path) if content is None else io.BytesIO(content) as file,
            av.open(file, mode="r", options=options) as container,
        ):
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise DataError(f"{path} must be a video, but has no pictures that can be read; convert or remove it")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > _MOST_PIXELS:
                raise DataError(
                    f"{path} must have frames of at most {_MOST_PIXELS:,} pixels; scale it down or remove it"
                )
            stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}  # for frames that become larger
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path} must be a video that can be read ({reason}); repair or remove it") from error
