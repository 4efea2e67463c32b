from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from lorasmith.runs.queue import Job, StoreError
from lorasmith.server.comfyui import websocket
from lorasmith.server.hub import Notice
from tests.launched import LONG_S
from tests.server.fake_server import GOOD, Played
from tests.server.fakes import until

JPEG, PNG = b"\xff\xd8\xffsome", b"\x89PNGsome"
UI = {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}
FLAGS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}


@contextlib.asynccontextmanager
async def connected(server: Played, client: str | None = "me") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    path = "/ws" if client is None else f"/ws?clientId={client}"
    async with server.http.ws_connect(path) as socket:
        yield socket


async def read(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[Any]:
    """The next messages; binary ones as bytes."""
    found = []
    async with asyncio.timeout(LONG_S):
        while len(found) < count:
            received = await socket.receive()
            assert received.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), received
            found.append(json.loads(received.data) if received.type is aiohttp.WSMsgType.TEXT else received.data)
    return found


async def read_until(socket: aiohttp.ClientWebSocketResponse, kind: str) -> list[Any]:
    found: list[Any] = []
    while not found or not isinstance(found[-1], dict) or found[-1]["type"] != kind:
        found += await read(socket, 1)
    return found


async def queue(server: Played, client: str | None = "me") -> None:
    await server.post("/prompt", {"prompt": GOOD, **({} if client is None else {"client_id": client})})


def play(server: Played, *, picture: bytes | None = JPEG, cached: bool = False) -> Job:
    """A run of the queued prompt, as its worker reports it; returns the running job."""
    job = server.start()
    server.event(job, "ExecutionStarted", order=["1", "2"], cached=["1"] if cached else [])
    if cached:
        server.event(job, "NodeCached", node_id="1", ui=UI)
    else:
        server.event(job, "NodeStarted", node_id="1", title="Number")
        server.event(job, "NodeProgress", node_id="1", value=1, maximum=2, text="loss 0.5", picture=picture)
        server.event(job, "NodeFinished", node_id="1", ui={})
    server.event(job, "NodeStarted", node_id="2", title="Show")
    server.event(job, "NodeFinished", node_id="2", ui=UI)
    return job


def names(messages: list[Any]) -> list[str]:
    return [one["type"] if isinstance(one, dict) else "binary" for one in messages]


async def test_the_messages_of_a_run_come_in_the_protocols_order(server: Played) -> None:
    async with connected(server) as socket:
        (greeting,) = await read(socket, 1)
        assert greeting == {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}}
        await queue(server)
        job = play(server)
        server.finish(job, outputs={"2": UI})
        found = await read_until(socket, "execution_success")
        assert (await server.get(f"/history/{job.id}"))[job.id]["outputs"] == {"2": UI}
        found += await read(socket, 2)
        assert [one for one in names(found) if one != "status"] == [
            *("execution_start", "execution_cached", "progress_state", "executing", "progress", "progress_state"),
            *("progress_state", "progress_state", "executing", "executed", "progress_state"),
            *("execution_success", "executing"),
        ]
        assert names(found)[-3:] == ["execution_success", "status", "executing"]
        assert found[-1]["data"] == {"node": None, "prompt_id": job.id}
        assert found[-2]["data"]["status"]["exec_info"]["queue_remaining"] == 0
        by_name = {one["type"]: one["data"] for one in found}
        assert by_name["executed"] == {"node": "2", "display_node": "2", "output": UI, "prompt_id": job.id}
        assert by_name["progress"] == {"value": 1, "max": 2, "prompt_id": job.id, "node": "1"}
        assert by_name["execution_start"]["prompt_id"] == job.id
        assert by_name["execution_success"]["timestamp"] > 10**12
        states = by_name["progress_state"]
        assert states["prompt_id"] == job.id
        assert states["nodes"]["1"] == {
            "value": 2,
            "max": 2,
            "state": "finished",
            "node_id": "1",
            "prompt_id": job.id,
            "display_node_id": "1",
            "parent_node_id": None,
            "real_node_id": "1",
        }


