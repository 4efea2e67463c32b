"""What the queue of a server costs: time per job, throughput by the number of workers, many waiting jobs, and memory.

Server and workers are processes of their own; a worker waits in place of training, so that what is measured is the
queue alone: requests, database, supervisor and messages. Jobs are queued over HTTP.

    python -m benchmarks.server_queue
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.results import Results, add_json
from lorasmith.core.folders import BUILT_IN_BASE

_BODY = {"dataset": "fox", "model": "lorasmith-tiny", "settings": {"steps": 10}}
_AT_ONCE = 4  # requests
_POLL_S = 0.05


def main() -> None:
    arguments = _arguments()
    if arguments.work is not None:
        _work(arguments.work)
    elif arguments.serve is not None:
        asyncio.run(_serve(arguments.serve, arguments.workers, arguments.seconds))
    else:
        results = Results(arguments)
        results.table({"": "", "jobs": "d", "p50, ms": ".1f", "p99, ms": ".1f", "jobs/s": ".2f", "server, MiB": ".0f"})
        asyncio.run(_measure(results, arguments))


async def _measure(results: Results, arguments: argparse.Namespace) -> None:
    for workers in (1, 2, 4):
        async with _Server(results, workers, arguments.seconds) as server:
            await server.throughput(f"{workers} x workers, jobs of {arguments.seconds:g} s", arguments.jobs * workers)
    async with _Server(results, 1, 0.0) as server:
        for done in range(0, arguments.ended, 1000):
            await server.throughput(f"jobs of 0 s, after {done:,}", min(1000, arguments.ended - done))
    async with _Server(results, 0, 0.0) as server:
        await server.add(f"POST /jobs, to {arguments.waiting:,} waiting", arguments.waiting)
        for path in ("/", "/lorasmith/v1/jobs?limit=100", "/lorasmith/v1/jobs?limit=100&offset=9000", "/metrics"):
            await server.look(f"GET {path}, {arguments.waiting:,} waiting", path)
        await server.look("POST /jobs/{id}/move", None)


class _Server:
    """A server and its one client."""

    def __init__(self, results: Results, workers: int, seconds: float) -> None:
        self._results, self._workers, self._seconds = results, workers, seconds

    async def __aenter__(self) -> _Server:
        self._left = contextlib.AsyncExitStack()
        address, self._process = self._left.enter_context(_server(self._workers, self._seconds))
        timeout = aiohttp.ClientTimeout(total=300)
        self._http = await self._left.enter_async_context(aiohttp.ClientSession(address, timeout=timeout))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._left.aclose()

    async def throughput(self, name: str, count: int) -> None:
        """Queue jobs in one go, and wait until the last has ended; the time per job is from the first to the last."""
        await self._post(1)
        await self._ended()
        began = time.monotonic()
        seconds = await self._post(count)
        await self._ended()
        rate = count / (time.monotonic() - began)
        self._row(name, count, seconds, rate)

    async def add(self, name: str, count: int) -> None:
        began = time.monotonic()
        seconds = await self._post(count)
        self._row(name, count, seconds, count / (time.monotonic() - began))

    async def look(self, name: str, path: str | None) -> None:
        """Ask for a path fifty times, or move the last waiting job to the front."""
        seconds = []
        for _ in range(50):
            if path is None:
                listed = await self._json("GET", "/lorasmith/v1/jobs?limit=1&offset=500")
                method, asked, body = "POST", f"/lorasmith/v1/jobs/{listed['jobs'][0]['id']}/move", {"front": True}
            else:
                method, asked, body = "GET", path, None
            began = time.monotonic()
            async with self._http.request(method, asked, json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            seconds.append(time.monotonic() - began)
        self._row(name, len(seconds), seconds, float("nan"))

    async def _post(self, count: int) -> list[float]:
        """The seconds of each request."""
        left, seconds = iter(range(count)), []

        async def client() -> None:
            for _ in left:
                began = time.monotonic()
                await self._json("POST", "/lorasmith/v1/jobs", _BODY)
                seconds.append(time.monotonic() - began)

        await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
        return seconds

    async def _ended(self) -> None:
        while (await self._json("GET", "/lorasmith/v1/jobs?states=pending,running&limit=1"))["total"]:
            await asyncio.sleep(_POLL_S)

    async def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        async with self._http.request(method, path, json=body) as answer:
            assert answer.status < 300, await answer.text()
            found: dict[str, Any] = await answer.json()
            return found

    def _row(self, name: str, count: int, seconds: list[float], rate: float) -> None:
        ordered = sorted(1000 * one for one in seconds)
        last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        memory = self._process.memory_info().rss / 2**20
        self._results.add(name, count, statistics.median(ordered), last, rate, memory)


@contextlib.contextmanager
def _server(workers: int, seconds: float) -> Iterator[tuple[str, psutil.Process]]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(BUILT_IN_BASE / "input" / "fox", Path(folder, "input", "fox"))
        own = ["--serve", folder, "--workers", str(workers), "--seconds", str(seconds)]
        command = [sys.executable, "-m", "benchmarks.server_queue", *own]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            try:
                yield server.stdout.readline().strip(), psutil.Process(server.pid)
            finally:
                server.stdin.close()
                server.wait(60)


async def _serve(base: Path, workers: int, seconds: float) -> None:
    from lorasmith.server.http_server import running
    from lorasmith.server.server_config import ServerConfig

    command = (sys.executable, "-m", "benchmarks.server_queue", "--work", str(seconds))
    devices = [{"name": f"worker-{number}"} for number in range(workers)]
    async with running(ServerConfig(base=base, port=0, devices=devices, worker_command=command)) as (_, address):
        print(address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def _work(seconds: float) -> None:
    """A worker that waits in place of each job."""
    from lorasmith.runs.child_process import channel_of_child

    channel = channel_of_child()
    channel.receive()
    channel.send({"type": "loading"})
    channel.send({"type": "ready"})
    while (message := channel.receive()) is not None:
        for job in message[0].get("jobs", ()):
            time.sleep(seconds)
            channel.send({"type": "ended", "id": job["id"], "state": "completed"})
        channel.send({"type": "ready"})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=40, help="of each worker, for the throughput")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a job, for the throughput")
    parser.add_argument("--ended", type=int, default=5_000, help="jobs that are done at once, for the memory")
    parser.add_argument("--waiting", type=int, default=10_000, help="jobs that wait")
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
