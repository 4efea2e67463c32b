"""Files named in requests: resolved within a folder, and sent so that a browser runs none of them.

A folder itself may be a link (an input folder on another disk); a link inside it that leads out of it is refused. Files
that a browser would run or render as a page are sent as downloads.
"""

from __future__ import annotations

import asyncio
import mimetypes
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast
from urllib.parse import quote

from aiohttp import web

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import is_regular
from lorasmith.core.folders import MAX_STEM_BYTES, is_reserved
from lorasmith.core.printable import HIDDEN

UNTRUSTED = "default-src 'none'; sandbox"  # content policy of responses with untrusted data


class OutsideError(LorasmithError):
    """A path leads out of its folder, or is invalid."""


class BadNameError(LorasmithError):
    """A name is not allowed for a new file."""


def contained(folder: Path, *names: str, to_write: bool = False) -> Path:
    """The resolved path of `names` below `folder`, which need not exist. Raises OutsideError if a name is invalid or
    leads out of the folder, and BadNameError for device names of Windows (on Windows, or if `to_write`).
    """
    parts = [part for name in names for part in PurePosixPath(name.replace("\\", "/")).parts]
    refused = "\0" in "".join(parts) or any(part in ("..", "/") or ":" in part for part in parts)
    if refused or any(name.startswith(("/", "\\")) for name in names):
        raise OutsideError(f"a name must stay inside its folder, got {'/'.join(names)!r}; use a relative name")
    if (to_write or sys.platform == "win32") and any(map(is_reserved, parts)):
        raise BadNameError(f"Windows has no files of the name {'/'.join(names)!r}; use another one")
    try:
        root = folder.resolve()
        path = root.joinpath(*parts).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutsideError(f"no file can have the name {'/'.join(names)!r}") from error
    if os.path.islink(path):  # noqa: PTH114 - for any name; Python 3.13 leaves links that lead to themselves
        raise OutsideError(f"a name must lead to a file, but {'/'.join(names)!r} is a link to itself")
    if path != root and root not in path.parents:
        raise OutsideError(f"a name must stay inside its folder, but {'/'.join(names)!r} is a link out of it")
    return path


def find_contained(folders: Iterable[Path], *names: str) -> Path | None:
    """The first regular file of `names` below one of `folders`, or None. Raises OutsideError."""
    found = (contained(folder, *names) for folder in folders)
    return next((path for path in found if is_regular(path)), None)


def checked_name(name: str) -> str:
    """The last part of a sent file name. Raises BadNameError if it is empty, hidden, too long or not portable."""
    last = name.replace("\\", "/").rpartition("/")[2].strip()
    stem = last.partition(".")[0]
    bad = not last or last.startswith(".") or last.endswith((".", " ")) or len(last.encode(errors="replace")) > 250
    if bad or _NOT_IN_NAMES.search(last) or is_reserved(last) or len(stem.encode(errors="replace")) > MAX_STEM_BYTES:
        raise BadNameError(f"a file cannot have the name {last!r}; use letters, digits, spaces, - and _")
    return last


def send_file(path: Path, *, name: str | None = None, cache: str = "no-cache") -> web.FileResponse:
    """A response with a file from `contained`. aiohttp handles ranges and conditional requests."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    inline = kind in _SHOWN
    headers = {
        "Content-Disposition": _disposition("inline" if inline else "attachment", name or path.name),
        "Content-Type": kind if inline else "application/octet-stream",
        "Content-Security-Policy": UNTRUSTED,
        "Cache-Control": cache,
    }
    return web.FileResponse(path, headers=headers)


async def send_zip(request: web.Request, files: Mapping[str, Path], *, name: str) -> web.StreamResponse:
    """A response with files in a ZIP file, not compressed, which is made while it is sent."""
    headers = {"Content-Disposition": _disposition("attachment", name), "Cache-Control": "no-store"}
    response = web.StreamResponse(headers={**headers, "Content-Type": "application/zip"})
    await response.prepare(request)
    blocks = _zipped(files)
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        await response.write(block)
    await response.write_eof()
    return response


def _zipped(files: Mapping[str, Path]) -> Iterator[bytes]:
    """A ZIP file in pieces."""
    made = _Unseekable()
    with zipfile.ZipFile(cast(IO[bytes], made), "w") as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(_BLOCK):
                    target.write(block)
                    yield made.taken()
    yield made.taken()


class _Unseekable:
    """What was written since it was last taken. Without `tell`, zipfile puts sizes behind files."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, block: bytes) -> int:
        self._written += block
        return len(block)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        found = bytes(self._written)
        self._written.clear()
        return found


def _disposition(kind: Literal["inline", "attachment"], name: str) -> str:
    """Whether a browser shows or stores a file, and its name."""
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", name)
    encoded = "" if plain == name else f"; filename*=UTF-8''{quote(name.encode(errors='replace'))}"
    return f'{kind}; filename="{plain}"{encoded}'


_BLOCK = 2**20
_SHOWN = frozenset(
    (
        *("image/png", "image/jpeg", "image/webp", "image/gif", "image/avif", "image/bmp", "image/x-ms-bmp"),
        *("image/tiff", "image/heic", "image/heif"),
        *("video/mp4", "video/webm", "video/quicktime", "video/x-matroska"),
        *("audio/mpeg", "audio/flac", "audio/x-flac", "audio/ogg", "audio/wav", "audio/x-wav", "audio/mp4"),
    )
)
"""Types that a browser shows and never runs; SVG can contain scripts."""
_NOT_IN_NAMES = re.compile(rf'[<>:"/\\|?*{HIDDEN}]')

for _suffix, _kind in {  # missing in some systems' tables
    ".avif": "image/avif",
    ".heic": "image/heic",
    ".heif": "image/heif",
    ".jfif": "image/jpeg",
    ".webm": "video/webm",
    ".webp": "image/webp",
}.items():
    mimetypes.add_type(_kind, _suffix)