async def test_previews_are_in_the_form_that_the_client_knows(server: Played) -> None:
    for data, picture in ((FLAGS["data"], PNG), ({}, PNG), ({}, JPEG)):
        async with connected(server) as socket:
            await socket.send_json({"type": "feature_flags", "data": data})
            (answer,) = (await read_until(socket, "feature_flags"))[-1:]
            assert answer["data"]["supports_preview_metadata"] is True
            assert answer["data"]["max_upload_size"] > 2**20
            await queue(server)
            job = play(server, picture=picture)
            server.finish(job)
            text, preview = [one for one in await read_until(socket, "execution_success") if isinstance(one, bytes)]
            assert text == struct.pack(">II", 3, 1) + b"1" + b"loss 0.5"
            if data:
                kind, length = struct.unpack(">II", preview[:8])
                metadata = json.loads(preview[8 : 8 + length])
                assert kind == 4
                assert preview[8 + length :] == picture
                assert metadata == {
                    "node_id": "1",
                    "prompt_id": job.id,
                    "display_node_id": "1",
                    "parent_node_id": None,
                    "real_node_id": "1",
                    "image_type": "image/png",
                }
            else:
                assert preview == struct.pack(">II", 1, 2 if picture == PNG else 1) + picture


async def test_a_client_may_want_no_previews(server: Played) -> None:
    async with connected(server) as socket:
        await socket.send_json(FLAGS)
        await read_until(socket, "feature_flags")
        await server.post("/prompt", {"prompt": GOOD, "client_id": "me", "extra_data": {"preview_method": "none"}})
        server.finish(play(server))
        frames = [one for one in await read_until(socket, "execution_success") if isinstance(one, bytes)]
        assert [one[:4] for one in frames] == [struct.pack(">I", 3)]


async def test_cached_outputs_are_sent_again(server: Played) -> None:
    async with connected(server) as socket:
        await queue(server)
        server.finish(play(server, cached=True))
        found = await read_until(socket, "execution_success")
        (cached,) = [one["data"] for one in found if one["type"] == "execution_cached"]
        assert cached["nodes"] == ["1"]
        assert [one["data"]["node"] for one in found if one["type"] == "executed"] == ["1", "2"]


async def test_a_failure_names_its_node(server: Played) -> None:
    async with connected(server) as socket:
        await queue(server)
        job = play(server)
        error = {"kind": "NodeError", "message": "no memory", "node_id": "2", "node_type": "Show", "executed": ["1"]}
        server.finish(job, "failed", error=error)
        found = await read_until(socket, "execution_error")
        data = found[-1]["data"]
        assert (data["node_id"], data["node_type"], data["executed"]) == ("2", "Show", ["1"])
        assert (data["exception_message"], data["exception_type"]) == ("no memory", "NodeError")
        assert {"traceback", "current_inputs", "current_outputs"} <= data.keys()
        assert names(await read(socket, 2)) == ["status", "executing"]


async def test_a_cancelled_run_is_interrupted(server: Played) -> None:
    async with connected(server) as socket:
        await queue(server)
        job = play(server)
        server.finish(job, "cancelled", error={"node_id": "2", "node_type": "Show", "executed": ["1"]})
        data = (await read_until(socket, "execution_interrupted"))[-1]["data"]
        assert (data["node_id"], data["node_type"], data["executed"]) == ("2", "Show", ["1"])
        assert (await server.get(f"/history/{job.id}"))[job.id]["status"]["status_str"] == "error"


async def test_messages_of_a_job_go_to_its_client_and_the_queue_to_all(server: Played) -> None:
    async with connected(server) as own, connected(server, "other") as other:
        await queue(server)
        server.finish(play(server))
        await read_until(own, "execution_success")
        await queue(server, "other")
        server.finish(play(server))
        found = await read_until(other, "execution_start")
        assert {*names(found)} == {"status", "execution_start"}


async def test_all_see_the_progress_of_a_job_without_a_client(server: Played) -> None:
    async with connected(server) as socket:
        await queue(server, None)
        server.finish(play(server))
        found = await read_until(socket, "progress")
        assert {*names(found)} == {"status", "progress_state", "progress"}


async def test_a_client_that_connects_again_learns_the_running_node(server: Played) -> None:
    await queue(server)
    job = server.start()
    server.event(job, "NodeStarted", node_id="2", title="Show")
    async with connected(server) as socket:
        status, executing = await read(socket, 2)
        assert status["data"]["sid"] == "me"
        assert executing["type"] == "executing"
        assert executing["data"]["node"] == "2"
    async with connected(server, "other") as socket:
        await read(socket, 1)
        server.finish(job)
        assert names(await read(socket, 1)) == ["status"]


