"""What is read of requests, within limits: bodies, and whole numbers in addresses."""

from __future__ import annotations

import re

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.server.error_answers import TooLargeError

__all__ = ["MAX_JSON_BYTES", "MAX_UPLOAD_BYTES", "number_in", "read_body"]

MAX_JSON_BYTES = 64 * 2**20
"""Size limit in bytes of bodies that are read whole: prompts, settings, saved workflows."""

MAX_UPLOAD_BYTES = 512 * 2**20
"""Size limit in bytes of one uploaded file."""


async def read_body(request: web.Request, *, at_most: int = MAX_JSON_BYTES) -> bytes:
    """The body of a request. Raises TooLargeError beyond `at_most` bytes."""
    content, size = bytearray(), request.content_length or 0
    if size <= at_most:
        async for chunk in request.content.iter_any():
            content += chunk
            if (size := len(content)) > at_most:
                break
    if size > at_most:
        raise TooLargeError(f"the body of a request must have at most {at_most:,} bytes; send less")
    return bytes(content)


def number_in(
    request: web.Request, name: str, *, default: int | None = None, at_least: int = 0, at_most: int = 10**12
) -> int | None:
    """A whole number in the query of a request.

    Args:
        request: the request.
        name: in the query.
        default: where it is missing.
        at_least, at_most: its range.

    Raises:
        OptionError: it is no whole number, or out of its range.
    """
    text = request.query.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not at_least <= int(text) <= at_most:
        raise OptionError(f"{name} must be a whole number between {at_least:,} and {at_most:,}, got {text[:40]!r}")
    return int(text)
