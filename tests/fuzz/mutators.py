"""Damage to bytes, text and JSON, drawn from a seeded generator, whatever the format."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

CANARY = "lorasmith_fuzz_canary"
"""Name of a module that a file must never get imported."""

_DEEP = "@deep@"
"""Text that `json_bytes` replaces by thousands of nested lists, which json itself cannot write."""

_TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a[/]b",
    "[bold]",
    "two\nlines\r\n",
    "\u202eabc",
    "\u200e\u202d\u2066a\u2069\u061c",
    "a\u2028b\u2029c\x85d\x0be",
    "\U000e0041\U000e007f\ufff9\u00ad\u2060",
    "\x1bP1$r\x1b\\\x1b]52;c;YQ==\x07",
    "\ud800",
    "…" * 400,
    "x" * 100_000,
    "../../outside.txt",
    "/etc/passwd",
    "~/outside",
    "C:\\windows",
    "CON",
    f"{CANARY}.X",
    "antigravity.X",
    "someone/some-model",
    "https://example.com/x.safetensors",
    "${HOME}",
    "%s%n{0}",
    "<script>alert(1)</script>",
    "1e400",
    "NaN",
    "null",
    "9" * 5000,
    "(" * 3000,
    "(a:1e999)",
    "٣",
    "é" * 130,
)
_NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.0, 1e-320, 1e38, 1e308, 1.5)
_NOT_NUMBERS = (float("nan"), float("inf"), -float("inf"), 10**400)


def nasty_text(rng: random.Random) -> str:
    """Text that is empty, long, full of control characters, a path, an import path, markup or just short."""
    if rng.random() < 0.2:
        return "".join(
            chr(rng.choice((rng.randrange(32), rng.randrange(0x2500), 0x1B))) for _ in range(rng.randrange(9))
        )
    return rng.choice(_TEXTS)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy with a few bits flipped, bytes set, pieces removed, inserted, repeated or blanked, or its end cut off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(result) + 1)
        if rng.random() < 0.5:  # headers are at the start
            at = min(at, rng.randrange(256))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0 if at < len(result):
                result[at] ^= 1 << rng.randrange(8)
            case 1:
                result[at : at + length] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * length
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = rng.randbytes(length)
            case 4:
                result[at:at] = result[max(0, at - length) : at]
            case 5:
                del result[at:]
            case _:
                result[at : at + length] = rng.randbytes(length)
    return bytes(result)


def nasty_value(rng: random.Random) -> Any:
    """A JSON value that readers may not expect."""
    makers: list[Callable[[], Any]] = [
        lambda: nasty_text(rng),
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_NOT_NUMBERS),
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice(([], {}, [[]], {"": {}}, [None], [0] * 5000)),
        lambda: _DEEP,
        lambda: {nasty_text(rng): nasty_text(rng)},
    ]
    return rng.choice(makers)()


def damaged_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with some members replaced, removed, renamed, repeated or wrapped."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place, key = _somewhere(rng, root)
        inside = place[key]
        match rng.randrange(8):
            case 0 if place is not root:
                del place[key]
            case 1 if isinstance(place, dict):
                place[nasty_text(rng)] = place.pop(key)
            case 2 if isinstance(place, list) and place is not root:
                place.insert(key, copy.deepcopy(inside))
            case 3:
                place[key] = [inside]
            case 4:
                place[key] = {"a": inside}
            case 5 if isinstance(inside, dict):
                inside[nasty_text(rng)] = nasty_value(rng)
            case 6 if isinstance(inside, (int, float)) and not isinstance(inside, bool):
                place[key] = rng.choice((-inside, inside + 1, inside * 10**6, str(inside), *_NUMBERS))
            case _:
                place[key] = nasty_value(rng)
    return root[0]


def json_bytes(value: Any) -> bytes:
    """A JSON text, with what only lenient writers allow: NaN, lone surrogates as escapes, deep nesting."""
    text = json.dumps(value).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode("utf-8", "surrogatepass")


def placed_json(rng: random.Random, value: Any) -> bytes:
    """The bytes of a damaged JSON file: members in most cases, its text in the others."""
    if rng.random() < 0.85:
        return json_bytes(damaged_json(rng, value))
    return damaged_bytes(rng, json_bytes(value))


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The bytes of a safetensors file with a damaged header, damaged bytes, or its body unaligned."""
    if rng.random() < 0.15:
        return unaligned_safetensors(data, rng.choice((1, 2, 3, 4, 7)))
    if rng.random() < 0.5:
        return damaged_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    text = json_bytes(damaged_json(rng, json.loads(data[8 : 8 + length])))
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def two_directories(one: bytes, other: bytes) -> bytes:
    """Two zip archives as one, with a central directory each: readers that look for the last one before its locator
    find that of the first archive, those that follow the locator find the other's.
    """
    (body, directory, count), (second, others, number) = _parts(one), _parts(other)
    moved = b"".join(_moved(entry, len(body)) for entry in _entries(others))
    start = len(body) + len(second)
    result = body + second + moved + _end_of_directory(number, len(moved), start)
    located = start + len(moved)
    at = len(result)
    result += directory + _end_of_directory(count, len(directory), at)
    result += b"PK\6\7" + struct.pack("<IQI", 0, located, 1)
    return result + b"PK\5\6" + struct.pack("<4H2IH", *(2**16 - 1,) * 4, *(2**32 - 1,) * 2, 0)


def with_entry(archive: bytes, end: str, content: bytes) -> bytes:
    """A zip archive with other content in the entry whose name ends so."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), content if entry.filename.endswith(end) else old.read(entry))
    return made.getvalue()


def unaligned_safetensors(data: bytes, by: int) -> bytes:
    """A safetensors file whose header is longer by a number of blanks, and so its body elsewhere."""
    length = min(int.from_bytes(data[:8], "little"), len(data))
    return (length + by).to_bytes(8, "little") + data[8 : 8 + length] + b" " * by + data[8 + length :]


def _parts(archive: bytes) -> tuple[bytes, bytes, int]:
    """Entries, central directory, and number of entries of a zip archive."""
    end = archive.rfind(b"PK\5\6")
    count, size, start = struct.unpack("<HII", archive[end + 10 : end + 20])
    return archive[:start], archive[start : start + size], count


def _entries(directory: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(directory):
        size = 46 + sum(struct.unpack("<3H", directory[at + 28 : at + 34]))
        found.append(directory[at : at + size])
        at += size
    return found


def _moved(entry: bytes, by: int) -> bytes:
    (offset,) = struct.unpack("<I", entry[42:46])
    return entry[:42] + struct.pack("<I", offset + by) + entry[46:]


def _end_of_directory(count: int, size: int, start: int) -> bytes:
    return b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)


def _somewhere(rng: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """A container in a JSON value, and a key or index of it."""
    place: Any = root
    key: Any = 0
    while True:
        inside = place[key]
        fits = isinstance(inside, MutableMapping | MutableSequence) and len(inside) > 0
        if not fits or rng.random() < 0.15:
            return place, key
        place = inside
        key = rng.choice(list(place)) if isinstance(place, MutableMapping) else rng.randrange(len(place))
