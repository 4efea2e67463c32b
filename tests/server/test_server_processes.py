"""The real processes: minutes on a busy machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lorasmith.runs.queue import JobStore
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.http_server import running
from lorasmith.server.server_config import ServerConfig
from tests.launched import LONG_S
from tests.server.crash import GRAPH, TRAINING, queue
from tests.server.fakes import CPU, ended, fake_config, is_alive, until

pytestmark = pytest.mark.slow


def config(base: Path, **settings: Any) -> ServerConfig:
    """Real workers, and an assistant without torch."""
    worker = ServerConfig(base=base).worker_command
    return fake_config(base, **{"worker_command": worker, **settings})


async def test_the_assistant_answers_and_a_stranger_module_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the base folder was imported')")
    async with running(ServerConfig(base=tmp_path, port=0)) as (context, _):
        (found,) = await context.assistant.ask("devices")
        assert found["memory_bytes"] > 2**20
        with pytest.raises(RefusedError, match=r"unknown question 'divices' .did you mean") as caught:
            await context.assistant.ask("divices")
        assert caught.value.kind == "OptionError"
        await until(lambda: [one["state"] for one in context.dispatcher.devices()] == ["ready"])


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
async def test_a_stopped_worker_is_replaced_and_its_job_continues_by_itself(tmp_path: Path) -> None:
    queue(tmp_path)
    async with running(config(tmp_path, silence_s=60.0)) as (context, _):
        job = context.store.get("training")
        with context.hub.subscribe(kinds={"view"}) as views:
            async for _ in views:
                if any(tmp_path.glob("runs/*/states/*")):
                    break
        (pid,) = context.dispatcher.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: not is_alive(pid))
        await until(lambda: context.store.get(job.id).state == "completed")
        assert context.store.get(job.id).attempts == 2


@pytest.mark.skipif(sys.platform == "win32", reason="limits the memory of a process")
async def test_out_of_memory_ends_the_job_and_not_the_worker(tmp_path: Path) -> None:
    queue(tmp_path)
    limited = ("sh", "-c", 'ulimit -v 12000000; exec "$0" "$@"', *ServerConfig(base=tmp_path).worker_command)
    settings = {**TRAINING["settings"], "batch_size": 10_000, "resolution": 4096}  # latents of 40 GB
    async with running(config(tmp_path, worker_command=limited)) as (context, _):
        large = context.dispatcher.submit("measure", {**TRAINING, "settings": settings}, front=True)
        found = await until(lambda: context.store.get(large.id).error)
        assert found["kind"] == "OutOfMemory" and "smaller resolution" in found["message"], found
        (pid,) = context.dispatcher.worker_pids()
        await until(lambda: context.store.get("graph").state not in ("pending", "running"))
        assert context.store.get("graph").state == "completed"
        assert context.dispatcher.worker_pids() == [pid]


def test_ctrl_c_saves_the_running_job_and_the_next_start_offers_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    queue(base)
    store_path = base / "user" / "lorasmith" / "jobs.sqlite3"
    command = [sys.executable, "-m", "lorasmith", "serve", "--base-dir", str(base), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[3]
        assert urllib.request.urlopen(address).status == 200
        wait_for(lambda: list(base.glob("runs/*/states/*.safetensors")))
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=LONG_S)
        assert "Stopping and saving the running job" in said and process.returncode == 0
    finally:
        process.kill()
    store = JobStore(store_path)
    job = store.get("training")
    assert (job.state, job.attempts) == ("interrupted", 1) and job.run is not None
    assert (base / job.run / "fox.safetensors").is_file() and "continue it" in str(job.error)
    assert [one.id for one in store.pending()] == ["graph"]
    store.close()


def wait_for(condition: Any, seconds: float = LONG_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


async def test_a_graph_runs_in_the_worker(tmp_path: Path) -> None:
    async with running(config(tmp_path, devices=[CPU])) as (context, _):
        job = context.dispatcher.submit("graph", GRAPH)
        await until(lambda: context.store.get(job.id).state not in ("pending", "running"))
        assert (await ended(context, job)).state == "completed"
