"""Server-sent events (text/event-stream): all jobs, one job with the view of its run, and a run as its log grows.

The first `view` of a stream is whole, later ones have what has changed, so a reader that reconnects misses nothing.
Streams do not end by themselves; an idle one sends a comment as heartbeat, which detects closed connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError
from lorasmith.server.api.endpoint import Call
from lorasmith.server.api.job_answers import job_answer, job_row
from lorasmith.server.hub import Notice, SentViews, Subscription
from lorasmith.server.request_handling import ServerContext, TooManyError, send

MOST_STREAMS = 64  # open at once

_POLL_S, _BEAT_S, _RETRY_MS = 1.0, 15.0, 2000
_FIRST_JOBS = 100
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
    """`job`: the job, at first and at each change. `view`: what is shown of its run, at first and as it changes.
    `graph`: events of a graph's nodes. `progress`: steps of a drawing.
    """
    id = call.path("id")
    job = context.store.get(id)
    with context.hub.subscribe(job_id=id, kinds=("job", "view", "graph", "progress")) as notices:
        views = context.hub.views(id)
        if not views and job.run:
            views = [await _logged_view(context, job.run, is_begun=False)]
        async with _stream(call.request) as stream:
            await stream.send("job", job_answer(job, with_graph=False))
            for view in views:
                await stream.send_view(view)
            async for notice in _each(notices):
                if notice is None:
                    await stream.beat()
                elif notice.kind == "job":
                    await stream.send("job", job_row(notice.data))
                elif notice.kind in ("graph", "progress"):
                    await stream.send(notice.kind, notice.data)
                else:
                    await stream.send_view(notice)
        return stream.response


async def run_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`view`: what is shown of the run, at first and as its log grows."""
    id = call.path("id")
    view = await _logged_view(context, id)
    with context.hub.subscribe(kinds=()) as notices:  # none arrive; the subscription ends with the server
        async with _stream(call.request) as stream:
            await stream.send_view(view)
            async for _ in _each(notices, pause_s=_POLL_S):
                await stream.send_view(await _logged_view(context, id))
                await stream.beat(quiet=True)
        return stream.response


async def _logged_view(context: ServerContext, run: str, *, is_begun: bool = True) -> Notice:
    """The view of a run's log."""
    view = await context.assistant.ask("run_view", id=run, is_begun=is_begun)
    return Notice(kind="view", data={"node_id": None, "view": view})


class _Stream:
    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self.response = response
        self._request = request
        self._first = f"retry: {_RETRY_MS}\n\n"
        self._sent = asyncio.get_running_loop().time()
        self._views = SentViews()

    async def send_view(self, notice: Notice) -> None:
        """Send what has changed of a view since it was last sent."""
        if changes := self._views.changes(notice):
            await self.send("view", {"node_id": notice.data["node_id"], "view": changes})

    async def send(self, event: str, data: Any) -> None:
        """Send an event; waits while the reader's buffer is full."""
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
        lines = [f"event: {event}", *(f"data: {line}" for line in _LINES.split(text))]
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
