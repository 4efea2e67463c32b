"""Pictures embedded in pages and notebooks: scaled down, compressed, as data URIs; clips as animated WebP files.

Browsers show these files as pictures; their text is in EXIF data. Notebooks show cards of models, LoRAs and results:
text is escaped, and styles are inline.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags, Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.files import atomic_path, open_regular, write_atomic
from lorasmith.report.markup import Html, tag

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


PictureOrClip = Image.Image | Clip  # a sample of a prompt


def encoded(picture: Image.Image, format: str, **settings: Any) -> bytes:
    """A picture as a file of a format of Pillow, with its settings for it."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **settings)
    return buffer.getvalue()


def animation(
    clip: Clip, entries: Mapping[int, str | bytes], *, lossless: bool = False, quality: int = 90, method: int = 4
) -> bytes:
    """A clip as an endlessly repeating WebP file with EXIF data by tag.

    `quality` is 0 to 100, if lossless the effort; `method` is the effort of the compression, 0 to 6.
    """
    exif = Image.Exif()
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    for key, value in entries.items():
        (inner if key == ExifTags.Base.UserComment else exif)[key] = value
    return encoded(
        clip.frames[0],
        "webp",
        save_all=True,
        append_images=clip.frames[1:],
        duration=int(1000 / clip.rate),
        loop=0,
        exif=exif,
        lossless=lossless,
        quality=quality,
        method=method,
    )


def parameters_entry(text: str) -> tuple[int, bytes]:
    """Tag and value of a picture's parameters, where A1111 and model browsers look for them in WebP files."""
    return int(ExifTags.Base.UserComment), _USER_COMMENT + text.encode("utf-16-be")


def write_drawn(picture: PictureOrClip, stem: Path, parameters: str, entry: str | None = None) -> Path:
    """Write a picture as `<stem>.png` or a clip as `<stem>.webp`, with parameters in A1111's format; returns the path.

    `entry` is the text of `PREVIEW_ENTRY` in a PNG file, of `PREVIEW_TAG` in a WebP file.
    """
    if isinstance(picture, Clip):
        path = stem.with_name(f"{stem.name}.webp")
        further = {} if entry is None else {PREVIEW_TAG: entry}
        write_atomic(path, animation(picture, dict([parameters_entry(parameters), *further.items()])))
        return path
    path, info = stem.with_name(f"{stem.name}.png"), PngInfo()
    info.add_itxt("parameters", parameters)
    if entry is not None:
        info.add_itxt(PREVIEW_ENTRY, entry)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", pnginfo=info)
    return path


PREVIEW_ENTRY = "lorasmith.preview"  # not `prompt`, which ComfyUI reads as a graph
PREVIEW_TAG = int(ExifTags.Base.ImageDescription)  # the same in the EXIF data of clips


UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""Errors of opening a picture that is missing, damaged or not a file, mostly by Pillow."""

_Item = TypeVar("_Item")
_LARGE, _SMALL, _SHEET = 320, 208, 1600  # longest edge in pixels
_MANY = 40  # number of pictures from which they are made small
_TINY = 128  # size up to which pictures are enlarged, where compression artifacts would be visible
_QUALITY = 82
_GAP = 4  # between pictures side by side
_MOST_FRAMES = 257


@dataclass(frozen=True)
class PictureTable:
    """Pictures in labelled rows and columns."""

    columns: Sequence[str]  # headings, such as prompts; none for a contact sheet, which includes its labels
    rows: Sequence[tuple[str, Sequence[Path | None]]]  # label and pictures, one per column; None for a missing one
    about: str  # accessible name


def picture_table(pictures: PictureTable) -> Html:
    """The table, which scrolls horizontally if it does not fit; unreadable pictures are marked as missing."""
    if not pictures.columns:
        [(_, [sheet])] = pictures.rows
        return picture(sheet, pictures.about, _SHEET, class_="sheet")
    many = len(pictures.columns) * len(pictures.rows) > _MANY
    edge = _SMALL if many else _LARGE
    head = tag("tr", tag("td"), [tag("th", prompt, scope="col") for prompt in pictures.columns])
    rows = [
        tag(
            "tr",
            tag("th", label, scope="row"),
            [
                tag("td", picture(path, f"{prompt}, {label}", edge))
                for prompt, path in zip(pictures.columns, row, strict=True)
            ],
        )
        for label, row in pictures.rows
    ]
    whole = tag(
        "table", tag("thead", head), tag("tbody", rows), class_="pictures", style=f"--columns: {len(pictures.columns)}"
    )
    return tag("div", whole, class_="scroll", role="region", aria_label=pictures.about, tabindex=0)


def data_uri(path: Path, longest: int) -> tuple[str, int, int] | None:
    """A picture as a WebP data URI with width and height, its longest edge at most `longest`; None if unreadable.

    Clips stay animated.
    """
    frames: list[Image.Image] = []
    shown = 0.0
    try:
        with open_regular(path) as file, Image.open(file) as opened:
            for frame in itertools.islice(ImageSequence.Iterator(opened), _MOST_FRAMES):
                pixels = frame.convert("RGB")
                pixels.thumbnail((longest, longest), Image.Resampling.LANCZOS)
                frames.append(pixels)
                shown += frame.info.get("duration") or 100
    except UNREADABLE:
        return None
    if len(frames) == 1:
        return picture_uri(frames[0])
    rate = 1000 * len(frames) / shown
    return _uri(animation(Clip(tuple(frames), rate), {}, quality=_QUALITY)), *frames[0].size


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """RGB pictures in a row, centred on white; a single one as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    row, left = Image.new("RGB", (width + _GAP * (len(pictures) - 1), height), "white"), 0
    for picture in pictures:
        row.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width + _GAP
    return row


def picture_uri(picture: Image.Image) -> tuple[str, int, int]:
    """An RGB picture as a WebP data URI with width and height."""
    return _uri(webp(picture)), picture.width, picture.height


KEPT_EDGE = 512
"""Pixels of the longer edge of pictures that are kept in a run's folder to be compared."""


def webp(picture: Image.Image, longest: int | None = None) -> bytes:
    """An RGB picture as a WebP file, its longest edge at most `longest` pixels; small ones are lossless."""
    if longest is not None and max(picture.size) > longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    lossless = max(picture.size) <= _TINY
    return encoded(picture, "webp", lossless=lossless, quality=100 if lossless else _QUALITY)


def _uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def thinned(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def picture(path: Path | None, alt: str, longest: int, class_: str | None = None) -> Html:
    """A picture as an element, its longest edge at most `longest` pixels, or a note that there is none."""
    embedded = None if path is None else data_uri(path, longest)
    if embedded is None:
        return tag("span", "no picture", class_="missing")
    uri, width, height = embedded
    return tag("img", src=uri, alt=alt, width=width, height=height, class_=class_)


_FRAME = "border:1px solid #8884;border-radius:8px;padding:.75em 1em;display:inline-block;max-width:60em"
_NAME = "text-align:left;font-weight:normal;opacity:.7;padding:.1em 1em .1em 0;vertical-align:top"
_VALUE = "text-align:left;padding:.1em 0;overflow-wrap:anywhere"
_LONGEST = 960  # pixels of a picture's longer edge


def card(title: str, facts: Mapping[str, object], *children: object) -> str:
    """A card as HTML for `_repr_html_`; text is escaped unless it is `Html`, and empty facts are left out."""
    rows = [
        tag("tr", tag("th", name, scope="row", style=_NAME), tag("td", value, style=_VALUE))
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return tag("div", tag("strong", title), tag("table", rows), *children, style=_FRAME)


def embedded_png(png: bytes, alt: str) -> Html:
    """A PNG picture as an element; `alt` is its text alternative."""
    return _shown(f"data:image/png;base64,{base64.b64encode(png).decode()}", alt)


def embedded_picture(path: Path, alt: str) -> Html:
    """A picture file, scaled down, as an element; empty if it is missing or unreadable."""
    embedded = data_uri(path, _LONGEST)
    return Html("") if embedded is None else _shown(embedded[0], alt)


def _shown(uri: str, alt: str) -> Html:
    return tag("img", src=uri, alt=alt, style="display:block;max-width:100%;margin-top:.75em")
