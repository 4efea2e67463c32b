"""What handlers of requests share: the parts of the server, bodies and answers within limits, uploads, errors.

Errors are responses with a status and `{"error": {"kind", "message", "details"}}`. The files of a form are streamed to
`<base>/user/lorasmith/uploads` until they are checked and moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import BodyPartReader, ClientError, web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.core.files import is_full
from lorasmith.core.folders import Folders
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.runs.queue import JobStore, StoreError
from lorasmith.server.dispatcher import Assistant, Dispatcher, RefusedError
from lorasmith.server.hub import Hub, LogBook
from lorasmith.server.models.downloads import Downloads
from lorasmith.server.server_config import FOLDER, ServerConfig
from lorasmith.server.server_disk import disk_space


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The parts of a running server."""

    config: ServerConfig
    folders: Folders
    store: JobStore  # read only; the dispatcher changes jobs
    dispatcher: Dispatcher
    hub: Hub
    downloads: Downloads
    assistant: Assistant  # answers what needs torch, numpy, PIL, `runs` or `nodes`
    log: LogBook  # lines of the child processes


CONTEXT: web.AppKey[ServerContext] = web.AppKey("context", ServerContext)


_STATUS = {
    "DiskFullError": 507,
    "DownloadStateError": 409,
    "DuplicateJobError": 409,
    "GatedError": 403,
    "InternalError": 500,
    "JobStateError": 409,
    "KeyTakenError": 409,
    "OutsideError": 403,
    "QueueFullError": 429,
    "StaleCaptionError": 409,
    "StaleDraftError": 409,
    "TakenNameError": 409,
    "SlowClientError": 408,
    "TooLargeError": 413,
    "TooManyError": 429,
    "UnavailableError": 503,
    "UnknownDownloadError": 404,
    "UnknownFileError": 404,
    "UnknownJobError": 404,
}
"""By kind, raised here or by the assistant; all others are 400."""


class TooManyError(LorasmithError):
    """Too many streams or uploads at once."""


class TooLargeError(LorasmithError):
    """A request body is too large."""


class SlowClientError(LorasmithError):
    """A client has stopped sending its body."""


def status_of(error: LorasmithError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, StoreError):
        return 507 if error.is_full else 503
    if is_full(error):
        return 507
    return _STATUS.get(_kind(error), 400)


def error_response(status: int, kind: str, message: str, details: object = None) -> web.Response:
    """An error response, in the form of all routes except ComfyUI's; `details` are JSON values."""
    text = json.dumps({"error": {"kind": kind, "message": message, "details": details}})
    return web.json_response(text=text, status=status, headers={"Cache-Control": "no-store"})


@web.middleware
async def errors_answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: exceptions become responses; a bug is logged, and its response names the log."""
    try:
        return await handler(request)
    except LorasmithError as error:
        details = getattr(error, "details", None)
        return error_response(status_of(error), _kind(error), str(error), details)
    except (web.HTTPException, ConnectionError):  # responses of aiohttp; client disconnected
        raise
    except Exception as error:
        if request.writer.output_size:  # headers are sent: closing the connection marks the response as incomplete
            raise
        context = request.app[CONTEXT]
        context.log.add("server", f"{request.method} {request.path} failed\n{traceback.format_exc()}")
        log = context.config.log.relative_to(context.config.base).as_posix()  # the client may be unauthenticated
        message = f"the server failed ({type(error).__name__}); the reason is in {log} of its base folder"
        return error_response(500, "InternalError", message)


def _kind(error: LorasmithError) -> str:
    return error.kind if isinstance(error, RefusedError) else type(error).__name__


MAX_JSON_BYTES = 16 * 2**20  # of bodies that are read whole: prompts, settings, captions, saved workflows

MAX_UPLOAD_BYTES = 512 * 2**20  # of one file

IDLE_TIMEOUT_S = 60.0
"""Seconds without progress in reading a body or sending pieces, after which the client is disconnected."""

_LOOK_S = 0.5  # between two looks whether a client is there
_MOST_BODIES_BYTES = 256 * 2**20
_SMALL_BYTES = 2**16
_bodies: dict[object, int] = {}  # sizes of bodies being read

T = TypeVar("T")


async def in_time(reading: Awaitable[T]) -> T:
    """Await the client's next data. Raises SlowClientError after `IDLE_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            return await reading
    except TimeoutError:
        raise SlowClientError(f"nothing arrived for {IDLE_TIMEOUT_S:g} seconds; send the request again") from None


