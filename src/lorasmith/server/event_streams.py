"""Server-sent events (text/event-stream): all jobs, one job with the view of its run, and a run as its log grows.
A browser has six connections to a server, all tabs together, so one stream can have all of these.

The first `view` of a stream is whole, later ones have what has changed, so a reader that reconnects misses nothing.
Streams do not end by themselves; an idle one sends a comment as heartbeat, which detects closed connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.server.endpoint import Call
from lorasmith.server.hub import Notice, SentViews, Subscription
from lorasmith.server.jobs.job_rows import job_answer, job_row
from lorasmith.server.request_handling import ServerContext, TooManyError, send

MOST_STREAMS = 64  # open at once
MOST_TOPICS = 32  # of a stream

_POLL_S, _BEAT_S, _RETRY_MS = 1.0, 15.0, 2000
_FIRST_JOBS = 100
_open: set[object] = set()


async def all_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`queue`, `job`, `dataset`, `check` and `draft` events: first the waiting and running jobs, then every change; and
    the events of each `topic`, `jobs/ID` or `runs/ID`, as in its own stream, with that topic in their data.
    """
    topics = sorted(set(call.request.query.getall("topic", [])))
    if len(topics) > MOST_TOPICS:
        raise TooManyError(f"a stream must have at most {MOST_TOPICS} topics, got {len(topics):,}; close other pages")
    notices = context.hub.subscribe(kinds=("job", "queue", "dataset", "check", "draft"))
    with notices, context.dispatcher.watched():
        async with _stream(call.request) as stream:
            await stream.send("queue", context.store.queue_counts())
            for job in context.store.active(_FIRST_JOBS):
                await stream.send("job", job_row(job))
            watching = [asyncio.create_task(_watch(context, stream.of(topic))) for topic in topics]
            try:
                async for notice in _each(notices):
                    if notice is None:
                        await stream.beat()
                    elif notice.kind == "job":
                        await stream.send("job", job_row(notice.data))
                    else:
                        await stream.send(notice.kind, notice.data)
            finally:
                for task in watching:
                    task.cancel()
        return stream.response


async def _watch(context: ServerContext, stream: _Stream) -> None:
    """Send the events of a topic; an error ends this topic alone."""
    kind, _, id = stream.topic.partition("/")
    with contextlib.suppress(ConnectionResetError):  # the stream itself ends
        try:
            if kind not in _SENT:
                raise OptionError(f"a topic must be jobs/ID or runs/ID, got {stream.topic[:40]!r}; correct it")
            await _SENT[kind](context, stream, id)
        except LorasmithError as error:
            await stream.send_fault(error)


async def job_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`job`: the job, at first and at each change. `view`: what is shown of its run, at first and as it changes.
    `graph`: events of a graph's nodes. `progress`: steps of a drawing.
    """
    context.store.get(call.path("id"))  # an error has a status before the stream begins
    async with _stream(call.request) as stream:
        await _send_job(context, stream, call.path("id"))
    return stream.response


async def run_events(context: ServerContext, call: Call) -> web.StreamResponse:
    """`view`: what is shown of the run, at first and as its log grows."""
    await _logged_view(context, call.path("id"))
    async with _stream(call.request) as stream:
        await _send_run(context, stream, call.path("id"))
    return stream.response


async def _send_job(context: ServerContext, stream: _Stream, id: str) -> None:
    job = context.store.get(id)
    with context.hub.subscribe(job_id=id, kinds=("job", "view", "graph", "progress")) as notices:
        views = context.hub.views(id)
        if not views and job.run:
            views = [await _logged_view(context, job.run, is_begun=False)]
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


async def _send_run(context: ServerContext, stream: _Stream, id: str) -> None:
    with context.hub.subscribe(kinds=()) as notices:  # none arrive; the subscription ends with the server
        await stream.send_view(await _logged_view(context, id))
        async for _ in _each(notices, pause_s=_POLL_S):
            await stream.send_view(await _logged_view(context, id))
            await stream.beat(quiet=True)


_SENT = {"jobs": _send_job, "runs": _send_run}


async def _logged_view(context: ServerContext, run: str, *, is_begun: bool = True) -> Notice:
    """The view of a run's log."""
    view = await context.assistant.ask("run_view", id=run, is_begun=is_begun)
    return Notice(kind="view", data={"node_id": None, "view": view})


class _Stream:
    """Events to one reader; those of a `topic` have it in their data."""

    def __init__(self, request: web.Request, response: web.StreamResponse, topic: str = "") -> None:
        self.response = response
        self.topic = topic
        self._request = request
        self._first = "" if topic else f"retry: {_RETRY_MS}\n\n"
        self._sent = asyncio.get_running_loop().time()
        self._views = SentViews()

    def of(self, topic: str) -> _Stream:
        """A part of this stream."""
        return _Stream(self._request, self.response, topic)

    async def send_view(self, notice: Notice) -> None:
        """Send what has changed of a view since it was last sent."""
        if changes := self._views.changes(notice):
            await self.send("view", {"node_id": notice.data["node_id"], "view": changes})

    async def send_fault(self, error: LorasmithError) -> None:
        """Send why no more events come."""
        await self.send("fault", {"kind": getattr(error, "kind", type(error).__name__), "message": str(error)})

    async def send(self, event: str, data: Mapping[str, Any]) -> None:
        """Send an event; waits while the reader's buffer is full."""
        content = {**data, "topic": self.topic} if self.topic else data
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        await self._write(f"event: {event}\ndata: {text}\n\n")

    async def beat(self, *, quiet: bool = False) -> None:
        """Send a comment; if `quiet`, only after a while without events."""
        if not quiet or asyncio.get_running_loop().time() - self._sent >= _BEAT_S:
            await self._write(":\n\n")

    async def _write(self, text: str) -> None:
        self._sent = asyncio.get_running_loop().time()
        first, self._first = self._first, ""
        await send(self._request, self.response, (first + text).encode("utf-8", "replace"))


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
                await stream.send_fault(error)
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
