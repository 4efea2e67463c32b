r"""Text fit to print: amounts, and text of strangers (names of files and tensors, metadata, captions, messages).

Terminals obey control characters (they move the cursor, set the title, write the clipboard), and direction marks
reorder a name on screen. Both are replaced by JSON's escapes (`\\u001b`), so that JSON stays JSON. Joiners, which
several scripts and emoji need, are kept.
"""

from __future__ import annotations

import json
import os
import re

MAX_SENTENCE = 300  # characters of an error message


def printable(text: object, *, limit: int = 10_000, keep: str = "") -> str:
    """`text` on one line, without characters that a terminal obeys, except those in `keep` (such as line breaks).

    Longer than `limit` characters, its middle is replaced by an ellipsis.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else json.dumps(match[0])[1:-1]

    # Shortened before, so that escaping takes no longer for a text of gigabytes.
    return _shortened(_HIDDEN.sub(escaped, _shortened(str(text), limit)), limit)


def one_line_of(error: Exception) -> str:
    """Another package's error message on one line, without its full stop; the kind of error if it is empty."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def sentence(text: object, *, limit: int = MAX_SENTENCE) -> str:
    """A message on one line of at most `limit` characters.

    The longest words (paths, names) and quotations lose their middle first, then the sentence itself does, as the rule
    is at its start and the remedy at its end.
    """
    shown = printable(text, limit=20 * limit)
    for longest in range(limit, 40, -10):
        for piece in (_WORD, _QUOTATION):
            if len(shown) > limit:
                parts = piece.split(shown)  # every second one is a match
                shown = "".join(_shortened(part, longest) if i % 2 else part for i, part in enumerate(parts))
    if len(shown) <= limit:
        return shown
    start, end = shown[: limit // 2 - 2], shown[len(shown) - limit // 2 + 1 :]
    return f"{start.rpartition(' ')[0] or start} … {end.partition(' ')[2] or end}"


def first_line(error: BaseException) -> str:
    """The first line of another package's error without its full stop, the name of its class if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


HIDDEN = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff"
)
"""Ranges of a pattern: C0 and C1, soft hyphen, marks of direction and of order, line and paragraph separators,
invisible operators, halves of surrogate pairs (names that are not UTF-8), annotations and tags.
"""

_HIDDEN = re.compile(f"[{HIDDEN}]")
_WORD = re.compile(r"(\S+)")
_QUOTATION = re.compile(r"('[^']+'|\"[^\"]+\")")


def _shortened(text: str, limit: int) -> str:
    """`text`, or its start and (longer, as it says more of a path) its end."""
    if len(text) <= limit:
        return text
    end = (limit - 1) * 3 // 5
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"


def described(value: object) -> str:
    """What a caller passed, for messages: plain values as they are, others by their type (`a DataLoader`)."""
    if value is None or isinstance(value, bool | int | float | str | bytes | os.PathLike):
        return printable(repr(value), limit=60)
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def memory_text(size_bytes: int) -> str:
    """`512 MiB` or `1.5 GiB`."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def count_text(count: int, noun: str) -> str:
    """`1 step` or `2,000 steps`, for nouns with a regular plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def time_text(seconds: float) -> str:
    """A duration as hours, minutes and seconds: `0:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
