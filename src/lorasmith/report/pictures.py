"""Pictures embedded in the page: scaled down, compressed, as data URIs."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageSequence

from lorasmith.core.files import open_regular
from lorasmith.report.animations import Clip, animation
from lorasmith.report.markup import Html, tag

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""Errors of opening a picture that is missing, damaged or not a file, mostly by Pillow."""

_Item = TypeVar("_Item")
_LARGE, _SMALL, _SHEET = 320, 208, 1600  # longest edge in pixels
_MANY = 40  # number of pictures from which they are made small
_TINY = 128  # size up to which pictures are enlarged, where compression artifacts would be visible
_QUALITY = 82
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
    whole = tag("table", tag("thead", head), tag("tbody", rows), class_="pictures")
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


def picture_uri(picture: Image.Image) -> tuple[str, int, int]:
    """An RGB picture as a WebP data URI with width and height."""
    buffer = io.BytesIO()
    lossless = max(picture.size) <= _TINY
    picture.save(buffer, format="webp", lossless=lossless, quality=100 if lossless else _QUALITY)
    return _uri(buffer.getvalue()), picture.width, picture.height


def _uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def thinned(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def picture(path: Path | None, alt: str, longest: int, class_: str | None = None) -> Html:
    """A picture as an element, its longest edge at most `longest` pixels, or a note that there is none."""
    found = None if path is None else data_uri(path, longest)
    if found is None:
        return tag("span", "no picture", class_="missing")
    uri, width, height = found
    return tag("img", src=uri, alt=alt, width=width, height=height, class_=class_)
