"""The WebSocket: one connection per client id, which reports the progress of its jobs.

A message is a JSON object `{type, data}` or a binary frame, which begins with its type as a 32-bit big-endian number:
1, a picture; 3, a line of text for the running node; 4, a picture with metadata. Messages about a job go to the client
that submitted it; progress of a job without a client goes to all. Simple clients take every binary frame for a result,
so only clients that have sent feature flags receive any.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import aiohttp
from aiohttp import web

from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.runs.queue import ENDED, Job, StoreError, UnknownJobError
from lorasmith.server.comfyui.queue_routes import ending_message, milliseconds, queue_info
from lorasmith.server.hub import Notice, SentViews, Subscription
from lorasmith.server.request_handling import MAX_UPLOAD_BYTES, ServerContext

MOST_SOCKETS = 128  # connections at once: fewer than one address may have, so that requests remain possible
_MOST_MESSAGE = 2**16
_HEARTBEAT_S = 30.0
_SEND_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 1.0

FEATURES = {
    "supports_preview_metadata": True,
    "node_replacements": False,
    "assets": False,
    "max_upload_size": MAX_UPLOAD_BYTES,
    "extension": {},
}
"""Feature flags of this server, by the protocol's names."""


class Sockets:
    """All connections, and the progress of jobs for clients that connect later."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._progress = GraphProgress()
        self._connections: dict[str, _Connection] = {}
        # `_observe` runs while a notice is published, before connections read it; this subscription stays empty.
        self._observing = context.hub.subscribe(wants=self._observe)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        if len(self._connections) >= MOST_SOCKETS:
            raise web.HTTPServiceUnavailable(text=f"at most {MOST_SOCKETS} clients can be connected; close one")
        socket = web.WebSocketResponse(heartbeat=_HEARTBEAT_S, max_msg_size=_MOST_MESSAGE, compress=False)
        await socket.prepare(request)
        client = Client(request.query.get("clientId", "")[:200] or uuid.uuid4().hex)
        with self._context.hub.subscribe(wants=lambda notice: _concerns(notice, client)) as subscription:
            connection = _Connection(socket, client, subscription, request.transport)
            if (older := self._connections.get(client.id)) is not None:
                older.subscription.close()
            self._connections[client.id] = connection
            sending = asyncio.create_task(self._send_all(connection))
            try:
                await self._receive_all(connection)
            finally:
                if self._connections.get(client.id) is connection:
                    del self._connections[client.id]
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sending
        return socket

    def subscribe_to_log(self, client_id: str, enabled: bool) -> None:
        """Start or stop sending the log's lines to a client, if it is connected."""
        if (connection := self._connections.get(client_id)) is not None:
            connection.client.reads_log = enabled

    def _observe(self, notice: Notice) -> bool:
        self._progress.observe(notice)
        if notice.job_id is not None and notice.data.get("event") == "ExecutionStarted":
            job = None
            with contextlib.suppress(StoreError):  # an extra preview is better than a failure
                job = self._context.store.find(notice.job_id)
            extra = {} if job is None else job.request.get("extra_data") or {}
            self._progress.of(notice.job_id).has_previews = extra.get("preview_method") != "none"
        return False

    async def _receive_all(self, connection: _Connection) -> None:
        """Read the client's feature flags, its first JSON message; all others are ignored."""
        is_first = True
        async for received in connection.socket:
            if not is_first or received.type is not aiohttp.WSMsgType.TEXT:
                continue
            try:
                value = parse_foreign_json(received.data)
            except ValueError:
                continue
            is_first = False
            if isinstance(value, dict) and value.get("type") == "feature_flags":
                flags = value.get("data")
                connection.client.flags = flags if isinstance(flags, dict) else {}
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await _send(connection.socket, message("feature_flags", FEATURES))

    async def _send_all(self, connection: _Connection) -> None:
        """Send the current state, then every notice."""
        try:
            for frame in self._greeting(connection.client):
                await _send(connection.socket, frame)
            async for notice in connection.subscription:
                for frame in self._frames(notice, connection.client):
                    await _send(connection.socket, frame)
            # The client has reconnected or was too slow, or the server stops.
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await connection.socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)
        except (ConnectionError, TimeoutError, aiohttp.ClientError, StoreError):
            # A client that does not read would not answer a close frame either; this ends the receiving side.
            if connection.transport is not None:
                connection.transport.abort()

    def _greeting(self, client: Client) -> Iterator[Frame]:
        yield message("status", {"status": queue_info(self._context.store.queue_counts()), "sid": client.id})
        for job in self._context.store.running():
            running = self._progress.of(job.id).running
            if job.client_id == client.id and running is not None:
                yield message("executing", {"node": running, "display_node": running, "prompt_id": job.id})
            for view in self._context.hub.views(job.id):
                yield from frames_of(view, client, self._progress)

    def _frames(self, notice: Notice, client: Client) -> Iterator[Frame]:
        if notice.kind != "job":
            yield from frames_of(notice, client, self._progress)
        elif notice.job_id is not None and notice.data.get("state") in ENDED:
            try:
                job = self._context.store.get(notice.job_id)
            except UnknownJobError:
                return  # removed meanwhile
            yield from ending_frames(job, client)
            if job.client_id == client.id:
                yield message("status", {"status": queue_info(self._context.store.queue_counts())})
            yield from final_frames(job, client)


