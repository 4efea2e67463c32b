"""Uploads: the files of a form, streamed to `<base>/user/lorasmith/uploads` until they are checked and moved."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import TypeVar

from aiohttp import BodyPartReader, ClientError, web
from aiohttp.http import HttpProcessingError

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.server.error_answers import TooLargeError, TooManyError
from lorasmith.server.request_parts import in_time
from lorasmith.server.server_config import FOLDER
from lorasmith.server.server_disk import disk_space

MOST_UPLOADS = 16  # requests at once

_BLOCK = 2**18
_OLD_S = 24 * 3600
_open: set[object] = set()

T = TypeVar("T")


@contextlib.contextmanager
def upload_folder(base: Path) -> Iterator[Path]:
    """A temporary folder for the files of a request. Raises TooManyError, DiskFullError and OutputError."""
    if len(_open) >= MOST_UPLOADS:
        raise TooManyError(f"there must be at most {MOST_UPLOADS} uploads at once; wait for the others")
    key = object()
    _open.add(key)
    try:
        with _new_folder(base / FOLDER / "uploads") as place:
            yield Path(place)
    finally:
        _open.discard(key)


async def form_parts(request: web.Request) -> AsyncIterator[BodyPartReader]:
    """The parts of a form, to be read in order. Raises OptionError if it is malformed, and SlowClientError."""
    if not request.content_type.startswith("multipart/"):
        raise OptionError("files are sent as multipart/form-data; send them as a form")
    reader = await _of_form(request.multipart())
    while (part := await _of_form(reader.next())) is not None:
        if not isinstance(part, BodyPartReader):
            raise OptionError("files are sent one by one in a form, got a form within a form; send them plainly")
        yield part


async def blocks(part: BodyPartReader) -> AsyncIterator[bytes]:
    """The content of a part as it arrives. Raises as `form_parts`."""
    while block := await _of_form(part.read_chunk(_BLOCK)):
        yield block


async def received(part: BodyPartReader, path: Path, *, at_most: int, read_at_most: int) -> int:
    """Write at most `at_most` bytes of a part to disk, and return its full size. Raises TooLargeError beyond
    `read_at_most` bytes, and OutputError if it cannot be written or would fill the disk.
    """
    size = 0
    try:
        with path.open("wb") as file:
            async for block in blocks(part):
                size += len(block)
                if size > read_at_most:
                    raise TooLargeError(f"an upload must have at most {read_at_most:,} bytes; send less at once")
                if size <= at_most:
                    with disk_space(path.parent, len(block)):
                        file.write(block)
    except OSError as error:
        raise OutputError(
            f"an upload cannot be written ({error.strerror}); check the disk and send it again"
        ) from error
    return size


async def _of_form(reading: Awaitable[T]) -> T:
    try:
        return await in_time(reading)
    except (ValueError, AssertionError, ClientError, HttpProcessingError) as error:  # aiohttp: malformed forms
        raise OptionError("the body of the request is no complete form; send it again") from error


def _new_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with disk_space(parent):
            for left in parent.iterdir():  # left by a killed server
                if left.stat().st_mtime < time.time() - _OLD_S:
                    shutil.rmtree(left, ignore_errors=True)
            return tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"uploads cannot be written to {parent} ({error.strerror}); check its permissions") from error
