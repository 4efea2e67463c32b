"""Limits of connections: how many there are, and how long one may be idle.

aiohttp has no such limit. So a connection is kept here until the headers of its first request have arrived, and is
passed to aiohttp then. At the limit, the oldest connection without a request is closed for a new one, so that idle
clients block nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

from aiohttp import web

MOST_CONNECTIONS = 512  # at once
MOST_PER_ADDRESS = 256  # at once from one address; all clients of a proxy have the same one
KEEPALIVE_S = 75.0
"""Seconds between two requests of a connection, the headers of the second included; the default of many proxies."""

_HEADER_TIMEOUT_S = 15.0
_UNREAD_TIMEOUT_S = 300.0
_MOST_HEADER_BYTES = 2**16
_OTHER_FILES = 64  # open files other than connections and files being sent


def most_connections() -> int:
    """`MOST_CONNECTIONS`, or fewer if the limit of open files is lower."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    wanted = 2 * MOST_CONNECTIONS + _OTHER_FILES  # each may be receiving a file
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (min(wanted, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            )
            soft = min(wanted, hard)
    return max(8, min(MOST_CONNECTIONS, (soft - _OTHER_FILES) // 2))


class Connections:
    """The protocol factory of a listening socket; `server` is aiohttp's, which takes over the connections."""

    def __init__(self, server: web.Server, *, most: int, most_per_address: int = MOST_PER_ADDRESS) -> None:
        self.server = server
        self.waiting: dict[_Waiting, None] = {}  # without a request, oldest first
        self._most = most
        self._most_per_address = most_per_address

    def __call__(self) -> asyncio.Protocol:
        return _Waiting(self)

    def close(self) -> None:
        """Close the connections without a request."""
        for connection in list(self.waiting):
            connection.end()

    def has_room(self, address: str) -> bool:
        """Whether an address may open a connection, after closing the oldest idle one if necessary."""
        for most, of in ((self._most_per_address, address), (self._most, None)):
            silent = [connection for connection in self.waiting if of in (None, connection.address)]
            busy = sum(of in (None, (connection.peername or ("",))[0]) for connection in self.server.connections)
            if len(silent) + busy >= most:
                if not silent:
                    return False
                silent[0].end()
        return True


class _Waiting(asyncio.Protocol):
    """A connection whose first request has not arrived."""

    def __init__(self, connections: Connections) -> None:
        self.address = ""
        self._connections = connections
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.address = (transport.get_extra_info("peername") or ("",))[0]
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: drops clients that do not read
            opened = transport.get_extra_info("socket")
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_UNREAD_TIMEOUT_S * 1000))
        if not self._connections.has_room(self.address):
            self._refuse("503 Service Unavailable")
            return
        self._connections.waiting[self] = None
        self._timer = asyncio.get_running_loop().call_later(_HEADER_TIMEOUT_S, self.end)

    def data_received(self, data: bytes) -> None:
        if self not in self._connections.waiting:
            return
        start = max(0, len(self._received) - 3)
        self._received += data
        is_http = 65 <= self._received[0] <= 90  # aiohttp answers anything else, such as TLS, at once
        if is_http and self._received.find(b"\r\n\r\n", start) < 0:
            if len(self._received) > _MOST_HEADER_BYTES:
                self._refuse("431 Request Header Fields Too Large")
            return
        self._leave()
        protocol = self._connections.server()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(bytes(self._received))

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def end(self) -> None:
        self._leave()
        self._transport.abort()

    def _refuse(self, status: str) -> None:
        self._leave()
        self._transport.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        self._transport.close()

    def _leave(self) -> None:
        if self in self._connections.waiting:
            del self._connections.waiting[self]
            self._timer.cancel()
