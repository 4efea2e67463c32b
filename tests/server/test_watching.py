"""What watches a server from outside, and how it ends for an update."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from lorasmith.core.errors import OptionError
from lorasmith.runs.queue import JobStore
from lorasmith.server.draining import drain
from lorasmith.server.http_server import make_app
from lorasmith.server.server_config import ServerConfig
from tests.launched import LONG_S
from tests.server.fake_server import serving
from tests.server.fakes import dispatching, ended, until

SAMPLE = re.compile(r'^lorasmith_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+.0-9e]+$')


async def test_metrics_count_jobs_waits_steps_and_failures(tmp_path: Path) -> None:
    async with dispatching(tmp_path) as context, TestClient(TestServer(make_app(context))) as client:
        for request in ({"do": "steps", "steps": 5}, {"do": "fail"}, {"do": "crash"}, {}):
            await ended(context, context.dispatcher.submit("graph", request))
        context.dispatcher.submit("train", {"do": "wait"})
        await until(context.store.running)
        answer = await client.get("/metrics")
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await answer.text()).splitlines()
        samples = [line for line in lines if not line.startswith("#")]
        assert [line for line in samples if not SAMPLE.match(line)] == []
        found = dict(line.rsplit(" ", 1) for line in samples)
        assert found['lorasmith_jobs{state="completed"}'] == "2" and found['lorasmith_jobs{state="running"}'] == "1"
        assert found['lorasmith_jobs_ended_total{kind="graph",state="failed"}'] == "1"
        assert found['lorasmith_failures_total{reason="NodeError"}'] == "1"
        assert found['lorasmith_failures_total{reason="WorkerEnded"}'] == "1"
        assert found['lorasmith_steps_total{device="cpu"}'] == "4"
        assert found["lorasmith_wait_seconds_count"] == found['lorasmith_wait_seconds_bucket{le="+Inf"}'] == "5"
        assert found['lorasmith_device_state{device="cpu",title="CPU",state="busy"}'] == "1"
        assert found['lorasmith_device_memory_bytes{device="cpu",title="CPU"}'] == "1"
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) and names


async def test_health_needs_no_token_and_says_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path, token="a long secret") as server:
        assert await server.get("/healthz") == {"status": "ok"}
        await server.get("/metrics", status=401)
        for method in ("POST", "PUT", "DELETE"):
            await server.send(method, "/healthz", status=401)
        await server.get("/healthz", status=403, headers={"Host": "evil.example"})
        server.context.dispatcher.drain()
        assert await server.get("/healthz") == {"status": "draining"}
        server.context.store._database.close()
        assert await server.get("/healthz", status=503) == {"status": "the queue cannot be read"}
        server.context.store.__init__(tmp_path / "other.sqlite3")  # type: ignore[misc] - closed by the fixture


async def test_a_drained_server_starts_no_job_and_starts_them_again(tmp_path: Path) -> None:
    async with dispatching(tmp_path) as context:
        dispatcher = context.dispatcher
        running = dispatcher.submit("train", {"do": "wait"})
        await until(lambda: context.store.get(running.id).state == "running")
        waiting = dispatcher.submit("train", {})
        dispatcher.drain()
        assert not dispatcher.drained.is_set()
        dispatcher.cancel(running.id)
        await until(dispatcher.drained.is_set)
        assert context.store.get(waiting.id).state == "pending"
        dispatcher.drain(drains=False)
        assert (await ended(context, waiting)).state == "completed" and not dispatcher.drained.is_set()


async def test_lines_of_the_log_are_objects_with_the_ids_of_jobs(tmp_path: Path) -> None:
    async with dispatching(tmp_path, logs_json=True) as context:
        job = context.dispatcher.submit("graph", {"do": "crash"})
        await ended(context, job)
        lines = [json.loads(line) for line in context.config.log.read_text().splitlines()]
    changes = [(one["state"], one["attempts"]) for one in lines if one["source"] == "queue"]
    assert changes == [("pending", 0), ("running", 1), ("interrupted", 1)]
    assert all(one["jobs"] == [job.id] for one in lines if one["source"] == "queue")
    (lost,) = [one for one in lines if "ended: it ended with exit status 3" in one["m"]]
    assert (lost["source"], lost["jobs"]) == ("worker", [job.id])


SERVE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.server.fakes import fake_config
from lorasmith.server.http_server import serve
serve(fake_config(Path(sys.argv[1]), token="a long secret"), started=lambda at: print(at, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_drain_waits_for_what_runs_and_ends_the_server(tmp_path: Path) -> None:
    def config(token: str) -> ServerConfig:
        return ServerConfig(base=tmp_path, token=token)

    with pytest.raises(OptionError, match="no server runs with the base folder"):
        drain(config(""))
    store = JobStore(tmp_path / "user" / "lorasmith" / "jobs.sqlite3")
    store.add("train", {"do": "wait"}, id="runs")
    store.add("train", {}, id="waits")
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        while store.get("runs").state != "running":
            pass
        with pytest.raises(OptionError, match="needs its token"):
            drain(config(""))
        seen: list[Any] = []

        def waiting(running: int) -> None:
            seen.append(running)
            cancel = urllib.request.Request(f"{address}/lorasmith/v1/jobs/runs/cancel", b"{}", method="POST")
            cancel.add_header("Authorization", "Bearer a long secret")
            with urllib.request.urlopen(cancel) as answer:
                assert answer.status == 200

        assert drain(config("a long secret"), waiting=waiting) == address
        assert seen[0] == 1 and server.wait(LONG_S) == 0
        assert [store.get(id).state for id in ("runs", "waits")] == ["cancelled", "pending"]
    finally:
        server.send_signal(signal.SIGKILL)
        server.communicate()
        store.close()
