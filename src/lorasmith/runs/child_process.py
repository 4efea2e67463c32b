"""A child process (its lines, its heartbeats, its end, its restart), and the messages between both.

A message is a JSON object and optional bytes, length-prefixed:

    4 bytes  length of the JSON, big-endian
    4 bytes  length of the bytes
    JSON, bytes

The parent uses asyncio, a child blocking calls. A child uses its original stdin and stdout; what its code prints goes
to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from lorasmith.core.printable import printable

TOKEN_VARIABLE, SECRET_VARIABLE = "LORASMITH_TOKEN", "LORASMITH_NOTIFY_SECRET"
RAY_VARIABLE = "RAY_ADDRESS"  # Ray's own
"""Environment variables of a server's token and of the secret of its notices, which child processes do not inherit."""

_LONGEST_LINE = 64 * 2**10


class ChildOwner(Protocol):
    """Who started a child process; called in the event loop."""

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        """A message of the process, but for heartbeats."""

    def on_line(self, line: str) -> None:
        """A line of its stderr."""

    def on_end(self, why: str) -> None:
        """It has ended, for a reason in a clause; called once, unless the process could not be started."""


class ChildProcess:
    """A process with a channel on its stdin and stdout, killed after `silence_s` seconds without a message."""

    def __init__(
        self,
        command: Sequence[str],
        owner: ChildOwner,
        *,
        cwd: Path,
        silence_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._cwd = cwd
        self._silence_s = silence_s
        self._owner = owner
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None
        self._channel: AsyncChannel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._why = ""
        self._last_line = ""
        self.heard = time.monotonic()

    async def start(self, first: Mapping[str, Any]) -> None:
        """Start the process and send its first message. Raises OSError."""
        # Its own session: Ctrl-C in the terminal reaches only the parent, which then asks its children to exit.
        detached: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            detached = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._cwd,
            env={**_inherited(), "PYTHONUNBUFFERED": "1", **self._environment},
            limit=_LONGEST_LINE,
            **detached,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._channel = AsyncChannel(self._process.stdout, self._process.stdin)
        self._channel.send(first)
        self.heard = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._read(self._process, self._channel)),
            asyncio.create_task(self._read_lines(self._process.stderr)),
            asyncio.create_task(self._watch()),
        ]

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a message; it is lost if the process has ended."""
        if self._channel is not None:
            self._channel.send(head, body)

    def kill(self, why: str) -> None:
        """Kill the process; `why` is the reason for `on_end`."""
        if self._process is not None and self._process.returncode is None:
            self._why = self._why or why
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, grace_s: float) -> None:
        """Ask the process to exit by closing its stdin; kill it after `grace_s` seconds."""
        if self._process is None or self._channel is None:
            return
        self._channel.close()
        done, _ = await asyncio.wait(self._tasks[:1], timeout=grace_s)
        if not done:
            self.kill(f"it did not end within {grace_s:g} seconds")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        try:
            while (message := await channel.receive()) is not None:
                self.heard = time.monotonic()
                head, body = message
                if head.get("type") != "beat":
                    self._owner.on_message(head, body)
        except BrokenChannelError as error:
            self.kill(str(error))
        except BaseException:
            self.kill("one of its messages could not be handled")
            raise
        finally:
            channel.close()
            # Its output is closed: it has ended or is about to.
            ending = asyncio.create_task(process.wait())
            done, _ = await asyncio.wait([ending], timeout=10)
            if not done:
                self.kill("it closed its output without ending")
            code = await ending
            self._tasks[2].cancel()
            await asyncio.wait([self._tasks[1]], timeout=1)  # the rest of its stderr
            self._tasks[1].cancel()
            last_line = f"; its last line is {printable(self._last_line, limit=200)}" if self._last_line else ""
            self._owner.on_end((self._why or _reason(code)) + last_line)

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit, which readline has skipped
                continue
            if not line:
                return
            # Progress bars are redrawn with carriage returns; keep the last state.
            if text := line.decode(errors="backslashreplace").rstrip().rpartition("\r")[2]:
                self._last_line = text
                self._owner.on_line(text)

    async def _watch(self) -> None:
        pause = self._silence_s / 10
        while True:
            before = time.monotonic()
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > 2 * pause + 1:  # the parent itself was suspended
                self.heard = now
            elif now - self.heard > self._silence_s:
                self.kill(f"it sent no heartbeat for {self._silence_s:g} seconds")


def _inherited() -> dict[str, str]:
    """The environment without the token; module paths do not depend on the current folder."""
    found = {name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, SECRET_VARIABLE)}
    if paths := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths.split(os.pathsep))
    return found


def _reason(code: int) -> str:
    if code < 0 and sys.platform != "win32":
        import signal

        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = ", as systems do when memory runs out" if name == "SIGKILL" else ""
        return f"it was ended by {name}{memory}"
    return f"it ended with exit status {code}"


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
    """The parent's end: reads a child's stdout and writes to its stdin."""

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
        """Raises OSError if the parent has closed the channel."""
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
