"""The application and its life."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.runs.queue import JobStateError, JobStore, QueueFullError, StoreError, UnknownJobError
from lorasmith.server.contained_files import OutsideError
from lorasmith.server.dispatcher import RefusedError, UnavailableError
from lorasmith.server.http_server import make_app, running
from lorasmith.server.request_handling import CONTEXT, ServerContext, TooLargeError, TooManyError
from tests.launched import LONG_S
from tests.server.fakes import ended, fake_config, fake_context

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "safetensors", "matplotlib", "typer", "rich")
LATER = (*HEAVY, "lorasmith.workflow", "lorasmith.nodes")
"""What would make the first page late."""

ERRORS = {
    "full": (StoreError("disk full", is_full=True), 507),
    "store": (StoreError("locked"), 503),
    "queue": (QueueFullError("too many"), 429),
    "unknown": (UnknownJobError("none"), 404),
    "state": (JobStateError("running"), 409),
    "away": (UnavailableError("away"), 503),
    "option": (OptionError("steps"), 400),
    "refused": (RefusedError("GraphError", "bad", ["node 1"]), 400),
    "bug": (RefusedError("InternalError", "bug"), 500),
    "outside": (OutsideError("outside"), 403),
    "missing": (RefusedError("UnknownFileError", "missing"), 404),
    "taken": (RefusedError("TakenNameError", "taken"), 409),
    "many": (TooManyError("many"), 429),
    "large": (TooLargeError("large"), 413),
}


async def test_tables_are_mounted_and_errors_become_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(request: web.Request) -> web.Response:
        if (name := request.match_info["name"]) == "unforeseen":
            raise KeyError("secret")
        raise ERRORS[name][0]

    async def good(request: web.Request) -> web.Response:
        return web.Response()

    routes = [web.get("/fail/{name}", fail), web.get("/good", good)]
    monkeypatch.setattr("lorasmith.server.page_routes.routes", lambda context: routes)
    context = fake_context(tmp_path)
    async with TestClient(TestServer(make_app(context))) as client:
        for name, (error, status) in ERRORS.items():
            answer = await client.get(f"/fail/{name}")
            found = (await answer.json())["error"]
            assert (answer.status, found["message"]) == (status, str(error))
            assert found["kind"] == getattr(error, "kind", type(error).__name__)
            assert found.get("details") == getattr(error, "details", None)
        answer = await client.get("/fail/unforeseen")
        found = (await answer.json())["error"]
        assert (answer.status, found["kind"]) == (500, "InternalError")
        assert "user/lorasmith/server.log" in found["message"] and "secret" not in found["message"]
        assert str(tmp_path) not in found["message"]  # whoever asks may have no token
        assert "KeyError: 'secret'" in context.log.entries[-1]["m"]
        answer = await client.get("/good")
        assert answer.status == 200 and answer.headers["X-Frame-Options"] == "DENY"
    context.store.close()


async def test_a_server_runs_jobs_and_only_one_has_a_base_folder(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    async with running(config) as (context, address):
        async with aiohttp.ClientSession() as session, session.get(address) as answer:
            assert answer.status == 200
        job = context.dispatcher.submit("train", {})
        assert (await ended(context, job)).state == "completed"
        with pytest.raises(OutputError, match=f"a server runs at {address} with the base folder"):
            async with running(config):
                pass
    async with running(config) as (context, _):
        assert context.store.get(job.id).state == "completed"


def test_a_port_that_is_taken_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    async def check(port: int) -> None:
        async with running(fake_config(tmp_path, port=port)):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port} of 127.0.0.1 is taken by another program"):
            asyncio.run(check(port))
    asyncio.run(check(port))


def test_an_address_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    async def check() -> None:
        async with running(fake_config(tmp_path, host="192.0.2.1", token="some long secret")):
            pass

    with pytest.raises(OptionError, match=r"192\.0\.2\.1:0 is not an address to listen on"):
        asyncio.run(check())


def test_the_server_imports_nothing_heavy() -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.server.fakes import ended, fake_config
from lorasmith.server.http_server import running

async def main(base):
    async with running(fake_config(base)) as (context, address):
        import urllib.request
        get = lambda path: asyncio.to_thread(lambda: urllib.request.urlopen(address + path).read())
        assert await get("/")
        print([name for name in {LATER!r} if name in sys.modules])
        for path in ("/lorasmith/v1/status", "/lorasmith/v1/settings", "/queue", "/editor/templates/index.json"):
            assert await get(path)
        job = urllib.request.Request(address + "/lorasmith/v1/jobs", b'{{"model": "lorasmith-tiny", "dataset": "fox"}}')
        assert await asyncio.to_thread(lambda: urllib.request.urlopen(job).read())
        await ended(context, context.dispatcher.submit("train", {{}}))

import tempfile
with tempfile.TemporaryDirectory() as base:
    asyncio.run(main(Path(base)))
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_context_is_at_hand_in_handlers(tmp_path: Path) -> None:
    context = fake_context(tmp_path)
    app = make_app(context)
    assert app[CONTEXT] is context and isinstance(context, ServerContext)
    context.store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_ctrl_c_again_ends_a_server_at_once(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.server.fakes import fake_config
from lorasmith.server.contained_files import OutsideError
from lorasmith.server.request_handling import TooLargeError, TooManyError
from lorasmith.server.http_server import serve

say = lambda what: print(what, flush=True)
serve(fake_config(Path({str(tmp_path)!r})), started=say, stopping=say)
"""
    store = JobStore(tmp_path / "user" / "lorasmith" / "jobs.sqlite3")
    store.add("train", {"do": "wait deaf"}, id="deaf")
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://")
        while store.get("deaf").state != "running":
            time.sleep(0.02)
        server.send_signal(signal.SIGINT)
        assert server.stdout.readline() == "1\n"
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=LONG_S)
    finally:
        server.kill()
    assert server.returncode == 1 and "CancelledError: the server was ended at once" in said.splitlines()[-1]
    assert store.get("deaf").state == "interrupted"
    store.close()