async def read_body(request: web.Request, *, at_most: int = MAX_JSON_BYTES) -> bytes:
    """The body of a request. Raises TooLargeError, TooManyError (too many large bodies) and SlowClientError."""
    content, size, key = bytearray(), request.content_length or 0, object()
    try:
        while size <= at_most and (chunk := await in_time(request.content.readany())):
            content += chunk
            size = max(size, len(content))
            _bodies[key] = len(content)
            if sum(_bodies.values()) > _MOST_BODIES_BYTES:
                raise TooManyError("too many large requests are sent at once; send them one after another")
    finally:
        _bodies.pop(key, None)
    if size > at_most:
        raise TooLargeError(f"the body of a request must have at most {at_most:,} bytes; send less")
    return bytes(content)


async def parsed_in_thread(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, in a thread unless the input has a small `size` in bytes."""
    return function(*arguments) if size <= _SMALL_BYTES else await asyncio.to_thread(function, *arguments)


async def while_connected(request: web.Request, answering: Coroutine[Any, Any, T]) -> T:
    """Await what changes nothing; cancelled when the client has disconnected. Raises ConnectionResetError then."""
    task = asyncio.ensure_future(answering)
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the client has disconnected")
        return task.result()
    finally:
        task.cancel()


async def send(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send a part of a response. Raises ConnectionResetError if the client has disconnected, or does not read."""
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()  # closing the response would block, too
        raise ConnectionResetError("the client does not read") from None


async def send_json_pieces(request: web.Request, pieces: Iterable[str]) -> web.StreamResponse:
    """Stream JSON text as it is generated, so that it is never in memory as a whole."""
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    await response.prepare(request)
    waiting = bytearray()
    for piece in pieces if request.method != "HEAD" else ():
        waiting += piece.encode()
        if len(waiting) > _SMALL_BYTES:
            await send(request, response, bytes(waiting))
            waiting.clear()
    await send(request, response, bytes(waiting))
    await response.write_eof()
    return response


def number_in(request: web.Request, name: str, *, at_least: int = 0, at_most: int = 10**12) -> int | None:
    """An integer in the query of a request. Raises OptionError if it is malformed or out of range."""
    text = request.query.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not at_least <= int(text) <= at_most:
        raise OptionError(f"{name} must be a whole number between {at_least:,} and {at_most:,}, got {text[:40]!r}")
    return int(text)


MOST_UPLOADS = 16  # requests at once

_BLOCK = 2**18
_OLD_S = 24 * 3600
_open: set[object] = set()


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
        raise OptionError("the body of the request is not a complete form; send it again") from error


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


def refused(status: int, message: str) -> web.Response:
    """An error response of ComfyUI's protocol."""
    return web.json_response({"error": message}, status=status)


def table(routes: list[tuple[str, str, Handler]]) -> list[web.RouteDef]:
    """Routes of ComfyUI's protocol from (method, path, handler)."""
    return [web.route(method, path, _answering(handler)) for method, path, handler in routes]


def _answering(handler: Handler) -> Handler:
    """Wraps a handler so that its LorasmithErrors become responses."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except LorasmithError as error:
            return refused(status_of(error), str(error))

    return answer


async def read_json(request: web.Request, *, empty: Any = ...) -> Any:
    """The JSON of a request, whatever its Content-Type; `empty` for an empty body, if allowed. Raises OptionError."""
    body = await read_body(request)
    if not body.strip() and empty is not ...:
        return empty
    try:
        return await parsed_in_thread(len(body), parse_foreign_json, body)
    except ValueError as error:
        raise OptionError(f"the body must be JSON, but it {error}") from error


async def read_object(request: web.Request, *, empty: Any = ...) -> dict[str, Any]:
    """An object as `read_json`."""
    value = await read_json(request, empty=empty)
    if not isinstance(value, dict):
        raise OptionError(f"the body must be an object, got {type(value).__name__}")
    return value
