"""Clients that connect and send nothing, or little by little."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from lorasmith.server import connections
from lorasmith.server.comfyui.websocket import MOST_SOCKETS
from lorasmith.server.connections import MOST_CONNECTIONS, MOST_PER_ADDRESS, Connections, most_connections
from lorasmith.server.event_streams import MOST_STREAMS
from lorasmith.server.http_server import running
from tests.server.fakes import fake_config, until

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def listening(most: int, most_per_address: int) -> AsyncIterator[tuple[Connections, int, asyncio.Event]]:
    """A server that answers `good`, and a request to `/wait` when the event is set."""
    ended = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/wait":
            await ended.wait()
        return web.Response(text=f"good {len(await request.read())}")

    factory = Connections(web.Server(answer), most=most, most_per_address=most_per_address)
    listener = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    try:
        yield factory, listener.sockets[0].getsockname()[1], ended
    finally:
        ended.set()
        listener.close()
        factory.close()
        await factory.server.shutdown(1)


async def asked(port: int, request: bytes = REQUEST, address: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class Silent:
    """Clients that send nothing, or what they are told to; closed at the end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Silent:
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def connected(self, begun: bytes = b"", address: str = "127.0.0.1") -> tuple[Any, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(address, 0))
        self._writers.append(writer)
        writer.write(begun)
        return reader, writer


def is_over(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None


@pytest.mark.parametrize(("most", "most_per_address"), [(8, 100), (100, 8)])
async def test_silent_connections_make_room_the_oldest_first(most: int, most_per_address: int) -> None:
    async with listening(most, most_per_address) as (factory, port, _), Silent(port) as clients:
        opened = [await clients.connected(b"GET / HT") for _ in range(30)]
        await until(lambda: is_over(opened[21][0]))
        assert len(factory.waiting) == 8
        for _ in range(3):
            assert b"good 0" in await asked(port)
        reader, writer = opened[-1]
        assert not is_over(reader)
        writer.write(b"TP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"good 0" in await reader.read()


async def test_a_connection_beyond_the_limit_of_busy_ones_is_refused() -> None:
    async with listening(4, 100) as (factory, port, ended):
        busy = [asyncio.create_task(asked(port, REQUEST.replace(b"GET /", b"GET /wait"))) for _ in range(4)]
        await until(lambda: len(factory.server.connections) == 4)
        assert b"good" not in await asked(port)
        ended.set()
        assert all(b"good" in answer for answer in await asyncio.gather(*busy))
        assert b"good" in await asked(port)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
async def test_an_address_has_its_own_limit() -> None:
    async with listening(100, 4) as (factory, port, ended), Silent(port) as clients:
        wait = REQUEST.replace(b"GET /", b"GET /wait")
        busy = [asyncio.create_task(asked(port, wait, "127.0.0.2")) for _ in range(4)]
        await until(lambda: len(factory.server.connections) == 4)
        others = [(await clients.connected(address="127.0.0.3"))[0] for _ in range(3)]
        assert b"good" not in await asked(port, address="127.0.0.2")
        assert b"good" in await asked(port)
        assert not any(map(is_over, others))
        ended.set()
        await asyncio.gather(*busy)


async def test_headers_have_a_time_and_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(10, 10) as (factory, port, _), Silent(port) as clients:
        with monkeypatch.context() as patch:
            patch.setattr(connections, "_HEADER_TIMEOUT_S", 0.2)
            reader, writer = await clients.connected(b"GET / HTTP/1.1\r\nX: ")
            await until(lambda: writer.write(b"a") or is_over(reader))
        assert not factory.waiting
        assert b" 431 " in await asked(port, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12_000)
        assert b" 400 " in await asked(port, b"\x16\x03\x01\x02\x00\x01\x00")  # TLS is refused at once
        assert b"good 3" in await asked(port, REQUEST.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\nabc"))


async def test_a_request_in_pieces_and_two_in_one_are_answered() -> None:
    async with listening(10, 10) as (_, port, _), Silent(port) as clients:
        reader, writer = await clients.connected()
        for place in range(len(REQUEST)):
            writer.write(REQUEST[place : place + 1])
            await asyncio.sleep(0)
        assert b"good 0" in await reader.read()
        two = await asked(port, REQUEST.replace(b"Connection: close\r\n", b"") + REQUEST)
        assert two.count(b"good 0") == 2


def test_the_limit_follows_that_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for soft, hard, most in ((256, 256, 96), (256, 10_000, MOST_CONNECTIONS), (20_000, 20_000, MOST_CONNECTIONS)):
        limit = [soft, hard]
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: tuple(limit))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, new, limit=limit: limit.__setitem__(0, new[0]))
        assert most_connections() == most and limit[0] >= min(2 * most, hard)
    assert MOST_SOCKETS + MOST_STREAMS < MOST_PER_ADDRESS < MOST_CONNECTIONS


async def test_a_server_answers_among_silent_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.server.http_server.most_connections", lambda: 10)
    async with running(fake_config(tmp_path)) as (_, address):
        port = int(address.rpartition(":")[2])
        async with Silent(port) as clients:
            for _ in range(30):
                await clients.connected()
            assert b"200 OK" in await asked(port, REQUEST.replace(b"GET /", b"GET /prompt"))
