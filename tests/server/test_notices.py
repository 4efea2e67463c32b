"""Notices arrive signed, in order and at least once, and nowhere else than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.core.errors import OptionError
from lorasmith.runs.child_process import _inherited
from lorasmith.runs.queue import JobStore
from lorasmith.server import notices
from lorasmith.server.http_server import running
from lorasmith.server.notices import NoticeSender, _CheckedResolver, checked_url, host_of
from tests.server.api_server import api
from tests.server.fakes import ended, fake_config, until

SECRET = "a long secret"


class Receiver:
    """Receives notices; `answers` are the next statuses, then 200."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.refused: list[int] = []
        self.answers: list[int] = []
        self.port = self.followed = 0

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        at, _, digest = request.headers["Lorasmith-Signature"].removeprefix("t=").partition(",v1=")
        assert digest == hmac.new(SECRET.encode(), at.encode() + b"." + body, hashlib.sha256).hexdigest()
        assert abs(time.time() - int(at)) < 60 and request.content_type == "application/json"
        if status := self.answers.pop(0) if self.answers else 0:
            self.refused.append(json.loads(body)["notice"])
            return web.Response(status=status, headers={"Location": f"http://localhost:{self.port}/other"})
        self.seen.append(json.loads(body))
        return web.Response()

    async def follow(self, request: web.Request) -> web.Response:
        self.followed += 1
        return web.Response()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/hook"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_POLL_S", 0.01)
    monkeypatch.setattr(notices, "_FIRST_PAUSE_S", 0.01)


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    served = web.Application()
    served.add_routes([web.post("/hook", receiver.receive), web.route("*", "/other", receiver.follow)])
    runner = web.AppRunner(served)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()


def config(base: Path, receiver: Receiver, **settings: Any) -> Any:
    return fake_config(base, notify=receiver.url, notify_secret=SECRET, **settings)


async def test_changes_and_pictures_arrive_in_order_though_the_receiver_fails_now_and_then(tmp_path: Path) -> None:
    preview = {"step": 5, "strength": 1.0, "prompt": "a fox", "number": 1, "file": "samples/5.png"}
    view = {"run": "runs/x-001", "step": 5, "steps": 9, "previews": [preview]}
    async with receiving() as receiver, running(config(tmp_path, receiver)) as (context, _):
        receiver.answers = [307, 500, 404]
        first = context.dispatcher.submit("train", {"do": "wait", "view": view, "name": "fox"}, key="k")
        await until(lambda: any(one["kind"] == "picture" for one in receiver.seen))
        context.dispatcher.cancel(first.id)
        second = context.dispatcher.submit("graph", {"do": "fail"})
        await ended(context, second)
        await until(lambda: len(receiver.seen) == 7)
        of_first = [one for one in receiver.seen if one["job"] == first.id]
        assert [one.get("state", one["kind"]) for one in of_first] == ["pending", "running", "picture", "cancelled"]
        assert [one["notice"] for one in of_first] == sorted(one["notice"] for one in of_first)
        assert {one["key"] for one in of_first} == {"k"} and of_first[1]["attempt"] == 1
        assert {name: of_first[2][name] for name in preview} == preview and of_first[2]["run"] == "runs/x-001"
        (*_, failed) = [one for one in receiver.seen if one["job"] == second.id]
        assert failed["state"] == "failed" and failed["error"] == {"kind": "NodeError", "message": "no"}
        assert receiver.refused == [1, 1, 1] and receiver.followed == 0
        (said,) = [one["m"] for one in context.log.entries if "was not received" in one["m"]]
        assert said.endswith("(it is redirected by status 307, which is not followed); it is sent again")
        assert context.store.due_notices(9) == []


async def test_what_was_not_received_is_sent_by_the_next_server_and_given_up_after_a_day(tmp_path: Path) -> None:
    said: list[str] = []
    async with receiving() as receiver:
        store = JobStore(tmp_path / "jobs.sqlite3")
        store.add("train", {}, id="a", notify=receiver.url)
        store.claim("cpu")
        store.finish("a", "completed", outputs={"steps": 3})
        store.close()
        store = JobStore(tmp_path / "jobs.sqlite3")
        receiver.answers = [503]
        store._database.execute("UPDATE notices SET created = created - 86400 WHERE sequence = 1")
        sender = NoticeSender(store, SECRET, (host_of(receiver.url),), said.append)
        await sender.start()
        await until(lambda: len(receiver.seen) == 2 and not store.due_notices(9))
        await sender.stop()
        assert said == ["a notice of job a was not received for a day (the answer has status 503) and is given up"]
        assert [one["state"] for one in receiver.seen] == ["running", "completed"]
        assert receiver.seen[-1]["outputs"] == {"steps": 3}
        store.close()


