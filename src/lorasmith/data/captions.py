"""Caption files and the trigger."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.core.files import read_regular

__all__ = ["CAPTION_SUFFIXES", "Caption", "read_caption", "with_trigger"]

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, the preferred one first."""


@dataclass(frozen=True)
class Caption:
    """The content of a caption file.

    Attributes:
        text: on one line, each run of white space a single blank; may be empty.
        path: the file.
        note: a remark on the file for the user, one sentence, or None.
    """

    text: str
    path: Path
    note: str | None = None


def read_caption(image: Path) -> Caption | None:
    """Caption of an image from the file of the same name ending in `.txt` or `.caption`; None without one.

    Text is UTF-8, with or without byte order mark, or UTF-16 with one. Anything else is read as latin-1, which always
    succeeds but may be wrong, with a `note`.

    Raises:
        DataError: the file exists but cannot be read.
    """
    path = next((path for suffix in CAPTION_SUFFIXES if (path := image.with_suffix(suffix)).is_file()), None)
    if path is None:
        return None
    try:
        content = read_regular(path)
    except OSError as error:
        raise DataError(f"caption file {path} cannot be read ({error.strerror}); check its permissions") from error
    text, note = _decoded(content)
    return Caption(_one_line(text), path, note and f"caption file {path} {note}")


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in front, unless it contains it (as whole words, ignoring case).

    >>> with_trigger("on a beach", "sks dog"), with_trigger("a SKS dog", "sks dog"), with_trigger("", "sks dog")
    ('sks dog, on a beach', 'a SKS dog', 'sks dog')
    """
    caption, trigger = _one_line(caption), _one_line(trigger)
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _decoded(content: bytes) -> tuple[str, str | None]:
    """Text of a caption file, and a remark if the encoding was not recognised."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16"), None
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return content.decode("latin-1"), "is not UTF-8 and was read as latin-1; check its accents or save it as UTF-8"


def _one_line(text: str) -> str:
    return " ".join(text.split())
