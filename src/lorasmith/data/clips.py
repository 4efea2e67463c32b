"""Clips: files of several pictures in time, videos and animations, and which of their frames are trained.

Animated WebP and GIF files are read with Pillow, videos with PyAV (an optional package). A clip is sampled from its
start at the model's frame rate, by the time stamps of its frames, so motion has the speed that the model was trained
on; the rate that a file states may be an average, a default of the recorder, or missing. A `Video` is a selection of a
file's frames for nodes; nothing is decoded until the pictures are needed.

Files are untrusted: only containers of videos are opened, not the formats in which a file references others.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.files import is_folder, open_regular
from lorasmith.data.captions import read_caption_file
from lorasmith.data.data_config import MOST_FRAMES, DataConfig
from lorasmith.data.folder_listing import LINK, VIDEO_SUFFIXES, Reason, Skipped, list_folders, stem_of
from lorasmith.data.image_files import ImageError, image_size, open_animation, open_reduced
from lorasmith.families.forms import LatentFormat
from lorasmith.families.model import Model

_READ_S = 60.0  # of a clip; more than a run trains on, unless its settings say so
_MOST_RATE = 1000  # frames per second; files with more are read for a shorter time
_ANIMATED = (".webp", ".gif")
_ROUNDING = 1e-6  # of a frame: 16 of 10 frames a second are 1.6 of each, despite rounding
_TICK = 1e-3  # seconds that stamps may be rounded by, as in Matroska; less where a file counts in smaller units
_VARIES = 1.1  # factor between the longest and the shortest time of a frame
_FORMATS = "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's names
_MOST_FRAMES = 10_000_000  # of a file: four days at 30 frames a second
_MOST_PIXELS = 2**26  # of a frame: twice those of 8K video; a small file may announce frames that fill the memory
_COLOUR_SPACES = {18: "HDR", 16: "HDR PQ"}
"""ComfyUI's names by transfer function (ITU-T H.273); sRGB for all others."""


class OpenedFile(NamedTuple):
    """Size (upright, in pixels) and frames of an image file or a clip."""

    width: int
    height: int
    times: tuple[float, ...] = ()  # of a clip: seconds at which each frame is shown, and the end; empty for a picture

    @property
    def frames(self) -> int:
        """Frames of a clip that were read; 0 for a picture."""
        return max(0, len(self.times) - 1)


@dataclass(frozen=True)
class ClipForm:
    """The clips that a model accepts."""

    most: int  # frames at most
    rate: float  # frames per second
    latent: LatentFormat

    def numbers(self, times: Sequence[float]) -> tuple[int, ...]:
        """The trained frames of a clip (`OpenedFile.times`): those shown at evenly spaced times from its start."""
        count = self.latent.whole_frames(min(self.most, self.available(times)))
        shown = (bisect_right(times, (number + _ROUNDING) / self.rate) - 1 for number in range(count))
        return tuple(min(number, len(times) - 2) for number in shown)

    def available(self, times: Sequence[float]) -> int:
        """Frames of the whole clip at the model's rate."""
        return max(1, int(times[-1] * self.rate + _ROUNDING))

    def resampled(self, times: Sequence[float]) -> str:
        """What the trained frames of a clip were taken from, a clause; empty if they are the clip's own."""
        numbers = self.numbers(times)
        if numbers == tuple(range(len(numbers))):
            return ""
        spans = [after - before for before, after in itertools.pairwise(times[: numbers[-1] + 2]) if after > before]
        slowest, fastest = 1 / max(spans), 1 / min(spans)
        varies = fastest > _VARIES * slowest
        rate = f"{slowest:.3g} to {fastest:.3g} a second" if varies else f"{len(spans) / sum(spans):.4g} a second"
        repeats = len(numbers) - len(set(numbers))
        return f"{rate}, {repeats} of {len(numbers)} frames repeated" if repeats else rate


def steady_times(frames: int, rate: float) -> tuple[float, ...]:
    """The times of a clip (`OpenedFile.times`) of this many frames per second."""
    return tuple(number / rate for number in range(frames + 1))


def clip_form(model: Model, config: DataConfig) -> ClipForm | None:
    """The clips that a model accepts, None for an image model. Raises OptionError for settings that it cannot use."""
    latent, defaults = model.components.latent, model.defaults
    if latent.time_downscale:
        return ClipForm(config.frames or defaults.frames, config.frame_rate or defaults.frame_rate, latent)
    for name in ("frames", "frame_rate"):
        if (value := getattr(config, name)) is not None:
            model.check_clips(name, value)
    return None