async def test_a_client_has_one_connection(server: Played) -> None:
    async with connected(server) as older:
        await read(older, 1)
        async with connected(server) as newer:
            await read(newer, 1)
            async with asyncio.timeout(LONG_S):
                assert (await older.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            await queue(server)
            assert names(await read(newer, 1)) == ["status"]
    async with connected(server, None) as socket:
        (greeting,) = await read(socket, 1)
        assert len(greeting["data"]["sid"]) == 32, "a client without an id gets one"


async def test_what_a_client_sends_breaks_nothing(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(server) as socket:
        await read(socket, 1)
        parsed: list[object] = []
        parse = websocket.parse_foreign_json
        monkeypatch.setattr(websocket, "parse_foreign_json", lambda text: parsed.append(text) or parse(text))
        for text in ("{", "[]", '"x"', '{"type": 5}', '{"type": "feature_flags", "data": 7}'):
            await socket.send_str(text)
        await socket.send_bytes(b"\xff\xff")
        await queue(server)
        assert names(await read(socket, 1)) == ["status"]
        assert parsed == ["{", "[]"]  # its first message has the flags, all others have no meaning


async def test_what_is_shown_of_a_training_node_reaches_its_client_also_if_it_connects_later(server: Played) -> None:
    from lorasmith.server.hub import Notice

    def training(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one["data"] for one in found if one["type"] == "lorasmith.training"]

    async with connected(server) as socket:
        await queue(server)
        job = server.start()
        for node, step in (("1", 3), (None, 4), ("1", 3), ("1", 5)):  # the second is of no node
            data = {"node_id": node, "view": {"step": step, "steps": 9}}
            server.context.hub.publish(Notice(kind="view", job_id=job.id, data=data, client_id="me"))
        found = training([one for _ in range(2) for one in await read_until(socket, "lorasmith.training")])
        here = {"prompt_id": job.id, "node": "1"}
        assert found == [{**here, "view": {"step": 3, "steps": 9}}, {**here, "view": {"step": 5}}]
    async with connected(server) as socket:
        server.finish(job)
        found = training(await read_until(socket, "execution_success"))
        assert found == [{**here, "view": {"step": 5, "steps": 9}}]


async def test_the_log_goes_to_those_who_subscribed(server: Played) -> None:
    async with connected(server) as socket:
        await read(socket, 1)
        server.context.log.add("worker", "first")
        await server.send("PATCH", "/internal/logs/subscribe", json={"clientId": "me", "enabled": True})
        server.context.log.add("worker", "second")
        (message,) = await read(socket, 1)
        assert [one["m"] for one in message["data"]["entries"]] == ["second\n"]
        await server.send("PATCH", "/internal/logs/subscribe", json={"clientId": "me"}, status=400)
        await server.send("PATCH", "/internal/logs/subscribe", json={"clientId": "none", "enabled": True})


async def test_a_database_that_cannot_be_read_ends_connections_and_no_worker(
    server: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(id: str) -> Job:
        raise StoreError("cannot be read")

    async with connected(server) as socket:
        await read(socket, 1)
        await queue(server)
        job = server.start()
        await read_until(socket, "status")
        with monkeypatch.context() as patch:
            patch.setattr(server.context.store, "find", refuse)
            patch.setattr(server.context.store, "get", refuse)
            server.event(job, "ExecutionStarted", order=["1"], cached=[])  # as the worker's reader publishes it
            data = {**job.summary(), "state": "completed"}
            server.context.hub.publish(Notice(kind="job", job_id=job.id, data=data, client_id="me"))
            async with asyncio.timeout(LONG_S):
                while (await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                    pass
        async with connected(server) as again:
            await read(again, 1)


async def test_a_client_that_never_reads_is_cut_off(server: Played, monkeypatch: Any) -> None:
    monkeypatch.setattr(websocket, "_SEND_TIMEOUT_S", 0.2)

    def server_sockets(server: Played) -> list[Any]:
        return [one.socket for one in websocket_of(server)._connections.values()]

    async with connected(server) as socket:
        await read(socket, 1)
        await queue(server)
        job = server.start()
        big = {"text": ["x" * 2**20]}
        for _ in range(100):
            server.event(job, "NodeFinished", node_id="2", ui=big)
        await until(lambda: not server_sockets(server))
        await queue(server, None)  # the others are served on


def websocket_of(server: Played) -> websocket.Sockets:
    """The connections of a server, from the handler of its route."""
    (route,) = [one for one in server.app.router.routes() if one.resource and one.resource.canonical == "/ws"][:1]
    found = route.handler.__wrapped__.__self__  # type: ignore[union-attr]
    assert isinstance(found, websocket.Sockets)
    return found