class _Connection(NamedTuple):
    socket: web.WebSocketResponse
    client: Client
    subscription: Subscription
    transport: asyncio.Transport | None


def _concerns(notice: Notice, client: Client) -> bool:
    if notice.kind == "log":
        return client.reads_log
    return notice.kind == "queue" or notice.client_id in (None, client.id)


async def _send(socket: web.WebSocketResponse, frame: Frame) -> None:
    """Raises TimeoutError if the client does not read."""
    async with asyncio.timeout(_SEND_TIMEOUT_S):
        if isinstance(frame, str):
            await socket.send_str(frame)
        else:
            await socket.send_bytes(frame)


Frame: TypeAlias = str | bytes  # JSON text, or a binary frame


@dataclass
class Client:
    """A client of the WebSocket."""

    id: str
    flags: Mapping[str, Any] | None = None  # feature flags; None until received
    reads_log: bool = False  # subscribed to the log
    views: SentViews = field(default_factory=SentViews)

    @property
    def takes_binary(self) -> bool:
        return self.flags is not None

    @property
    def takes_metadata(self) -> bool:
        """Whether previews are sent with metadata."""
        return self.flags is not None and self.flags.get("supports_preview_metadata") is True


@dataclass
class JobProgress:
    """Progress of a running graph."""

    # value, maximum and state by node, in the protocol's form
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None  # id of a node
    has_previews: bool = True  # whether its client wants previews


class GraphProgress:
    """Progress of graphs by job. Kept for the last jobs after their end, as clients may still read it."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobProgress] = {}

    def observe(self, notice: Notice) -> None:
        if notice.job_id is None:
            return
        if notice.kind == "job":
            if notice.data.get("state") in ENDED and notice.job_id in self._jobs:
                self._jobs[notice.job_id].running = None
            return
        if notice.kind == "graph":
            self._observe_event(notice.job_id, notice.data)

    def of(self, job_id: str) -> JobProgress:
        return self._jobs.get(job_id) or JobProgress()

    def _observe_event(self, job_id: str, data: Mapping[str, Any]) -> None:
        event, node = data.get("event"), str(data.get("node_id", ""))
        if event == "ExecutionStarted":
            self._jobs.pop(job_id, None)
        job = self._jobs.setdefault(job_id, JobProgress())
        while len(self._jobs) > _MOST_JOBS:
            del self._jobs[next(iter(self._jobs))]
        if event == "NodeStarted":
            job.running = node
            job.nodes[node] = _node_state(job_id, node, 0, 1, "running")
        elif event == "NodeProgress":
            job.nodes[node] = _node_state(job_id, node, data.get("value", 0), data.get("maximum", 1), "running")
        elif event in ("NodeFinished", "NodeCached"):
            last = job.nodes.pop(node, None)
            most = last["max"] if last else 1
            job.nodes[node] = _node_state(job_id, node, most, most, "finished")
            if job.running == node:
                job.running = None
        while len(job.nodes) > _MOST_STATES:  # drop the oldest: every message repeats all of them
            del job.nodes[next(iter(job.nodes))]


def log_entry(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the log in the protocol's form."""
    return {"t": line["t"], "m": f"{line['m']}\n"}


def message(kind: str, data: Mapping[str, Any]) -> str:
    """A message as JSON text."""
    return json.dumps({"type": kind, "data": data})


def frames_of(notice: Notice, client: Client, progress: GraphProgress) -> Iterator[Frame]:
    """The messages of a notice, which `progress` has observed; the end of a job is in `ending_frames`."""
    if notice.kind == "queue":
        yield message("status", {"status": queue_info(notice.data)})
    elif notice.kind == "log":
        if client.reads_log:
            yield message("logs", {"entries": [log_entry(notice.data)], "size": TERMINAL_SIZE})
    elif notice.kind == "view":
        node, is_own = notice.data["node_id"], notice.client_id in (None, client.id)
        if node is not None and is_own and (changes := client.views.changes(notice)):
            yield message(TRAINING, {"prompt_id": notice.job_id, "node": node, "view": changes})
    elif notice.kind == "graph" and notice.job_id is not None:
        yield from _graph_frames(notice, notice.job_id, client, progress)


