"""Messages between the server and its child processes: a JSON object and optional bytes, length-prefixed.

    4 bytes  length of the JSON, big-endian
    4 bytes  length of the bytes
    JSON, bytes

The server uses asyncio, a child blocking calls. A child uses its original stdin and stdout; what its code prints goes
to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO, TypeAlias

Message: TypeAlias = tuple[dict[str, Any], bytes]  # a JSON object, and bytes, which may be empty

MOST_JSON_BYTES, MOST_BODY_BYTES = 512 * 2**20, 2**30  # longer messages are bugs

_LENGTHS = struct.Struct(">II")


class BrokenChannelError(Exception):
    """The received bytes are not a message."""


def packed(head: Mapping[str, Any], body: bytes = b"") -> bytes:
    """A message as bytes. Raises ValueError if it exceeds the limits, and TypeError if `head` is not JSON."""
    text = json.dumps(head, separators=(",", ":")).encode()
    if len(text) > MOST_JSON_BYTES or len(body) > MOST_BODY_BYTES:
        raise ValueError(f"a message must have at most {MOST_JSON_BYTES} bytes of JSON, got {len(text)}")
    return b"".join((_LENGTHS.pack(len(text), len(body)), text, body))


def _lengths(prefix: bytes) -> tuple[int, int]:
    head, body = _LENGTHS.unpack(prefix)
    if head > MOST_JSON_BYTES or body > MOST_BODY_BYTES:
        raise BrokenChannelError(f"a message must begin with its lengths, got {prefix!r}")
    return head, body


def _head(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BrokenChannelError(f"a message must be JSON, got {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise BrokenChannelError(f"a message must be a JSON object, got {text[:80]!r}")
    return found


class AsyncChannel:
    """The server's end: reads a child's stdout and writes to its stdin."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> Message | None:
        """The next message; None at the end, even within a message. Raises BrokenChannelError."""
        try:
            head, body = _lengths(await self._reader.readexactly(_LENGTHS.size))
            return _head(await self._reader.readexactly(head)), await self._reader.readexactly(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Queue a message; it is lost if the child has ended, which the reader detects."""
        if not self._writer.is_closing():
            self._writer.write(packed(head, body))

    def close(self) -> None:
        """Close the child's stdin, which asks it to exit."""
        if not self._writer.is_closing():
            self._writer.close()


class BlockingChannel:
    """A child's end. `send` is thread-safe."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._lock = threading.Lock()

    def receive(self) -> Message | None:
        """The next message; None at the end. Raises BrokenChannelError."""
        prefix = self._exactly(_LENGTHS.size)
        if prefix is None:
            return None
        head, body = _lengths(prefix)
        text, content = self._exactly(head), self._exactly(body)
        return None if text is None or content is None else (_head(text), content)

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Raises OSError if the server has closed the channel."""
        content = packed(head, body)
        with self._lock:
            self._outgoing.write(content)
            self._outgoing.flush()

    def _exactly(self, size: int) -> bytes | None:
        parts = []
        while size:
            try:
                part = self._incoming.read(size)
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def channel_of_child() -> BlockingChannel:
    """The channel on stdin and stdout. Call it first: later prints, also those of C libraries, go to stderr."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        for descriptor in (incoming, outgoing):
            msvcrt.setmode(descriptor, os.O_BINARY)
    return BlockingChannel(os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb"))
