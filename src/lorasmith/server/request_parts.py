"""Reading requests and sending responses in pieces, with limits of size and time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.server.error_answers import SlowClientError, TooLargeError, TooManyError

MAX_JSON_BYTES = 16 * 2**20  # of bodies that are read whole: prompts, settings, captions, saved workflows

MAX_UPLOAD_BYTES = 512 * 2**20  # of one file

IDLE_TIMEOUT_S = 60.0
"""Seconds without progress in reading a body or sending pieces, after which the client is disconnected."""

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


async def apart(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, in a thread unless the input has a small `size` in bytes."""
    return function(*arguments) if size <= _SMALL_BYTES else await asyncio.to_thread(function, *arguments)


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


def number_in(
    request: web.Request, name: str, *, default: int | None = None, at_least: int = 0, at_most: int = 10**12
) -> int | None:
    """An integer in the query of a request. Raises OptionError if it is malformed or out of range."""
    text = request.query.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not at_least <= int(text) <= at_most:
        raise OptionError(f"{name} must be a whole number between {at_least:,} and {at_most:,}, got {text[:40]!r}")
    return int(text)
