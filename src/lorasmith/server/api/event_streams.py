"""Server-sent events (text/event-stream): all jobs, one job, and the events of a run as its log grows.

The id of a run's event is its place in the log, so that a reader reconnects with `Last-Event-ID` (or `?after=`).
Streams do not end by themselves; an idle one sends a comment as heartbeat, which detects closed connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError
from lorasmith.server.api.endpoint import Call
from lorasmith.server.api.job_answers import job_answer, job_row
from lorasmith.server.hub import Notice, Subscription
from lorasmith.server.log_tail import LogTail
from lorasmith.server.request_handling import ServerContext, TooManyError, send
from lorasmith.training.events import KINDS

MOST_STREAMS = 64  # open at once

_POLL_S, _BEAT_S, _RETRY_MS = 0.4, 15.0, 2000
_FIRST_JOBS = 100
_NOT_LOGGED = frozenset(("Drawing", "CaptionEncoded"))  # events of training that are not in its log
_open: set[object] = set()


async def all_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`queue` and `job` events: first the waiting and running jobs, then every change."""
    with context.hub.subscribe(kinds=("job", "queue")) as notices:
        async with _stream(call.request) as stream:
            await stream.send("queue", context.store.queue_counts())
            for job in context.store.active(_FIRST_JOBS):
                await stream.send("job", job_row(job))
            async for notice in _each(notices):
                if notice is None:
                    await stream.beat()
                elif notice.kind == "job":
                    await stream.send("job", job_row(notice.data))
                else:
                    await stream.send("queue", notice.data)
        return stream.response


async def job_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`job`: the job, at first and at each change. `preparation`: events before the first step. `training`: the run's
    events, with the ids of its log, and those that are not logged. `graph`: events of a graph's nodes.
    """
    id = call.path("id")
    job = context.store.get(id)
    with context.hub.subscribe(job_id=id, kinds=("job", "training", "graph")) as notices:
        tail = await _tail(context, job.run, call, is_begun=False)
        async with _stream(call.request) as stream:
            await stream.send("job", job_answer(job, with_graph=False))
            await _send_log(stream, tail)
            async for notice in _each(notices, pause_s=_POLL_S):
                await _send_log(stream, tail)  # before the notice, so that the last events come before the job's end
                if notice is None:
                    await stream.beat(quiet=True)
                elif notice.kind == "job":
                    if tail is None and notice.data.get("run"):
                        tail = await _tail(context, notice.data["run"], call, is_begun=False)
                        await _send_log(stream, tail)
                    await stream.send("job", job_row(notice.data))
                elif notice.kind == "graph":
                    await stream.send("graph", notice.data)
                else:
                    await _send_notice(stream, notice, is_tailed=tail is not None)
        return stream.response


async def run_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`training`: the run's events, with the ids of its log. `reset`: the log was started again; discard all events."""
    tail = await _tail(context, call.path("id"), call)
    with context.hub.subscribe(kinds=()) as notices:  # none arrive; the subscription ends with the server
        async with _stream(call.request) as stream:
            await _send_log(stream, tail)
            async for _ in _each(notices, pause_s=_POLL_S):
                await _send_log(stream, tail)
                await stream.beat(quiet=True)
        return stream.response


class _Stream:
    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self.response = response
        self._request = request
        self._first = f"retry: {_RETRY_MS}\n\n"
        self._sent = asyncio.get_running_loop().time()

    async def send(self, event: str, data: Any, *, id: str = "") -> None:
        """Send an event; waits while the reader's buffer is full."""
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
        lines = [f"event: {event}", *([f"id: {id}"] if id else []), *(f"data: {line}" for line in _LINES.split(text))]
        await self._write("\n".join(lines) + "\n\n")

    async def beat(self, *, quiet: bool = False) -> None:
        """Send a comment; if `quiet`, only after a while without events."""
        if not quiet or asyncio.get_running_loop().time() - self._sent >= _BEAT_S:
            await self._write(":\n\n")

    async def _write(self, text: str) -> None:
        self._sent = asyncio.get_running_loop().time()
        first, self._first = self._first, ""
        await send(self._request, self.response, (first + text).encode("utf-8", "replace"))


_LINES = re.compile(r"\r\n|\r|\n")


@contextlib.asynccontextmanager
async def _stream(request: web.Request) -> AsyncIterator[_Stream]:
    """A stream that ends without an error when its reader disconnects. Raises TooManyError."""
    if len(_open) >= MOST_STREAMS:
        raise TooManyError(f"there must be at most {MOST_STREAMS} streams of events at once; close other pages")
    key = object()
    _open.add(key)
    try:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(request)
        stream = _Stream(request, response)
        with contextlib.suppress(ConnectionResetError):  # the reader has disconnected, or does not read
            try:
                yield stream
            except LorasmithError as error:  # too late for an answer with a status
                fault = {"kind": getattr(error, "kind", type(error).__name__), "message": str(error)}
                await stream.send("fault", fault)
    finally:
        _open.discard(key)


async def _each(notices: Subscription, *, pause_s: float = _BEAT_S) -> AsyncIterator[Notice | None]:
    """Notices as they arrive; None after a pause without any. Ends with the subscription."""
    while True:
        notice = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                try:
                    notice = await anext(notices)
                except StopAsyncIteration:
                    return
        yield notice


async def _tail(context: ServerContext, run: str | None, call: Call, *, is_begun: bool = True) -> LogTail | None:
    """The log of a run, after the last event that the reader received; None without a run."""
    if not run:
        return None
    path = await context.assistant.ask("run_log", id=run, is_begun=is_begun)
    return LogTail(Path(path), call.request.headers.get("Last-Event-ID") or call.text("after"))


async def _send_log(stream: _Stream, tail: LogTail | None) -> None:
    while tail is not None and (events := tail.read()):
        if tail.begins_again:
            await stream.send("reset", {})
        for event in events:
            await stream.send("training", event.data, id=event.place)


async def _send_notice(stream: _Stream, notice: Notice, *, is_tailed: bool) -> None:
    """Send an event of training or preparation, unless it is read from the log."""
    name = str(notice.data.get("event"))
    if name not in KINDS:
        await stream.send("preparation", notice.data)
    elif name in _NOT_LOGGED:
        await stream.send("preparation" if name == "CaptionEncoded" else "training", notice.data)
    elif not is_tailed:
        await stream.send("preparation", notice.data)