async def test_a_host_that_is_down_slow_or_no_longer_allowed_keeps_the_notice_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_TIMEOUT_S", 0.2)
    said: list[str] = []
    open_: set[asyncio.StreamWriter] = set()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_.add(writer)
        await reader.read(-1)  # until the client gives up
        writer.close()
        await writer.wait_closed()
        open_.discard(writer)

    slow = await asyncio.start_server(silent, "127.0.0.1", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = free.getsockname()[1]
    hosts = [f"localhost:{slow.sockets[0].getsockname()[1]}", f"localhost:{down}", "gone.example"]
    async with receiving() as receiver:
        store = JobStore(None)
        for host in hosts:
            store.add("train", {}, id=host, notify=f"http://{host}/hook")
        store.add("train", {}, id="fine", notify=receiver.url)
        sender = NoticeSender(store, SECRET, (*hosts[:2], host_of(receiver.url)), said.append)
        await sender.start()
        await until(lambda: receiver.seen and len(said) == 3)
        await sender.stop()
        assert [one["job"] for one in receiver.seen] == ["fine"]
        text = " ".join(said)
        assert "no answer within 0.2 seconds" in text and "Cannot connect" in text and "gone.example is none" in text
        (left,) = store._database.execute("SELECT count(*) FROM notices").fetchone()
        assert left == 3
        store.close()
    await until(lambda: not open_)
    slow.close()
    await slow.wait_closed()


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/", "http://hooks.example@evil.example/", "http://hooks.example:81/",
        "http://hooks.example.evil.example/", "ftp://hooks.example/", "file:///etc/passwd", "//hooks.example/", "",
        "http://u:p@hooks.example/", "http://hooks.example/#x", "http://hooks.example\\@evil.example/",
        "http://hooks.example:99999/", "http://169.254.169.254/latest/meta-data", "http://[::1]/", "http://127.0.0.1/",
        "http://hooks.example/\r\nX: y", "http://hooks.ex\u0430mple/", "http://0x7f.1/", "http://hooks.example /",
    ],
)  # fmt: skip
def test_an_address_that_is_not_allowed_is_refused(url: str) -> None:
    assert checked_url("https://Hooks.example/a?b=1", ["hooks.EXAMPLE"]) and checked_url("http://h:8/", ["h:8"])
    with pytest.raises(OptionError, match=r"notify must be|operator allows"):
        checked_url(url, ["hooks.example"])


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("127.0.0.1", True), ("169.254.169.254", True), ("0.0.0.0", True), ("::1", True), ("fe80::1", True),
        ("::ffff:127.0.0.1", True), ("224.0.0.1", True), ("10.0.0.7", False), ("93.184.216.34", False),
    ],
)  # fmt: skip
async def test_a_name_that_was_made_to_lead_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, is_refused: bool
) -> None:
    resolver = _CheckedResolver()

    async def resolve(*_: Any) -> Any:
        return [{"hostname": "hooks.example", "host": address, "port": 80, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(resolver._resolver, "resolve", resolve)
    if is_refused:
        with pytest.raises(OSError, match="not for notices"):
            await resolver.resolve("hooks.example", 80)
    else:
        assert await resolver.resolve("hooks.example", 80)


async def test_a_job_may_name_an_allowed_host_alone(tmp_path: Path) -> None:
    run = {"model": "lorasmith-tiny", "dataset": "fox"}
    async with api(tmp_path / "a") as client:
        said = await client.error("POST", "/jobs", {**run, "notify": "https://hooks.example/"})
        assert "needs a server that signs notices" in said
    async with api(tmp_path / "b", notify_hosts=("hooks.example",), notify_secret=SECRET) as client:
        job = await client.ask("POST", "/jobs", {**run, "notify": "https://hooks.example/x?key=1"}, status=201)
        assert "hooks.example" not in json.dumps(job)  # an address may have a secret
        assert client.context.store.get(job["id"]).notify == "https://hooks.example/x?key=1"
        said = await client.error("POST", "/jobs", {**run, "notify": "https://other.example/"})
        assert said.endswith("have the server started with --notify-host other.example")


def test_notices_need_a_secret_that_no_child_inherits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["serve", "--base-dir", str(tmp_path), "--notify", "https://hooks.example/"])
    assert "need a secret of at least 12 characters" in done.output
    monkeypatch.setenv("LORASMITH_NOTIFY_SECRET", SECRET)
    assert "LORASMITH_NOTIFY_SECRET" not in _inherited()
    done = CliRunner().invoke(app, ["serve", "--base-dir", str(tmp_path), "--notify", "hooks.example"])
    assert "notify must be an http or https address" in done.output
