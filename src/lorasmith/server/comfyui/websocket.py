"""The WebSocket: one connection per client id, which reports the progress of its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import aiohttp
from aiohttp import web

from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.comfyui.messages import (
    Client,
    Frame,
    Progress,
    ending_frames,
    final_frames,
    frames_of,
    message,
    queue_info,
)
from lorasmith.server.hub import Notice, Subscription
from lorasmith.server.jobs import ENDED, StoreError, UnknownJobError
from lorasmith.server.request_handling import ServerContext

MOST_SOCKETS = 128  # connections at once: fewer than one address may have, so that requests remain possible
_MOST_MESSAGE = 2**16
_HEARTBEAT_S = 30.0
_SEND_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 1.0

FEATURES: dict[str, Any] = {"supports_preview_metadata": True, "node_replacements": False, "assets": False}
"""Feature flags, by the protocol's names."""


def features(max_upload_bytes: int) -> dict[str, Any]:
    """The feature flags of this server."""
    return FEATURES | {"max_upload_size": max_upload_bytes, "extension": {}}


class Sockets:
    """All connections, and the progress of jobs for clients that connect later."""

    def __init__(self, context: ServerContext, flags: dict[str, Any]) -> None:
        self._context = context
        self._flags = flags
        self._progress = Progress()
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

    def subscribe_to_log(self, client_id: str, enabled: bool) -> bool:
        """Start or stop sending the log's lines to a client; returns whether it is connected."""
        connection = self._connections.get(client_id)
        if connection is not None:
            connection.client.reads_log = enabled
        return connection is not None

    def __len__(self) -> int:
        return len(self._connections)

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
                    await _send(connection.socket, message("feature_flags", self._flags))

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
        yield message("status", {"status": self.queue_info(), "sid": client.id})
        for job in self._context.store.running():
            running = self._progress.of(job.id).running
            if job.client_id == client.id and running is not None:
                yield message("executing", {"node": running, "display_node": running, "prompt_id": job.id})

    def queue_info(self) -> dict[str, Any]:
        return queue_info(self._context.store.queue_counts())

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
                yield message("status", {"status": self.queue_info()})
            yield from final_frames(job, client)


class _Connection:
    def __init__(
        self,
        socket: web.WebSocketResponse,
        client: Client,
        subscription: Subscription,
        transport: asyncio.Transport | None,
    ) -> None:
        self.socket = socket
        self.client = client
        self.subscription = subscription
        self.transport = transport


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
