"""Caption files and the trigger."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.core.files import read_regular

CAPTION_SUFFIXES = (".txt", ".caption")  # suffixes of caption files, the preferred one first

MAX_CAPTION = 20_000  # characters of a caption: a text encoder reads at most some hundred of its words


class CaptionError(DataError):
    """A caption file cannot be used; `reason` is the message without `path`, for lists."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"caption file {path} {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Caption:
    """The content of a caption file."""

    text: str  # on one line, white space collapsed; may be empty
    path: Path
    lines: tuple[str, ...] = ()  # those that are not blank, white space collapsed
    is_latin_1: bool = False  # not UTF-8, so read as latin-1


def read_caption(image: Path) -> Caption | None:
    """Caption of an image from its `.txt` or `.caption` file; None without one. Raises CaptionError."""
    path = next((path for suffix in CAPTION_SUFFIXES if os.path.lexists(path := image.with_suffix(suffix))), None)
    if path is None:
        return None
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):  # noqa: PTH120 - of a loop of links, too
        raise CaptionError(path, "is a link to another folder; copy it here")
    return read_caption_file(path)


def read_caption_file(path: Path) -> Caption:
    """The content of a caption file: UTF-8, UTF-16 with byte order mark, or else latin-1. Raises CaptionError."""
    try:
        content = read_regular(path, at_most=4 * MAX_CAPTION)
    except OSError as error:
        raise CaptionError(path, f"cannot be read ({error.strerror}); replace or remove it") from error
    text, is_latin_1 = _decoded(content)
    if "\x00" in text:
        raise CaptionError(path, "is no text, as it holds zero bytes; save it as UTF-8")
    lines = tuple(filter(None, map(one_line, text.splitlines())))
    if len(text := " ".join(lines)) > MAX_CAPTION:
        raise CaptionError(path, f"has more than {MAX_CAPTION:,} characters; shorten or remove it")
    return Caption(text, path, lines, is_latin_1)


def caption_of_file_name(stem: str) -> str:
    """A caption from an image's file name: underscores become blanks, trailing numbers are dropped.

    >>> caption_of_file_name("sks_dog_0012"), caption_of_file_name("a red car (3)"), caption_of_file_name("0001")
    ('sks dog', 'a red car', '')
    >>> caption_of_file_name("robot v2")
    'robot v2'
    """
    text = one_line(stem.replace("_", " "))
    while shorter := _NUMBER_AT_END.sub("", text):
        if shorter == text:
            return text
        text = shorter
    return ""


# It looks behind so that a run of blanks is tried at its start alone.
_NUMBER_AT_END = re.compile(r"(?:^|(?<![ .#-])[ .#-]+)(?:[0-9]+|\([0-9]+\))$")


def has_trigger(text: str, trigger: str) -> bool:
    """Whether a text contains a trigger as whole words, ignoring case; False for an empty one. Both are on one line."""
    return bool(trigger) and bool(re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE))


def starts_with_trigger(text: str, trigger: str) -> bool:
    """Whether a text begins with the trigger (which may have commas) as its first tag."""
    return bool(trigger) and bool(re.match(rf"{re.escape(trigger)} *(?:,|$)", text, re.IGNORECASE))


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in front, unless it contains it (as whole words, ignoring case).

    >>> with_trigger("on a beach", "sks dog"), with_trigger("a SKS dog", "sks dog"), with_trigger("", "sks dog")
    ('sks dog, on a beach', 'a SKS dog', 'sks dog')
    """
    caption, trigger = one_line(caption), one_line(trigger)
    if not trigger or has_trigger(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def one_line(text: str) -> str:
    """`text` with white space collapsed and lone surrogates removed."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _decoded(content: bytes) -> tuple[str, bool]:
    """The text, and whether it was decoded as latin-1."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16"), False
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("latin-1"), True