def is_video(path: Path) -> bool:
    """Whether a file has a video suffix, which Pillow does not read."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def seconds_read(config: DataConfig) -> float:
    """Seconds of a clip that are read: at least what is trained."""
    return max(_READ_S, (config.frames or MOST_FRAMES) / (config.frame_rate or math.inf))


def open_file(path: Path, *, clips: bool, any_format: bool = False, seconds: float = _READ_S) -> OpenedFile:
    """Size and frames of an image file or a clip, read whole, a clip for so many seconds.

    Without `clips`, animations are their first picture. ImageError if it cannot be read.
    """
    if is_video(path):
        with _image_errors(path):
            return _opened_clip(path, seconds)
    if clips and path.suffix.lower() in _ANIMATED:
        milliseconds = [0.0]
        for picture, shown in open_animation(path):
            milliseconds.append(milliseconds[-1] + shown)
            size = picture.size
            if milliseconds[-1] > 1000 * seconds or len(milliseconds) > seconds * _MOST_RATE:
                break
        if len(milliseconds) > 2:
            return OpenedFile(*size, tuple(millisecond / 1000 for millisecond in milliseconds))
    return OpenedFile(*image_size(path, any_format=any_format))


def clip_frames(path: Path, content: bytes, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Frames (ascending `numbers`, which may repeat) of a clip as upright RGB pictures. Raises ImageError."""
    wanted = set(numbers)
    images = (
        _video_frames(path, content, wanted)
        if is_video(path)
        else (frame for number, (frame, _) in enumerate(open_animation(path, content)) if number in wanted)
    )
    for number, picture in zip(sorted(wanted), images, strict=False):
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
    video_files: list[VideoFile] = []
    notes: list[str] = []
    skipped: Skipped = []
    listed = list_folders(str(folder), skipped=skipped, follow_links=follow_links, clips=True)
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
            video_files.append(VideoFile(place.file(name), place.repeats, None if caption is None else caption.text))
    notes += [f"skipped: {path.name} {reason}" for path, reason in skipped if subfolders or not is_folder(path)]
    if not video_files:
        known = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        raise DataError(
            f"{folder} holds no videos{f' that are used: {notes[0]}' if notes else ''}; put some in it ({known})"
        )
    return VideoScan(tuple(video_files), tuple(notes))


def open_video(path: Path) -> Video:
    """All frames of a file, decoded only if the file does not state their number. DataError if it is not a video."""
    with _opened_video(path) as (container, stream):
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
            Fraction(stream.average_rate or 1),  # 1 as in ComfyUI
            width,
            height,
            max((component.bits for component in stream.format.components), default=8),
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
    with _opened_video(path, content) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield _upright(frame)
                left -= 1
            if not left:
                return


def _video_frames(path: Path, content: bytes | None, wanted: Sequence[int] | set[int]) -> Iterator[Image.Image]:
    """The wanted frames in order, upright; those after the end are omitted."""
    with _image_errors(path):
        for frame in decoded_frames(path, wanted, content=content):
            yield Image.fromarray(frame)


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ImageError(path, str(error).removeprefix(f"{path} ")) from error


def _opened_clip(path: Path, seconds: float) -> OpenedFile:
    """Size and times of a video, of so many seconds. Raises DataError as `open_video`, and for a damaged file."""
    stamps: list[float] = []
    size = (0, 0)
    with _opened_video(path) as (container, stream):
        rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        for frame in container.decode(stream):
            if not stamps:
                height, width, _ = _upright(frame).shape
                size, first = (width, height), frame.time or 0.0
            # Stamps that are missing or run backwards count as those before.
            stamps.append(max(stamps[-1] if stamps else 0.0, 0.0 if frame.time is None else frame.time - first))
            if stamps[-1] > seconds or len(stamps) > seconds * _MOST_RATE:
                break
        tick = min(_TICK, float(stream.time_base or _TICK))
    if not stamps:
        raise DataError(f"{path} must be a video of at least one frame; repair or remove it")
    return OpenedFile(*size, _times(path, stamps, rates, tick))


def _times(path: Path, stamps: Sequence[float], rates: Sequence[float], tick: float) -> tuple[float, ...]:
    """The times of a video from the stamps of its frames, which are rounded to a tick, and the rates that it states.

    Stamps of a constant rate, but for the rounding, become that rate's exact times.
    """
    count, last = len(stamps), stamps[-1]
    if count > 1 and last:
        mean = (count - 1) / last
        rates = (*rates, round(mean), round(mean * 1.001) / 1.001, mean)
        rates = [
            rate
            for rate in rates
            if rate and all(abs(stamp - number / rate) <= tick for number, stamp in enumerate(stamps))
        ]
        if not rates:
            # A rounded stamp may be due a tick earlier.
            return (0.0, *(max(0.0, stamp - tick) for stamp in stamps[1:]), 2 * last - stamps[-2] + tick)
    if not rates:
        raise DataError(f"{path} must have time stamps or a frame rate; convert or remove it")
    return steady_times(count, rates[0])


def _upright(frame: Any) -> np.ndarray:
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90)).copy()


@contextlib.contextmanager
def _opened_video(path: Path, content: bytes | None = None) -> Iterator[tuple[Any, Any]]:
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
