"""Caption files and the trigger."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.core.files import read_regular

__all__ = ["CAPTION_SUFFIXES", "MAX_CAPTION", "Caption", "one_line", "read_caption", "with_trigger"]

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, the preferred one first."""

MAX_CAPTION = 20_000
"""Characters of a caption: a text encoder reads at most some hundred of its words."""


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
        DataError: the file exists but cannot be read, or has more than `MAX_CAPTION` characters.
    """
    path = next((path for suffix in CAPTION_SUFFIXES if os.path.lexists(path := image.with_suffix(suffix))), None)
    if path is None:
        return None
    try:
        content = read_regular(path, at_most=4 * MAX_CAPTION)
    except OSError as error:
        raise DataError(f"caption file {path} cannot be read ({error.strerror}); replace or remove it") from error
    text, note = _decoded(content)
    if len(text := one_line(text)) > MAX_CAPTION:
        raise DataError(f"caption file {path} has more than {MAX_CAPTION:,} characters; shorten or remove it")
    return Caption(text, path, note and f"caption file {path} {note}")


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in front, unless it contains it (as whole words, ignoring case).

    >>> with_trigger("on a beach", "sks dog"), with_trigger("a SKS dog", "sks dog"), with_trigger("", "sks dog")
    ('sks dog, on a beach', 'a SKS dog', 'sks dog')
    """
    caption, trigger = one_line(caption), one_line(trigger)
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def one_line(text: str) -> str:
    """`text` with each run of white space a single blank, and without lone surrogates, which are no text."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _decoded(content: bytes) -> tuple[str, str | None]:
    """Text of a caption file, and a remark if the encoding was not recognised."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16"), None
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return content.decode("latin-1"), "is not UTF-8 and was read as latin-1; check its accents or save it as UTF-8"