def ending_frames(job: Job, client: Client) -> Iterator[Frame]:
    """The messages that end a job; its history must be stored first."""
    ending = ending_message(job)
    if ending is None or job.started is None or job.kind != "graph":
        return
    name, data = ending
    if job.client_id == client.id or (name == "execution_interrupted" and job.client_id is None):
        yield message(name, data)


def final_frames(job: Job, client: Client) -> Iterator[Frame]:
    """The last message of a job, sent after the queue's new length."""
    if job.client_id == client.id and job.started is not None and job.kind == "graph":
        yield message("executing", {"node": None, "prompt_id": job.id})


def _graph_frames(notice: Notice, job_id: str, client: Client, progress: GraphProgress) -> Iterator[Frame]:
    data, event, is_own = notice.data, notice.data.get("event"), notice.client_id == client.id
    node = str(data.get("node_id", ""))
    if not is_own and (notice.client_id is not None or event not in _FOR_ALL):
        return
    if event == "ExecutionStarted":
        stamp = {"prompt_id": job_id, "timestamp": milliseconds(time.time())}
        yield message("execution_start", stamp)
        yield message("execution_cached", {"nodes": list(data.get("cached", ())), **stamp})
    elif event == "NodeCached":
        if data.get("ui"):
            yield _executed(job_id, node, data["ui"])
    elif event == "NodeStarted":
        yield _progress_state(job_id, progress)
        if is_own:
            yield message("executing", {"node": node, "display_node": node, "prompt_id": job_id})
    elif event == "NodeProgress":
        yield from _progress_frames(notice, job_id, node, client, progress)
    elif event == "NodeFinished":
        if is_own and data.get("ui"):
            yield _executed(job_id, node, data["ui"])
        yield _progress_state(job_id, progress)


def _progress_frames(
    notice: Notice, job_id: str, node: str, client: Client, progress: GraphProgress
) -> Iterator[Frame]:
    data = notice.data
    numbers = {"value": data.get("value", 0), "max": data.get("maximum", 1)}
    yield message("progress", {**numbers, "prompt_id": job_id, "node": node})
    yield _progress_state(job_id, progress)
    if not client.takes_binary:
        return
    if data.get("text"):
        yield text_frame(node, str(data["text"]))
    if notice.binary and progress.of(job_id).has_previews:
        picture = notice.binary
        yield metadata_frame(job_id, node, picture) if client.takes_metadata else picture_frame(picture)


def picture_frame(picture: bytes) -> bytes:
    """A frame of type 1: the picture's format (1 JPEG, 2 PNG) and the picture."""
    return struct.pack(">II", 1, 2 if picture.startswith(_PNG) else 1) + picture


def text_frame(node: str, text: str) -> bytes:
    """A frame of type 3: a line of text that is shown under a node."""
    name = node.encode()
    return struct.pack(">II", 3, len(name)) + name + text.encode(errors="replace")


def metadata_frame(job_id: str, node: str, picture: bytes) -> bytes:
    """A frame of type 4: metadata as JSON, and a JPEG or PNG."""
    kind = "image/png" if picture.startswith(_PNG) else "image/jpeg"
    text = json.dumps({**_names(job_id, node), "image_type": kind}).encode()
    return struct.pack(">II", 4, len(text)) + text + picture


def _executed(job_id: str, node: str, ui: Mapping[str, Any]) -> str:
    return message("executed", {"node": node, "display_node": node, "output": ui, "prompt_id": job_id})


def _progress_state(job_id: str, progress: GraphProgress) -> str:
    return message("progress_state", {"prompt_id": job_id, "nodes": progress.of(job_id).nodes})


def _node_state(job_id: str, node: str, value: float, most: float, state: str) -> dict[str, Any]:
    return {"value": value, "max": most, "state": state, **_names(job_id, node)}


def _names(job_id: str, node: str) -> dict[str, Any]:
    """A node's ids, which differ in ComfyUI only for nodes created during execution."""
    return {
        "node_id": node,
        "prompt_id": job_id,
        "display_node_id": node,
        "parent_node_id": None,
        "real_node_id": node,
    }


TRAINING = "lorasmith.training"  # type of messages with the view of a training, an addition to the protocol
TERMINAL_SIZE = {"cols": 120, "rows": 40}  # in which the editor shows the log
_FOR_ALL = frozenset({"NodeStarted", "NodeProgress", "NodeFinished"})
"""Events of jobs without a client that are sent to all clients."""
_MOST_STATES, _MOST_JOBS = 256, 16
_PNG = b"\x89PNG"
