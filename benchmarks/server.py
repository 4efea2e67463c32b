"""What a server takes under load: waiting times of requests and messages, and its memory.

The server is a process of its own with a real assistant and without a worker: queued jobs wait, and one plays the
running job, whose progress the server publishes at a given rate. A progress message carries the time at which it was
published, so its delay is measured to its arrival at each of the clients. In the rows, `p50` and `p99` are in
milliseconds; memory is that of the server process alone.

    python -m benchmarks.server
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.results import Results, add_json
from lorasmith.core.folders import ASSETS

_RATE = 20
"""Progress messages a second."""
_PICTURE_BYTES = 200_000
"""Of a preview, for the client that does not read."""
_PROMPT = ASSETS / "examples" / "folder.json"


def main() -> None:
    arguments = _arguments()
    if arguments.serve is not None:
        asyncio.run(_serve(arguments.serve))
        return
    results = Results(arguments)
    results.table({"": "", "times": "d", "p50, ms": ".1f", "p99, ms": ".1f", "server, MiB": ".0f"})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.server", "--serve", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                asyncio.run(_Load(results, server.stdout.readline().strip(), server.pid, arguments).run())
            finally:
                assert server.stdin is not None
                server.stdin.close()
                server.wait(30)


class _Load:
    """The clients."""

    def __init__(self, results: Results, address: str, pid: int, arguments: argparse.Namespace) -> None:
        self._results = results
        self._address = address
        self._process = psutil.Process(pid)
        self._arguments = arguments

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(self._address, timeout=timeout) as self._http:
            await self._get("/object_info")
            self._row("idle, assistant ready", [])
            await self._queued()
            await self._watched()
            await self._uploads()
            await self._large_graph()

    async def _queued(self) -> None:
        prompt, count = json.loads(_PROMPT.read_text(encoding="utf-8")), self._arguments.prompts
        body = {"prompt": prompt, "client_id": "load"}
        await self._timed(f"POST /prompt, to {count:,} queued", count, lambda: self._post("/prompt", body))
        await self._timed(f"GET /queue of {count:,} prompts", 50, lambda: self._get("/queue"))
        await self._timed("GET /prompt", 200, lambda: self._get("/prompt"))
        await self._timed("GET /api/jobs?limit=64", 50, lambda: self._get("/api/jobs?limit=64"))

    async def _watched(self) -> None:
        """Progress to many clients, while the queue is polled, and while one of them does not read."""
        count, seconds = self._arguments.clients, self._arguments.seconds
        for name, silent, polled in (
            (f"progress to {count} clients, {_RATE} a second", False, False),
            ("the same, GET /queue twice a second", False, True),
            ("the same, one more client never reads", True, True),
        ):
            delays: list[float] = []
            idle = await self._http.ws_connect("/ws?clientId=silent") if silent else None
            if idle is not None:  # its own job sends it pictures, so that no buffer on the way holds them all
                await idle.send_json({"type": "feature_flags", "data": {}})
            polling = asyncio.create_task(self._poll(polled))
            await asyncio.gather(*(self._watch(number, seconds, delays) for number in range(count)))
            polling.cancel()
            self._row(name, delays)
            if idle is not None:
                await idle.close()

    async def _watch(self, number: int, seconds: float, delays: list[float]) -> None:
        async with self._http.ws_connect(f"/ws?clientId=client{number}") as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                received = await socket.receive()
                if received.type is aiohttp.WSMsgType.TEXT and '"progress"' in received.data[:30]:
                    delays.append(time.monotonic() - json.loads(received.data)["data"]["value"])

    async def _poll(self, wanted: bool) -> None:
        while wanted:
            await self._get("/queue")
            await asyncio.sleep(0.5)

    async def _uploads(self) -> None:
        size = self._arguments.upload
        names = iter(range(10_000))

        async def upload() -> None:
            form = aiohttp.FormData()
            form.add_field("image", os.urandom(size * 2**20), filename=f"{next(names)}.png")
            async with self._http.post("/upload/image", data=form) as answer:
                assert answer.status == 200, await answer.text()

        await self._timed(f"upload of {size} MB", 10, upload)
        start = time.monotonic()
        await asyncio.gather(*(upload() for _ in range(8)))
        self._row(f"8 uploads of {size} MB at once, each", [(time.monotonic() - start) / 8])

    async def _large_graph(self) -> None:
        count = self._arguments.nodes
        prompt: dict[str, Any] = {"0": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}}
        for number in range(1, count, 2):
            prompt[str(number)] = {"class_type": "PrimitiveInt", "inputs": {"value": number}}
            inputs = {"source": [str(number), 0]}
            prompt[str(number + 1)] = {"class_type": "PreviewAny", "inputs": inputs}
        body = {"prompt": prompt, "client_id": "large"}
        await self._timed(f"POST /prompt of {count:,} nodes", 3, lambda: self._post("/prompt", body))
        await self._timed("GET /queue with these", 5, lambda: self._get("/queue"))
        await self._timed("GET /prompt after it", 50, lambda: self._get("/prompt"))

    async def _timed(self, name: str, times: int, ask: Callable[[], Awaitable[object]]) -> None:
        seconds = []
        for _ in range(times):
            start = time.monotonic()
            await ask()
            seconds.append(time.monotonic() - start)
        self._row(name, seconds)

    async def _get(self, path: str) -> bytes:
        async with self._http.get(path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    async def _post(self, path: str, body: Any) -> bytes:
        async with self._http.post(path, json=body) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    def _row(self, name: str, seconds: list[float]) -> None:
        memory = self._process.memory_info().rss / 2**20
        ordered = sorted(1000 * one for one in seconds)
        if not ordered:
            self._results.add(name, 0, float("nan"), float("nan"), memory)
            return
        last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        self._results.add(name, len(ordered), statistics.median(ordered), last, memory)


async def _serve(base: Path) -> None:
    """The server: without workers, and with progress of a job that plays the running one."""
    from lorasmith.server.http_server import running
    from lorasmith.server.hub import Notice
    from lorasmith.server.server_config import ServerConfig

    async with running(ServerConfig(base=base, port=0, devices=())) as (context, address):
        job = context.store.add("graph", {"prompt": {}})
        silent = context.store.add("graph", {"prompt": {}}, client_id="silent")
        for _ in range(2):
            context.store.claim("nobody")
        print(address, flush=True)
        loop = asyncio.get_running_loop()
        closed = loop.run_in_executor(None, sys.stdin.read)
        while not closed.done():
            data = {"event": "NodeProgress", "node_id": "1", "value": time.monotonic(), "maximum": 1, "text": "0.1"}
            context.hub.publish(Notice(kind="graph", job_id=job.id, data=data, droppable=True))
            picture = {"job_id": silent.id, "client_id": "silent", "binary": bytes(_PICTURE_BYTES)}
            context.hub.publish(Notice(kind="graph", data=data, droppable=True, **picture))
            await asyncio.sleep(1 / _RATE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000, help="prompts in the queue")
    parser.add_argument("--clients", type=int, default=50, help="clients of the WebSocket")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which they watch")
    parser.add_argument("--upload", type=int, default=20, help="size of an upload, MB")
    parser.add_argument("--nodes", type=int, default=10_000, help="nodes of the large graph")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
